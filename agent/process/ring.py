"""The last bytes of one output of a kept process, in a memfd: kernel memory that survives us.

splice(2) moves bytes from the pipe into the file and moves the file's position in one system call.
The position belongs to the open file, which PID 1 has too, so however the agent dies, a byte is
either still in the pipe or in the ring and counted. Memory that is written through a mapping has an
instant between the two. The first page of the file has the other counters.
"""

import os
import struct

from microguest.guest import bounds

__all__ = ["CUT", "ENDED", "OPEN", "Ring"]

PAGE = 4096
OPEN, ENDED, CUT = range(3)  # what `Ring.state` says of the output

# capacity, base, wrapping, acknowledged, dropped, counted, state
_COUNTERS = struct.Struct("<7Q")


class Ring:
    """Offsets count from the output's first byte. `written` is the offset behind the last one.

    `acknowledged`: a host needs nothing before it. `dropped`: bytes that made room before they were
    acknowledged. `state`: OPEN; ENDED at the end of the output; CUT where it was ended by us.
    `drops`: being full of unacknowledged bytes is no reason to stop reading.
    """

    __slots__ = (
        "_base",
        "_counted",
        "acknowledged",
        "capacity",
        "dropped",
        "drops",
        "fd",
        "state",
        "written",
    )

    def __init__(self, fd: int, capacity: int, *, drops: bool) -> None:
        self.fd = fd
        self.capacity = capacity
        self.drops = drops
        self.written = 0
        self.acknowledged = 0
        self.dropped = 0
        self.state = OPEN
        self._base = 0  # offset of the byte at the ring's beginning, in the lap that is written
        self._counted = 0  # what was dropped before this offset is in `dropped`

    @classmethod
    def create(cls, buffer: int, *, drops: bool) -> "Ring":
        """An empty one of `buffer` bytes, rounded up to pages. Raises OSError."""
        fd = os.memfd_create("output", os.MFD_CLOEXEC)
        ring = cls(fd, -(-buffer // PAGE) * PAGE, drops=drops)
        try:
            os.lseek(fd, PAGE, os.SEEK_SET)
            ring._save()
        except BaseException:
            os.close(fd)
            raise
        return ring

    @classmethod
    def restore(cls, fd: int, *, drops: bool) -> "Ring":
        """What an earlier agent created, wherever it was interrupted. Raises OSError."""
        values = _COUNTERS.unpack(os.pread(fd, _COUNTERS.size, 0))
        capacity, base, wrapping, acknowledged, dropped, counted, state = values
        ring = cls(fd, capacity, drops=drops)
        ring.acknowledged, ring.dropped, ring.state = acknowledged, dropped, state
        ring._base, ring._counted = base, counted
        if wrapping:  # nothing is written between the two marks
            os.lseek(fd, PAGE, os.SEEK_SET)
        ring.written = base + os.lseek(fd, 0, os.SEEK_CUR) - PAGE
        ring._count_dropped()
        ring._wrap()
        ring._save()
        return ring

    @property
    def oldest(self) -> int:
        """Offset of the first byte that can be read."""
        return max(0, self.written - self.capacity)

    @property
    def room(self) -> int:
        """Bytes that `fill` may take at most; 0 where acknowledgements must come first."""
        free = self.capacity
        if not self.drops:
            free -= self.written - max(self.acknowledged, self.oldest)
        return min(free, self._base + self.capacity - self.written, bounds.DATA_PAYLOAD)

    def fill(self, pipe: int) -> int:
        """Move what is in a pipe, at most `room`, which must not be 0; 0 at the pipe's end.

        Raises BlockingIOError where nothing is in it, and OSError.
        """
        count = os.splice(pipe, self.fd, self.room)
        self.written += count
        self._count_dropped()
        self._wrap()
        return count

    def read(self, offset: int, buffer: memoryview) -> int:
        """Copy bytes from `offset` on, which must be retained; how many, 0 where there are none."""
        place = offset % self.capacity
        count = min(len(buffer), self.written - offset, self.capacity - place)
        return os.preadv(self.fd, (buffer[:count],), PAGE + place) if count else 0

    def acknowledge(self, offset: int) -> None:
        """Nothing before `offset` is needed any more. What goes back or too far is ignored."""
        if self.acknowledged < offset <= self.written:
            self._count_dropped()
            self.acknowledged = offset
            self._save()

    def end(self, state: int) -> None:
        """ENDED or CUT: nothing more is written."""
        self.state = state
        self._save()

    def close(self) -> None:
        """Give the memory back, once PID 1 has done so as well."""
        os.close(self.fd)

    def _count_dropped(self) -> None:
        """From the counters alone, so that it can be done again after an interruption."""
        needed = max(self.acknowledged, self._counted)
        if self.oldest > needed:
            self.dropped += self.oldest - needed
            self._counted = self.oldest
            self._save()

    def _wrap(self) -> None:
        """Begin the next lap at the end of one. The mark tells `restore` that it was begun."""
        if self.written == self._base + self.capacity:
            self._base = self.written
            self._save(wrapping=True)
            os.lseek(self.fd, PAGE, os.SEEK_SET)
            self._save()

    def _save(self, *, wrapping: bool = False) -> None:
        counters = _COUNTERS.pack(
            self.capacity,
            self._base,
            wrapping,
            self.acknowledged,
            self.dropped,
            self._counted,
            self.state,
        )
        os.pwrite(self.fd, counters, 0)
