"""What PID 1 says: reports to the host over the connection that it dialled, lines to the console.

Neither may ever hold PID 1 up. A host that does not read or is gone is given up on; a console that
takes nothing loses lines.
"""

import _socket
import errno
import os
import select
import stat
import time

from guest import limits
from guest.bootconfig import Endpoint
from guest.report import CONSOLE_MARK, REPORTS, BootFailed, Report
from init_shim.failure import Failure, call
from init_shim.listener import VMADDR_CID_HOST, address_of, socket_for

__all__ = ["Reporter", "copy_to_console", "say"]

CONSOLE_LINE = 4096  # bytes; a pipe takes that many at once or none (pipe(7), PIPE_BUF)
CONSOLE_WAIT = 0.1  # seconds for a full console to take something
CONSOLE_LINE_WAIT = 1.0  # and for a slow one to take a whole line; 4 KiB take 0.4 at 115200 baud
MESSAGE = 2048  # characters of a failure's message
DIAL_AGAIN = 0.01  # seconds; the device may still be starting
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
                self._connection.settimeout(limits.FAREWELL_WAIT)
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
    deadline = time.monotonic() + limits.REPORT_CONNECT_TIMEOUT
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


def say(line: str) -> None:
    """One line on the console, prefixed for people unless it carries a report."""
    if not line.startswith(CONSOLE_MARK):
        line = f"microguest: {line}"
    data = line.encode("utf-8", "backslashreplace").replace(b"\n", b" ")[: CONSOLE_LINE - 1]
    write_console(data + b"\n", CONSOLE_WAIT)


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
        while data and time.monotonic() < deadline and poll.poll(int(patience * 1000)):
            data = data[os.write(console, data) :]
    except OSError:
        pass


def own_console() -> int:
    """A descriptor of the console that does not block. Opened once, when /proc is there.

    stderr itself is shared with the workload, which may expect it to block. A file needs none, and
    a socket cannot be opened again: there, stderr has to do.
    """
    global _console  # noqa: PLW0603  PID 1 has one console
    if _console < 0:
        try:
            kind = os.fstat(2).st_mode
            if not (stat.S_ISCHR(kind) or stat.S_ISFIFO(kind)):
                return 2
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            _console = os.open("/proc/self/fd/2", flags)
        except OSError:
            return 2
    return _console


_console = -1
