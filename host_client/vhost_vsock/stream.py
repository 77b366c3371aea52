"""One stream between a host socket and a guest socket: credit, the two halves, the end.

Bytes toward the host leave guest memory by the send call itself; only what the host socket does
not take is copied, and credit bounds that copy. The other direction is `read_into`, called by the
device with guest buffers. No rings and no addresses here.

The two directions end separately. Toward the host: the guest says SHUT_SEND, what is queued is
flushed, then the host sees end of file. Toward the guest: the host's end of file becomes SHUT_SEND.
Data goes first in each case, and also before the answer to a full close.
"""

import socket
from select import EPOLLERR, EPOLLET, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP
from typing import Final, Protocol

from microguest.host_client.event_loop import EventLoop, Timer
from microguest.host_client.vhost_vsock.packet import (
    CREDIT_UPDATE,
    MASK32,
    RESPONSE,
    RST,
    SHUT_BOTH,
    SHUT_RECEIVE,
    SHUT_SEND,
    SHUTDOWN,
)

CONNECT_TIMEOUT: Final = 30.0
"""Seconds a host program's dial may wait for the guest (its driver, then its answer)."""
CLOSE_TIMEOUT: Final = 8.0
"""Seconds the guest has to acknowledge a full close, as Linux's vhost_vsock grants."""

LOST_TIMEOUT: Final = 3.0
"""Seconds in which a guest must have taken something of what a host program sent before it left."""

_DISCARD: Final = 64 * 1024
_DISCARD_ROUNDS: Final = 64
_READ_EVENTS: Final = EPOLLIN | EPOLLRDHUP | EPOLLET
_LOST: Final = EPOLLHUP | EPOLLERR


class Carrier(Protocol):
    """What a connection asks of the device that carries it."""

    loop: EventLoop
    window: int

    def queue_control(
        self, op: int, host_port: int, guest_port: int, flags: int, connection: "Connection | None"
    ) -> None:
        """Send a packet without data to the guest, in order with other such packets."""

    def schedule(self, connection: "Connection") -> None:
        """Read from the connection's host socket into guest buffers when there are any."""

    def unlist(self, connection: "Connection") -> None:
        """Route the guest's packets to this connection no more."""

    def forget(self, connection: "Connection") -> None:
        """The connection is over; its place is free."""


