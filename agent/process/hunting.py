"""Who is looked for in /proc, without holding up the event loop: one pass serves all who wait."""

import signal
import time
from collections.abc import Generator
from typing import ClassVar, TypeVar

import trio

from microguest.agent.process import tree
from microguest.agent.process.tree import Hunt

__all__ = ["Hunters", "Quarry", "in_slices"]

SLICE = 0.005  # seconds of work before others get their turn

T = TypeVar("T")


class Quarry(Hunt):
    """A hunt that can be waited for."""

    def __init__(self, pid: int, mark: bytes, number: int = signal.SIGKILL) -> None:
        super().__init__(pid, mark, number)
        self.done = trio.Event()


class Hunters:
    """All hunts of this agent. `ending`: nobody else gets a turn any more; `finish` is next."""

    ending = False
    _waiting: ClassVar[list[Quarry]] = []
    _running = False

    @classmethod
    def send(cls, pid: int, mark: bytes, number: int) -> Quarry:
        """Begin to look for a process and its descendants; its pid must stay its own until then."""
        hunt = Quarry(pid, mark, number)
        cls._waiting.append(hunt)
        if not cls._running and not cls.ending:
            cls._running = True
            trio.lowlevel.spawn_system_task(cls._run)
        return hunt

    @classmethod
    def finish(cls) -> None:
        """All that are under way, to their ends, now."""
        tree.run(list(cls._waiting))

    @classmethod
    async def _run(cls) -> None:
        while cls._waiting:
            batch = list(cls._waiting)
            await in_slices(tree.passes(batch))
            cls._waiting = [hunt for hunt in cls._waiting if not hunt.over]
            for hunt in batch:
                if hunt.over:
                    hunt.done.set()
            await trio.lowlevel.checkpoint()
        cls._running = False


async def in_slices(steps: Generator[float, None, T]) -> T:
    """Run what waits by yielding seconds to its end, and let others have their turns."""
    until = time.monotonic() + SLICE
    while True:
        try:
            seconds = next(steps)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        if seconds or time.monotonic() >= until:
            await trio.sleep(seconds)
            until = time.monotonic() + SLICE
