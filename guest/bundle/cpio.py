"""Writing cpio archives in the "newc" form, as the kernel unpacks them into its initramfs.

Pure: entries in, bytes out. The build writes the initramfs with it, the host appends a segment with
the boot config. The same entries always give the same bytes: times are zero, inodes are counted.
The form is in the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
"""

import stat
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["ALIGNMENT", "Entry", "device", "directory", "regular", "segment", "symlink"]

# A segment is padded to this many bytes, as cpio(1) writes blocks; the kernel asks for 4.
ALIGNMENT = 512
# Header fields are eight hexadecimal digits.
FIELD_MAX = 0xFFFFFFFF
# PATH_MAX of the kernel: its unpacker drops longer names without a word.
NAME_MAX = 4096
TRAILER = "TRAILER!!!"


class Entry(NamedTuple):
    """One file of an archive. Owner is root; `path` is relative, "dev/console" for /dev/console."""

    path: str
    mode: int  # type and permission bits, as st_mode
    data: bytes = b""  # content of a regular file, target of a symbolic link
    device: tuple[int, int] = (0, 0)  # major and minor of a device node


def directory(path: str, permissions: int = 0o755) -> Entry:
    """A directory; its parents must come before it."""
    return Entry(path, stat.S_IFDIR | permissions)


def regular(path: str, data: bytes, permissions: int = 0o644) -> Entry:
    """A regular file."""
    return Entry(path, stat.S_IFREG | permissions, data)


def symlink(path: str, target: str) -> Entry:
    """A symbolic link to `target`."""
    return Entry(path, stat.S_IFLNK | 0o777, target.encode())


def device(path: str, major: int, minor: int, permissions: int = 0o600) -> Entry:
    """A character device node."""
    return Entry(path, stat.S_IFCHR | permissions, b"", (major, minor))


def segment(entries: Iterable[Entry]) -> bytes:
    """The archive of `entries` in their order, with its end mark, padded to ALIGNMENT.

    Segments may be concatenated; the kernel unpacks one after the other. Raises ValueError for a
    path that is empty, absolute, too long, names a parent or holds NUL, and for data above 4 GiB.
    """
    parts = []
    for inode, entry in enumerate(entries, start=1):
        _check(entry)
        parts.append(_record(entry, inode))
    parts.append(_record(Entry(TRAILER, 0), 0))
    return _padded(b"".join(parts), ALIGNMENT)


def _check(entry: Entry) -> None:
    steps = entry.path.split("/")
    if "" in steps or "." in steps or ".." in steps or "\0" in entry.path:
        raise ValueError(f"not a path inside an archive: {entry.path!r}")
    if entry.path == TRAILER:
        raise ValueError(f"{TRAILER} is the end mark of the archive form, not a path")
    if len(entry.path.encode()) >= NAME_MAX:
        raise ValueError(f"path of {len(entry.path.encode())} bytes: the kernel takes {NAME_MAX}")
    if len(entry.data) > FIELD_MAX:
        raise ValueError(f"{entry.path}: {len(entry.data)} bytes do not fit a cpio archive")


def _record(entry: Entry, inode: int) -> bytes:
    name = entry.path.encode() + b"\0"
    fields = (
        inode,
        entry.mode,
        0,  # uid
        0,  # gid
        2 if stat.S_ISDIR(entry.mode) else 1,  # links
        0,  # modification time
        len(entry.data),
        0,  # device of the file system: major
        0,  # and minor
        *entry.device,
        len(name),
        0,  # check sum, unused in this form
    )
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return _padded(header + name, 4) + _padded(entry.data, 4)


def _padded(data: bytes, alignment: int) -> bytes:
    return data + bytes(-len(data) % alignment)
