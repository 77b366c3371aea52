"""The initramfs: the ELF as /init, the kernel's modules, and nothing that can be mounted later."""

import os

from disk_template import make_template
from kernel import Kernel
from stages import read_bytes

from microguest.guest.bundle import cpio, disk_template
from microguest.guest.bundle.manifest import MODULES_FOLDER, MODULES_ORDER


def initramfs(program: str, kernel: Kernel) -> bytes:
    """A plain cpio archive: under emulation, unpacking a compressed one costs more than reading.

    The layout: empty mount points for PID 1, /dev/console and /dev/null for the time before
    devtmpfs (the kernel opens the former as PID 1's standard streams), /init, /microguest (0700:
    the host appends the boot config with the token there) with the modules in load order, and the
    empty ext4 for blank disks.
    """
    folder = MODULES_FOLDER.lstrip("/")
    names = "".join(f"{module.file}\n" for module in kernel.modules)
    return cpio.segment(
        [
            cpio.directory("dev"),
            cpio.device("dev/console", 5, 1, 0o600),
            cpio.device("dev/null", 1, 3, 0o666),
            cpio.directory("proc"),
            cpio.directory("sys"),
            cpio.directory("run"),
            cpio.directory("newroot"),
            cpio.directory(os.path.dirname(folder), 0o700),
            cpio.directory(folder, 0o700),
            cpio.regular(MODULES_ORDER.lstrip("/"), names.encode(), 0o600),
            *(
                cpio.regular(
                    f"{folder}/{module.file}", read_bytes(kernel.module_path(module)), 0o600
                )
                for module in kernel.modules
            ),
            cpio.regular(disk_template.PATH.lstrip("/"), make_template(), 0o600),
            cpio.regular("init", read_bytes(program), 0o755),
        ]
    )
