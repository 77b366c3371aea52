"""The boot of one machine on the host's clock, put together from what its guest reports.

A guest counts milliseconds from its kernel's start (CLOCK_BOOTTIME); the host counts them from the
launch. A report cannot arrive before it was sent, so each one bounds the difference of the two, and
the one that was quickest is the best bound.
"""

import time
from typing import Final

from microguest.guest.report import FirstExec, HandedOff, Ready, Step, WorkloadStarted
from microguest.host_client.machines.plan import STEPS_MAX

__all__ = ["BootTimeline"]

MS_MAX: Final = 1e12  # thirty years; sums of what a guest says have to stay numbers
WITH_MOMENT: Final = (WorkloadStarted, FirstExec, HandedOff)


class BootTimeline:
    """`steps` is what MachineState.timeline shows, again after each report."""

    def __init__(self, *, shared_clock: bool) -> None:
        """`shared_clock`: the guest has the host's own kernel."""
        self._launched = time.monotonic()
        self._clock = time.clock_gettime_ns(time.CLOCK_BOOTTIME) / 1e6
        self._offset = -self._clock if shared_clock else None
        self._shared = shared_clock
        self._launch_ms = 0.0
        self._guest: tuple[Step, ...] = ()
        self._moments: dict[str, float] = {}  # of the guest's clock
        self._ready_ms: float | None = None

    def launched(self, moment: float) -> None:
        """The VMM runs; it was launched at this moment of the monotonic clock."""
        self._clock += (moment - self._launched) * 1000
        self._launched = moment
        self._launch_ms = self.now()
        if self._shared:
            self._offset = -self._clock

    def now(self) -> float:
        """Milliseconds since the launch."""
        return round((time.monotonic() - self._launched) * 1000, 3)

    def take(self, report: object) -> bool:
        """A report of the guest. True where the timeline is another now."""
        sent = report.steps[-1].end_ms if isinstance(report, Ready) and report.steps else None
        if isinstance(report, WITH_MOMENT):
            sent = report.boot_ms
        if sent is not None and not self._shared:
            bound = self.now() - sane(sent)
            self._offset = bound if self._offset is None else min(bound, self._offset)
        if isinstance(report, Ready):
            self._guest, self._ready_ms = report.steps[:STEPS_MAX], self.now()
        elif isinstance(report, WorkloadStarted) and report.starts == 1:
            self._moments.setdefault("workload-runs", report.boot_ms)
        elif isinstance(report, HandedOff):
            self._moments.setdefault("handed-off", report.boot_ms)
        elif isinstance(report, FirstExec):
            self._moments.setdefault("first-exec", report.boot_ms)
        else:
            return False
        return True

    @property
    def steps(self) -> tuple[Step, ...]:
        """Launch, kernel, the guest's steps, and the moments, by their start."""
        launch = Step(name="launch", start_ms=0.0, end_ms=self._launch_ms)
        offset = self._offset if self._offset is not None else 0.0
        found = [
            Step(
                name=s.name,
                start_ms=round(sane(s.start_ms) + offset, 3),
                end_ms=round(sane(s.end_ms) + offset, 3),
            )
            for s in self._guest
        ]
        if found and not self._shared:
            start = round(max(0.0, offset), 3)
            found.insert(0, Step(name="kernel", start_ms=start, end_ms=found[0].start_ms))
        moments = [(name, round(sane(at) + offset, 3)) for name, at in self._moments.items()]
        if self._ready_ms is not None:
            moments.append(("ready", self._ready_ms))
        found += [Step(name=name, start_ms=at, end_ms=at) for name, at in moments]
        return (launch, *sorted(found, key=lambda step: step.start_ms))


def sane(moment: float) -> float:
    """A guest's moment, or the most that one can be."""
    return max(-MS_MAX, min(moment, MS_MAX))
