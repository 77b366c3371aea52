"""The console as a workload's output: its user may open it again, and gets nothing else of it.

/dev/stdout and /proc/self/fd/1 are opened with the rights that the inode gives, and servers without
root log to them. The console's own inode is root's, and stays so: who owns it can read what others
write or type there, make it a session's terminal, and let others do so. So the inode that the
workload gets is one of root's that everybody may write to, and that nobody else can reach.
"""

import fcntl
import os
import stat

from microguest.init_shim.failure import call
from microguest.init_shim.reporter import open_node, start_output

__all__ = ["open_console"]

NULL_DEVICE = os.makedev(1, 3)  # admin-guide/devices.txt
TIOCNXCL = 0x540D  # ioctl_tty(2)
WRITE_ONLY = 0o222
OWNER_AND_WRITERS = 0o622


def open_console() -> tuple[int, int, int]:
    """Descriptors for a workload's stdin, stdout and stderr, close-on-exec. Raises Failure.

    Its input is at its end. Where its output cannot be opened again (a file, a socket, a console
    that is another machine's), it is PID 1's own.
    """
    nothing = open_nothing()
    try:
        with call("dup"):
            out = write_only(1)
            try:
                return nothing, out, write_only(2)
            except BaseException:
                os.close(out)
                raise
    except BaseException:
        os.close(nothing)
        raise


def open_nothing() -> int:
    """/dev/null, or what reads as that where a workload has put something else there. Failure."""
    try:
        fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        status = os.fstat(fd)
        if stat.S_ISCHR(status.st_mode) and status.st_rdev == NULL_DEVICE:
            os.set_blocking(fd, True)
            return fd
        os.close(fd)
    except OSError:
        pass
    with call("pipe2"):
        reader, writer = os.pipe2(os.O_CLOEXEC)
    os.close(writer)
    return reader


def write_only(fd: int) -> int:
    """The same output, of an inode that everybody may write to. Raises OSError."""
    try:
        status = os.fstat(fd)
        if stat.S_ISCHR(status.st_mode):
            return open_for_workload(status.st_rdev)
        if is_pipe(fd):  # of a machine in namespaces: the monitor's, whose user stays its owner
            os.fchmod(fd, OWNER_AND_WRITERS)
    except OSError:
        pass
    return os.dup(fd)


def is_pipe(fd: int) -> bool:
    """Whether it is one without a name: the mode of a FIFO is somebody else's affair."""
    return os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:")


def open_for_workload(device: int) -> int:
    """A node of root's own for a terminal, which takes output as at its first start. OSError."""
    fd = open_node(device)
    try:
        os.fchmod(fd, WRITE_ONLY)
        undo_earlier_life(fd)
        os.set_blocking(fd, True)
    except BaseException:
        os.close(fd)
        raise
    return fd


def undo_earlier_life(terminal: int) -> None:
    """What a workload may have done to its console before it was started again."""
    start_output(terminal)
    try:
        fcntl.ioctl(terminal, TIOCNXCL)
    except OSError:
        pass  # no terminal
