"""Files on this host that are disks of a virtual machine, and keep what is written to them."""

import os
import stat
from dataclasses import dataclass
from typing import Final

from microguest.host_client.errors import MachineError
from microguest.host_client.machines.mounts import byte_size
from microguest.host_client.shortage import explain
from microguest.host_client.values import absolute_path

__all__ = ["GuestDisk", "image_disk"]

LEAST: Final = (
    64 << 20
)  # bytes; the guest's template of an ext4 (init_shim/root/blank_disk.py) has as many


@dataclass(frozen=True, slots=True)
class GuestDisk:
    """One virtio-blk device. QEMU locks the file, so that no two machines write to it."""

    path: str
    serial: str  # at most 20 bytes
    read_only: bool


def image_disk(path: str, serial: str, *, size: str, read_only: bool = False) -> GuestDisk:
    """A disk whose content is `path`; a missing one is made, sparse, of `size` ("": it is not).

    MachineError where it cannot be used.
    """
    absolute = absolute_path(path)
    try:
        if size and not read_only:
            make_sparse(absolute, size)
        # A FIFO would hold us up until somebody opens its other end.
        fd = os.open(absolute, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_NONBLOCK)
        kind = os.fstat(fd).st_mode
        os.close(fd)
        if not stat.S_ISREG(kind):
            raise MachineError(f"disk {absolute} is no regular file")
    except FileNotFoundError:
        raise MachineError(_missing(absolute, size=size, read_only=read_only)) from None
    except OSError as error:
        raise MachineError(f"disk {explain(error, absolute)}") from error
    return GuestDisk(absolute, serial, read_only)


def _missing(path: str, *, size: str, read_only: bool) -> str:
    """Why there is no file at `path`, and what to do."""
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        return f"disk {path}: no directory {folder}: make it, or name another"
    if os.path.islink(path):
        return f"disk {path} is a link to a file that does not exist"
    if read_only:
        return f"there is no disk {path}, and none is made that is only read"
    if size:
        return f"disk {path} was removed while it was opened: try again"
    return f"there is no disk {path}: give size=2G to have one made"


def make_sparse(path: str, size: str) -> None:
    """Unless there is something of that name. What could not be made large enough is removed.

    MachineError where it would be too small to be formatted.
    """
    if not os.path.lexists(path) and byte_size(size) < LEAST:
        raise MachineError(f"disk {path}: {size} is too small for an ext4: give 64M or more")
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return
    try:
        os.ftruncate(fd, byte_size(size))
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(fd)
