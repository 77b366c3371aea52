"""Bytes that have arrived and are not taken yet. Pure; who fills one sees to its size.

A signal's handler may raise behind any call, also between the taking of bytes and the return of
the call that gives them. So that call has a `Taking`: what left is written there in the same
moment, and can be put back.
"""

from collections import deque
from typing import Final

__all__ = ["Backlog", "Taking"]

# Pieces shorter than this are joined, so that a peer who sends single bytes cannot make them cost a
# hundred times their size.
SHORT: Final = 4096


class Taking:
    """What one call has taken. Until it has returned, that is not its caller's yet."""

    __slots__ = ("pieces",)

    def __init__(self) -> None:
        self.pieces: dict[Backlog, bytes] = {}


class Backlog:
    """A queue of bytes, given out in pieces, by lines or as a whole."""

    __slots__ = ("_arrived", "_pieces", "_searched", "taken")

    def __init__(self) -> None:
        self.taken = 0  # bytes, of all that ever arrived
        self._arrived = 0
        self._pieces: deque[tuple[int, bytes]] = deque()  # each with the number of its first byte
        self._searched = 0  # no newline before this byte

    @property
    def size(self) -> int:
        """Bytes that can be taken."""
        return self._arrived - self.taken

    @property
    def arrived(self) -> int:
        """Bytes that ever came."""
        return self._arrived

    def add(self, data: bytes) -> None:
        """Put bytes at the end."""
        if self._pieces and len(self._pieces[-1][1]) < SHORT:
            start, last = self._pieces[-1]
            self._pieces[-1] = start, last + data
        elif data:
            self._pieces.append((self._arrived, data))
        self._arrived += len(data)

    def take(self, most: int, taking: Taking) -> bytes:
        """The next bytes, at most that many; as they arrived, where possible without a copy."""
        start, first = self._pieces[0]
        begin = self.taken - start
        return self._give(first[begin : begin + most], taking)

    def take_line(self, taking: Taking) -> bytes:
        """The next line with its newline, b"" where no whole one is there."""
        searched = max(self._searched, self.taken)
        for start, piece in self._pieces:
            if start + len(piece) <= searched:
                continue
            if end := piece.find(b"\n", max(0, searched - start)) + 1:
                return self._give(self._next(start + end - self.taken), taking)
        self._searched = self._arrived
        return b""

    def take_all(self, taking: Taking) -> bytes:
        """Everything, which is then gone."""
        return self._give(self.everything(), taking)

    def everything(self) -> bytes:
        """A copy of everything."""
        return self._next(self.size)

    def put_back(self, data: bytes) -> None:
        """Bytes that were taken are the next ones again."""
        self._forget_taken()
        if self._pieces and self._pieces[0][0] < self.taken:
            start, first = self._pieces.popleft()
            self._pieces.appendleft((self.taken, first[self.taken - start :]))
        self.taken -= len(data)
        self._pieces.appendleft((self.taken, data))
        self._searched = self.taken

    def _next(self, size: int) -> bytes:
        """A copy of the next bytes."""
        parts: list[memoryview | bytes] = []
        for start, piece in self._pieces:
            if start >= self.taken + size:
                break
            whole = start >= self.taken and start + len(piece) <= self.taken + size
            begin = max(0, self.taken - start)
            end = self.taken + size - start
            parts.append(piece if whole else memoryview(piece)[begin:end])
        return b"".join(parts)

    def _give(self, data: bytes, taking: Taking) -> bytes:
        """The bytes, which are taken now."""
        taken = self.taken + len(data)
        taking.pieces[self] = data  # no call between this and the next line, so no interrupt
        self.taken = taken
        self._forget_taken()
        return data

    def _forget_taken(self) -> None:
        """Let the pieces go that are taken."""
        while self._pieces and self._pieces[0][0] + len(self._pieces[0][1]) <= self.taken:
            self._pieces.popleft()
