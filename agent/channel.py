"""One host's connection: a non-blocking socket and the protocol's state machine.

Output is queued as pieces and written with as few calls as possible; nobody queues more than one
read of each stream before it is written, so the queue is bounded by its users.
"""

import socket

import trio

from guest import limits
from guest.connection import Connection, Event, Role

__all__ = ["BUFFER", "Channel", "ConnectionLost"]

# Where every read goes, from sockets and pipes alike. One is enough, as nobody waits while it holds
# anything, and a fresh one for each read would be mapped and unmapped each time.
BUFFER = memoryview(bytearray(limits.STREAM_READ))


class ConnectionLost(Exception):
    """The host closed the connection or is gone."""


class Channel:
    """The connection is closed by whoever accepted it, not here."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.connection = Connection(Role.AGENT)
        self.outgoing: list[bytes] = []

    def queue(self, event: Event) -> None:
        """Put an event behind what is to be written. Raises LocalProtocolError."""
        self.outgoing.append(self.connection.send(event))

    def queue_data(self, stream: int, data: bytes) -> None:
        """As `queue`, for a piece of a stream, without copying it."""
        self.outgoing.append(self.connection.send_data_header(stream, len(data)))
        self.outgoing.append(data)

    def flush_now(self) -> bool:
        """Write what the socket takes without waiting; whether that was all.

        Raises ConnectionLost.
        """
        if not self.outgoing:
            return True
        try:
            sent = self.sock.sendmsg(self.outgoing)
        except BlockingIOError:
            return False
        except OSError:
            raise ConnectionLost from None
        while self.outgoing and sent >= len(self.outgoing[0]):
            sent -= len(self.outgoing.pop(0))
        if sent:
            self.outgoing[0] = self.outgoing[0][sent:]
        return not self.outgoing

    async def flush(self) -> None:
        """Write everything, waiting for the host to read. Raises ConnectionLost."""
        while not self.flush_now():
            await trio.lowlevel.wait_writable(self.sock)

    def receive_now(self) -> list[Event] | None:
        """The events in what has arrived, perhaps none yet; None where nothing has arrived.

        Raises ConnectionLost at the end of the connection, and RemoteProtocolError.
        """
        try:
            count = self.sock.recv_into(BUFFER)
        except BlockingIOError:
            return None
        except OSError:
            raise ConnectionLost from None
        if not count:
            raise ConnectionLost
        return self.connection.receive(BUFFER[:count])

    async def receive(self) -> list[Event]:
        """Wait for at least one event. Raises as `receive_now`."""
        while not (events := self.receive_now()):
            await trio.lowlevel.wait_readable(self.sock)
        return events
