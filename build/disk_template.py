"""The empty ext4 that PID 1 writes to blank disks, as mke2fs makes it.

It is small and can grow: the journal cannot be enlarged later, so it has the size that suits disks
of some GiB; inodes are as many per group of blocks as a large file system has; and room is kept for
the group descriptors of GROWTH, beyond which the kernel changes to another layout by itself.
"""

import os
import tempfile

from stages import BuildError, read_bytes, run

from microguest.guest.bundle import disk_template

SIZE = "64M"
JOURNAL = "16"  # MiB
INODES = "8192"  # in the one group; of each that is added: one per 16 KiB, mke2fs's usual ratio
BLOCK = 4096
GROWTH = 2**40 // BLOCK  # blocks
# All of mke2fs's defaults of today by name, so that no machine's mke2fs.conf has a say; and the
# seed of the checksums apart from the UUID, which each disk gets anew.
FEATURES = (
    "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,"
    "large_file,huge_file,dir_nlink,extra_isize,metadata_csum,metadata_csum_seed"
)
UUID = "6d696372-6f67-4573-8000-000000000000"
# The same bytes in every build: times in the file system, which no guest looks at.
ENVIRONMENT = {"E2FSPROGS_FAKE_TIME": "1700000000", "MKE2FS_CONFIG": os.devnull}


def make_template() -> bytes:
    """The file for the initramfs. Raises BuildError."""
    with tempfile.TemporaryDirectory(prefix="microguest-ext4-") as work:
        image = os.path.join(work, "ext4")
        path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
        command = [
            "mke2fs",
            "-q",
            "-F",
            "-t",
            "ext4",
            "-O",
            FEATURES,
            "-b",
            str(BLOCK),
            "-I",
            "256",
        ]
        command += ["-N", INODES, "-m", "0", "-J", f"size={JOURNAL}", "-e", "remount-ro"]
        command += ["-U", UUID, "-L", disk_template.LABEL, "-G", "16"]
        command += ["-E", f"hash_seed={UUID},resize={GROWTH},lazy_itable_init=0,root_owner=0:0"]
        run([*command, image, SIZE], env={**os.environ, **ENVIRONMENT, "PATH": path})
        template = disk_template.pack(read_bytes(image))
    if len(template) > 256 * 1024:
        raise BuildError(
            f"the empty ext4 takes {len(template)} bytes: mke2fs wrote more than usual"
        )
    return template
