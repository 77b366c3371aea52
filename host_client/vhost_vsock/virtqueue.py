"""One split virtqueue, seen from the device (virtio 1.2, section 2.7).

Takes chains of buffers that the guest makes available and gives them back as used. Everything in
the ring is written by the guest: each index, length and address is checked before use, and read
once, so that a guest which changes it afterwards changes nothing here. Knows nothing of vsock.

Ordering: an index is stored with one two-byte store, after the entries it publishes (x86 keeps
stores in order). Before the guest's notification threshold, or its index after asking for kicks,
is read there has to be a full barrier, because x86 does let a load overtake an earlier store; the
guest does the same in mirror image, and without both barriers each side can go to sleep waiting
for the other.
"""

import os
import struct
import threading
from typing import Final

from microguest.host_client.vhost_vsock.memory import GuestMemory

MAX_SIZE: Final = 1024
"""Largest ring accepted: one chain may be as long as the ring, and IOV_MAX is 1024. QEMU's vsock
rings have 128 entries."""

_DESCRIPTOR: Final = struct.Struct("<QIHH")
_NEXT: Final = 1
_WRITE: Final = 2
_INDIRECT: Final = 4
_NO_INTERRUPT: Final = 1
_NO_NOTIFY: Final = 1
_ONE: Final = (1).to_bytes(8, "little")

_barrier = threading.Lock()


def _fence() -> None:
    """Full memory barrier: taking a lock is an atomic read-modify-write, a full barrier on x86.

    By `with`, between whose two ends no interrupt comes that would leave it taken for ever.
    """
    with _barrier:
        pass


class VirtqueueError(Exception):
    """The guest broke the ring's rules; nothing in this ring can be trusted any more."""


class Virtqueue:
    """A ring whose buffers are all of one direction, as both vsock data rings are.

    Life: `size`, `addresses`, `next`, `kick` are set by control messages, `start` maps it, then
    `has_next` / `peek` / `complete` in turn and `signal` at the end of a batch.
    """

    __slots__ = (
        "_avail",
        "_descriptors",
        "_memory",
        "_seen",
        "_signalled",
        "_used",
        "_used_event",
        "_used_index",
        "_used_ring",
        "addresses",
        "call",
        "enabled",
        "event_index",
        "head",
        "kick",
        "name",
        "next",
        "running",
        "size",
        "writable",
    )

    def __init__(self, name: str, *, writable: bool) -> None:
        """`writable`: the device writes into this ring's buffers (else it reads them)."""
        self.name = name
        self.writable = writable
        self.size = 0
        self.addresses: tuple[int, int, int] | None = None
        self.next = 0  # index of the next available entry to take, modulo 2**16
        self.kick: int | None = None
        self.call: int | None = None
        self.enabled = True
        self.running = False
        self.event_index = False
        self.head = 0

    # -- life ----------------------------------------------------------------------------------

    def start(self, memory: GuestMemory) -> None:
        """Map the ring and serve it. GuestMemoryError when it lies outside shared memory."""
        assert self.addresses is not None
        descriptors, used, avail = self.addresses
        size = self.size
        self._memory = memory
        self._descriptors = memory.view_qemu(descriptors, 16 * size)
        self._avail = memory.view_qemu(avail, 6 + 2 * size).cast("H")
        used_area = memory.view_qemu(used, 6 + 8 * size)
        self._used = used_area[:4].cast("H")
        self._used_ring = used_area[4 : 4 + 8 * size].cast("I")
        self._used_event = used_area[4 + 8 * size :].cast("H")
        self._used_index = self._signalled = self._used[1]
        self._seen = self.next
        self.running = True

    def stop(self) -> None:
        """Touch the ring no more and let go of the mapping."""
        if self.running:
            self.running = False
            del self._memory, self._descriptors, self._avail
            del self._used, self._used_ring, self._used_event

    def close(self) -> None:
        """Stop, and close the kick and call descriptors."""
        self.stop()
        for fd in (self.kick, self.call):
            if fd is not None:
                os.close(fd)
        self.kick = self.call = None

    # -- taking chains -------------------------------------------------------------------------

    def has_next(self) -> bool:
        """Whether the guest has made another chain available. VirtqueueError on a bogus index."""
        if self._seen != self.next:
            return True
        self._seen = seen = self._avail[1]
        waiting = (seen - self.next) & 0xFFFF
        if waiting > self.size:
            raise VirtqueueError(
                f"{self.name} ring: {waiting} chains available in a ring of {self.size}"
            )
        return waiting != 0

    def peek(self) -> list[memoryview]:
        """The buffers of the next chain (`has_next` said there is one); it stays ours to
        `complete`. VirtqueueError or GuestMemoryError when the guest wrote nonsense."""
        size = self.size
        index = self.head = self._avail[2 + (self.next & (size - 1))]
        table = self._descriptors
        limit = size  # entries of the table walked
        left = size  # buffers a chain may have, over all tables
        view = self._memory.view
        wrong = 0 if self.writable else _WRITE
        buffers: list[memoryview] = []
        while True:
            if index >= limit:
                raise VirtqueueError(f"{self.name} ring: descriptor {index} of {limit}")
            address, length, flags, following = _DESCRIPTOR.unpack_from(table, index * 16)
            if flags & _INDIRECT:
                table, limit = self._indirect(table, address, length, flags)
                index = 0
                continue
            if flags & _WRITE == wrong:
                raise VirtqueueError(f"{self.name} ring: a buffer of the wrong direction")
            buffers.append(view(address, length))
            if not flags & _NEXT:
                return buffers
            left -= 1
            if left <= 0:
                raise VirtqueueError(f"{self.name} ring: a chain longer than the ring (a loop?)")
            index = following

    def _indirect(
        self, table: memoryview, address: int, length: int, flags: int
    ) -> tuple[memoryview, int]:
        if table is not self._descriptors or flags & _NEXT:
            raise VirtqueueError(f"{self.name} ring: an indirect table inside a chain or a table")
        if length == 0 or length % 16 or length > 16 * self.size:
            raise VirtqueueError(f"{self.name} ring: an indirect table of {length} bytes")
        return self._memory.view(address, length), length // 16

    def complete(self, written: int) -> None:
        """Give the chain of the last `peek` back, `written` bytes of it filled."""
        slot = (self._used_index & (self.size - 1)) * 2
        ring = self._used_ring
        ring[slot] = self.head
        ring[slot + 1] = written
        self.next = (self.next + 1) & 0xFFFF
        self._used_index = index = (self._used_index + 1) & 0xFFFF
        self._used[1] = index

    # -- notifications -------------------------------------------------------------------------

    def signal(self) -> None:
        """Interrupt the guest if chains were given back since last time and it wants to know."""
        old, new = self._signalled, self._used_index
        if old == new:
            return
        self._signalled = new
        _fence()
        if self.event_index:
            threshold = self._avail[2 + self.size]
            if (new - threshold - 1) & 0xFFFF >= (new - old) & 0xFFFF:
                return
        elif self._avail[0] & _NO_INTERRUPT:
            return
        if self.call is not None:
            try:
                os.write(self.call, _ONE)
            except OSError:  # a full counter already is a pending interrupt; QEMU gone: no guest
                return

    def mute(self) -> None:
        """Kicks are not needed now. (With event indexes, an old threshold says so by itself.)"""
        if not self.event_index:
            self._used[0] = _NO_NOTIFY

    def listen(self) -> None:
        """Ask for a kick at the next chain. Chains may have come meanwhile: check `has_next`."""
        if self.event_index:
            self._used_event[0] = self.next
        else:
            self._used[0] = 0
        _fence()