class Connection:
    """A stream, from the dial until neither side can miss a byte of it any more."""

    __slots__ = (
        "_backlog",
        "_carrier",
        "_fd",
        "_guest_knows",
        "_timer",
        "announced",
        "closed",
        "credit_queued",
        "forwarded",
        "guest_port",
        "guest_shut",
        "host_gone",
        "host_port",
        "host_shut",
        "open",
        "peer_forwarded",
        "peer_window",
        "readable",
        "scheduled",
        "sent",
        "sock",
    )

    def __init__(
        self, carrier: Carrier, sock: socket.socket, host_port: int, guest_port: int
    ) -> None:
        """Takes over `sock`, connected and non-blocking."""
        self._carrier = carrier
        self.sock = sock
        self._fd = sock.fileno()
        self.host_port = host_port
        self.guest_port = guest_port
        self.open = False  # both sides have agreed to it
        self.closed = False  # it is over, and what is queued for the guest is stale
        self.readable = False  # the host socket may have data (edge-triggered)
        self.scheduled = False  # it waits in the device's queue of readable connections
        self.sent = 0  # bytes to the guest; these four wrap at 2**32
        self.peer_window = 0
        self.peer_forwarded = 0
        self.forwarded = 0  # bytes from the guest that have left for the host
        self.announced = 0  # the value of `forwarded` that the guest was told last
        self.credit_queued = False
        self.guest_shut = 0  # SHUT_* flags that the guest has sent
        self.host_shut = 0  # SHUT_* flags that it was sent
        self.host_gone = False  # the host socket takes no more data
        self._guest_knows = True  # it has to be told of the end
        self._backlog = bytearray()
        self._timer: Timer | None = None
        carrier.loop.add(self._fd, self._on_socket, _READ_EVENTS)

    # -- opening -------------------------------------------------------------------------------

    def await_guest(self) -> None:
        """Drop the dial unless the guest answers within CONNECT_TIMEOUT."""
        self._timer = self._carrier.loop.call_later(CONNECT_TIMEOUT, self.reset)

    def dialled_by_guest(self) -> None:
        """Accept the guest's REQUEST."""
        self.open = True
        self._carrier.queue_control(RESPONSE, self.host_port, self.guest_port, 0, self)

    def accepted_by_guest(self) -> None:
        """The guest took the host's dial: tell the host program, whose data may follow."""
        self._cancel_timer()
        self.open = True
        try:
            self.sock.send(b"OK %d\n" % self.host_port)  # the socket is fresh: there is room
        except OSError:
            self._lose_host()
        if self.readable:
            self._carrier.schedule(self)

    # -- guest to host -------------------------------------------------------------------------

    def deliver(self, buffers: list[memoryview], size: int) -> None:
        """Send the guest's `buffers` to the host; `size` counts against its credit.

        The views are not kept. What the socket does not take now is copied.
        """
        taken = 0
        if not self._backlog and not self.host_gone:
            try:
                if len(buffers) == 1:
                    taken = self.sock.send(buffers[0])
                else:
                    taken = self.sock.sendmsg(buffers)
            except BlockingIOError:
                pass
            except OSError:
                self._lose_host()
        if self.host_gone:
            taken = size
        elif taken < size:
            self._keep(buffers, taken)
        self.forwarded = (self.forwarded + taken) & MASK32
        self.refresh_credit()

    def _keep(self, buffers: list[memoryview], skip: int) -> None:
        backlog = self._backlog
        if not backlog:
            self._carrier.loop.modify(self._fd, _READ_EVENTS | EPOLLOUT)
        for buffer in buffers:
            if skip >= len(buffer):
                skip -= len(buffer)
            else:
                backlog += buffer[skip:]
                skip = 0
        if len(backlog) > self._carrier.window:  # the guest sent more than it was allowed to
            self.reset()

    def refresh_credit(self) -> None:
        """Grant credit when half of what the guest may have in flight has left for the host.

        That is the smaller of both windows: Linux (since early 2026, stable kernels too) sends
        no more ahead than its own buffer size, and would wait for ever for half of a larger one.
        """
        in_flight = min(self._carrier.window, self.peer_window)
        if (self.forwarded - self.announced) & MASK32 >= in_flight // 2:
            self.grant_credit()

    def grant_credit(self) -> None:
        """Tell the guest how much has left for the host, once per queued packet."""
        if not self.credit_queued:
            self.credit_queued = True
            self._carrier.queue_control(CREDIT_UPDATE, self.host_port, self.guest_port, 0, self)

    def guest_shutdown(self, flags: int) -> None:
        """The guest takes no more data (SHUT_RECEIVE), or sends none (SHUT_SEND)."""
        before = self.guest_shut
        self.guest_shut |= flags & SHUT_BOTH
        if self.guest_shut & ~before & SHUT_RECEIVE:
            self._shut_socket(socket.SHUT_RD)  # the host program's next write fails with EPIPE
        if not self._backlog:
            self._flushed()

    def guest_reset(self) -> None:
        """Nothing more comes from the guest: deliver what it had sent, then close.

        The host program's pace decides how long that takes; the connection keeps its place in the
        device's limit meanwhile.
        """
        self._cancel_timer()
        self._carrier.unlist(self)
        self._guest_knows = False
        self.guest_shut = SHUT_BOTH
        if self._backlog:
            self._shut_socket(socket.SHUT_RD)
        else:
            self._close()

    def _flush(self) -> None:
        backlog = self._backlog
        while backlog:
            try:
                sent = self.sock.send(backlog)
            except BlockingIOError:
                break
            except OSError:
                self._lose_host()
                return
            del backlog[:sent]
            self.forwarded = (self.forwarded + sent) & MASK32
        if not backlog:
            self._carrier.loop.modify(self._fd, _READ_EVENTS)
            self._flushed()
        else:
            self.refresh_credit()

    def _flushed(self) -> None:
        if self.guest_shut == SHUT_BOTH:
            self.reset()
            return
        if self.guest_shut & SHUT_SEND:
            self._shut_socket(socket.SHUT_WR)
        elif self.forwarded != self.announced:
            self.grant_credit()

    # -- host to guest -------------------------------------------------------------------------

    def read_into(self, buffers: list[memoryview]) -> int:
        """Read from the host socket into guest `buffers`: the number of bytes; 0 when the host has
        ended; -1 when there is nothing now (a readiness event follows)."""
        try:
            if len(buffers) == 1:
                return self.sock.recv_into(buffers[0])
            return self.sock.recvmsg_into(buffers)[0]
        except BlockingIOError:
            self.readable = False
            return -1
        except OSError:  # the host program closed with data unread: what it wrote has been read
            return 0

    def end_toward_guest(self) -> int:
        """Everything the host wrote is with the guest: the SHUT_* flags to send now."""
        self.readable = False
        self.host_shut |= SHUT_SEND
        if self.host_gone:
            self.host_shut = SHUT_BOTH
            self._cancel_timer()
            self._await_acknowledgement()
        return self.host_shut

    # -- the socket ----------------------------------------------------------------------------

    def _on_socket(self, events: int) -> None:
        if events & _LOST:
            self._lose_host()
        if events & EPOLLOUT and self._backlog and not self.host_gone:
            self._flush()
        if events & ~EPOLLOUT and self._fd >= 0:
            self.readable = True
            if self.open:
                self._carrier.schedule(self)

    def _lose_host(self) -> None:
        """The host socket takes no more data; what it sent before may still be there to read."""
        if self.host_gone:
            return
        self.host_gone = True
        self.forwarded = (self.forwarded + len(self._backlog)) & MASK32
        self._backlog.clear()
        if not self.open or self.guest_shut == SHUT_BOTH:
            self.reset()
            return
        self.host_shut |= SHUT_RECEIVE
        if self.guest_shut & SHUT_RECEIVE:
            self.host_shut |= SHUT_SEND
        self._carrier.queue_control(SHUTDOWN, self.host_port, self.guest_port, self.host_shut, self)
        if self.host_shut == SHUT_BOTH:
            self._await_acknowledgement()
        else:
            self._watch_progress(self.sent)

    def _watch_progress(self, sent: int) -> None:
        """A guest that does not read would never come to the end of what is in its way, and so
        never learn that the host has left: it is told by a reset, and loses that rest."""

        def check() -> None:
            self._timer = None
            if self.sent == sent:
                self.reset()
            else:
                self._watch_progress(self.sent)

        self._cancel_timer()
        self._timer = self._carrier.loop.call_later(LOST_TIMEOUT, check)

    def _shut_socket(self, how: int) -> None:
        try:
            self.sock.shutdown(how)
        except OSError:  # ENOTCONN: the host program has closed already
            return

    # -- the end -------------------------------------------------------------------------------

    def reset(self) -> None:
        """End at once on both sides, dropping what is queued toward the host."""
        self._backlog.clear()
        if self._guest_knows:
            self._carrier.queue_control(RST, self.host_port, self.guest_port, 0, None)
        self._close()

    def _await_acknowledgement(self) -> None:
        """All is said and the guest owes an RST: the socket is not needed for that."""
        self._close_socket()
        if self._timer is None:
            self._timer = self._carrier.loop.call_later(CLOSE_TIMEOUT, self.reset)

    def _close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self.open = False
        self._guest_knows = False
        self._cancel_timer()
        self._close_socket()
        self._carrier.unlist(self)
        self._carrier.forget(self)

    def _close_socket(self) -> None:
        self.host_gone = True
        self.readable = False
        if self._fd < 0:
            return
        self._carrier.loop.remove(self._fd)
        self._fd = -1
        self._discard_unread()
        self.sock.close()

    def _discard_unread(self) -> None:
        """Take what the guest will not read: closing with unread data would turn the host
        program's end of file into ECONNRESET."""
        self._shut_socket(socket.SHUT_RDWR)
        try:
            for _ in range(_DISCARD_ROUNDS):
                if not self.sock.recv(_DISCARD):
                    return
        except OSError:
            return

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
