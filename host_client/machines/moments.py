"""When the lines of a console came: an index beside each half of its log, bounded as that is.

    console.times and console.times.1:  MAGIC, inode of the half;  offset in it, nanoseconds; …

An entry says: lines that begin at this offset and behind it came then. The monitor makes it from
its own clock; what a guest writes has no part in it but where its lines begin. Used by the monitor,
so it imports next to nothing.
"""

import os
import struct
import time
from bisect import bisect_right
from typing import Final

__all__ = ["COALESCED", "MOMENTS_MAX", "Moments", "MomentsWriter"]

MOMENTS_MAX: Final = 128 * 1024  # entries of a half, 2 MiB; one that has so many has ended
COALESCED: Final = 0.01  # seconds; lines that come within share an entry: at most 100 a second
MAGIC: Final = b"MGTIMES1"
HEAD: Final = struct.Struct("=8sQ")
ENTRY: Final = struct.Struct("=QQ")


class MomentsWriter:
    """Writes the index of one log. A full disk costs times, never the log or the machine."""

    def __init__(self, log_path: str) -> None:
        self._path = times_path(log_path)
        self._fd = -1
        self._inode = 0
        self._count = 0
        self._next = float("-inf")  # time.monotonic()

    @property
    def full(self) -> bool:
        """Whether the half has as many as it may."""
        return self._count >= MOMENTS_MAX

    def begin(self, inode: int) -> None:
        """A new half of the log is open: begin its index, which has its first line at once."""
        self.close()
        self._inode = inode
        self._count = 0
        self._next = float("-inf")
        try:
            self._open()
        except OSError:
            pass  # the next line tries again

    def rotate(self) -> None:
        """The half that ends becomes the previous one.

        Before the log's: when the file that goes is no more, a new one may have its inode.
        """
        try:
            os.rename(self._path, f"{self._path}.1")
        except OSError:
            pass

    def note(self, offset: int) -> None:
        """A line begins there, now. Before its bytes are written, so that who sees them sees it."""
        now = time.monotonic()
        if now < self._next:
            return
        try:
            if self._fd < 0:
                self._open()
            entry = ENTRY.pack(offset, time.time_ns())
            # At its place, so that one that was half written is written again.
            if os.pwrite(self._fd, entry, HEAD.size + ENTRY.size * self._count) == ENTRY.size:
                self._count += 1
                self._next = now + COALESCED
        except OSError:
            pass

    def close(self) -> None:
        """Nothing more comes."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self._path, flags, 0o600)
        try:
            os.pwrite(fd, HEAD.pack(MAGIC, self._inode), 0)
        except OSError:
            os.close(fd)
            raise
        self._fd = fd


class Moments:
    """The index of one half as it is read, while it may grow."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._offsets: list[int] = []
        self._times: list[int] = []

    @classmethod
    def find(cls, log_path: str, inode: int) -> "Moments | None":
        """That of the half with this inode, which is kept open meanwhile; None: there is none."""
        path = times_path(log_path)
        for half in (path, f"{path}.1", path):  # it may become the previous one between two looks
            try:
                fd = os.open(half, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            if os.pread(fd, HEAD.size, 0) == HEAD.pack(MAGIC, inode):
                return cls(fd)
            os.close(fd)
        return None

    def load(self) -> None:
        """Take what has been added."""
        count = len(self._offsets)
        place = HEAD.size + ENTRY.size * count
        data = os.pread(self._fd, ENTRY.size * (MOMENTS_MAX - count), place)
        for offset, when in ENTRY.iter_unpack(data[: len(data) // ENTRY.size * ENTRY.size]):
            self._offsets.append(offset)
            self._times.append(when)

    def at(self, offset: int) -> int | None:
        """When the line that begins there came: nanoseconds since the epoch; None: unknown."""
        if not self._times:
            return None
        return self._times[max(0, bisect_right(self._offsets, offset) - 1)]

    def close(self) -> None:
        """Nothing more is loaded; what is there can be asked for."""
        os.close(self._fd)


def times_path(log_path: str) -> str:
    """Where the index of a log is."""
    return f"{log_path.removesuffix('.log')}.times"
