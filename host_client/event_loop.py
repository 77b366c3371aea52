"""The event loop of a machine's monitor: one thread, one epoll, timers, and nothing else.

It knows nothing of vsock, so that whatever else the process watches (a pidfd, a console, a
lifeline) shares it. Imports the standard library only.
"""

import heapq
import select
import time
from collections.abc import Callable
from itertools import count
from typing import Final

_COMPACT_AT: Final = 64
"""Cancelled timers that may lie in the heap before it is worth rebuilding."""


class Timer:
    """A call that is due later. Made by `EventLoop.call_later`."""

    __slots__ = ("_loop", "callback", "due")

    def __init__(self, loop: "EventLoop", due: float, callback: Callable[[], None]) -> None:
        self._loop = loop
        self.due = due
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Make sure the call does not happen; without effect when it has happened already."""
        if self.callback is not None:
            self.callback = None
            self._loop._timer_cancelled()  # noqa: SLF001 - the two classes are one thing


class EventLoop:
    """Calls back when file descriptors are ready and when time has passed.

    A callback that raises ends `run` with its exception: the loop does not guess which failures
    the process survives. Not thread-safe.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._removed: set[int] = set()
        self._timers: list[tuple[float, int, Timer]] = []
        self._sequence = count()
        self._cancelled = 0
        self._deferred: list[Callable[[], None]] = []
        self._running = False

    def run(self) -> None:
        """Serve callbacks until `stop`. Can be called again afterwards."""
        self._running = True
        while self._running:
            self._turn()

    def _turn(self) -> None:
        # An fd that is closed and opened again by one callback gets the number back, and a later
        # event of the same batch would then reach the wrong owner: such events are skipped.
        self._removed.clear()
        callbacks, removed = self._callbacks, self._removed
        for fd, events in self._epoll.poll(self._timeout()):
            callback = callbacks.get(fd)
            if callback is not None and fd not in removed:
                callback(events)
        if self._timers:
            self._run_timers()
        if self._deferred:
            deferred, self._deferred = self._deferred, []
            for call in deferred:
                call()

    def stop(self) -> None:
        """Make `run` return when the current turn has ended."""
        self._running = False

    def close(self) -> None:
        """Close the epoll descriptor and forget every callback and timer."""
        self._epoll.close()
        self._callbacks.clear()
        self._timers.clear()
        self._deferred.clear()

    def add(self, fd: int, callback: Callable[[int], None], events: int) -> None:
        """Call `callback(ready)` when `fd` has one of `events` (select.EPOLL* bits).

        OSError (EEXIST, EBADF, EPERM) as epoll_ctl(2) has it. The fd stays the caller's, who must
        `remove` it before closing it.
        """
        self._epoll.register(fd, events)
        self._callbacks[fd] = callback

    def modify(self, fd: int, events: int) -> None:
        """Change the events of an added `fd`; with EPOLLET this also reports its state afresh."""
        self._epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Forget `fd`; no callback for it happens after this returns. An unknown fd is ignored."""
        if self._callbacks.pop(fd, None) is not None:
            self._removed.add(fd)
            self._epoll.unregister(fd)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call `callback()` once, `seconds` from now at the earliest."""
        timer = Timer(self, time.monotonic() + seconds, callback)
        heapq.heappush(self._timers, (timer.due, next(self._sequence), timer))
        return timer

    def defer(self, callback: Callable[[], None]) -> None:
        """Call `callback()` once, after this turn's callbacks; from a deferred call: next turn."""
        self._deferred.append(callback)

    def _timeout(self) -> float:
        if self._deferred:
            return 0
        if not self._timers:
            return -1
        return max(0.0, self._timers[0][0] - time.monotonic())

    def _run_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            callback, timer.callback = timer.callback, None
            if callback is None:
                self._cancelled -= 1
            else:
                callback()

    def _timer_cancelled(self) -> None:
        self._cancelled += 1
        if self._cancelled > _COMPACT_AT and self._cancelled * 2 > len(self._timers):
            self._timers = [entry for entry in self._timers if entry[2].callback is not None]
            heapq.heapify(self._timers)
            self._cancelled = 0
