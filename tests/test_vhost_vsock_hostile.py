"""Guests (and a QEMU) that break the rules: a connection or the machine ends, never the process.

An exception out of the device would end its thread, which pytest reports as an error of the test.
"""

import os
import random
import resource
import select
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_vhost_vsock import (
    GUEST_BASE,
    HEADER,
    MEMORY,
    QEMU_BASE,
    REQUEST,
    RESPONSE,
    RING,
    RST,
    RW,
    TX_AT,
    WAIT,
    FakeGuest,
    InThread,
    exactly,
    fake_guest,
    to_end,
    wait_until,
)

from microguest.host_client.vhost_vsock import device, unix_dialer
from microguest.host_client.vhost_vsock.device import MAX_CONNECTIONS, MAX_CONTROL
from microguest.host_client.vhost_vsock.hybrid import MAX_HANDSHAKES
from microguest.host_client.vhost_vsock.memory import GuestMemory, GuestMemoryError

NEXT, WRITE, INDIRECT = 1, 2, 4


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[FakeGuest]:
    with fake_guest(tmp_path) as made:
        yield made


# -- rings ---------------------------------------------------------------------------------------


def outside(guest: FakeGuest) -> None:
    guest.rings[1].describe(0, GUEST_BASE + MEMORY - 10, 44, 0)


def below(guest: FakeGuest) -> None:
    guest.rings[1].describe(0, GUEST_BASE - 1, 44, 0)


def end_of_address_space(guest: FakeGuest) -> None:
    guest.rings[1].describe(0, 2**64 - 1, 2**32 - 1, 0)


def endless(guest: FakeGuest) -> None:
    guest.rings[1].describe(0, GUEST_BASE + TX_AT, 2**32 - 1, 0)


def loop(guest: FakeGuest) -> None:
    guest.rings[1].describe(0, GUEST_BASE + TX_AT, 44, NEXT, 1)
    guest.rings[1].describe(1, GUEST_BASE + TX_AT, 44, NEXT, 0)


def next_beyond_ring(guest: FakeGuest) -> None:
    guest.rings[1].describe(0, GUEST_BASE + TX_AT, 44, NEXT, RING)


def wrong_direction(guest: FakeGuest) -> None:
    guest.rings[1].describe(0, GUEST_BASE + TX_AT, 44, WRITE)


def indirect_of(guest: FakeGuest, size: int, *entries: tuple[int, int, int, int]) -> None:
    table = b"".join(struct.pack("<QIHH", *entry) for entry in entries)
    guest.memory[TX_AT : TX_AT + len(table)] = table
    guest.rings[1].describe(0, GUEST_BASE + TX_AT, size, INDIRECT)


def indirect_empty(guest: FakeGuest) -> None:
    indirect_of(guest, 0)


def indirect_odd(guest: FakeGuest) -> None:
    indirect_of(guest, 17, (GUEST_BASE, 44, 0, 0), (0, 0, 0, 0))


def indirect_huge(guest: FakeGuest) -> None:
    indirect_of(guest, 16 * (RING + 1), (GUEST_BASE, 44, 0, 0))


def indirect_nested(guest: FakeGuest) -> None:
    indirect_of(guest, 16, (GUEST_BASE + TX_AT, 16, INDIRECT, 0))


def indirect_loop(guest: FakeGuest) -> None:
    indirect_of(guest, 32, (GUEST_BASE, 4, NEXT, 1), (GUEST_BASE, 4, NEXT, 0))


def indirect_beyond(guest: FakeGuest) -> None:
    indirect_of(guest, 16, (GUEST_BASE, 4, NEXT, 1))


def indirect_and_next(guest: FakeGuest) -> None:
    indirect_of(guest, 16, (GUEST_BASE, 44, 0, 0))
    guest.rings[1].describe(0, GUEST_BASE + TX_AT, 16, INDIRECT | NEXT, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        outside,
        below,
        end_of_address_space,
        endless,
        loop,
        next_beyond_ring,
        wrong_direction,
        indirect_empty,
        indirect_odd,
        indirect_huge,
        indirect_nested,
        indirect_loop,
        indirect_beyond,
        indirect_and_next,
    ],
)
def test_a_bad_chain_ends_the_machine(guest: FakeGuest, wrong: Callable[[FakeGuest], None]) -> None:
    sock, stream = guest.connect()
    with sock:
        stream.send(b"what came before counts")
        assert exactly(sock, 23) == b"what came before counts"
        wait_until(lambda: guest.rings[1].used16[1] == guest.rings[1].avail[1])
        wrong(guest)
        guest.rings[1].publish(0)
        assert to_end(sock) == b""
    wait_until(lambda: guest.failures)
    assert guest.failures[0].startswith("the guest broke its vsock device: ")
    wait_until(lambda: guest.device.connections == 0)


