"""A point in time until which something has to be done. Imports nothing of the project."""

import time

__all__ = ["Deadline"]


class Deadline:
    """`seconds` from now on the monotonic clock; None is never."""

    __slots__ = ("_at", "seconds")

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._at = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float | None:
        """Seconds until then, 0.0 when it has passed, None for never."""
        return None if self._at is None else max(0.0, self._at - time.monotonic())

    @property
    def passed(self) -> bool:
        """Whether the time is over."""
        return self._at is not None and time.monotonic() >= self._at

    def within(self, at_most: float) -> float:
        """Seconds to wait now: until then, but no more than `at_most`."""
        if self._at is None:
            return at_most
        return min(at_most, max(0.0, self._at - time.monotonic()))
