"""What has arrived of a process's outputs and waits for readers: how much, in which order."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from microguest.guest.wire.connection import Data, End, Event
from microguest.host_client.client.backlog import Backlog, Taking
from microguest.host_client.client.process_connection import too_large

__all__ = ["STDERR", "STDOUT", "Unread"]

STDOUT: Final = 1
STDERR: Final = 2
RUNS: Final = 1024  # alternations between the outputs whose order is remembered


class Unread:
    """Both outputs. `max_unread`: bytes of each that may wait, but for who collects."""

    def __init__(self, max_unread: int) -> None:
        self._max = max_unread
        self._outputs = {STDOUT: Backlog(), STDERR: Backlog()}
        self._ended: set[int] = set()
        self._runs: deque[list[int]] = deque()  # [output, its bytes until then], as they arrived
        self._collectors: dict[int, dict[Taking, int]] = {STDOUT: {}, STDERR: {}}  # what they allow

    def add(self, events: list[Event]) -> None:
        """Put what arrived where its reader finds it."""
        for event in events:
            if isinstance(event, Data):
                output = self._outputs[event.stream]
                output.add(event.data)
                self._note_arrival(event.stream, output.arrived)
            elif isinstance(event, End):
                self._ended.add(event.stream)

    def size(self, stream: int) -> int:
        """Bytes that wait."""
        return self._outputs[stream].size

    def taken(self, stream: int) -> int:
        """Bytes that were handed out."""
        return self._outputs[stream].taken

    def over(self, stream: int) -> bool:
        """Whether no more will come."""
        return stream in self._ended

    @property
    def full(self) -> int:
        """An output of which no more may come before it is read; 0 for none."""
        for stream, output in self._outputs.items():
            room = max(self._collectors[stream].values(), default=0)
            if output.size >= self._max and output.size > room:
                return stream
        return 0

    # ── taking ───────────────────────────────────────────────────────────────────────────────────

    def take(self, stream: int, most: int, taking: Taking) -> bytes:
        """What is next of an output; b"" where nothing waits."""
        output = self._outputs[stream]
        return output.take(most, taking) if output.size else b""

    def take_line(self, stream: int, taking: Taking) -> bytes:
        """A line, or what is there where no more can come; b"" to wait, or at the end."""
        output = self._outputs[stream]
        line = output.take_line(taking)
        if not line and output.size and (self.over(stream) or output.size >= self._max):
            return output.take_all(taking)
        return line

    def take_all(self, stream: int, taking: Taking) -> bytes:
        """All that waits."""
        output = self._outputs[stream]
        return output.take_all(taking) if output.size else b""

    def first(self) -> tuple[int, int]:
        """Which output's bytes arrived first, and how many; (0, 0) where none wait."""
        self._forget_runs()
        if not self._runs:
            return 0, 0
        stream, until = self._runs[0]
        return stream, until - self.taken(stream)

    def put_back(self, taking: Taking) -> None:
        """What a call has taken is there for the next one. It collects no more."""
        for stream, output in self._outputs.items():
            self._collectors[stream].pop(taking, None)
            data = taking.pieces.pop(output, b"")
            if data:
                until = output.taken
                output.put_back(data)
                self._runs.appendleft([stream, until])

    # ── collecting ───────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def collecting(self, most: int, taking: Taking, *streams: int) -> Iterator[None]:
        """Let up to `most` bytes of these outputs wait for who wants all of them at once.

        They stay where others would find them until that call is about to return: cancelled, or
        ended by an error, it has taken nothing.
        """
        try:
            for stream in streams:
                self._collectors[stream][taking] = most
            yield
        finally:
            for stream in streams:
                self._collectors[stream].pop(taking, None)

    def collected(self, stream: int) -> int:
        """Bytes that wait for who collects."""
        return self.size(stream) if self._collectors[stream] else 0

    def fits(self, stream: int, most: int) -> bool:
        """True. OutputTooLarge where more than that waits."""
        if self.size(stream) > most:
            raise too_large(stream, most)
        return True

    # ── the order ────────────────────────────────────────────────────────────────────────────────

    def _note_arrival(self, stream: int, until: int) -> None:
        """Remember the order between the outputs; beyond RUNS, only in which they were before."""
        self._forget_runs()
        for run in reversed(self._runs):
            if run[0] == stream:
                run[1] = until
                return
            if len(self._runs) < RUNS:
                break
        self._runs.append([stream, until])

    def _forget_runs(self) -> None:
        while self._runs and self._runs[0][1] <= self.taken(self._runs[0][0]):
            self._runs.popleft()
