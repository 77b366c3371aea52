"""A machine's console on disk: bounded, however much the guest writes.

Used by the monitor, so it imports next to nothing.
"""

import os
import re
import time
from typing import BinaryIO, Final, NamedTuple

from microguest.guest.errors import printable
from microguest.host_client.machines.moments import Moments, MomentsWriter

__all__ = [
    "HALF_MAX",
    "MARK_FILE",
    "TAIL_MAX",
    "LogReader",
    "Piece",
    "RotatingLog",
    "printable_lines",
    "read_log",
    "read_mark",
]

HALF_MAX: Final = 4 * 1024 * 1024  # bytes of the current and of the previous file, each
MARK_FILE: Final = "console.mark"  # beside the log: what begins PID 1's lines in it
MARK_MAX: Final = 64  # bytes
MARK: Final = re.compile(r"(?m)^microguest [0-9a-f]{12}: ")  # as `guest.report.line_mark`
TAIL_MAX: Final = 16 * 1024  # bytes at the end that stay in memory, for errors
NEWLINE: Final = ord("\n")
OPENED_MAX: Final = 3  # times that the previous half is opened until it has its index
ROTATED_WAIT: Final = 0.005  # seconds in between


class RotatingLog:
    """Appends to PATH; at `half_max` bytes it becomes PATH.1 and a new one begins.

    timed: there is an index of when its lines came, and a half also ends when that is full.
    """

    def __init__(self, path: str, half_max: int = HALF_MAX, *, timed: bool = False) -> None:
        self._path = path
        self._half_max = half_max
        self._fd = -1
        self._size = 0
        self._within = False  # a line
        self._tail = bytearray()
        self._moments = MomentsWriter(path) if timed else None
        self.lost = 0  # bytes that could not be written: the disk is full
        self._open()

    def write(self, data: bytes) -> None:
        """Append. A full disk loses the bytes, never the machine."""
        self._tail += data
        del self._tail[:-TAIL_MAX]
        try:
            if self._size and (self._size + len(data) > self._half_max or self._is_full()):
                self._rotate()
            self._note_moment(data)
            written = os.write(self._fd, data)
        except OSError:
            written = 0
        self._size += written
        self.lost += len(data) - written
        if written:
            self._within = data[written - 1] != NEWLINE

    def tail(self) -> str:
        """The last lines."""
        return bytes(self._tail).decode("utf-8", "replace")

    def close(self) -> None:
        """Nothing more comes."""
        os.close(self._fd)
        if self._moments is not None:
            self._moments.close()

    def _is_full(self) -> bool:
        return self._moments is not None and self._moments.full

    def _note_moment(self, data: bytes) -> None:
        """Where a line begins in the data, it is now."""
        if self._moments is None:
            return
        first = data.find(b"\n") + 1 if self._within else 0
        if first < len(data) and (first or not self._within):
            self._moments.note(self._size + first)

    def _rotate(self) -> None:
        if self._moments is not None:
            self._moments.rotate()
        try:
            os.rename(self._path, f"{self._path}.1")
        except FileNotFoundError:
            pass  # the last time it was renamed, and the new one could not be made
        ended = self._fd
        self._open()
        os.close(ended)

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(self._path, flags, 0o600)
        self._size = 0
        if self._moments is not None:
            self._moments.begin(os.fstat(self._fd).st_ino)


def read_log(path: str) -> bytes:
    """Both halves of a log, oldest first; b"" where there is none."""
    data = b""
    for half in (f"{path}.1", path):
        try:
            with open(half, "rb") as file:
                data += file.read(2 * HALF_MAX)
        except FileNotFoundError:
            continue
    return data


def read_mark(folder: str) -> bytes:
    """What begins PID 1's lines; b"" where an older version has started the machine."""
    try:
        with open(os.path.join(folder, MARK_FILE), "rb") as file:
            return file.read(MARK_MAX)
    except FileNotFoundError:
        return b""


class Piece(NamedTuple):
    """Bytes that follow each other in one half of a log."""

    data: bytes
    offset: int
    moments: Moments | None  # of the half; None: not asked for, or there are none


class LogReader:
    """Reads a log piece by piece while it is written, and becomes PATH.1, and again.

    timed: with the index of when its lines came.
    """

    def __init__(self, path: str, *, timed: bool = False) -> None:
        self._path = path
        self._timed = timed
        self._half: Half | None = None

    def read(self) -> bytes:
        """What has come since the last call; at the first one all that there is."""
        return b"".join(piece.data for piece in self.pieces())

    def pieces(self) -> list[Piece]:
        """The same, and where it is."""
        found = [] if self._half is None else [self._half.read()]
        try:
            newest = Half(self._path, self._path, timed=self._timed)
        except FileNotFoundError:
            return found
        if self._half is not None and is_same(self._half.file, newest.file):
            newest.close()
            return found
        if self._half is not None:
            found.append(self._half.read())  # it will get nothing more
        found += self._previous()
        self.close()
        self._half = newest
        return [*found, newest.read()]

    def close(self) -> None:
        """Nothing more is read."""
        if self._half is not None:
            self._half.close()

    def _previous(self) -> list[Piece]:
        """PATH.1, where that is not what was read last."""
        for _ in range(OPENED_MAX):
            try:
                half = Half(f"{self._path}.1", self._path, timed=self._timed)
            except FileNotFoundError:
                return []
            try:
                if self._half is not None and is_same(self._half.file, half.file):
                    return []
                piece = half.read()
            finally:
                half.close()
            if piece.moments is not None or not self._timed:
                break
            time.sleep(ROTATED_WAIT)  # it may have gone just now, its index first
        return [piece]


class Half:
    """One file of a log that is read."""

    def __init__(self, path: str, log_path: str, *, timed: bool) -> None:
        self.file: BinaryIO = open(path, "rb")  # noqa: SIM115  stays open
        self._log_path = log_path
        self._timed = timed
        self._offset = 0
        self._moments: Moments | None = None
        self._find_moments()  # before its index can go

    def read(self) -> Piece:
        """What has come since the last call."""
        data = self.file.read()
        if data:
            self._find_moments()  # of a new half it is made behind the file
            if self._moments is not None:
                self._moments.load()  # behind the data, whose moments it has then
        piece = Piece(data, self._offset, self._moments)
        self._offset += len(data)
        return piece

    def close(self) -> None:
        """Nothing more is read."""
        self.file.close()
        if self._moments is not None:
            self._moments.close()

    def _find_moments(self) -> None:
        if self._timed and self._moments is None:
            inode = os.fstat(self.file.fileno()).st_ino
            self._moments = Moments.find(self._log_path, inode)


def is_same(one: BinaryIO, other: BinaryIO) -> bool:
    """Whether two open files are one."""
    return os.path.samestat(os.fstat(one.fileno()), os.fstat(other.fileno()))


def printable_lines(text: str) -> str:
    """Console text for people: lines as they were, what could drive a terminal as escapes.

    PID 1's begin with `microguest: `: who reads an error has no use for the mark.
    """
    return MARK.sub("microguest: ", printable(text.replace("\r\n", "\n"), keep="\n\t"))
