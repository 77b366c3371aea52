"""The vsock device against a fake QEMU and guest: real shared memory, rings, eventfds and sockets.

`FakeGuest` is a well-behaved driver: it waits for interrupts, kicks only when asked, and keeps to
its credit, so a lost notification or a wrong window shows as a timeout. The hostile guests are in
test_vhost_vsock_hostile.py, which uses it too.
"""

import hashlib
import itertools
import mmap
import os
import random
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from patience import PATIENCE

from microguest.host_client.vhost_vsock import EventLoop, VsockDevice, unix_dialer
from microguest.host_client.vhost_vsock import stream as connection

HEADER = struct.Struct("<QQIIIHHIII")
REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)
CID = 77
EVENT_INDEX = 1 << 29
BASE_FEATURES = 1 << 32 | 1 << 30 | 1 << 28
GUEST_BASE, QEMU_BASE = 0x4000_0000, 0x7F12_0000_0000
RING = 128
RX_SLOT, TX_SLOT = 4096, 16384
RINGS_AT, RX_AT, TX_AT = 0, 0x10000, 0x100000
MEMORY = TX_AT + RING * TX_SLOT
WAIT = PATIENCE

_lock = threading.Lock()


def fence() -> None:
    with _lock:
        pass


class Packet:
    def __init__(self, data: bytes) -> None:
        fields = HEADER.unpack_from(data)
        (self.source, self.target, self.host_port, self.guest_port, self.size) = fields[:5]
        (self.kind, self.op, self.flags, self.window, self.forwarded) = fields[5:]
        self.data = data[44:]


class Ring:
    """The driver's side of one split ring."""

    def __init__(self, guest: "FakeGuest", index: int) -> None:
        self.guest, self.index = guest, index
        self.at = RINGS_AT + index * 0x4000
        self.avail_at, self.used_at = self.at + 0x1000, self.at + 0x2000
        memory = memoryview(guest.memory)
        self.avail = memory[self.avail_at : self.avail_at + 6 + 2 * RING].cast("H")
        self.used = memory[self.used_at : self.used_at + 6 + 8 * RING]
        self.used16 = self.used[:4].cast("H")
        self.avail_event = self.used[4 + 8 * RING :].cast("H")
        self.taken = 0
        self.kick, self.call = os.eventfd(0), os.eventfd(0, os.EFD_NONBLOCK)
        self.kicks = 0

    def describe(self, slot: int, address: int, size: int, flags: int, following: int = 0) -> None:
        entry = struct.pack("<QIHH", address, size, flags, following)
        self.guest.memory[self.at + 16 * slot : self.at + 16 * slot + 16] = entry

    def publish(self, head: int) -> None:
        index = self.avail[1]
        self.avail[2 + index % RING] = head
        self.avail[1] = (index + 1) & 0xFFFF
        fence()
        if self.guest.event_index:
            if self.avail_event[0] == index:
                self.notify()
        elif not self.used16[0] & 1:
            self.notify()

    def notify(self) -> None:
        self.kicks += 1
        os.eventfd_write(self.kick, 1)

    def next_used(self, timeout: float) -> tuple[int, int] | None:
        """Wait, by interrupt only, for the device to give a chain back: (head, written)."""
        deadline = time.monotonic() + timeout
        while self.used16[1] == self.taken:
            if self.guest.event_index:
                self.avail[2 + RING] = self.taken
            fence()
            if self.used16[1] != self.taken:
                break
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.call], [], [], left)[0]:
                if self.used16[1] != self.taken:
                    assert select.select([self.call], [], [], 2)[0], "an interrupt was lost"
                    continue
                return None
            os.eventfd_read(self.call)
        slot = self.taken % RING
        self.taken = (self.taken + 1) & 0xFFFF
        head, written = struct.unpack_from("<II", self.used, 4 + 8 * slot)
        return head, written

    def release(self) -> None:
        for view in (self.avail, self.avail_event, self.used16, self.used):
            view.release()


