"""What PID 1 says: reports to the host over the connection that it dialled, lines to the console.

Neither may ever hold PID 1 up. A host that does not read or is gone is given up on; a console that
takes nothing loses lines.
"""

import _socket
import errno
import fcntl
import os
import select
import stat
import time

from microguest.guest import bounds
from microguest.guest.boot.config import BootConfig, Endpoint
from microguest.guest.errors import raised_at
from microguest.guest.report import CONSOLE_MARK, REPORTS, BootFailed, Ready, Report, line_mark
from microguest.init_shim.failure import SHORT, Failure, call, reason
from microguest.init_shim.listener import VMADDR_CID_HOST, address_of, socket_for
from microguest.init_shim.timeline import Timeline

__all__ = [
    "Reporter",
    "announcement",
    "copy_to_console",
    "failed_boot",
    "leave_out",
    "left_out",
    "mark_lines",
    "open_node",
    "own_console",
    "say",
    "start_output",
]

CONSOLE_LINE = 4096  # bytes; a pipe takes that many at once or none (pipe(7), PIPE_BUF)
CONSOLE_WAIT = 0.1  # seconds for a full console to take something
CONSOLE_LINE_WAIT = 1.0  # and for a slow one to take a whole line; 4 KiB take 0.4 at 115200 baud
MESSAGE = 2048  # characters of a failure's message
DIAL_AGAIN = 0.01  # seconds; the device may still be starting
STDERR = "/proc/self/fd/2"
NODE = "/dev/.microguest-console"  # for an instant
WRITE_NOW = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
# ioctl_tty(2); the same numbers on every architecture that includes asm-generic/ioctls.h
TCXONC, TCOON = 0x540A, 1
TIOCGDEV = 0x80045432  # of asm-generic as well: the device that a terminal is, whatever its name
NOT_YET = (errno.ENODEV, errno.ECONNRESET, errno.ENETUNREACH)


class Reporter:
    """The report connection. `connect` may fail; `send` never does."""

    def __init__(self) -> None:
        self.endpoint: Endpoint | None = None  # where to dial; None: nobody wants reports
        self._connection: _socket.socket | None = None
        self._dialled = False

    def connect(self) -> None:
        """Dial the endpoint within REPORT_CONNECT_TIMEOUT. Raises Failure."""
        if self.endpoint is None:
            return
        self._dialled = True
        where = address_of(self.endpoint)
        with call("connect", where, hint="is the host listening for reports?"):
            self._connection = dial(self.endpoint)

    def send(self, report: Report) -> None:
        """Tell the host; a failed boot also goes to the console. Gives up quietly."""
        if isinstance(report, BootFailed):
            report = shortened(report, MESSAGE)
            say(console_line(report))
            self._dial_late()
        if self._connection is None:
            return
        line = REPORTS.encode(report) + b"\n"
        try:
            flags = _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL
            complete = self._connection.send(line, flags) == len(line)
        except OSError:
            complete = False
        if not complete:
            self._close()

    def farewell(self) -> None:
        """End the connection so that the last report is not lost with the machine's memory.

        vsock sends from a worker of the kernel: power off too early and the packet is gone. The
        host closes its side when it has read everything, or FAREWELL_WAIT passes.
        """
        if self._connection is None:
            return
        try:
            self._connection.shutdown(_socket.SHUT_WR)
            if self.endpoint is not None and self.endpoint.transport == "vsock":
                self._connection.settimeout(bounds.FAREWELL_WAIT)
                self._connection.recv(1)
        except OSError:
            pass
        self._close()

    def _dial_late(self) -> None:
        """A boot that failed before its step `report` still tries to say so."""
        if self.endpoint is not None and not self._dialled:
            try:
                self.connect()
            except Failure as failure:
                say(f"cannot report: {failure}")

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def announcement(config: BootConfig, timeline: Timeline) -> Ready:
    """What the host is told when the agent serves."""
    return Ready(
        steps=tuple(timeline.steps),
        token_proof=proof(config.agent.token),
        left_out=tuple(left_out),
    )


def proof(token: str) -> str:
    """What shows the host that it is this boot which reports, without showing the token."""
    import hashlib

    return hashlib.sha256(token.encode()).hexdigest()


def failed_boot(error: BaseException, timeline: Timeline) -> BootFailed:
    """What to tell about an exception that ended the boot, or later the supervision."""
    steps = tuple(timeline.steps)
    step = timeline.current or "start"
    if isinstance(error, Failure):
        return BootFailed(
            step=step,
            message=error.message,
            syscall=error.syscall,
            path=error.path,
            errno=error.errno,
            steps=steps,
        )
    number = (error.errno or 0) if isinstance(error, OSError) else 0
    message = f"unexpected: {raised_at(error)}"
    if number in SHORT:
        message += f"; {reason(number)}"
    return BootFailed(step=step, message=message, errno=number, steps=steps)


def console_line(report: BootFailed) -> str:
    """The report without its steps, as much of its texts as fits into one line of the console."""
    most = MESSAGE
    while True:
        part = shortened(report, most).replace(steps=())
        line = CONSOLE_MARK + REPORTS.encode(part).decode("ascii")
        if len(line) < CONSOLE_LINE or most == 1:
            return line
        most //= 2  # what is not ASCII takes up to twelve characters there


