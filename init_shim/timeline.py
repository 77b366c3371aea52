"""When each step of the boot began and ended."""

import time

from microguest.guest.report import Step

TYPE_CHECKING = False  # typing itself is too heavy for PID 1
if TYPE_CHECKING:
    from types import TracebackType

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
        """`with timeline.step(name):` times the block. Names are listed in docs/design/boot.md."""
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
