"""The image's passwd and group files: read with bounds, and not read again while unchanged.

The image is not trusted: what lies at these paths may be a FIFO, a device or 10 GB.
"""

import os
import stat

from guest import limits
from guest.users import GROUPS_FILE, USERS_FILE, Identity, resolve

__all__ = ["Accounts"]


class Accounts:
    """Remembers the identities that were asked for, until one of the two files changes."""

    def __init__(self) -> None:
        self._stamp: tuple[object, ...] = ()
        self._identities: dict[tuple[str, ...], Identity] = {}

    def identity(self, spec: str, more_groups: tuple[str, ...] = ()) -> Identity:
        """As `guest.users.resolve` with the files as they are now. Raises its errors."""
        stamp = (_stamp(USERS_FILE), _stamp(GROUPS_FILE))
        if stamp != self._stamp or len(self._identities) > limits.REMEMBERED_IDENTITIES:
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


def _read(path: str) -> bytes:
    """The file's content, one byte more than allowed at most; b"" for anything but a file."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        fd = os.open(path, flags)
    except OSError:
        return b""
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return b""
        with open(fd, "rb", closefd=False) as file:
            return file.read(limits.ACCOUNT_FILE + 1)
    except OSError:
        return b""
    finally:
        os.close(fd)