def shortened(report: BootFailed, most: int) -> BootFailed:
    """With `most` characters of each of its texts."""
    return report.replace(message=report.message[:most], path=report.path[:most])


def dial(endpoint: Endpoint) -> _socket.socket:
    """Connect, trying again while the vsock device is not up. Raises OSError."""
    address = (VMADDR_CID_HOST, endpoint.port) if endpoint.transport == "vsock" else endpoint.path
    deadline = time.monotonic() + bounds.REPORT_CONNECT_TIMEOUT
    while True:
        connection = socket_for(endpoint)
        try:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            connection.connect(address)
        except OSError as error:
            connection.close()
            if isinstance(error, TimeoutError):
                raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from None
            again = endpoint.transport == "vsock" and error.errno in NOT_YET
            if not again or time.monotonic() > deadline:
                raise
            time.sleep(DIAL_AGAIN)
        else:
            return connection


def mark_lines(token: str) -> None:
    """From now on the host can tell what `say` writes from what a workload does."""
    global _token  # noqa: PLW0603  as of the console
    _token = token


def say(line: str) -> None:
    """One line on the console, with a mark before it unless it carries a report."""
    if not line.startswith(CONSOLE_MARK):
        line = f"{line_mark(_token) if _token else 'microguest: '}{line}"
    data = line.encode("utf-8", "backslashreplace").replace(b"\n", b" ")[: CONSOLE_LINE - 1]
    write_console(data + b"\n", CONSOLE_WAIT)


def leave_out(line: str) -> None:
    """`say` what the boot does without, and tell the host when the machine is ready."""
    say(line)
    sentence = line[: bounds.LEFT_OUT_TEXT]
    if sentence not in left_out and len(left_out) < bounds.LEFT_OUT:
        left_out.append(sentence)


left_out: list[str] = []


def copy_to_console(data: bytes) -> None:
    """Somebody else's words, as they are; what the console has no room for now is lost."""
    write_console(data, 0.0)


def write_console(data: bytes, patience: float) -> None:
    """As much as it takes, within CONSOLE_LINE_WAIT seconds, of them `patience` without headway."""
    console = own_console()
    deadline = time.monotonic() + CONSOLE_LINE_WAIT
    poll = select.poll()
    poll.register(console, select.POLLOUT)
    try:
        while data and time.monotonic() < deadline:
            if not poll.poll(0):
                start_output(console)  # whoever has the console may have stopped it
                if not poll.poll(int(patience * 1000)):
                    return
            data = data[put(console, data) :]
    except OSError:
        pass


def put(console: int, data: bytes) -> int:
    """One write that does not block: how much of it was taken. Raises OSError."""
    if _console_socket is not None:
        return _console_socket.send(data, _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL)
    return os.write(console, data)


def start_output(terminal: int) -> None:
    """Undo a tcflow(3); does nothing where it is no terminal."""
    try:
        fcntl.ioctl(terminal, TCXONC, TCOON)
    except OSError:
        pass


def own_console() -> int:
    """A descriptor of the console that does not block. Opened once, when /proc and /dev are there.

    stderr itself is shared with the workload, which may expect it to block. A file needs none, and
    a socket cannot be opened again: there, each write says that it does not wait.
    """
    global _console, _console_socket  # noqa: PLW0603  PID 1 has one console
    if _console < 0:
        try:
            kind = os.fstat(2).st_mode
            if stat.S_ISCHR(kind):
                _console = open_terminal()
            elif stat.S_ISFIFO(kind):
                _console = os.open(STDERR, WRITE_NOW)
            else:
                _console = 2
                if stat.S_ISSOCK(kind):
                    _console_socket = _socket.socket(fileno=os.dup(2))
        except OSError:
            return 2
    return _console


def open_terminal() -> int:
    """The terminal behind stderr, by its own device. Raises OSError.

    By /dev/console's, root can lead what is written to another terminal (TIOCCONS, ioctl_tty(2)),
    and there a write waits for whoever reads that one.
    """
    try:
        told = fcntl.ioctl(2, TIOCGDEV, bytes(4))
        return open_node(device_number(int.from_bytes(told, "little")))
    except OSError:  # namespaces, which may make no device; or it is none
        return os.open(STDERR, WRITE_NOW)


def device_number(told: int) -> int:
    """From the kernel's encoding of 32 bits (linux/kdev_t.h, new_encode_dev)."""
    return os.makedev(told >> 8 & 0xFFF, told & 0xFF | told >> 12 & 0xFFF00)


def open_node(device: int) -> int:
    """Open a terminal for writing, by a node that has no name afterwards. Raises OSError.

    Without the right to read, TIOCSCTTY is refused as well: ioctl_tty(2). It does not block, also
    not for a line that has no carrier.
    """
    try:
        os.unlink(NODE)
    except FileNotFoundError:
        pass
    os.mknod(NODE, stat.S_IFCHR, device)
    try:
        return os.open(NODE, WRITE_NOW | os.O_NOFOLLOW)
    finally:
        os.unlink(NODE)


_console = -1
_console_socket: _socket.socket | None = None
_token = ""
