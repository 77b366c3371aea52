"""A point in time until which something has to be done. Imports nothing of the project."""

import time

__all__ = ["LAST_LOOK", "Deadline"]

LAST_LOOK = 0.5  # seconds in which what has arrived by the deadline is still taken


class Deadline:
    """`seconds` from now on the monotonic clock; None is never."""

    __slots__ = ("_at", "_seen", "seconds")

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._seen: float | None = None  # when its end was first noticed
        self._at = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float | None:
        """Seconds until then, 0.0 when it has passed, None for never."""
        return None if self._at is None else max(0.0, self._at - time.monotonic())

    @property
    def passed(self) -> bool:
        """Whether the time is over."""
        return self._at is not None and time.monotonic() >= self._at

    @property
    def overdue(self) -> bool:
        """Whether to give up although there is something to take.

        Who comes late, as after being stopped, still gets what has arrived. A peer that always has
        one more byte cannot draw that out: LAST_LOOK after the end was noticed it is over.
        """
        if self._at is None or (now := time.monotonic()) < self._at:
            return False
        if self._seen is None:
            self._seen = now
        return now - self._seen >= LAST_LOOK

    def within(self, at_most: float) -> float:
        """Seconds to wait now: until then, but no more than `at_most`."""
        if self._at is None:
            return at_most
        return min(at_most, max(0.0, self._at - time.monotonic()))
