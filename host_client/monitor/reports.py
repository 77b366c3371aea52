"""The one connection on which a guest's PID 1 reports: hostile input, bounded in every way."""

import contextlib
import os
import socket
import time
from collections.abc import Callable
from select import EPOLLIN
from typing import Final

from microguest.guest import bounds
from microguest.guest.record import Record, RecordError
from microguest.guest.report import REPORTS
from microguest.host_client.event_loop import EventLoop

__all__ = ["ReportReader"]

REPORTS_MAX: Final = 1000  # at once; a guest that says more loses its connection
REPORTS_PER_SECOND: Final = 10.0  # that it may say for as long as it lives
CHUNK: Final = 64 * 1024
DRAIN_WITHIN: Final = 1.0  # seconds: another process may have the guest's end, and go on


class ReportReader:
    """Takes the first connection and no other. Calls `on_report` for each record in it."""

    def __init__(
        self,
        loop: EventLoop,
        on_report: Callable[[Record], None],
        on_error: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._on_report = on_report
        self._on_error = on_error
        self._socket: socket.socket | None = None
        self._listener: socket.socket | None = None
        self._cid: int | None = None
        self._taken = False
        self._line = bytearray()
        self._allowed = float(REPORTS_MAX)
        self._counted = time.monotonic()

    def listen(self, listener: socket.socket, *, cid: int | None = None) -> None:
        """Wait for the guest on a listening socket, which is closed after it came.

        cid: of a socket that every guest of this host can reach, the one that is heard.
        """
        listener.setblocking(False)
        self._cid = cid
        self._listener = listener
        self._loop.add(listener.fileno(), lambda _events: self._accept(), EPOLLIN)

    def take(self, connection: socket.socket) -> None:
        """This is the guest's connection."""
        assert not self._taken
        self._taken = True
        connection.setblocking(False)
        self._socket = connection
        self._loop.add(connection.fileno(), self._on_readable, EPOLLIN)

    def dialled(self) -> socket.socket | None:
        """The other end of a new connection; None where the guest has had its one."""
        if self._taken:
            return None
        ours, theirs = socket.socketpair()
        self.take(ours)
        return theirs

    def drain(self) -> None:
        """Read what is there: the machine has ended."""
        give_up = time.monotonic() + DRAIN_WITHIN
        while self._socket is not None and self._readable() and time.monotonic() < give_up:
            pass

    def close(self) -> None:
        """Take nothing more."""
        self._close_listener()
        self._close()

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, peer = self._listener.accept()
        except OSError:
            return
        if self._cid is not None and peer[0] != self._cid:
            connection.close()  # another guest's, or a program's of this host
            return
        self._close_listener()
        self.take(connection)

    def _on_readable(self, _events: int) -> None:
        self._readable()

    def _readable(self) -> bool:
        """One recv(2). False where nothing was there, or nothing can come any more."""
        if self._socket is None:
            return False
        try:
            data = self._socket.recv(CHUNK)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._close()  # which tells a guest that waits that all of it was read
            return False
        self._take_lines(data)
        return self._socket is not None

    def _take_lines(self, data: bytes) -> None:
        self._line += data
        while (end := self._line.find(b"\n")) >= 0:
            line = bytes(self._line[:end])
            del self._line[: end + 1]
            if not self._take_line(line):
                return
        if len(self._line) > bounds.REPORT_LINE:
            self._refuse(f"a report of more than {bounds.REPORT_LINE} bytes")

    def _take_line(self, line: bytes) -> bool:
        now = time.monotonic()
        earned = (now - self._counted) * REPORTS_PER_SECOND
        self._allowed = min(self._allowed + earned, REPORTS_MAX) - 1
        self._counted = now
        if self._allowed < 0:
            self._refuse(f"more than {REPORTS_MAX} reports at once")
            return False
        try:
            report = REPORTS.decode(line)
        except RecordError as error:
            self._refuse(f"a report that is none: {error!s:.200}")
            return False
        self._on_report(report)
        return True

    def _refuse(self, what: str) -> None:
        self._line.clear()
        self._close()
        self._on_error(f"the guest sent {what}")

    def _close(self) -> None:
        if self._socket is not None:
            self._loop.remove(self._socket.fileno())
            self._socket.close()
            self._socket = None

    def _close_listener(self) -> None:
        if self._listener is not None:
            self._loop.remove(self._listener.fileno())
            path = self._listener.getsockname()
            self._listener.close()
            self._listener = None
            if isinstance(path, str) and path:
                with contextlib.suppress(OSError):  # a guest's root can reach it
                    os.unlink(path)
