"""The vsock device: moves packets between the guest's rings and the connections.

Two loops are hot. `_process_transmit` takes the guest's packets in ring order; `_pump` fills the
guest's receive buffers, control packets first, then one packet per readable connection in turn.
Both stop after a bounded number of packets, so that the process's other duties get their turn.

A packet that breaks vsock's rules costs its connection, a ring that breaks virtio's rules costs the
machine (`on_failure`): nothing a guest writes raises out of this module.
"""

import os
import socket
import struct
from collections import deque
from collections.abc import Callable
from select import EPOLLET, EPOLLIN
from typing import Final

from microguest.host_client.event_loop import EventLoop, Timer
from microguest.host_client.vhost_vsock.control import ControlChannel
from microguest.host_client.vhost_vsock.hybrid import HybridListener
from microguest.host_client.vhost_vsock.memory import GuestMemoryError
from microguest.host_client.vhost_vsock.packet import (
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    HEADER,
    HEADER_SIZE,
    HOST_CID,
    MASK32,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    SHUT_RECEIVE,
    SHUT_SEND,
    SHUTDOWN,
    STREAM,
)
from microguest.host_client.vhost_vsock.stream import Connection
from microguest.host_client.vhost_vsock.virtqueue import Virtqueue, VirtqueueError

WINDOW: Final = 256 * 1024
"""Bytes per connection that the guest may send ahead of the host program (our buf_alloc)."""
MAX_CONNECTIONS: Final = 1024
"""Streams at a time, those being opened and those being flushed included."""
MAX_CONTROL: Final = 8192
"""Control packets waiting for guest buffers. At the limit the guest's own packets wait too. Larger
than what all connections together can have queued, so only a flood of stray packets gets there, or
one of dials that are given up before the guest has taken them; at twice as many, dials are refused.
"""
BATCH: Final = 256
"""Packets per direction before other callbacks get their turn."""

_FIRST_PORT: Final = 1 << 30
_LAST_PORT: Final = (1 << 31) - 1
_RX, _TX = 0, 1

_Control = tuple[int, int, int, int, Connection | None]


