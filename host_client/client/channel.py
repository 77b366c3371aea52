"""One connection to an agent: the protocol's state machine on a plain non-blocking socket.

This is the only place that reads and writes such a socket; it waits by steps, for whoever runs
them. A wait ends with events, with its deadline, or with the news that the machine is gone.
"""

import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from microguest.guest import bounds
from microguest.guest.errors import MicroguestError, OperationError, RemoteProtocolError
from microguest.guest.wire.connection import Connection, Event, Role, State
from microguest.host_client.client.deadline import Deadline
from microguest.host_client.client.steps import Steps, Wait, until
from microguest.host_client.errors import ConnectError, ConnectionLost, DeadlineExceeded
from microguest.host_client.log import WARNING, note

__all__ = ["Broken", "Channel", "Obituary", "Probe", "ended"]

RECEIVE_SIZE: Final = 256 * 1024  # bytes per recv(2): some pipe-fuls of output
CHECK_EVERY: Final = 1.0  # seconds between looks at whether the machine still lives
PROBE_AFTER: Final = 2.0  # seconds of silence after which the agent is asked whether it lives
EXPLAIN_WITHIN: Final = 1.0  # seconds: a VMM's exit is known a little after its sockets close
EXPLAIN_EVERY: Final = 0.02

# How the machine behind the connection ended, or "" while it runs. The argument is how many seconds
# it may take to find out.
Obituary = Callable[[float], str]

# Asks the agent on another connection. Raises where there is no answer.
Probe = Callable[[], Steps[None]]

# What one recv(2) is read into. Events hold copies, so that one buffer serves connection after
# connection; several are only needed by threads that receive at the same time.
_buffers: deque[bytearray] = deque(maxlen=4)


class Broken(Exception):
    """The connection is of no use any more; `Channel.explained` finds out why."""