class FakeGuest:
    """QEMU and a Linux-like driver in one. `streams` holds what the guest side has open."""

    def __init__(
        self,
        folder: Path,
        *,
        event_index: bool = True,
        layout: str = "joined",
        window: int = 256 * 1024,
        device_window: int = 256 * 1024,
        connect_to_host: Callable[[int], socket.socket | None] | None = None,
        start: bool = True,
    ) -> None:
        self.event_index, self.layout, self.window = event_index, layout, window
        self.hybrid_path = str(folder / "v.sock")
        self.listening = {1024}
        self.streams: dict[tuple[int, int], GuestStream] = {}
        self.accepted: deque[GuestStream] = deque()
        self.stray: list[Packet] = []
        self.failures: list[str] = []
        self.next_port = 5000
        self.fd = os.memfd_create("guest")
        os.ftruncate(self.fd, MEMORY)
        self.memory = mmap.mmap(self.fd, MEMORY)
        self.rings = [Ring(self, index) for index in range(3)]
        self.free = deque(range(RING))
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.hybrid_path)
        listener.listen(64)
        self.control, device_end = socket.socketpair()
        self.control.settimeout(WAIT)
        self.loop = EventLoop()
        self.device = VsockDevice(
            self.loop,
            guest_cid=CID,
            control=device_end,
            hybrid_listener=listener,
            connect_to_host=connect_to_host or unix_dialer(self.hybrid_path),
            on_failure=self.failures.append,
            window=device_window,
        )
        self.calls: deque[Callable[[], None]] = deque()
        self.wake = os.eventfd(0)
        self.loop.add(self.wake, self._run_calls, select.EPOLLIN)
        self.thread = threading.Thread(target=self.loop.run)
        self.thread.start()
        self.set_up()
        if start:
            self.start()

    # -- life

    def _run_calls(self, _events: int) -> None:
        os.eventfd_read(self.wake)
        while self.calls:
            self.calls.popleft()()

    def in_loop(self, call: Callable[[], None]) -> None:
        """Run `call` in the device's thread and wait for it."""
        done = threading.Event()
        self.calls.extend((call, done.set))
        os.eventfd_write(self.wake, 1)
        assert done.wait(WAIT)

    def close(self) -> None:
        self.in_loop(self.device.close)
        self.in_loop(self.loop.stop)
        self.thread.join(WAIT)
        assert not self.thread.is_alive()
        self.loop.close()
        self.control.close()
        for ring in self.rings:
            ring.release()
            os.close(ring.kick)
            os.close(ring.call)
        self.memory.close()
        os.close(self.fd)
        os.close(self.wake)

    # -- vhost-user

    def request(
        self, number: int, payload: bytes, fds: list[int] | None = None, *, flags: int = 1
    ) -> None:
        message = struct.pack("<III", number, flags, len(payload)) + payload
        socket.send_fds(self.control, [message], fds or [])

    def reply(self, number: int) -> bytes:
        answer, flags, size = struct.unpack("<III", exactly(self.control, 12))
        assert (answer, flags) == (number, 5)
        return exactly(self.control, size)

    def ask(self, number: int, payload: bytes = b"") -> bytes:
        self.request(number, payload)
        return self.reply(number)

    def sync(self) -> None:
        """Return when the device has handled every message before this one."""
        self.ask(17)

    def set_up(self) -> None:
        offered = struct.unpack("<Q", self.ask(1))[0]
        wanted = BASE_FEATURES | (EVENT_INDEX if self.event_index else 0)
        assert wanted & ~offered == 0
        assert struct.unpack("<Q", self.ask(15))[0] == 1 << 3 | 1 << 9
        self.request(16, struct.pack("<Q", 1 << 3 | 1 << 9))
        self.request(3, b"")
        self.request(2, struct.pack("<Q", wanted))
        config = self.ask(24, struct.pack("<III", 0, 8, 0) + bytes(8))
        assert config == struct.pack("<IIIQ", 0, 8, 0, CID)
        self.set_memory()

    def set_memory(self) -> None:
        table = struct.pack("<IIQQQQ", 1, 0, GUEST_BASE, MEMORY, QEMU_BASE, 0)
        self.request(5, table, [self.fd], flags=9)
        assert self.reply(5) == bytes(8)

    def start(self, bases: tuple[int, int] = (0, 0)) -> None:
        for slot in range(RING):
            self.rings[0].describe(slot, GUEST_BASE + RX_AT + slot * RX_SLOT, RX_SLOT, 2)
        if bases == (0, 0):
            for ring in self.rings:
                ring.taken = 0
                self.memory[ring.avail_at : ring.avail_at + 6 + 2 * RING] = bytes(6 + 2 * RING)
                self.memory[ring.used_at : ring.used_at + 6 + 8 * RING] = bytes(6 + 8 * RING)
            for slot in range(RING):
                self.rings[0].avail[2 + slot] = slot
            self.rings[0].avail[1] = RING
        for index, base in zip((0, 1), bases, strict=True):
            self.start_ring(index, base)
        self.sync()

    def start_ring(self, index: int, base: int) -> None:
        ring = self.rings[index]
        self.request(8, struct.pack("<II", index, RING))
        self.request(10, struct.pack("<II", index, base))
        where = [QEMU_BASE + at for at in (ring.at, ring.used_at, ring.avail_at)]
        self.request(9, struct.pack("<IIQQQQ", index, 0, *where, 0))
        self.request(13, struct.pack("<Q", index), [ring.call])
        self.request(12, struct.pack("<Q", index), [ring.kick])
        self.request(18, struct.pack("<II", index, 1))

    def stop(self) -> tuple[int, int]:
        bases = []
        for index in (0, 1):
            answered, base = struct.unpack("<II", self.ask(11, struct.pack("<II", index, 0)))
            assert answered == index
            bases.append(base)
        return bases[0], bases[1]

    # -- packets

    def put(self, packet: bytes) -> None:
        """Send one packet in the layout that this guest uses."""
        ring = self.rings[1]
        while not self.free:
            used = ring.next_used(WAIT)
            assert used is not None, "the device gives no transmit buffer back"
            self.free.append(used[0])
        slot = self.free.popleft()
        at = TX_AT + slot * TX_SLOT
        self.memory[at : at + len(packet)] = packet
        start = GUEST_BASE + at
        cuts = {"joined": [len(packet)], "split": [44], "shreds": [7, 30, 60]}[self.layout]
        edges = sorted({0, len(packet), *(cut for cut in cuts if cut < len(packet))})
        parts = list(itertools.pairwise(edges))
        if len(parts) <= 1:
            ring.describe(slot, start, len(packet), 0)
        else:  # an indirect table at the end of the slot
            table = b"".join(
                struct.pack("<QIHH", start + a, b - a, 1 if b < len(packet) else 0, n + 1)
                for n, (a, b) in enumerate(parts)
            )
            at += TX_SLOT - 256
            self.memory[at : at + len(table)] = table
            ring.describe(slot, GUEST_BASE + at, len(table), 4)
        ring.publish(slot)

    def send(
        self,
        op: int,
        host_port: int,
        guest_port: int,
        data: bytes = b"",
        *,
        flags: int = 0,
        forwarded: int = 0,
        window: int | None = None,
        **odd: int,
    ) -> None:
        window = self.window if window is None else window
        self.put(
            HEADER.pack(
                odd.get("source", CID),
                odd.get("target", 2),
                guest_port,
                host_port,
                odd.get("size", len(data)),
                odd.get("kind", 1),
                op,
                flags,
                window,
                forwarded,
            )
            + data
        )

    def receive(self, timeout: float = WAIT) -> Packet | None:
        """The next packet of the device, its buffer given back; None when none comes."""
        ring = self.rings[0]
        used = ring.next_used(timeout)
        if used is None:
            return None
        head, written = used
        at = RX_AT + head * RX_SLOT
        packet = Packet(self.memory[at : at + written])
        ring.publish(head)
        assert packet.source == 2
        assert packet.target == CID
        assert packet.kind == 1
        assert packet.size == len(packet.data)
        return packet

    def step(self, timeout: float = WAIT) -> Packet | None:
        """Take one packet and act on it as a kernel would."""
        packet = self.receive(timeout)
        if packet is None:
            return None
        key = packet.host_port, packet.guest_port
        stream = self.streams.get(key)
        if packet.op == REQUEST and stream is None and packet.guest_port in self.listening:
            stream = self.streams[key] = GuestStream(self, *key)
            stream.credit(packet)
            stream.open = True
            self.send(RESPONSE, *key)
            self.accepted.append(stream)
        elif stream is not None:
            stream.handle(packet)
        elif packet.op != RST:
            self.send(RST, *key)
        else:
            self.stray.append(packet)
        return packet

    def until(self, condition: Callable[[], object], timeout: float = WAIT) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, "the device did not get there"
            self.step(0.02)

    def accept(self) -> "GuestStream":
        self.until(lambda: self.accepted)
        return self.accepted.popleft()

    def dial(self, port: int) -> "GuestStream":
        self.next_port += 1
        stream = self.streams[port, self.next_port] = GuestStream(self, port, self.next_port)
        self.send(REQUEST, port, stream.guest_port)
        self.until(lambda: stream.open or stream.reset)
        return stream

    def host_dial(self, port: int = 1024) -> socket.socket:
        """A host program's CONNECT, not waiting for the answer."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(WAIT)
        sock.connect(self.hybrid_path)
        sock.sendall(b"CONNECT %d\n" % port)
        return sock

    def connect(self) -> tuple[socket.socket, "GuestStream"]:
        sock = self.host_dial()
        stream = self.accept()
        assert line(sock) == b"OK %d\n" % stream.host_port
        return sock, stream


class GuestStream:
    """One socket of the guest, with a kernel's credit rules."""

    def __init__(self, guest: FakeGuest, host_port: int, guest_port: int) -> None:
        self.guest, self.host_port, self.guest_port = guest, host_port, guest_port
        self.open = self.reset = False
        self.received = bytearray()
        self.hold = False  # the program does not read: no credit is given back
        self.consumed = self.told = 0
        self.sent = self.peer_window = self.peer_forwarded = 0
        self.peer_shut = 0

    def credit(self, packet: Packet) -> None:
        self.peer_window, self.peer_forwarded = packet.window, packet.forwarded

    def handle(self, packet: Packet) -> None:
        if packet.op == RST:
            self.reset, self.open = True, False
            del self.guest.streams[self.host_port, self.guest_port]
            return
        self.credit(packet)
        if packet.op == RESPONSE:
            self.open = True
        elif packet.op == SHUTDOWN:
            self.peer_shut |= packet.flags
        elif packet.op == RW:
            self.received += packet.data
            outstanding = len(self.received) - (0 if self.hold else self.told)
            assert outstanding <= self.guest.window, "the device overran the guest's window"
            if not self.hold and len(self.received) - self.told > self.guest.window // 2:
                self.give_credit()

    def give_credit(self) -> None:
        self.told = len(self.received)
        self.control(CREDIT_UPDATE)

    def control(self, op: int, flags: int = 0) -> None:
        forwarded = self.told & 0xFFFFFFFF
        self.guest.send(op, self.host_port, self.guest_port, flags=flags, forwarded=forwarded)

    def room(self) -> int:
        in_flight = (self.sent - self.peer_forwarded) & 0xFFFFFFFF
        return min(self.peer_window, self.guest.window) - in_flight

    def send(self, data: bytes, packet: int = 12000) -> None:
        offset = 0
        while offset < len(data):
            self.guest.until(lambda: self.room() > 0 or self.reset)
            assert not self.reset
            part = data[offset : offset + min(packet, self.room())]
            self.guest.send(
                RW, self.host_port, self.guest_port, part, forwarded=self.told & 0xFFFFFFFF
            )
            self.sent = (self.sent + len(part)) & 0xFFFFFFFF
            offset += len(part)

    def stuff(self) -> bytes:
        """Send until the host program's socket and the window are full: what was sent."""
        data, full = b"", 0
        while True:
            self.control(CREDIT_REQUEST)
            self.guest.step()  # the answer
            while self.guest.step(0.05):
                pass
            if self.room() <= 0:
                full += 1
                if full == 3:  # and not only because the device is slow
                    return data
                continue
            full = 0
            part = blob(self.room(), seed=len(data))
            self.send(part)
            data += part

    def shutdown(self, flags: int) -> None:
        self.control(SHUTDOWN, flags)

    def wait_for(self, size: int) -> bytes:
        self.guest.until(lambda: len(self.received) >= size)
        return bytes(self.received)


def exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = sock.recv(size - len(data))
        assert part, f"end of file after {len(data)} of {size} bytes"
        data += part
    return data


def line(sock: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        part = sock.recv(1)
        if not part:
            return data
        data += part
    return data


def to_end(sock: socket.socket) -> bytes:
    data = bytearray()
    while part := sock.recv(65536):
        data += part
    return bytes(data)


class InThread:
    """Runs a host program's part while the test plays the guest."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.result: object = None
        self.thread = threading.Thread(target=self._run, args=(call,))
        self.thread.start()

    def _run(self, call: Callable[[], object]) -> None:
        self.result = call()

    def done(self) -> bool:
        return not self.thread.is_alive()

    def join(self) -> object:
        self.thread.join(WAIT)
        assert self.done()
        return self.result


@contextmanager
def fake_guest(folder: Path, **options: object) -> Iterator[FakeGuest]:
    guest = FakeGuest(folder, **options)  # type: ignore[arg-type]
    try:
        yield guest
    finally:
        guest.close()


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[FakeGuest]:
    with fake_guest(tmp_path) as made:
        yield made


def blob(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


# -- opening -----------------------------------------------------------------------------------


@pytest.mark.parametrize("event_index", [True, False])
@pytest.mark.parametrize("layout", ["joined", "split", "shreds"])
def test_a_host_program_talks_to_a_guest_port(
    tmp_path: Path, layout: str, event_index: bool
) -> None:
    with fake_guest(tmp_path, layout=layout, event_index=event_index) as guest:
        sock, stream = guest.connect()
        with sock:
            for round_ in range(300):
                message = b"%d" % round_ * 20
                sock.sendall(message)
                assert stream.wait_for(len(message)) == message
                stream.received.clear()
                stream.told = 0
                stream.send(message)
                assert exactly(sock, len(message)) == message


def test_bytes_right_behind_the_connect_line_are_data(guest: FakeGuest) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(guest.hybrid_path)
        sock.sendall(b"CONN")
        time.sleep(0.02)
        sock.sendall(b"ECT 1024\nhello")
        stream = guest.accept()
        assert stream.wait_for(5) == b"hello"


def test_the_guest_dials_a_host_port(guest: FakeGuest) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(guest.hybrid_path + "_900")
        listener.listen()
        listener.settimeout(WAIT)
        stream = guest.dial(900)
        assert stream.open
        sock, _ = listener.accept()
        with sock:
            stream.send(b"ready")
            assert exactly(sock, 5) == b"ready"
            sock.sendall(b"fine")
            assert stream.wait_for(4) == b"fine"


def test_a_port_nobody_listens_on_is_refused_both_ways(guest: FakeGuest) -> None:
    assert guest.dial(901).reset
    with guest.host_dial(2000) as sock:
        answer = InThread(lambda: line(sock))
        guest.until(answer.done)
        assert answer.join() == b""


def test_a_dial_before_the_driver_waits_for_it(tmp_path: Path) -> None:
    with fake_guest(tmp_path, start=False) as guest, guest.host_dial() as sock:
        time.sleep(0.05)
        guest.start()
        stream = guest.accept()
        assert line(sock) == b"OK %d\n" % stream.host_port


def test_a_host_program_that_stops_waiting_leaves_nothing(tmp_path: Path) -> None:
    with fake_guest(tmp_path, start=False) as guest:
        sock = guest.host_dial()
        wait_until(lambda: guest.device.connections == 1)
        sock.close()
        wait_until(lambda: guest.device.connections == 0)
        guest.start()
        while packet := guest.receive(0.05):
            assert packet.op == RST


@pytest.mark.parametrize(
    "text", [b"\n", b"CONNECT\n", b"CONNECT x\n", b"HELLO 5\n", b"CONNECT 4294967296\n", b"x" * 64]
)
def test_a_bad_connect_line_is_closed(guest: FakeGuest, text: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(WAIT)
        sock.connect(guest.hybrid_path)
        sock.sendall(text)
        try:
            assert sock.recv(1) == b""
        except ConnectionResetError:
            pass  # the rest of the line was not read


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# -- bulk and credit ---------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["joined", "split"])
@pytest.mark.parametrize("window", [256 * 1024, 30_000])
def test_five_megabytes_each_way(tmp_path: Path, layout: str, window: int) -> None:
    data = blob(5_000_000)
    with fake_guest(tmp_path, layout=layout, window=window, device_window=1 << 20) as guest:
        sock, stream = guest.connect()
        with sock:
            sender = InThread(lambda: sock.sendall(data))
            received = stream.wait_for(len(data))
            sender.join()
            assert hashlib.sha256(received).digest() == hashlib.sha256(data).digest()
            reader = InThread(lambda: exactly(sock, len(data)))
            stream.send(data)
            assert reader.join() == data


def test_a_host_program_that_does_not_read_stops_its_guest_only(guest: FakeGuest) -> None:
    sock, stream = guest.connect()
    other, lively = guest.connect()
    with sock, other:
        data = stream.stuff()
        assert len(data) < 1_000_000
        lively.send(b"still here")
        assert exactly(other, 10) == b"still here"
        more = blob(1_000_000)
        reader = InThread(lambda: exactly(sock, len(data) + len(more)))
        stream.send(more)
        assert reader.join() == data + more


def test_a_guest_that_does_not_read_is_not_overrun(guest: FakeGuest) -> None:
    sock, stream = guest.connect()
    with sock:
        stream.hold = True
        data = blob(1_000_000)
        sender = InThread(lambda: sock.sendall(data))
        guest.until(lambda: len(stream.received) == guest.window)
        assert guest.receive(0.1) is None
        stream.hold = False
        stream.give_credit()
        assert stream.wait_for(len(data)) == data
        sender.join()


def test_a_guest_that_asks_is_told_its_credit(guest: FakeGuest) -> None:
    sock, stream = guest.connect()
    with sock:
        stream.send(b"x" * 1000)
        exactly(sock, 1000)
        stream.control(CREDIT_REQUEST)
        packet = guest.receive()
        assert packet is not None
        assert packet.op == CREDIT_UPDATE
        assert packet.window == 256 * 1024
        assert packet.forwarded == 1000


def test_many_connections_share_the_ring_fairly(guest: FakeGuest) -> None:
    pairs = [guest.connect() for _ in range(40)]
    data = blob(100_000)
    for sock, _ in pairs:
        sock.sendall(data)  # fits the socket's own buffer; the ring holds five of these
    guest.until(lambda: sum(len(stream.received) for _, stream in pairs) > 2_500_000)
    assert min(len(stream.received) for _, stream in pairs) > 20_000
    for sock, stream in pairs:
        assert stream.wait_for(len(data)) == data
        sock.close()


# -- ends ----------------------------------------------------------------------------------------


def test_half_close_from_the_host(guest: FakeGuest) -> None:
    sock, stream = guest.connect()
    with sock:
        sock.sendall(b"request")
        sock.shutdown(socket.SHUT_WR)
        guest.until(lambda: stream.peer_shut)
        assert stream.peer_shut == 2
        assert stream.received == b"request"
        stream.send(b"answer")
        stream.shutdown(3)
        assert to_end(sock) == b"answer"
        guest.until(lambda: stream.reset)
    wait_until(lambda: guest.device.connections == 0)


def test_half_close_from_the_guest(guest: FakeGuest) -> None:
    sock, stream = guest.connect()
    with sock:
        stream.send(b"request")
        stream.shutdown(2)
        assert to_end(sock) == b"request"
        sock.sendall(b"answer")
        assert stream.wait_for(6) == b"answer"
    guest.until(lambda: stream.peer_shut == 3)


def test_a_guest_that_reads_no_more_gives_the_host_epipe(guest: FakeGuest) -> None:
    sock, stream = guest.connect()
    with sock:
        stream.shutdown(1)
        wait_until(lambda: not writable(sock))
        stream.send(b"but it talks")
        stream.shutdown(2)
        assert to_end(sock) == b"but it talks"


def writable(sock: socket.socket) -> bool:
    try:
        sock.send(b"x")
    except BrokenPipeError:
        return False
    return True


@pytest.mark.parametrize("end", ["close", "close then time out", "abort"])
@pytest.mark.parametrize("full", [False, True])
def test_the_last_bytes_arrive_when_the_guest_closes(
    guest: FakeGuest, full: bool, end: str
) -> None:
    sock, stream = guest.connect()
    with sock:
        if full:
            data = stream.stuff()
            assert len(data) > guest.window
        else:
            data = b"exit 0\n"
            stream.send(data)
        if end != "abort":
            stream.shutdown(3)
        if end != "close":
            stream.control(RST)
        time.sleep(0.05)
        assert to_end(sock) == data
    wait_until(lambda: guest.device.connections == 0)


def test_the_end_is_clean_when_the_host_had_written_too_much(guest: FakeGuest) -> None:
    sock, stream = guest.connect()
    with sock:
        stream.hold = True
        sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            sock.sendall(bytes(5_000_000))
        sock.settimeout(WAIT)
        while guest.step(0.05):
            pass
        stream.send(b"enough")
        stream.shutdown(3)
        assert to_end(sock) == b"enough"


def test_a_host_program_that_closes_has_said_everything(guest: FakeGuest) -> None:
    sock, stream = guest.connect()
    stream.hold = True
    data = blob(400_000)
    sender = InThread(lambda: (sock.sendall(data), sock.close()))
    guest.until(lambda: len(stream.received) == guest.window)
    sender.join()
    stream.send(b"nobody reads this")
    stream.hold = False
    stream.give_credit()
    assert stream.wait_for(len(data)) == data
    guest.until(lambda: stream.peer_shut == 3)
    stream.control(RST)
    wait_until(lambda: guest.device.connections == 0)


def test_a_guest_that_writes_to_a_closed_host_is_told(guest: FakeGuest) -> None:
    sock, stream = guest.connect()
    sock.close()
    guest.until(lambda: stream.peer_shut == 3)
    stream.shutdown(3)
    guest.until(lambda: stream.reset)
    wait_until(lambda: guest.device.connections == 0)


# -- the machine's life --------------------------------------------------------------------------


def test_a_paused_machine_keeps_its_connections(guest: FakeGuest) -> None:
    sock, stream = guest.connect()
    with sock:
        bases = guest.stop()
        sock.sendall(b"while you slept")
        guest.start(bases)
        assert stream.wait_for(15) == b"while you slept"
        stream.send(b"awake")
        assert exactly(sock, 5) == b"awake"


def test_what_is_sent_right_before_a_pause_arrives_and_is_given_back(guest: FakeGuest) -> None:
    sock, stream = guest.connect()
    with sock:
        ring = guest.rings[1]
        while ring.next_used(0.05):
            guest.free.append(0)
        ring.notify = lambda: None  # type: ignore[method-assign] # stopped before the kick is seen
        stream.send(b"yawn")
        bases = guest.stop()
        assert exactly(sock, 4) == b"yawn"
        guest.start(bases)
        assert select.select([ring.call], [], [], WAIT)[0]


def test_a_driver_that_starts_afresh_ends_old_connections(guest: FakeGuest) -> None:
    sock, stream = guest.connect()
    with sock:
        stream.send(b"last words")
        guest.stop()
        guest.streams.clear()
        guest.free = deque(range(RING))
        guest.start()
        assert to_end(sock) == b"last words"
        again, _ = guest.connect()
        again.close()


def test_what_lies_in_the_ring_when_the_machine_ends_still_arrives(guest: FakeGuest) -> None:
    sock, stream = guest.connect()
    with sock:
        data = blob(100_000)
        ring = guest.rings[1]
        ring.notify = lambda: None  # type: ignore[method-assign] # the machine dies before the kick
        stream.send(data)
        guest.control.close()
        assert to_end(sock) == data
    assert not guest.failures


def test_drain_waits_for_a_slow_host_program(guest: FakeGuest) -> None:
    sock, stream = guest.connect()
    with sock:
        data = stream.stuff()
        done = threading.Event()
        guest.in_loop(lambda: guest.device.drain(done.set, WAIT))
        assert not done.wait(0.05)
        assert to_end(sock) == data
        assert done.wait(WAIT)


def test_drain_ends_at_its_timeout(guest: FakeGuest) -> None:
    sock, stream = guest.connect()
    with sock:
        stream.stuff()
        done = threading.Event()
        guest.in_loop(lambda: guest.device.drain(done.set, 0.1))
        assert done.wait(WAIT)


def test_a_guest_that_never_answers_is_given_up(
    guest: FakeGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "CONNECT_TIMEOUT", 0.1)
    with guest.host_dial() as sock:
        assert to_end(sock) == b""
    assert [packet.op for packet in (guest.receive(), guest.receive()) if packet] == [REQUEST, RST]


def test_a_guest_that_never_acknowledges_a_close_is_given_up(
    guest: FakeGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "CLOSE_TIMEOUT", 0.1)
    sock, stream = guest.connect()
    sock.close()
    guest.until(lambda: stream.reset)
    wait_until(lambda: guest.device.connections == 0)


def test_a_guest_that_does_not_read_is_told_that_the_host_has_left(
    guest: FakeGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "LOST_TIMEOUT", 0.1)
    sock, stream = guest.connect()
    stream.hold = True
    sender = InThread(lambda: (sock.sendall(blob(400_000)), sock.close()))
    guest.until(lambda: len(stream.received) == guest.window)
    sender.join()
    guest.until(lambda: stream.reset)
    wait_until(lambda: guest.device.connections == 0)


def test_a_guest_that_shrinks_its_buffer_is_not_left_waiting(guest: FakeGuest) -> None:
    sock, stream = guest.connect()
    with sock:
        stream.send(bytes(100_000))  # less than half a window: not announced
        exactly(sock, 100_000)
        guest.window = 20_000
        stream.control(CREDIT_UPDATE)
        stream.send(bytes(100_000))
        exactly(sock, 100_000)


# -- the loop --------------------------------------------------------------------------------------


def test_an_event_of_a_closed_fd_does_not_reach_its_successor() -> None:
    loop = EventLoop()
    pairs = [socket.socketpair() for _ in range(2)]
    reached: list[str] = []

    def first(index: int) -> None:
        """Closes the other socket and opens a new one, which gets its number."""
        other = pairs[1 - index][0]
        number = other.fileno()
        loop.remove(number)
        other.close()
        os.dup2(pairs[1 - index][1].fileno(), number)
        loop.add(number, lambda _events: reached.append("successor"), select.EPOLLIN)
        loop.remove(pairs[index][0].fileno())
        loop.defer(loop.stop)
        made.append(number)

    made: list[int] = []
    for index, (near, far) in enumerate(pairs):
        loop.add(near.fileno(), lambda _events, index=index: first(index), select.EPOLLIN)
        far.send(b"x")
    loop.run()
    assert reached == []
    assert len(made) == 1
    loop.close()
    os.close(made[0])
    for near, far in pairs:
        near.close()
        far.close()


def test_timers_run_in_order_and_cancelled_ones_do_not() -> None:
    loop = EventLoop()
    ran: list[int] = []
    timers = [loop.call_later(0.01 + n / 1000, lambda n=n: ran.append(n)) for n in range(10)]
    for _ in range(1000):
        loop.call_later(60, lambda: ran.append(-1)).cancel()
    timers[3].cancel()
    timers[3].cancel()
    loop.call_later(0.05, loop.stop)
    loop.run()
    assert ran == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert len(loop._timers) < 200
    loop.close()
