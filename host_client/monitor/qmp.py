"""QEMU's control connection, QMP: the monitor pauses and resumes its machine over it.

One JSON object a line, as QEMU's docs/interop/qmp-spec.rst says. Its words are QEMU's, not the
guest's. A connection that makes no sense is closed; the machine runs on without it.
"""

import json
import socket
import time
from collections import deque
from collections.abc import Callable
from select import EPOLLIN
from typing import Any, Final

from microguest.host_client.event_loop import EventLoop

__all__ = ["Qmp"]

LINE_MAX: Final = 1024 * 1024  # bytes; the greeting and the answers here have a few hundred
CHUNK: Final = 64 * 1024
DRAIN_WITHIN: Final = 1.0  # seconds: another process may have the VMM's end, and go on

Answered = Callable[[str], None]  # with QEMU's sentence where it refused, else ""


class Qmp:
    """Commands one after the other, events as they come."""

    def __init__(
        self, loop: EventLoop, sock: socket.socket, on_event: Callable[[str, str], None]
    ) -> None:
        """Takes over `sock`. `on_event` is called with an event's name and reason.

        As with "STOP" and "", "SHUTDOWN" and "guest-reset".
        """
        self._loop = loop
        self._sock = sock
        self._on_event = on_event
        self._buffer = b""
        self._waiting: deque[Answered] = deque()
        sock.setblocking(False)
        loop.add(sock.fileno(), self._on_readable, EPOLLIN)
        self.execute("qmp_capabilities", lambda _error: None)

    def execute(self, command: str, answered: Answered, **arguments: object) -> None:
        """Give a command; a few short ones always fit into the socket."""
        if self._sock.fileno() < 0:
            answered("its control connection is closed")
            return
        self._waiting.append(answered)
        packet = {"execute": command, **({"arguments": arguments} if arguments else {})}
        try:
            self._sock.send(json.dumps(packet).encode("ascii") + b"\n")
        except OSError as error:
            self._fail(f"its control connection: {error.strerror}")

    def drain(self) -> None:
        """Take what is there: the VMM has ended."""
        give_up = time.monotonic() + DRAIN_WITHIN
        while self._sock.fileno() >= 0 and self._readable() and time.monotonic() < give_up:
            pass

    def close(self) -> None:
        """Close the connection; commands that are not answered never will be."""
        self._fail("the machine has ended")

    def _on_readable(self, _events: int) -> None:
        self._readable()

    def _readable(self) -> bool:
        """One recv(2). False where nothing was there, or nothing can come any more."""
        try:
            data = self._sock.recv(CHUNK)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if not data or len(self._buffer) > LINE_MAX:
            self._fail("its control connection has ended")
            return False
        for line in filter(bytes.strip, lines):
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                message = None
            self._take(message if isinstance(message, dict) else {})
        return True

    def _take(self, message: dict[str, Any]) -> None:
        if "event" in message:
            data = message.get("data")
            reason = data.get("reason", "") if isinstance(data, dict) else ""
            self._on_event(str(message["event"]), str(reason))
        elif ("return" in message or "error" in message) and self._waiting:
            error = message.get("error", "")
            said = error.get("desc", error) if isinstance(error, dict) else error
            self._waiting.popleft()(str(said)[:500])

    def _fail(self, reason: str) -> None:
        if self._sock.fileno() >= 0:
            self._loop.remove(self._sock.fileno())
            self._sock.close()
        while self._waiting:
            self._waiting.popleft()(reason)