def test_a_head_beyond_the_ring_ends_the_machine(guest: FakeGuest) -> None:
    guest.rings[1].publish(RING)
    wait_until(lambda: guest.failures)


def test_an_index_that_jumps_ends_the_machine(guest: FakeGuest) -> None:
    ring = guest.rings[1]
    ring.avail[1] = ring.avail[1] + RING + 1
    ring.notify()
    wait_until(lambda: guest.failures)
    assert "129 chains available in a ring of 128" in guest.failures[0]


@pytest.mark.parametrize("room", [10, 44])
def test_a_receive_buffer_without_room_ends_the_machine(guest: FakeGuest, room: int) -> None:
    with guest.host_dial() as sock:
        guest.accept()
        exactly(sock, 3)
        for slot in range(RING):
            guest.rings[0].describe(slot, GUEST_BASE, room, WRITE)
        sock.sendall(b"data")
        wait_until(lambda: guest.failures)
    assert "without room" in guest.failures[0]


# -- packets -------------------------------------------------------------------------------------


def answer_to(guest: FakeGuest) -> int:
    packet = guest.receive()
    assert packet is not None
    return packet.op


def nothing_comes(guest: FakeGuest) -> bool:
    return guest.receive(0.2) is None


@pytest.mark.parametrize(
    "odd", [{"source": 5}, {"target": 3}, {"target": 2**63}, {"kind": 2}, {"op": RW}, {"op": 99}]
)
def test_a_stray_packet_is_answered_with_a_reset(guest: FakeGuest, odd: dict[str, int]) -> None:
    op = odd.pop("op", REQUEST)
    guest.send(op, 900, 5000, **odd)
    assert answer_to(guest) == RST
    guest.send(RST, 900, 5000, **odd)
    assert nothing_comes(guest)
    assert not guest.failures


def test_a_packet_shorter_than_a_header_is_ignored(guest: FakeGuest) -> None:
    for size in (0, 1, 43):
        guest.put(bytes(size) or b"")
    assert nothing_comes(guest)
    assert not guest.failures


@pytest.mark.parametrize("lie", [1, 500, 2**32 - 1])
def test_a_length_that_lies_costs_the_connection(guest: FakeGuest, lie: int) -> None:
    sock, stream = guest.connect()
    with sock:
        guest.send(RW, stream.host_port, stream.guest_port, b"", size=lie)
        assert to_end(sock) == b""
    guest.until(lambda: stream.reset)
    guest.connect()[0].close()


@pytest.mark.parametrize("op", [REQUEST, RESPONSE, 0, 8, 65535])
def test_an_operation_out_of_place_costs_the_connection(guest: FakeGuest, op: int) -> None:
    sock, stream = guest.connect()
    with sock:
        stream.control(op)
        assert to_end(sock) == b""
    guest.until(lambda: stream.reset)


def test_data_after_the_end_costs_the_connection(guest: FakeGuest) -> None:
    sock, stream = guest.connect()
    with sock:
        stream.shutdown(2)
        stream.send(b"more")
        assert to_end(sock) == b""
    guest.until(lambda: stream.reset)


def test_data_before_the_answer_costs_the_connection(guest: FakeGuest) -> None:
    guest.listening.clear()
    with guest.host_dial() as sock:
        packet = guest.receive()
        assert packet is not None
        guest.send(RW, packet.host_port, packet.guest_port, b"early")
        assert to_end(sock) == b""
        assert answer_to(guest) == RST


def test_a_guest_that_ignores_its_credit_is_cut_off(guest: FakeGuest) -> None:
    sock, stream = guest.connect()
    with sock:
        for _ in range(60):
            guest.send(RW, stream.host_port, stream.guest_port, bytes(12000))
        guest.until(lambda: stream.reset)
    wait_until(lambda: guest.device.connections == 0)
    assert not guest.failures


def test_one_byte_packets_cost_no_more_memory_than_their_credit(guest: FakeGuest) -> None:
    sock, stream = guest.connect()
    with sock:
        while stream.room() > 40_000:
            stream.send(bytes(min(12000, stream.room() - 40_000)))
            while guest.step(0.01):
                pass
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        stream.send(bytes(20_000), packet=1)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096


@pytest.mark.parametrize("forwarded", [1, 2**31, 2**32 - 1])
def test_credit_from_the_future_does_not_open_the_window(guest: FakeGuest, forwarded: int) -> None:
    sock, stream = guest.connect()
    with sock:
        stream.hold = True
        guest.send(6, stream.host_port, stream.guest_port, forwarded=forwarded, window=1000)
        sock.sendall(bytes(10_000))
        while guest.step(0.1):
            pass
        assert len(stream.received) <= 1001
    assert not guest.failures


