"""Whether the agent still does anything: questions, and a closer look where one is not answered.

A busy agent is late with its answers too. So an agent hangs only where it was silent at MISSES
looks in a row and did nothing between them: it has not run, it does not want to, and it does not
wait inside the kernel for a device. A machine that was paused counts one look, however long.
"""

import os
import time

from microguest.guest import bounds
from microguest.init_shim.mounts import open_proc
from microguest.init_shim.signals import CONTINUE

TYPE_CHECKING = False  # typing itself is too heavy for PID 1
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Watchdog"]

# Of proc_pid_stat(5): T was stopped by a signal. R wants to run, D waits for a device, t is looked
# at by a debugger: none of them hangs.
STOPPED = "T"
HANGING = "ST"
ENDED = "Z"  # but not for waitpid(2), while another thread of it is on its way
EXITING = 0x4  # PF_EXITING of the flags there, in the kernel's sched.h
EXIT_STOP = 6 << 8 | 5  # exit_code there of who stands in its end for a debugger: ptrace(2)


class Watchdog:
    """Of one agent at a time. `interval`: seconds between two looks; 0: there are none.

    `ask` is called with the number of each question.
    """

    def __init__(self, interval: float, ask: "Callable[[int], None]") -> None:
        self.look_at: float | None = None  # time.monotonic()
        self.ends = False  # at the last look it was ending, and it was not reaped yet
        self._interval = interval
        self._ask = ask
        self._pid = 0
        self._number = 0
        self._answered = True
        self._misses = 0
        self._seen: tuple[int, ...] = ()

    def start(self, pid: int) -> None:
        """Another agent begins."""
        self._pid = pid
        self._answered = True
        self._misses = 0
        self._plan()

    def stop(self) -> None:
        """There is no agent."""
        self.look_at = None

    def answer(self, number: int) -> None:
        """The agent has answered a question."""
        if number == self._number:
            self._answered = True

    def look(self) -> bool:
        """When it is time to. Returns whether the agent hangs."""
        self._plan()
        self.ends = False
        if self._answered:
            self._misses = 0
            self._answered = False
            self._number += 1
            self._ask(self._number)
            return False
        state, self.ends, did = activity(self._pid)
        idle = state in HANGING and did == self._seen
        self._misses = self._misses + 1 if idle else 0
        self._seen = did
        if state == STOPPED:  # somebody's mistake, which costs it no more than the pause
            os.kill(self._pid, CONTINUE)
        return self._misses >= bounds.WATCHDOG_MISSES

    def look_within(self, seconds: float) -> None:
        """The next look is no later than that."""
        if self.look_at is not None:
            self.look_at = min(self.look_at, time.monotonic() + seconds)

    def _plan(self) -> None:
        self.look_at = time.monotonic() + self._interval if self._interval else None


def activity(pid: int) -> tuple[str, bool, tuple[int, ...]]:
    """Its state, "" where it cannot be seen, whether it ends, and what it had of the processor.

    The latter are numbers that only grow, of the time that it ran and that it waited for its turn.
    All of it is of its first thread, which the event loop is in: another one looks at that every
    half second, also while it hangs (agent/process/guard.py).
    """
    thread = f"{pid}/task/{pid}"
    try:
        with open(open_proc(f"{thread}/stat"), encoding="ascii", errors="replace") as file:
            state, *fields = file.read().rpartition(")")[2].split()
    except OSError:
        return "", False, ()
    used = tuple(int(field) for field in fields[10:12])  # utime and stime
    try:
        with open(open_proc(f"{thread}/schedstat"), encoding="ascii") as file:
            used += tuple(map(int, file.read().split()))
    except OSError:
        pass  # a kernel without CONFIG_SCHED_INFO: ticks have to do
    ends = state == ENDED or bool(int(fields[5]) & EXITING) or int(fields[48]) == EXIT_STOP
    return state, ends, used
