"""A machine's console on disk: bounded, however much the guest writes.

Used by the monitor, so it imports next to nothing.
"""

import os
from typing import BinaryIO, Final

from guest.errors import printable

__all__ = ["HALF_MAX", "TAIL_MAX", "LogReader", "RotatingLog", "printable_lines", "read_log"]

HALF_MAX: Final = 4 * 1024 * 1024  # bytes of the current and of the previous file, each
TAIL_MAX: Final = 16 * 1024  # bytes at the end that stay in memory, for errors


class RotatingLog:
    """Appends to PATH; at `half_max` bytes it becomes PATH.1 and a new one begins."""

    def __init__(self, path: str, half_max: int = HALF_MAX) -> None:
        self._path = path
        self._half_max = half_max
        self._fd = -1
        self._size = 0
        self._tail = bytearray()
        self.lost = 0  # bytes that could not be written: the disk is full
        self._open()

    def write(self, data: bytes) -> None:
        """Append. A full disk loses the bytes, never the machine."""
        self._tail += data
        del self._tail[:-TAIL_MAX]
        try:
            if self._size + len(data) > self._half_max and self._size:
                os.close(self._fd)
                os.rename(self._path, f"{self._path}.1")
                self._open()
            self._size += os.write(self._fd, data)
        except OSError:
            self.lost += len(data)

    def tail(self) -> str:
        """The last lines."""
        return bytes(self._tail).decode("utf-8", "replace")

    def close(self) -> None:
        """Nothing more comes."""
        os.close(self._fd)

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._fd = os.open(self._path, flags, 0o600)
        self._size = 0


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


class LogReader:
    """Reads a log piece by piece while it is written, and becomes PATH.1, and again."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._file: BinaryIO | None = None

    def read(self) -> bytes:
        """What has come since the last call; at the first one all that there is."""
        data = b"" if self._file is None else self._file.read()
        try:
            newest = open(self._path, "rb")  # noqa: SIM115  stays open
        except FileNotFoundError:
            return data
        if self._file is not None and is_same(self._file, newest):
            newest.close()
            return data
        if self._file is not None:
            data += self._file.read()  # it will get nothing more
        data += self._previous()
        self.close()
        self._file = newest
        return data + newest.read()

    def close(self) -> None:
        """Nothing more is read."""
        if self._file is not None:
            self._file.close()

    def _previous(self) -> bytes:
        """PATH.1, where that is not what was read last."""
        try:
            with open(f"{self._path}.1", "rb") as file:
                return b"" if self._file is not None and is_same(self._file, file) else file.read()
        except FileNotFoundError:
            return b""


def is_same(one: BinaryIO, other: BinaryIO) -> bool:
    """Whether two open files are one."""
    return os.path.samestat(os.fstat(one.fileno()), os.fstat(other.fileno()))


def printable_lines(text: str) -> str:
    """Console text for people: lines as they were, what could drive a terminal as escapes."""
    return printable(text.replace("\r\n", "\n"), keep="\n\t")