class Channel:
    """Sends and receives events. Not thread-safe. After any error: close it."""

    def __init__(
        self,
        sock: socket.socket,
        url: Callable[[], str],
        obituary: Obituary | None,
        probe: Probe | None = None,
    ) -> None:
        """Takes over `sock`, a connected non-blocking socket. `probe`: where waits have no end."""
        self.url = url
        self.sock = sock
        self._owner = os.getpid()
        self._obituary = obituary
        self._probe = probe
        self._connection = Connection(Role.HOST)
        self._outbox: list[bytes | memoryview] = []
        self._pieces_sent = 0  # of the outbox, whole ones
        self._bytes_sent = 0  # of the next one
        self._send_broken = False
        self._failed: MicroguestError | None = None  # why nothing can be sent or received any more
        self._torn: ConnectionLost | None = None  # why nothing can be received any more
        self._heard = 0.0  # monotonic: last sign of life from the agent; 0.0: since the last look
        self._looked = 0.0  # when somebody last looked whether it lives

    def fileno(self) -> int:
        """For select(2): readable when there is something to take."""
        return self.sock.fileno()

    def close(self) -> None:
        """Close the connection; a process that belongs to it is killed by the agent.

        In a forked child just its copy: the connection is the parent's.
        """
        if not self.foreign:
            self.wake()  # also the agent must notice, where a child has a copy that we know not of
        self.sock.close()

    @property
    def foreign(self) -> bool:
        """Whether this is a forked child's copy, which is of no use."""
        return os.getpid() != self._owner

    def check_owner(self) -> None:
        """ConnectionLost in a forked child."""
        if self.foreign:
            raise ConnectionLost(
                f"this connection to {self.url()} belongs to process {self._owner}, from which "
                "this one was forked: connect, start or attach here anew"
            )

    @property
    def pending(self) -> int:
        """Bytes that are queued and not yet with the kernel."""
        self._forget_sent()
        return sum(map(len, self._outbox)) - self._bytes_sent

    @property
    def ready(self) -> bool:
        """Whether another request may follow."""
        usable = not self._send_broken and self._torn is None
        return usable and self._connection.state is State.READY

    @property
    def usable(self) -> bool:
        """For an idle connection: nothing has arrived, not even its end."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return not poll.poll(0)

    def queue(self, *events: Event) -> None:
        """Encode events and keep them to be sent. LocalProtocolError where they are not allowed.

        On a connection that has failed, again the error that it failed with.
        """
        self._check_whole()
        self._enqueue(b"".join([self._connection.send(event) for event in events]))

    def queue_data(self, stream: int, data: memoryview) -> None:
        """Queue a data frame without copying `data`, which must not change until it is sent."""
        self._check_whole()
        self._enqueue(self._connection.send_data_header(stream, len(data)))
        self._enqueue(data)

    def own_queued(self) -> None:
        """Copy what is still queued, so that its owner may change it."""
        self._forget_sent()
        self._outbox = [bytes(piece) for piece in self._outbox]

    @property
    def input_room(self) -> int:
        """Bytes of stdin that there is credit for, at most one frame."""
        credit = self._connection.input_credit
        if credit is None:
            return bounds.DATA_PAYLOAD
        return min(credit - self._connection.input_bytes, bounds.DATA_PAYLOAD)

    def step(self, deadline: Deadline) -> Steps[list[Event]]:
        """Send what can be sent and return what has arrived, waiting for the first of either.

        DeadlineExceeded, ConnectionLost and RemoteProtocolError end the connection's use.
        """
        ready = yield from self.until_ready(deadline)
        try:
            return self.arrived(ready)
        except Broken as error:
            raise (yield from self.explained(error)) from error

    def until_ready(self, deadline: Deadline) -> Steps[int]:
        """Send what can be sent; what `arrived` is then to do, poll(2)'s bits. Takes nothing."""
        self.flush()  # most often all of it fits and nobody needs to wait for room
        events = select.POLLIN | select.POLLOUT if self._outbox else select.POLLIN
        if deadline.overdue:  # the agent always has something, and never all of it
            raise self._late(deadline)
        while not (ready := (yield Wait(self.sock, events, deadline.within(CHECK_EVERY)))):
            if deadline.passed:
                raise self._late(deadline)
            yield from self.check_alive(deadline)
        return ready

    def _late(self, deadline: Deadline) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"{self.url()} gave no answer within {deadline.seconds:g} s",
            seconds=deadline.seconds or 0.0,
        )

    def arrived(self, ready: int) -> list[Event]:
        """Do what poll(2) said can be done; never waits. Raises Broken, RemoteProtocolError."""
        if ready & select.POLLOUT:
            self.flush()
        return self.receive() if ready & ~select.POLLOUT else []

    def check_alive(self, deadline: Deadline) -> Steps[None]:
        """ConnectionLost where the machine has ended, or where it answers no one any more.

        For whoever has waited in vain; looks at most once in CHECK_EVERY seconds. Ends without news
        at the deadline.
        """
        now = time.monotonic()
        if now - self._looked < 0.9 * CHECK_EVERY:
            return
        self._looked = now
        if self._obituary is not None and (how := self._obituary(0.0)):
            raise ConnectionLost(how)
        if not self._heard:
            self._heard = now - CHECK_EVERY
        if self._probe is None or now - self._heard < PROBE_AFTER:
            return
        try:
            yield from until(deadline, self._probe())
            if deadline.passed:
                return
        except OperationError:
            pass  # a refusal is a sign of life as well
        except (ConnectionLost, ConnectError, DeadlineExceeded) as error:
            if not self.usable:  # something has come here meanwhile
                return
            note(WARNING, "%s: the guest is not alive: %s", self.url(), error)
            raise ConnectionLost(f"the guest at {self.url()} is not alive: {error}") from error
        self._heard = time.monotonic()

    def wake(self) -> None:
        """Let everybody who watches the socket notice that it is about to be closed."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it has ended already, which they notice as well

    def fail(self, error: MicroguestError) -> None:
        """Have whoever waits on it, in whatever thread, raise this."""
        self._failed = error
        self.wake()

    def flush(self) -> None:
        """Give the kernel what it takes now.

        Also exact where it is interrupted (Ctrl-C, an exception for this thread), which happens
        after a call: so `map` makes the call, and between that and the count there is none.
        """
        self.check_owner()
        self._forget_sent()
        try:
            for index, piece in enumerate(self._outbox):
                size = len(piece)
                while self._pieces_sent == index:
                    rest = memoryview(piece)[self._bytes_sent :] if self._bytes_sent else piece
                    for sent in map(self.sock.send, (rest,)):
                        self._bytes_sent += sent
                        if self._bytes_sent == size:
                            self._bytes_sent = 0
                            self._pieces_sent += 1
        except BlockingIOError:
            pass
        except OSError:
            # The agent is done with our bytes; what it said before it closed can still be read.
            self._send_broken = True
            self._outbox.clear()
            self._pieces_sent = self._bytes_sent = 0
        self._forget_sent()

    def _forget_sent(self) -> None:
        """Let the pieces go that the kernel has."""
        del self._outbox[: self._pieces_sent]
        self._pieces_sent = 0

    def receive(self) -> list[Event]:
        """What is there. Raises Broken, RemoteProtocolError; then again what it failed with."""
        self._check_whole()
        if self._torn is not None:
            raise self._torn
        try:
            buffer = _buffers.pop()
        except IndexError:
            buffer = bytearray(RECEIVE_SIZE)
        try:
            size = self.sock.recv_into(buffer)
            if size:
                self._heard = 0.0
                return self._connection.receive(memoryview(buffer)[:size])
        except BlockingIOError:
            return []
        except RemoteProtocolError as error:
            self._failed = error
            raise
        except OSError as error:
            raise Broken(str(error.strerror)) from error
        except BaseException:
            self.torn()
            raise
        finally:
            _buffers.append(buffer)
        try:
            self._connection.receive_eof()
        except RemoteProtocolError as error:
            reason = str(error)
        else:
            reason = "connection closed"
        self._failed = ConnectionLost(f"lost the agent at {self.url()}: {reason}")
        raise Broken(reason)

    def torn(self) -> ConnectionLost:
        """An interrupt came between bytes that were taken from the socket and who was to have them.

        What `receive` raises from now on. What is to be said can still be sent.
        """
        self._torn = ConnectionLost(
            f"the connection to {self.url()} was interrupted while it received: attach again where "
            "the process is kept"
        )
        return self._torn

    def explained(self, error: Broken) -> Steps[ConnectionLost]:
        """What to raise for it: how the machine ended, where that can be known."""
        how = yield from ended(self._obituary, Deadline(EXPLAIN_WITHIN))
        self._failed = ConnectionLost(how or f"lost the agent at {self.url()}: {error}")
        note(WARNING, "%s: connection lost: %s", self.url(), self._failed)
        return self._failed

    def _check_whole(self) -> None:
        self.check_owner()
        if self._failed is not None:
            raise self._failed

    def _enqueue(self, data: bytes | memoryview) -> None:
        if not self._send_broken:
            self._outbox.append(data)


def ended(obituary: Obituary | None, patience: Deadline) -> Steps[str]:
    """How the machine ended, "" where it still seems to live when the patience is over."""
    if obituary is None:
        return ""
    while not (how := obituary(0.0)) and not patience.passed:
        yield Wait(None, 0, EXPLAIN_EVERY)
    return how
