"""Terminals: a pair of pseudo-terminal ends from the image's devpts, sizes, and what END types.

The agent is inside the image's root, which is hostile to it: whatever stands at the path of the
multiplexer is checked before it is used, and the slave is opened through the master, by no path at
all. See pty(7), ioctl_tty(2) and devpts in the kernel's documentation.
"""

import errno
import fcntl
import os
import signal
import stat
import struct
import termios

import _guestsys

from microguest.guest.wire.messages import Winsize

__all__ = ["NoTerminal", "advice", "end_of_file", "open_terminal", "resize"]

# The second is what docker and systemd make; it need not exist where devpts is mounted.
MULTIPLEXERS = ("/dev/pts/ptmx", "/dev/ptmx")
MULTIPLEXER_DEVICE = os.makedev(5, 2)  # admin-guide/devices.txt; devpts's own ptmx has it as well
# Where users have taken all terminals of the image's devpts, hosts' come from one of their own: PID
# 1 leaves it room (bounds.HOSTS_TERMINALS). The image sees it, so that ttyname(3) finds a name.
RESERVE = "/dev/microguest-pts"
RESERVE_MULTIPLEXER = f"{RESERVE}/ptmx"
RESERVE_OPTIONS = "mode=0620,ptmxmode=0000"
NOSUID, NOEXEC = 0x2, 0x8  # linux/mount.h
OWN_MODE = (
    0o620  # as grantpt(3): the owner, and the group that devpts was mounted with for write(1)
)
# ioctl_tty(2); the same numbers on every architecture that includes asm-generic/ioctls.h
TIOCSPTLCK = 0x40045431
TIOCGPTPEER = 0x5441

_SIZE = struct.Struct("HHHH")  # struct winsize: rows, columns, and two that nobody uses
_PGRP = struct.Struct("i")


class NoTerminal(OSError):
    """With errno, and the path of the multiplexer that was tried last."""

    step = "terminal"


def open_terminal(size: Winsize, uid: int) -> tuple[int, int]:
    """A new terminal of this size, its slave owned by `uid`: (master, slave).

    Both are close-on-exec, the master does not block and is nobody's controlling terminal. Raises
    NoTerminal.
    """
    master, path = _open_multiplexer()
    slave = -1
    try:
        fcntl.ioctl(master, TIOCSPTLCK, bytes(4))
        slave = fcntl.ioctl(master, TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        _give_to(slave, uid)
        os.fchmod(slave, OWN_MODE)
        _set_size(master, size.rows, size.columns)
    except OSError as error:
        os.close(master)
        if slave >= 0:
            os.close(slave)
        raise NoTerminal(error.errno, error.strerror, path) from None
    return master, slave


def advice(error: NoTerminal) -> str:
    """What is missing, or which limit is reached, and what to do."""
    if error.errno == errno.ENOSPC:
        return (
            "every terminal is taken, hosts' own as well (max= of devpts, kernel.pty.max): look by "
            "an exec without a terminal who holds them, and end it"
        )
    return "it needs devpts at /dev/pts"


def resize(master: int, rows: int, columns: int) -> None:
    """Set the size and tell the foreground group, which the kernel does for a new size only.

    Does nothing where the terminal has no process any more.
    """
    try:
        same = fcntl.ioctl(master, termios.TIOCGWINSZ, bytes(_SIZE.size))[:4]
        _set_size(master, rows, columns)
        if same == _SIZE.pack(rows, columns, 0, 0)[:4]:
            (group,) = _PGRP.unpack(fcntl.ioctl(master, termios.TIOCGPGRP, bytes(_PGRP.size)))
            if group > 0:  # 0 is a group outside the pid namespace, or none: never our own
                os.killpg(group, signal.SIGWINCH)
    except OSError:
        pass  # hung up, or the group has just ended


def end_of_file(master: int, *, unfinished: bool) -> bytes:
    """What to type for the end of the input.

    In canonical mode (termios(3)) the end-of-file character gives a reader what was typed so far,
    and only where that is nothing it is the end; so an unfinished line needs two. A terminal in
    another mode passes the character on, as when it is typed there.
    """
    try:
        settings = termios.tcgetattr(master)  # the slave's: a master has none of its own
    except termios.error:
        return b""
    character: bytes = settings[6][termios.VEOF]
    canonical = settings[3] & termios.ICANON
    if character == b"\0":  # _POSIX_VDISABLE
        return b""
    return character * 2 if unfinished and canonical else character


def _open_multiplexer() -> tuple[int, str]:
    """And its path. Raises NoTerminal."""
    problem = NoTerminal(errno.ENODEV, os.strerror(errno.ENODEV), MULTIPLEXERS[0])
    for path in MULTIPLEXERS:
        try:
            return _open_checked(path), path
        except OSError as error:
            problem = NoTerminal(error.errno, error.strerror, path)
            if error.errno == errno.ENOSPC:
                break
    if problem.errno != errno.ENOSPC:
        raise problem
    try:
        return _open_reserve(), RESERVE_MULTIPLEXER
    except OSError:
        raise problem from None


def _open_reserve() -> int:
    """The multiplexer of hosts' own devpts, mounted at the first need. Raises OSError."""
    try:
        return _open_checked(RESERVE_MULTIPLEXER)
    except FileNotFoundError:
        pass
    try:
        os.mkdir(RESERVE, 0o755)
    except FileExistsError:
        pass
    _guestsys.mount("devpts", RESERVE, "devpts", NOSUID | NOEXEC, RESERVE_OPTIONS)
    return _open_checked(RESERVE_MULTIPLEXER)


def _open_checked(path: str) -> int:
    """The multiplexer, if that is what stands there. Raises OSError."""
    # Without O_NONBLOCK something else at that path could hold the agent.
    fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC | os.O_NONBLOCK)
    status = os.fstat(fd)
    if stat.S_ISCHR(status.st_mode) and status.st_rdev == MULTIPLEXER_DEVICE:
        return fd
    os.close(fd)
    raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), path)


def _give_to(slave: int, uid: int) -> None:
    """The user's own. Raises OSError."""
    try:
        os.fchown(slave, uid, -1)
    except OSError as error:
        if error.errno != errno.EINVAL:  # this user namespace has no such user: nobody can be it
            raise


def _set_size(master: int, rows: int, columns: int) -> None:
    fcntl.ioctl(master, termios.TIOCSWINSZ, _SIZE.pack(rows, columns, 0, 0))
