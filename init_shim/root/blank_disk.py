"""An ext4 on a disk that has nothing on it, without a mkfs in the guest.

The initramfs brings an empty file system (guest/bundle/disk_template.py), which is written to the
disk and grows to its size once it is mounted. Imported only where a disk may be formatted.
"""

import errno
import fcntl
import os

from microguest.guest.bundle import disk_template
from microguest.guest.bundle.disk_template import BLOCK
from microguest.init_shim.failure import Failure, call

TYPE_CHECKING = False  # typing itself is too heavy for PID 1
if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["format_if_blank", "grow"]

EDGE = 1024 * 1024  # bytes at either end of a disk that must be zero for it to count as blank
# Written first and overwritten last. It stands where ext4 leaves room for a boot loader.
UNFINISHED = b"microguest: this disk was being formatted\n"

# linux/fs.h, fs/ext4/ext4.h (as in include/uapi/linux/ext4.h)
BLKZEROOUT = 0x127F
EXT4_IOC_RESIZE_FS = 0x40086610

# The superblock (kernel: filesystems/ext4/super.rst): its place on the disk, and fields in it.
SUPERBLOCK = 1024
SUPERBLOCK_SIZE = 1024
BLOCKS = 0x4  # and the upper half at BLOCKS_HIGH
BLOCK_SIZE = 0x18  # as a power of two above 1024
MAGIC = 0x38
UUID = 0x68
LABEL = 0x78
HASH_SEED = 0xEC
BLOCKS_HIGH = 0x150
CHECKSUM = 0x3FC

# Where other things say what they are: offset, magic, name.
FOREIGN = (
    (0, b"LUKS", "an encrypted volume"),
    (0, b"XFSB", "an xfs"),
    (0, b"hsqs", "a squashfs"),
    (0, b"\x7fELF", "a program"),
    (0, b"QFI\xfb", "a qcow2 image that was given as a raw one"),
    (512, b"EFI PART", "a partition table"),
    (510, b"\x55\xaa", "a partition table or boot sector"),
    (1024, b"\xe2\xe1\xf5\xe0", "an erofs"),
    (65600, b"_BHRfS_M", "a btrfs"),
)


def format_if_blank(device: str, serial: str) -> None:
    """Leave an ext4 as it is, and make one where there is nothing. Raises Failure for all else.

    A disk whose formatting was cut off is formatted again.
    """
    with call("open", device):
        fd = os.open(device, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    try:
        with call("read", device):
            size = os.lseek(fd, 0, os.SEEK_END)
            begin = os.pread(fd, EDGE, 0)
            end = os.pread(fd, EDGE, max(size - EDGE, 0))
        if begin.startswith(UNFINISHED) or not (any(begin) or any(end)):
            write_file_system(fd, device, serial, size)
        elif begin[SUPERBLOCK + MAGIC : SUPERBLOCK + MAGIC + 2] != b"\x53\xef":
            raise Failure(
                f"disk {serial!r} ({device}) holds {name_of(begin)}, which is not formatted over; "
                "give an ext4 or an empty disk",
                path=device,
                errno=errno.EEXIST,
            )
    finally:
        os.close(fd)


def name_of(begin: bytes) -> str:
    """What a disk that begins like this holds."""
    for offset, magic, name in FOREIGN:
        if begin[offset : offset + len(magic)] == magic:
            return name
    return "something that is no ext4"


def write_file_system(fd: int, device: str, serial: str, size: int) -> None:
    """The template, with the block of the superblock last: it is an ext4 from that write on."""
    needed, pieces = read_template()
    if size < needed:
        raise Failure(
            f"disk {serial!r} ({device}) has {size} bytes; an ext4 is made on {needed} and more",
            path=device,
            errno=errno.ENOSPC,
        )
    with call("write", device):
        os.pwrite(fd, UNFINISHED, 0)
        os.fsync(fd)
        fcntl.ioctl(fd, BLKZEROOUT, extent(BLOCK, needed))
        first = bytearray(BLOCK)
        for offset, data in pieces:
            if offset < BLOCK:
                first[offset : offset + len(data)] = data
            else:
                os.pwrite(fd, data, offset)
        os.fsync(fd)
        make_unique(first)
        os.pwrite(fd, first, 0)
        os.fsync(fd)


def read_template() -> "tuple[int, Iterator[tuple[int, bytes]]]":
    """Size and pieces of the file system that the bundle brings. Raises Failure."""
    hint = "the bundle is not complete: build it anew"
    with (
        call("open", disk_template.PATH, hint=hint),
        open(disk_template.PATH, "rb", buffering=0) as file,
    ):
        template = file.read() or b""
    try:
        return disk_template.unpack(template)
    except ValueError as error:
        raise Failure(f"{disk_template.PATH}: {error}; {hint}", path=disk_template.PATH) from None


def extent(begin: int, end: int) -> bytes:
    """BLKZEROOUT's argument: two numbers of 64 bits, start and length."""
    return begin.to_bytes(8, "little") + (end - begin).to_bytes(8, "little")


def make_unique(first: bytearray) -> None:
    """A UUID and a hash seed of its own for the superblock in a disk's first block.

    All other checksums hang on a seed that is stored beside the UUID (metadata_csum_seed), so that
    this one is the only one to be made anew.
    """
    block = memoryview(first)[SUPERBLOCK : SUPERBLOCK + SUPERBLOCK_SIZE]
    for field in (UUID, HASH_SEED):
        random = bytearray(os.urandom(16))
        random[6] = random[6] & 0x0F | 0x40  # a random UUID says so (RFC 9562, 5.4)
        random[8] = random[8] & 0x3F | 0x80
        block[field : field + 16] = random
    block[CHECKSUM : CHECKSUM + 4] = crc32c(block[:CHECKSUM]).to_bytes(4, "little")


def crc32c(data: "memoryview | bytes") -> int:
    """As ext4 has it: RFC 3720's polynomial, all ones to begin with, not inverted in the end."""
    remainder = 0xFFFFFFFF
    for byte in data:
        remainder ^= byte
        for _ in range(8):
            remainder = remainder >> 1 ^ (0x82F63B78 if remainder & 1 else 0)
    return remainder


def grow(device: str, target: str) -> None:
    """Let a mounted file system of ours fill its disk; one that somebody else made stays as it is.

    The kernel does it while it is mounted, in steps that survive a loss of power.
    """
    with call("read", device), open(device, "rb", buffering=0) as disk:
        size = disk.seek(0, os.SEEK_END)
        disk.seek(SUPERBLOCK)
        block = disk.read(SUPERBLOCK_SIZE) or b""
    label = disk_template.LABEL.encode().ljust(16, b"\0")
    if block[LABEL : LABEL + 16] != label:
        return
    blocks = number(block, BLOCKS) + (number(block, BLOCKS_HIGH) << 32)
    possible = size // (1024 << number(block, BLOCK_SIZE))
    if possible <= blocks:
        return
    with call("open", target):
        fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with call("ioctl", target, hint=f"growing from {blocks} to {possible} blocks"):
            fcntl.ioctl(fd, EXT4_IOC_RESIZE_FS, possible.to_bytes(8, "little"))
    finally:
        os.close(fd)


def number(block: bytes, offset: int) -> int:
    return int.from_bytes(block[offset : offset + 4], "little")
