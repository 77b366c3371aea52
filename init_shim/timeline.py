"""When each step of the boot began and ended, and a limit for all of them together."""

import signal
import time

from guest import limits
from guest.report import Step
from init_shim.failure import Failure

TYPE_CHECKING = False  # typing itself is too heavy for PID 1
if TYPE_CHECKING:
    from types import FrameType, TracebackType

__all__ = ["Timeline", "boot_ms"]


def boot_ms() -> float:
    """Milliseconds since the kernel started, suspended time included, to a microsecond."""
    return round(time.clock_gettime_ns(time.CLOCK_BOOTTIME) / 1e6, 3)


class Timeline:
    """The steps so far. A failing step stays `current`, so that the failure can name it."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.current = ""
        self._start_ms = 0.0

    def step(self, name: str) -> "Timeline":
        """`with timeline.step(name):` times the block. Names are listed in docs/boot.md."""
        self.current = name
        self._start_ms = boot_ms()
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: "type[BaseException] | None",
        error: BaseException | None,
        trace: "TracebackType | None",
    ) -> None:
        if error is None:
            self.steps.append(Step(name=self.current, start_ms=self._start_ms, end_ms=boot_ms()))

    def start_deadline(self) -> None:
        """From now on a boot longer than BOOT_DEADLINE is a Failure, wherever it waits.

        It interrupts every wait that a signal can interrupt; a task stuck in uninterruptible sleep
        inside the kernel is beyond its reach.
        """
        signal.signal(signal.SIGALRM, _too_late)
        signal.setitimer(signal.ITIMER_REAL, limits.BOOT_DEADLINE)

    def end_deadline(self) -> None:
        """The boot is over, well or badly."""
        signal.setitimer(signal.ITIMER_REAL, 0)


def _too_late(number: int, frame: "FrameType | None") -> None:
    raise Failure(f"the boot is not done after {limits.BOOT_DEADLINE:g} s", syscall="alarm")
