"""The image's passwd and group files: read with bounds, and not read again while unchanged.

The image is not trusted: what lies at these paths may be a FIFO, a device or 10 GB.
"""

import os
import stat

import _guestsys

from microguest.guest import bounds
from microguest.guest.users import GROUPS_FILE, USERS_FILE, Identity, resolve

__all__ = ["Accounts"]

# linux/openat2.h
NO_MAGICLINKS = 0x02
IN_ROOT = 0x10


class Accounts:
    """Remembers the identities that were asked for, until one of the two files changes."""

    def __init__(self) -> None:
        self._stamp: tuple[object, ...] = ()
        self._identities: dict[tuple[str, ...], Identity] = {}

    def identity(self, spec: str, more_groups: tuple[str, ...] = ()) -> Identity:
        """As `guest.users.resolve` with the files as they are now. Raises its errors."""
        stamp = (_stamp(USERS_FILE), _stamp(GROUPS_FILE))
        if stamp != self._stamp or len(self._identities) > bounds.REMEMBERED_IDENTITIES:
            self._identities.clear()
            self._stamp = stamp
        asked = (spec, *more_groups)
        if asked not in self._identities:
            self._identities[asked] = resolve(
                spec, _read(USERS_FILE), _read(GROUPS_FILE), more_groups=more_groups
            )
        return self._identities[asked]


def _stamp(path: str) -> tuple[int, ...]:
    """What changes when the file does; () where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _read(path: str) -> bytes | None:
    """The file's content; b"" where there is none, None where it is not to be read.

    Links stay in the root, and none of /proc is followed to a descriptor of the agent's own. Of a
    file of /proc, which is the kernel's log perhaps, nothing is read: such files have no size.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
    try:
        root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fd = _guestsys.openat2(root, path, flags, 0, IN_ROOT | NO_MAGICLINKS)
        finally:
            os.close(root)
    except (FileNotFoundError, NotADirectoryError):
        return b""
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > bounds.ACCOUNT_FILE:
            return None
        return os.read(fd, status.st_size)
    except OSError:
        return None
    finally:
        os.close(fd)
