"""Standard descriptors that are closed, as daemons and `<&-` leave them.

The kernel gives the lowest free number: without care a socket of ours becomes 0, 1 or 2, and is
read as input, written to as output, or replaced when a child's streams are set up.
"""

import fcntl
import os

__all__ = ["above_standard", "take_standard"]

FIRST_FREE = 3  # the number behind stdin, stdout and stderr


def take_standard() -> None:
    """Open /dev/null where 0, 1 or 2 is closed. To be called before anything else is opened."""
    while (fd := os.open(os.devnull, os.O_RDWR)) < FIRST_FREE:
        os.set_inheritable(fd, True)
    os.close(fd)


def above_standard(fd: int) -> int:
    """Another number for the same open file, behind the standard ones. The caller closes it."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE)