class VsockDevice:
    """One guest's vsock. Lives in the monitor's event loop; not thread-safe."""

    def __init__(
        self,
        loop: EventLoop,
        *,
        guest_cid: int,
        control: socket.socket,
        hybrid_listener: socket.socket,
        connect_to_host: Callable[[int], socket.socket | None],
        on_failure: Callable[[str], None],
        window: int = WINDOW,
    ) -> None:
        """Serve a machine until `close`. Takes over both sockets.

        guest_cid: 3 to 2**32-2. control: connected stream whose other end QEMU has as
        `-chardev socket,id=vs,fd=N`. hybrid_listener: listening AF_UNIX socket for host programs.
        connect_to_host: asked when the guest dials port P of CID 2; returns a connected socket, or
        None (or raises OSError) to refuse; must not block. on_failure: called at most once, with a
        sentence, when the guest or QEMU broke the rules and the machine should be ended; the
        device serves nothing from then on. RuntimeError on anything but x86-64, whose store order
        the rings rely on.
        """
        if os.uname().machine != "x86_64":
            raise RuntimeError("the built-in vsock device needs x86-64's memory ordering")
        self.loop = loop
        self.window = window
        self._cid = guest_cid
        self._connect_to_host = connect_to_host
        self._on_failure = on_failure
        self._failed = False
        self._rx = Virtqueue("receive", writable=True)
        self._tx = Virtqueue("transmit", writable=False)
        # The event ring would carry a transport reset, which nothing here causes: never served.
        self.rings: tuple[Virtqueue, ...] = (
            self._rx,
            self._tx,
            Virtqueue("event", writable=True),
        )
        self._connections: dict[tuple[int, int], Connection] = {}
        self._alive: set[Connection] = set()
        self._control: deque[_Control] = deque()
        self._ready: deque[Connection] = deque()
        self._pump_due = False
        self._tx_stalled = False
        self._next_port = _FIRST_PORT
        self._on_drained: Callable[[], None] | None = None
        self._drain_timer: Timer | None = None
        self._channel = ControlChannel(loop, control, self, struct.pack("<Q", guest_cid))
        self._hybrid: HybridListener | None = HybridListener(loop, hybrid_listener, self._dial)

    # -- life ----------------------------------------------------------------------------------

    @property
    def connections(self) -> int:
        """Streams that exist now, in whatever phase."""
        return len(self._alive)

    def drain(self, done: Callable[[], None], timeout: float) -> None:
        """The machine has ended: deliver what the guest had sent, then call `done()` once.

        Takes what is still in the transmit ring, ends every connection after its last byte, and
        accepts none. `done` is called at the latest after `timeout` seconds; `close` comes then.
        """
        self._guest_gone()
        self._close_hybrid()
        self._on_drained = done
        if self._alive:
            self._drain_timer = self.loop.call_later(timeout, self._drained)
        else:
            self.loop.defer(self._drained)

    def close(self) -> None:
        """Close everything at once; what host programs have not taken is lost (see `drain`)."""
        self._on_drained = None
        if self._drain_timer is not None:
            self._drain_timer.cancel()
        self._close_hybrid()
        self._channel.close()
        for connection in list(self._alive):
            connection.reset()
        self._control.clear()
        self._ready.clear()

    def _drained(self) -> None:
        if self._drain_timer is not None:
            self._drain_timer.cancel()
        done, self._on_drained = self._on_drained, None
        if done is not None:
            done()

    def _close_hybrid(self) -> None:
        if self._hybrid is not None:
            self._hybrid.close()
            self._hybrid = None

    def _guest_gone(self) -> None:
        """Nothing comes from the guest any more; its last packets may still lie in the ring."""
        self._finish_transmit()
        self._channel.close()
        for connection in list(self._alive):
            connection.guest_reset()
        self._control.clear()

    def _fail(self, reason: str) -> None:
        if self._failed:
            return
        self._failed = True
        self._tx.stop()
        self._guest_gone()
        self._close_hybrid()
        self._on_failure(reason)

    # -- what the control channel calls --------------------------------------------------------

    def ring_started(self, index: int, *, resumed: bool) -> None:
        """See RingOwner. A driver that starts afresh knows none of the old connections."""
        kick = self.rings[index].kick
        assert kick is not None
        if index == _RX:
            if not resumed:
                self._forget_driver()
            self._watch(kick, self._on_receive_kick)
            self._pump_later()
        elif index == _TX:
            self._watch(kick, self._on_transmit_kick)
            self.loop.defer(self._process_transmit_safely)

    def _watch(self, kick: int, callback: Callable[[int], None]) -> None:
        # Edge-triggered: every write to the eventfd is an event, so it need not be read.
        self.loop.remove(kick)
        self.loop.add(kick, callback, EPOLLIN | EPOLLET)

    def ring_stopping(self, index: int) -> None:
        """See RingOwner. The guest's last bytes before a power-off are taken here."""
        kick = self.rings[index].kick
        assert kick is not None
        self.loop.remove(kick)
        self._finish_transmit()

    def control_ended(self, reason: str | None) -> None:
        """See RingOwner. Without a reason QEMU is exiting, which its owner sees by itself."""
        if reason is None:
            self._guest_gone()
        else:
            self._fail(reason)

    def _forget_driver(self) -> None:
        """End what an earlier driver left, except dials that no driver has been told of yet."""
        requests = [packet for packet in self._control if packet[0] == REQUEST]
        waiting = {packet[4] for packet in requests}
        for connection in list(self._alive):
            if connection not in waiting:
                connection.guest_reset()
        self._control = deque(requests)

    # -- guest to host -------------------------------------------------------------------------

    def _on_transmit_kick(self, _events: int) -> None:
        self._process_transmit_safely()

    def _process_transmit_safely(self) -> None:
        try:
            self._process_transmit()
        except (VirtqueueError, GuestMemoryError) as error:
            self._fail(f"the guest broke its vsock device: {error}")

    def _process_transmit(self) -> None:
        ring = self._tx
        if not (ring.running and ring.enabled):
            return
        budget = BATCH
        ring.mute()
        while True:
            while ring.has_next():
                if len(self._control) >= MAX_CONTROL:
                    self._tx_stalled = True  # the pump continues here
                    ring.signal()
                    return
                if budget == 0:
                    self.loop.defer(self._process_transmit_safely)
                    ring.signal()
                    return
                budget -= 1
                self._take_packet(ring.peek())
                ring.complete(0)
            ring.listen()
            if not ring.has_next():
                break
            ring.mute()
        ring.signal()

    def _finish_transmit(self) -> None:
        """Take what the guest has put into the transmit ring before it goes away, one ring full
        at most. A broken ring has nothing to lose."""
        ring = self._tx
        try:
            for _ in range(ring.size):
                if not (ring.running and ring.has_next()):
                    break
                self._take_packet(ring.peek())
                ring.complete(0)
        except (VirtqueueError, GuestMemoryError):
            ring.stop()
        if ring.running:
            ring.signal()  # a machine that is only paused waits for these buffers when it goes on

    def _take_packet(self, buffers: list[memoryview]) -> None:
        """Act on one packet of the guest. The buffers are the guest's again afterwards."""
        first = buffers[0]
        header = first if len(first) >= HEADER_SIZE else _gather(buffers)
        if len(header) < HEADER_SIZE:
            return  # not a packet; there is nobody to answer
        source, target, guest_port, host_port, size, kind, op, flags, window, forwarded = (
            HEADER.unpack_from(header)
        )
        connection = self._connections.get((host_port, guest_port))
        addressed = source == self._cid and target == HOST_CID and kind == STREAM
        if connection is None or not addressed:
            if op == REQUEST and addressed:
                self._guest_dials(host_port, guest_port, window, forwarded)
            elif op != RST:
                self.queue_control(RST, host_port, guest_port, 0, None)
            return
        connection.peer_window = window
        connection.peer_forwarded = forwarded
        if op == RW and connection.open:
            self._take_data(connection, buffers, size)
        elif connection.open:
            self._take_control(connection, op, flags)
        else:
            self._answer_to_dial(connection, op)

    def _take_data(self, connection: Connection, buffers: list[memoryview], size: int) -> None:
        payload = _payload(buffers, size) if size <= self.window else None
        if payload is None or connection.guest_shut & SHUT_SEND:
            connection.reset()
            return
        if size:
            connection.deliver(payload, size)
        if connection.readable:
            self.schedule(connection)

    def _answer_to_dial(self, connection: Connection, op: int) -> None:
        if op == RESPONSE:
            connection.accepted_by_guest()
        elif op == RST:
            connection.guest_reset()
        else:
            connection.reset()

    def _take_control(self, connection: Connection, op: int, flags: int) -> None:
        if op == CREDIT_UPDATE:
            if connection.forwarded != connection.announced:
                connection.refresh_credit()
            if connection.readable:
                self.schedule(connection)
        elif op == CREDIT_REQUEST:
            connection.grant_credit()
        elif op == SHUTDOWN:
            connection.guest_shutdown(flags)
        elif op == RST:
            connection.guest_reset()
        else:  # a second REQUEST or RESPONSE, or no operation at all
            connection.reset()

    def _guest_dials(self, host_port: int, guest_port: int, window: int, forwarded: int) -> None:
        sock = None
        if len(self._alive) < MAX_CONNECTIONS:
            try:
                sock = self._connect_to_host(host_port)
            except OSError:
                sock = None
        if sock is None:
            self.queue_control(RST, host_port, guest_port, 0, None)
            return
        sock.setblocking(False)
        connection = self._enlist(sock, host_port, guest_port)
        connection.peer_window = window
        connection.peer_forwarded = forwarded
        connection.dialled_by_guest()

    # -- host to guest -------------------------------------------------------------------------

    def _on_receive_kick(self, _events: int) -> None:
        self._pump_later()

    def _pump_later(self) -> None:
        if not self._pump_due:
            self._pump_due = True
            self.loop.defer(self._pump_safely)

    def _pump_safely(self) -> None:
        self._pump_due = False
        try:
            self._pump()
        except (VirtqueueError, GuestMemoryError) as error:
            self._fail(f"the guest broke its vsock device: {error}")

    def _pump(self) -> None:
        ring = self._rx
        if not (ring.running and ring.enabled):
            return
        control, ready = self._control, self._ready
        budget = BATCH
        while control or ready:
            if not ring.has_next():
                ring.listen()
                if not ring.has_next():
                    break
                ring.mute()
            if budget == 0:
                self._pump_later()
                break
            budget -= 1
            if control:
                packet = control.popleft()
                if packet[4] is None or not packet[4].closed:
                    self._put(packet, ring.peek(), 0)
            else:
                connection = ready.popleft()
                connection.scheduled = False
                self._feed(ring, connection)
        ring.signal()
        if self._tx_stalled and len(control) < MAX_CONTROL:
            self._tx_stalled = False
            self.loop.defer(self._process_transmit_safely)

    def _put(self, packet: _Control, buffers: list[memoryview], size: int) -> None:
        """Complete the next receive chain with a packet whose `size` data bytes are in it."""
        op, host_port, guest_port, flags, connection = packet
        window = forwarded = 0
        if connection is not None:
            window, forwarded = self.window, connection.forwarded
            connection.announced = forwarded
            if op == CREDIT_UPDATE:
                connection.credit_queued = False
        header = HEADER.pack(
            HOST_CID, self._cid, host_port, guest_port, size, STREAM, op, flags, window, forwarded
        )
        if len(buffers[0]) >= HEADER_SIZE:
            buffers[0][:HEADER_SIZE] = header
        else:
            _scatter(buffers, header)
        self._rx.complete(HEADER_SIZE + size)

    def _feed(self, ring: Virtqueue, connection: Connection) -> None:
        """Move what fits in one receive buffer, then queue for the next turn."""
        if not connection.readable or connection.guest_shut & SHUT_RECEIVE:
            return
        in_flight = (connection.sent - connection.peer_forwarded) & MASK32
        credit = connection.peer_window - in_flight
        if credit <= 0:
            return  # a packet with new credit schedules the connection again
        buffers = ring.peek()
        space = _behind_header(buffers, credit)
        if not space:
            raise VirtqueueError("receive ring: a buffer without room for data")
        size = connection.read_into(space)
        ports = connection.host_port, connection.guest_port
        if size > 0:
            connection.sent = (connection.sent + size) & MASK32
            self._put((RW, *ports, 0, connection), buffers, size)
            connection.scheduled = True
            self._ready.append(connection)
        elif size == 0:
            self._put((SHUTDOWN, *ports, connection.end_toward_guest(), connection), buffers, 0)

    # -- what connections call -----------------------------------------------------------------

    def queue_control(
        self, op: int, host_port: int, guest_port: int, flags: int, connection: Connection | None
    ) -> None:
        """See Carrier."""
        self._control.append((op, host_port, guest_port, flags, connection))
        if not self._pump_due:
            self._pump_later()

    def schedule(self, connection: Connection) -> None:
        """See Carrier."""
        if not connection.scheduled:
            connection.scheduled = True
            self._ready.append(connection)
            self._pump_later()

    def unlist(self, connection: Connection) -> None:
        """See Carrier."""
        key = connection.host_port, connection.guest_port
        if self._connections.get(key) is connection:
            del self._connections[key]

    def forget(self, connection: Connection) -> None:
        """See Carrier."""
        self._alive.discard(connection)
        if self._on_drained is not None and not self._alive:
            self.loop.defer(self._drained)

    def _enlist(self, sock: socket.socket, host_port: int, guest_port: int) -> Connection:
        connection = Connection(self, sock, host_port, guest_port)
        self._connections[host_port, guest_port] = connection
        self._alive.add(connection)
        return connection

    def _dial(self, sock: socket.socket, guest_port: int) -> None:
        """A host program wants `guest_port`. Waits for the guest's driver if that is not up yet."""
        # A guest that takes no packets, as a paused one, gets no more dials than that.
        if len(self._alive) >= MAX_CONNECTIONS or len(self._control) >= 2 * MAX_CONTROL:
            sock.close()
            return
        while True:
            host_port = self._next_port
            self._next_port = host_port + 1 if host_port < _LAST_PORT else _FIRST_PORT
            if (host_port, guest_port) not in self._connections:
                break
        connection = self._enlist(sock, host_port, guest_port)
        connection.await_guest()
        self.queue_control(REQUEST, host_port, guest_port, 0, connection)


