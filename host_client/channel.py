"""One connection to an agent: the protocol's state machine on a plain non-blocking socket.

This is the only place that waits for a socket. A wait ends with events, with its deadline, or with
the news that the machine is gone.
"""

import select
import socket
from collections import deque
from collections.abc import Callable
from typing import Final

from guest.connection import Connection, Event, Role, State
from guest.errors import RemoteProtocolError
from host_client.deadline import Deadline
from host_client.errors import ConnectionLost, DeadlineExceeded

__all__ = ["Channel", "Obituary"]

RECEIVE_SIZE: Final = 256 * 1024  # bytes per recv(2): some pipe-fuls of output
CHECK_EVERY: Final = 1.0  # seconds between looks at whether the machine still lives

# How the machine behind the connection ended, or "" while it runs. The argument is how many seconds
# it may take to find out.
Obituary = Callable[[float], str]
EXPLAIN_WITHIN: Final = 1.0  # seconds: a VMM's exit is known a little after its sockets close


class Channel:
    """Sends and receives events. Not thread-safe. After any error: close it."""

    def __init__(self, sock: socket.socket, url: str, obituary: Obituary) -> None:
        """Takes over `sock`, a connected non-blocking socket."""
        self.url = url
        self._sock = sock
        self._obituary = obituary
        self._connection = Connection(Role.HOST)
        self._poll = select.poll()
        self._watched = select.POLLIN
        self._poll.register(sock, select.POLLIN)
        self._outbox: deque[memoryview] = deque()
        self._send_broken = False

    def fileno(self) -> int:
        """For select(2): readable when `step` has something to take."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the connection; a process that belongs to it is killed by the agent."""
        self._sock.close()

    @property
    def pending(self) -> int:
        """Bytes that are queued and not yet with the kernel."""
        return sum(len(piece) for piece in self._outbox)

    @property
    def ready(self) -> bool:
        """Whether another request may follow."""
        return self._connection.state is State.READY and not self._send_broken

    @property
    def usable(self) -> bool:
        """For an idle connection: nothing has arrived, not even its end."""
        return not self._poll.poll(0)

    def queue(self, *events: Event) -> None:
        """Encode events and keep them for `step`. LocalProtocolError where they are not allowed."""
        self._enqueue(b"".join([self._connection.send(event) for event in events]))

    def queue_data(self, stream: int, data: memoryview) -> None:
        """Queue a data frame without copying `data`, which must not change until it is sent."""
        self._enqueue(self._connection.send_data_header(stream, len(data)))
        self._enqueue(data)

    def step(self, deadline: Deadline) -> list[Event]:
        """Send what can be sent and return what has arrived, waiting for the first of either.

        DeadlineExceeded, ConnectionLost and RemoteProtocolError end the connection's use.
        """
        if self._outbox and not self._watched & select.POLLOUT:
            self._flush()  # most often all of it fits and poll(2) need not ask for room
        self._watch(select.POLLIN | (select.POLLOUT if self._outbox else 0))
        ready = self._wait(deadline)
        if ready & select.POLLOUT:
            self._flush()
        if ready & ~select.POLLOUT:
            return self._receive()
        return []

    def take(self) -> list[Event]:
        """Like `step`, but never waits."""
        if self._outbox:
            self._flush()
        return self._receive()

    def _enqueue(self, data: bytes | memoryview) -> None:
        if not self._send_broken:
            self._outbox.append(memoryview(data))

    def _watch(self, events: int) -> None:
        if events != self._watched:
            self._watched = events
            self._poll.modify(self._sock, events)

    def _wait(self, deadline: Deadline) -> int:
        while True:
            ready = self._poll.poll(deadline.wait_ms(CHECK_EVERY))
            if ready:
                return ready[0][1]
            if deadline.passed:
                raise DeadlineExceeded(
                    f"{self.url} gave no answer within {deadline.seconds} s",
                    seconds=deadline.seconds or 0.0,
                )
            self.check_alive()

    def check_alive(self) -> None:
        """ConnectionLost where the machine is known to have ended."""
        if how := self._obituary(0.0):
            raise ConnectionLost(how)

    def _flush(self) -> None:
        try:
            while self._outbox:
                sent = self._sock.send(self._outbox[0])
                if sent == len(self._outbox[0]):
                    self._outbox.popleft()
                else:
                    self._outbox[0] = self._outbox[0][sent:]
        except BlockingIOError:
            pass
        except OSError:
            # The agent is done with our bytes; what it said before it closed can still be read.
            self._send_broken = True
            self._outbox.clear()

    def _receive(self) -> list[Event]:
        try:
            data = self._sock.recv(RECEIVE_SIZE)
        except BlockingIOError:
            return []
        except OSError as error:
            raise self._lost(str(error.strerror)) from error
        if data:
            return self._connection.receive(data)
        try:
            self._connection.receive_eof()
        except RemoteProtocolError as error:
            raise self._lost(str(error)) from None
        raise self._lost("connection closed")

    def _lost(self, what: str) -> ConnectionLost:
        how = self._obituary(EXPLAIN_WITHIN)
        return ConnectionLost(how or f"lost the agent at {self.url}: {what}")
