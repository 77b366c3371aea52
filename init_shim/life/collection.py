"""How long the output and exit code of an ended workload wait for their reader.

A wait counts from where the other side can act: not before an agent serves, not while a host is
there that only is slow, and, for one that has not come yet, as long as the config has promised.
All of it together is bounded by the config's `output_wait`.
"""

from microguest.guest import bounds

__all__ = ["Collection"]


class Collection:
    """Of one machine. All moments are time.monotonic().

    output_wait: seconds for a reader who is there, or has not been there yet.
    """

    def __init__(self, output_wait: float) -> None:
        self._output_wait = output_wait
        self._ended: float | None = None
        self._served: float | None = None  # since when: the first agent, and the one there is
        self._serves_since: float | None = None
        self._agent_is_down = False  # for good
        self.reader_there = False
        self._reader_left: float | None = None  # None also where nobody has come yet

    @property
    def pending(self) -> bool:
        """Whether it has ended and was not collected."""
        return self._ended is not None

    def workload_ended(self, now: float) -> None:
        """For good."""
        self._ended = now

    def agent_serves(self, now: float) -> None:
        """A host can be served from now on."""
        self._serves_since = now
        if self._served is None:
            self._served = now

    def agent_died(self, now: float, *, comes_again: bool) -> None:
        """Nobody is served until the next one does. Its hosts have lost their connections."""
        self._serves_since = None
        self._agent_is_down = not comes_again
        if self.reader_there:
            self.reader(now, there=False)

    def reader(self, now: float, *, there: bool) -> None:
        """A host that may write to the workload is there, or none is any more."""
        self.reader_there = there
        self._reader_left = None if there else now

    def done(self) -> None:
        """It is collected, or was waited for long enough."""
        self._ended = None

    @property
    def until(self) -> float | None:
        """When it has waited long enough; None while that cannot be said."""
        if self._ended is None or self._agent_is_down:
            return self._ended
        if self._served is None:
            return None  # how long it may take to serve at all, the boot looks after
        most = max(self._ended, self._served) + self._output_wait
        if self._serves_since is None or self.reader_there or self._reader_left is None:
            return most
        alone_since = max(self._ended, self._serves_since, self._reader_left)
        return min(most, alone_since + bounds.OUTPUT_GRACE)
