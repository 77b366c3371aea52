"""The workload through all its lives: started, signalled, and started again as its policy says.

What one life is made of is `init_shim.life.workload`'s; whose turn it is, the supervisor's.
"""

import os
import time

from microguest.guest import bounds
from microguest.guest.boot.workload import Workload, signal_number
from microguest.guest.report import WorkloadExited, WorkloadFailed, WorkloadStarted
from microguest.init_shim.failure import Failure
from microguest.init_shim.life.collection import Collection
from microguest.init_shim.life.workload import RunningWorkload, WorkloadNotStarted
from microguest.init_shim.timeline import boot_ms

TYPE_CHECKING = False  # typing itself is too heavy for PID 1
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MainProcess", "failed_start"]


class MainProcess:
    """`running` is None before, between and after its lives.

    `restart_at`: time.monotonic() of the next start; None where there is none to come.
    """

    def __init__(self, workload: Workload, start: "Callable[[], RunningWorkload]") -> None:
        self.attached = workload.stdio != "console"
        self.collection = Collection(workload.output_wait)
        self.running: RunningWorkload | None = None
        self.restart_at: float | None = None
        self._workload = workload
        self._start = start
        self._starts = 0
        self._restarts = 0  # in a row, without a healthy life between them

    def start(self) -> WorkloadStarted:
        """Begin a life. Raises WorkloadNotStarted, or Failure."""
        self.restart_at = None
        self.running = self._start()
        self._starts += 1
        return WorkloadStarted(pid=self.running.pid, boot_ms=boot_ms(), starts=self._starts)

    def start_again(self) -> WorkloadStarted | WorkloadFailed:
        """The same for a later life; one that cannot begin counts as a run that failed."""
        try:
            return self.start()
        except WorkloadNotStarted as error:
            report = failed_start(error)
        except Failure as failure:
            report = WorkloadFailed(code="internal", message=str(failure), errno=failure.errno)
        return report.replace(restart_in=self._plan_restart(failed=True))

    def ended(self, status: int, *, for_good: bool) -> WorkloadExited:
        """It was reaped with this wait status. `for_good`: the machine ends as well."""
        assert self.running is not None
        life, self.running = self.running, None
        fields = life.ended(status)
        if life.duration >= bounds.RESTART_RESET:
            self._restarts = 0
        delay = None if for_good else self._plan_restart(failed=fields.get("code") != 0)
        about = {"boot_ms": boot_ms(), "restart_in": delay, "oom_killed": life.oom_killed()}
        return WorkloadExited.from_map({**fields, **about})

    def _plan_restart(self, *, failed: bool) -> float | None:
        """Seconds until the next life, doubled each time; None where the policy has no other."""
        plan = self._workload.restart
        wanted = plan.policy == "always" or (plan.policy == "on-failure" and failed)
        if not wanted or (plan.limit and self._restarts >= plan.limit):
            return None
        doubled = min(self._restarts, 64)  # above that any delay is longer than the longest
        delay = min(plan.delay * 2.0**doubled, plan.delay_max)
        self._restarts += 1
        self.restart_at = time.monotonic() + delay
        return delay

    def signal(self, number: int) -> None:
        """To the process, or to its group where the config says so. Nothing between its lives."""
        if self.running is None:
            return
        try:
            if self._workload.signal_group:
                os.killpg(self.running.pid, number)
            else:
                os.kill(self.running.pid, number)
        except OSError:
            pass  # PID 1 may signal everybody, so it has ended and is reaped next

    def ask_to_end(self) -> None:
        """The image's own stop signal."""
        self.restart_at = None
        self.signal(signal_number(self._workload.stop_signal))


def failed_start(error: WorkloadNotStarted) -> WorkloadFailed:
    """What to tell about it."""
    return WorkloadFailed(
        code=error.code, message=error.message, step=error.step, errno=error.errno
    )
