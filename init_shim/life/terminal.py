"""The workload's terminal: a pair of pseudo-terminal ends from the devpts that PID 1 has mounted.

See pty(7), ioctl_tty(2). `agent.process.terminals` does the same for processes of hosts, and
distrusts the image more than is needed here, before anything of it has run.
"""

import errno
import fcntl
import os

from microguest.init_shim.failure import call

__all__ = ["open_terminal"]

MULTIPLEXER = "/dev/pts/ptmx"
OWN_MODE = 0o620  # as grantpt(3)
# ioctl_tty(2); the same numbers on every architecture that includes asm-generic/ioctls.h
TIOCSWINSZ = 0x5414
TIOCSPTLCK = 0x40045431
TIOCGPTPEER = 0x5441


def open_terminal(rows: int, columns: int, uid: int) -> tuple[int, int]:
    """A new terminal of this size, its slave owned by `uid`: (master, slave). Raises Failure.

    Both are close-on-exec and nobody's controlling terminal.
    """
    with call("open", MULTIPLEXER, hint="a terminal needs devpts at /dev/pts"):
        master = os.open(MULTIPLEXER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    slave = -1
    try:
        with call("ioctl", MULTIPLEXER):
            fcntl.ioctl(master, TIOCSPTLCK, bytes(4))
            slave = fcntl.ioctl(master, TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
            give_to(slave, uid)
            os.fchmod(slave, OWN_MODE)
            fcntl.ioctl(master, TIOCSWINSZ, window_size(rows, columns))
    except BaseException:
        os.close(master)
        if slave >= 0:
            os.close(slave)
        raise
    return master, slave


def give_to(slave: int, uid: int) -> None:
    """The user's own. Raises OSError."""
    try:
        os.fchown(slave, uid, -1)
    except OSError as error:
        if error.errno != errno.EINVAL:  # this user namespace has no such user: nobody can be it
            raise


def window_size(rows: int, columns: int) -> bytes:
    """struct winsize, little-endian as every machine that this runs on."""
    return rows.to_bytes(2, "little") + columns.to_bytes(2, "little") + bytes(4)