def _gather(buffers: list[memoryview]) -> bytes:
    """The header of a packet whose first buffer is too short for it; shorter if it has none."""
    header = b""
    for buffer in buffers:
        header += buffer[: HEADER_SIZE - len(header)]
        if len(header) == HEADER_SIZE:
            break
    return header


def _scatter(buffers: list[memoryview], header: bytes) -> None:
    for buffer in buffers:
        part, header = header[: len(buffer)], header[len(buffer) :]
        buffer[: len(part)] = part
        if not header:
            return
    raise VirtqueueError("receive ring: a buffer without room for a packet header")


def _payload(buffers: list[memoryview], size: int) -> list[memoryview] | None:
    """The `size` bytes behind the header, or None when the packet is shorter than it says."""
    if len(buffers) == 2 and len(buffers[0]) == HEADER_SIZE and len(buffers[1]) == size:
        return buffers[1:]  # as Linux up to 6.2 sends it
    parts = _behind_header(buffers, size)
    return parts if sum(map(len, parts)) == size else None


def _behind_header(buffers: list[memoryview], limit: int) -> list[memoryview]:
    """What of the buffers lies behind the header, at most `limit` bytes."""
    parts = []
    skip = HEADER_SIZE
    for buffer in buffers:
        if skip >= len(buffer):
            skip -= len(buffer)
            continue
        part = buffer[skip : skip + limit]
        skip = 0
        limit -= len(part)
        parts.append(part)
        if not limit:
            break
    return parts