# -- floods --------------------------------------------------------------------------------------


def test_a_flood_of_dials_stops_at_the_limit(tmp_path: Path) -> None:
    made: list[socket.socket] = []

    def connect(_port: int) -> socket.socket:
        near, far = socket.socketpair()
        made.append(far)
        return near

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    try:
        with fake_guest(tmp_path, connect_to_host=connect) as guest:
            answers = []
            for port in range(MAX_CONNECTIONS + 50):
                guest.send(REQUEST, 900, 10_000 + port)
                packet = guest.receive()
                assert packet is not None
                answers.append(packet.op)
            assert answers.count(RESPONSE) == MAX_CONNECTIONS
            assert answers[MAX_CONNECTIONS:] == [RST] * 50
            assert guest.device.connections == MAX_CONNECTIONS
            with guest.host_dial() as sock:
                assert to_end(sock) == b""
            guest.send(RST, 900, 10_000)
            wait_until(lambda: guest.device.connections == MAX_CONNECTIONS - 1)
            guest.connect()[0].close()
    finally:
        for far in made:
            far.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_flood_of_stray_packets_waits_for_its_answers_to_be_read(guest: FakeGuest) -> None:
    ring = guest.rings[1]
    sent = 0
    while sent < MAX_CONTROL + 3 * RING:
        while not guest.free and (used := ring.next_used(3.0)):
            guest.free.append(used[0])
        if not guest.free:
            break
        guest.send(RW, 900, 5000)
        sent += 1
    # what was answered into the ring, what is queued, and what waits in the transmit ring
    assert sent == RING + MAX_CONTROL + RING
    for _ in range(sent):
        packet = guest.receive()
        assert packet is not None
        assert packet.op == RST
    guest.connect()[0].close()


def test_dials_that_are_given_up_while_the_guest_sleeps_are_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "MAX_CONTROL", 2 * RING)
    with fake_guest(tmp_path) as guest:  # it takes nothing out of its ring

        def refused(sock: socket.socket) -> bool:
            return bool(select.select([sock], [], [], 0)[0])  # the guest does not answer

        given_up = 0
        while True:
            with guest.host_dial() as sock:
                wait_until(lambda: guest.device.connections == 1 or refused(sock))
                if refused(sock):
                    break
            wait_until(lambda: guest.device.connections == 0)
            given_up += 1
        assert given_up < 6 * RING
        assert len(guest.device._control) <= 4 * RING + 2
        while guest.receive(1.0):  # it wakes up
            pass
        guest.connect()[0].close()


def test_silent_host_programs_are_limited(guest: FakeGuest) -> None:
    silent = []
    for _ in range(MAX_HANDSHAKES + 1):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(WAIT)
        sock.connect(guest.hybrid_path)
        silent.append(sock)
    assert silent[-1].recv(1) == b""
    silent[0].close()
    assert wait_for_answer(guest) == b"O"
    for sock in silent:
        sock.close()


def wait_for_answer(guest: FakeGuest) -> bytes:
    """Dial until there is room again: the first byte of the answer."""
    answer = b""
    for _ in range(100):
        with guest.host_dial() as sock:
            dial = InThread(lambda sock=sock: first_byte(sock))
            guest.until(dial.done)
            answer = bytes(dial.join())
        if answer:
            break
    return answer


def first_byte(sock: socket.socket) -> bytes:
    try:
        return sock.recv(1)
    except ConnectionResetError:  # closed before the line was read
        return b""


def test_a_host_that_raises_is_a_refusal(tmp_path: Path) -> None:
    def connect(_port: int) -> socket.socket:
        raise PermissionError

    with fake_guest(tmp_path, connect_to_host=connect) as guest:
        assert guest.dial(900).reset


