"""The loop that PID 1 lives in: signals, the agent's messages, children that ended, deadlines.

Single-threaded; nothing in it blocks but `Signals.wait`. It alone waits for children: its two own
are known by pid, everything else that ends is an orphan and needs no more than reaping.
"""

import os
import time
from resource import struct_rusage

from guest import limits
from guest.report import AgentExited, WorkloadExited
from guest.supervision import MainCollected, ShutdownRequest
from init_shim.agent_process import AgentProcess
from init_shim.reporter import Reporter
from init_shim.signals import Signals
from init_shim.timeline import boot_ms
from init_shim.workload import RunningWorkload

TYPE_CHECKING = False  # typing itself is too heavy for PID 1
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Supervisor"]

REAPED_AT_ONCE = 1024  # children per turn, so that a flood of orphans cannot starve the rest
MESSAGES_AT_ONCE = 512  # more than the pair's queue holds, but not without an end


class Supervisor:
    """`status` is "" until the machine's end is decided; then as in `guest.report.Stopping`.

    `grace` is how many seconds everything gets between TERM and KILL.
    """

    def __init__(self, signals: Signals, reporter: Reporter, agent: AgentProcess) -> None:
        self.status = ""
        self.grace = limits.STOP_GRACE
        self.workload: RunningWorkload | None = None
        self._signals = signals
        self._reporter = reporter
        self._agent = agent
        self._attached = False
        self._collect_until: float | None = None  # time.monotonic()
        self._more_to_reap = False
        self._readers: dict[int, Callable[[], None]] = {}

    def when_readable(self, fd: int, act: "Callable[[], None]") -> None:
        """Call `act` in each turn in which `fd` can be read or was closed by its peer.

        `act` must not block, and reads a bounded amount; at the end of the file it calls `forget`.
        """
        self._readers[fd] = act

    def forget(self, fd: int) -> None:
        """No longer look at `fd`; before it is closed."""
        self._readers.pop(fd, None)

    def watch(self, workload: RunningWorkload, *, attached: bool) -> None:
        """From now on the end of `workload` is the end of the machine."""
        self.workload = workload
        self._attached = attached

    def run(
        self, done: "Callable[[], bool]", *, timeout: float | None = None, despite: str = ""
    ) -> bool:
        """Turn until `done()`, until the machine's end is decided, or for `timeout` seconds.

        An end with the status `despite` does not count. Returns False if the time was up.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not (done() or self.status not in ("", despite)):
            if deadline is not None and time.monotonic() >= deadline:
                return False
            self._turn(deadline)
        return True

    def _turn(self, deadline: float | None) -> None:
        pair = self._agent.fileno()
        ready = self._signals.wait(
            self._patience(deadline),
            read=(*self._readers, *([pair] if pair >= 0 else [])),
            write=[pair] if pair >= 0 and self._agent.has_more_to_say else [],
        )
        if self._signals.stop_requested:
            self._end("shutdown")
        for fd, act in list(self._readers.items()):
            if fd in ready:
                act()
        if pair in ready:
            self._agent.say_more()
        ended = reap()
        self._agent.reaped |= any(pid == self._agent.pid for pid, _, _ in ended)
        if (
            pair in ready or ended
        ):  # a child of the agent is only ours when the agent has said its last
            self._hear_agent()
        self._more_to_reap = len(ended) == REAPED_AT_ONCE
        for pid, status, usage in ended:
            self._ended(pid, status, usage)
        now = time.monotonic()
        if self._agent.restart_at is not None and now >= self._agent.restart_at:
            self._agent.start()
        if self._collect_until is not None and now >= self._collect_until:
            self._end("done")

    def _patience(self, deadline: float | None) -> float | None:
        """Seconds until the next thing that has to happen by itself."""
        if self._more_to_reap:
            return 0.0
        moments = (deadline, self._agent.restart_at, self._collect_until)
        known = [moment for moment in moments if moment is not None]
        return max(0.0, min(known) - time.monotonic()) if known else None

    def _hear_agent(self) -> None:
        for _ in range(MESSAGES_AT_ONCE):
            message = self._agent.receive()
            if message is None:
                return
            if isinstance(message, ShutdownRequest):
                if 0.0 <= message.grace <= limits.STOP_GRACE_MAX:
                    self.grace = message.grace
                self._end("shutdown")
            elif isinstance(message, MainCollected) and self._collect_until is not None:
                self._end("done")

    def _ended(self, pid: int, status: int, usage: struct_rusage) -> None:
        if pid == self._agent.pid:
            fields = self._agent.ended(status)
            delay = None
            if self._agent.restart_at is not None:
                delay = max(0.0, round(self._agent.restart_at - time.monotonic(), 3))
            about = {"crashes": self._agent.crashes, "restart_in": delay}
            self._reporter.send(AgentExited.from_map({**fields, **about}))
        elif self.workload is not None and pid == self.workload.pid:
            fields = self.workload.ended(status)
            self._reporter.send(WorkloadExited.from_map({**fields, "boot_ms": boot_ms()}))
            if self._attached:
                self._agent.main_exited()
                self._collect_until = time.monotonic() + limits.OUTPUT_GRACE
            else:
                self._end("done")
        else:
            self._agent.kept_reaped(pid, status, usage)

    def _end(self, status: str) -> None:
        if self.status in ("", "done"):
            self.status = status


def reap(most: int = REAPED_AT_ONCE) -> list[tuple[int, int, struct_rusage]]:
    """(pid, wait status, usage) of children that ended, at most `most`."""
    ended: list[tuple[int, int, struct_rusage]] = []
    while len(ended) < most:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if pid == 0:
            break
        ended.append((pid, status, usage))
    return ended
