"""Bytes that have arrived and are not taken yet. Pure; who fills one sees to its size."""

from collections import deque
from typing import Final

__all__ = ["Backlog"]

# Pieces shorter than this are joined, so that a peer who sends single bytes cannot make them cost a
# hundred times their size.
SHORT: Final = 4096


class Backlog:
    """A queue of bytes, given out in pieces, by lines or as a whole."""

    __slots__ = ("_pieces", "_searched", "_skip", "size")

    def __init__(self) -> None:
        self.size = 0
        self._pieces: deque[bytes] = deque()
        self._skip = 0  # bytes of the first piece that are taken
        self._searched = 0  # pieces at the front that are known to hold no newline

    def add(self, data: bytes) -> None:
        """Put bytes at the end."""
        self.size += len(data)
        if self._pieces and len(self._pieces[-1]) < SHORT:
            self._pieces[-1] += data
            self._searched = min(self._searched, len(self._pieces) - 1)
        else:
            self._pieces.append(data)

    def take(self, most: int) -> bytes:
        """The next bytes, at most that many; as they arrived, where possible without a copy."""
        first = self._pieces[0]
        end = min(len(first), self._skip + most)
        taken = first[self._skip : end] if self._skip or end < len(first) else first
        self._drop(end, len(first))
        self.size -= len(taken)
        return taken

    def take_line(self) -> bytes:
        """The next line with its newline, b"" where no whole one is there."""
        for index in range(self._searched, len(self._pieces)):
            start = self._skip if index == 0 else 0
            end = self._pieces[index].find(b"\n", start) + 1
            if end:
                return self._take_until(index, end)
        self._searched = len(self._pieces)
        return b""

    def take_all(self) -> bytes:
        """Everything, which is then gone."""
        whole = self.everything()
        self._pieces.clear()
        self.size = self._skip = self._searched = 0
        return whole

    def everything(self) -> bytes:
        """A copy of everything."""
        whole = b"".join(self._pieces)
        return whole[self._skip :] if self._skip else whole

    def _take_until(self, index: int, end: int) -> bytes:
        if index == 0:
            return self.take(end - self._skip)
        parts = [self.take(self.size) for _ in range(index)]
        parts.append(self.take(end))
        return b"".join(parts)

    def _drop(self, end: int, length: int) -> None:
        """The first piece is taken up to `end`."""
        if end < length:
            self._skip = end
        else:
            self._pieces.popleft()
            self._skip = 0
        self._searched = max(0, self._searched - 1) if end == length else 0