def test_a_full_backlog_is_a_refusal(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/p_7")
        listener.listen(0)
        dial = unix_dialer(f"{tmp_path}/p")
        first = dial(7)
        assert first is not None
        assert dial(7) is None
        first.close()


# -- the control channel ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "payload"),
    [
        (99, b""),
        (5, b"\1"),
        (5, struct.pack("<II", 9, 0) + bytes(288)),
        (5, struct.pack("<IIQQQQ", 1, 0, GUEST_BASE, MEMORY, QEMU_BASE, 0)),
        (8, struct.pack("<II", 2, 3)),
        (8, struct.pack("<II", 2, 2048)),
        (8, struct.pack("<II", 3, 128)),
        (8, struct.pack("<II", 0, 128)),
        (9, struct.pack("<IIQQQQ", 0, 0, 0x1000, 0x2000, 0x3000, 0)),
        (9, struct.pack("<IIQQQQ", 0, 0, QEMU_BASE + 1, QEMU_BASE, QEMU_BASE, 0)),
        (10, struct.pack("<II", 2, 65536)),
        (11, struct.pack("<II", 200, 0)),
        (12, struct.pack("<Q", 2)),
        (12, struct.pack("<Q", 0x102)),
        (13, struct.pack("<Q", 7)),
        (2, struct.pack("<Q", 1 << 34)),
        (16, struct.pack("<Q", 1)),
        (18, b"\1"),
        (24, struct.pack("<III", 200, 100, 0)),
    ],
)
def test_a_bad_message_ends_the_machine(guest: FakeGuest, number: int, payload: bytes) -> None:
    sock, stream = guest.connect()
    with sock:
        stream.send(b"last words")
        guest.request(number, payload)
        wait_until(lambda: guest.failures)
        assert guest.failures[0].startswith("vhost-user channel to QEMU: ")
        assert to_end(sock) == b"last words"
    assert len(guest.failures) == 1


def test_an_oversized_or_foreign_header_ends_the_machine(tmp_path: Path) -> None:
    for number, header in enumerate((struct.pack("<III", 1, 1, 5000), b"GET / HTTP/1")):
        folder = tmp_path / str(number)
        folder.mkdir()
        with fake_guest(folder) as guest:
            guest.control.sendall(header)
            wait_until(lambda guest=guest: guest.failures)


def test_an_unknown_request_that_wants_an_answer_is_refused(guest: FakeGuest) -> None:
    guest.request(99, b"", flags=9)
    assert struct.unpack("<Q", guest.reply(99))[0] != 0
    assert not guest.failures


def test_a_message_in_pieces_is_put_together(guest: FakeGuest) -> None:
    message = struct.pack("<III", 17, 1, 0) + struct.pack("<IIIII", 24, 1, 12, 0, 8) + bytes(4)
    for position in range(len(message)):
        guest.control.send(message[position : position + 1])
    assert guest.reply(17) == struct.pack("<Q", 3)
    assert guest.reply(24)[12:] == struct.pack("<Q", 77)


def test_passed_descriptors_are_not_kept(guest: FakeGuest) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        guest.request(3, b"", [0, 1, 2])
        guest.set_memory()
    guest.sync()
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # mmap keeps its own of each region


# -- memory ----------------------------------------------------------------------------------------


def test_a_region_larger_than_its_file_is_refused() -> None:
    fd = os.memfd_create("short")
    try:
        os.ftruncate(fd, 4096)
        for size, offset in ((8192, 0), (4096, 1), (0, 0), (2**64 - 1, 1)):
            with pytest.raises(GuestMemoryError):
                GuestMemory(struct.pack("<IIQQQQ", 1, 0, 0, size, 0, offset), [fd])
        memory = GuestMemory(struct.pack("<IIQQQQ", 1, 0, 0x1000, 2048, 0x9000, 2048), [fd])
        assert len(memory.view(0x1000, 2048)) == 2048
        assert len(memory.view_qemu(0x97FF, 1)) == 1
        for address, length in ((0xFFF, 1), (0x1000, 2049), (0x1800, 1), (2**64 - 1, 1)):
            with pytest.raises(GuestMemoryError):
                memory.view(address, length)
    finally:
        os.close(fd)


def test_random_rings_never_raise(tmp_path: Path) -> None:
    """Whole descriptor tables of noise, half of it plausible."""
    for seed in range(60):
        noise = random.Random(seed)
        folder = tmp_path / str(seed)
        folder.mkdir()
        with fake_guest(folder) as guest:
            sock, stream = guest.connect()
            ring = guest.rings[1]
            for slot in range(RING):
                address = GUEST_BASE + noise.randrange(MEMORY) if noise.random() < 0.9 else 0
                flags = noise.choice((0, 0, NEXT, NEXT, INDIRECT, noise.randrange(8)))
                size = noise.choice((0, 16, 44, 64, 4096, noise.randrange(2**32)))
                ring.describe(slot, address, size, flags, noise.randrange(RING + 2))
            header = HEADER.pack(
                77, 2, stream.guest_port, stream.host_port, 100, 1, RW, 0, 2**18, 0
            )
            guest.memory[TX_AT:MEMORY] = (
                (header + noise.randbytes(20)) * ((MEMORY - TX_AT) // 64 + 1)
            )[: MEMORY - TX_AT]
            for _ in range(40):
                ring.publish(noise.randrange(RING))
            guest.in_loop(lambda: None)
            sock.close()
            assert guest.thread.is_alive()
