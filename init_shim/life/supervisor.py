"""The loop that PID 1 lives in: signals, the agent's messages, children that ended, deadlines.

Single-threaded; nothing in it blocks but `Signals.wait`. It alone waits for children: its two own
are known by pid, everything else that ends is an orphan and needs no more than reaping.
"""

import os
import time
from resource import struct_rusage

import _guestsys

from microguest.guest import bounds
from microguest.guest.report import AgentServes, FirstExec, WorkloadFailed
from microguest.guest.supervision import (
    AgentReady,
    ExecStarted,
    MainCollected,
    MainReader,
    ShutdownRequest,
)
from microguest.init_shim.ending import Ending
from microguest.init_shim.failure import Failure
from microguest.init_shim.life.agent_child import AgentProcess
from microguest.init_shim.life.workload_lives import MainProcess
from microguest.init_shim.reporter import Reporter
from microguest.init_shim.signals import KILL, Signals

TYPE_CHECKING = False  # typing itself is too heavy for PID 1
if TYPE_CHECKING:
    from collections.abc import Callable

    from microguest.guest.record import Record

__all__ = ["Supervisor", "await_agent"]

REAPED_AT_ONCE = 128  # children per turn: a flood of orphans starves nobody and takes no memory
MESSAGES_AT_ONCE = 512  # more than the pair's queue holds, but not without an end
LOOK_AGAIN = 0.05  # seconds between two looks at who is left, should a SIGCHLD be missed


class Supervisor:
    """`status` is "" until the machine's end is decided; then as in `guest.report.Stopping`.

    `grace` is how many seconds everything gets between TERM and KILL. `agent` may be set later.
    """

    def __init__(
        self, signals: Signals, reporter: Reporter, agent: AgentProcess | None = None
    ) -> None:
        self.status = ""
        self.grace = bounds.STOP_GRACE
        self.signals = signals
        self.reporter = reporter
        self.agent = agent
        self.main: MainProcess | None = None
        self._more_to_reap = False
        self._readers: dict[int, Callable[[], None]] = {}
        self._first_exec_told = False
        self._last_phase = False  # everybody is being ended: nobody is started again
        self._told: set[int] = set()  # those whose end was told, and who are not reaped yet

    # ── what it looks after ──────────────────────────────────────────────────────────────────────

    def begin(self, main: MainProcess) -> None:
        """Start the workload; from now on its end is the machine's, unless its policy says more.

        Raises WorkloadNotStarted, or Failure.
        """
        self.reporter.send(main.start())
        self.main = main
        if self.agent is not None and self.agent.ready:
            main.collection.agent_serves(time.monotonic())
        self._tell_of(main)

    def _tell_of(self, main: MainProcess) -> None:
        """The agent passes signals on to it, and serves its streams where it has any."""
        if self.agent is not None and main.running is not None:
            self.agent.main_started(main.running)

    def when_readable(self, fd: int, act: "Callable[[], None]") -> None:
        """Call `act` in each turn in which `fd` can be read or was closed by its peer.

        `act` must not block, and reads a bounded amount; at the end of the file it calls `forget`.
        """
        self._readers[fd] = act

    def forget(self, fd: int) -> None:
        """No longer look at `fd`; before it is closed."""
        self._readers.pop(fd, None)

    def fail(self, status: str) -> None:
        """The machine ends because of a failure, whatever else was decided."""
        self.status = status
        self.grace = bounds.FAILED_GRACE

    # ── going on ─────────────────────────────────────────────────────────────────────────────────

    def run(
        self, done: "Callable[[], bool]", *, timeout: float | None = None, despite: str = ""
    ) -> bool:
        """Turn until `done()`, until the machine's end is decided, or for `timeout` seconds.

        An end with the status `despite` does not count. Returns False if the time was up.
        """
        return self._turns(lambda: done() or self.status not in ("", despite), timeout)

    def stop_workload(self) -> None:
        """Ask it to end, and everything goes on until it has, for at most `grace` seconds.

        With pipes or a terminal it is killed then, before the agent is, and whoever reads them has
        COLLECT_WAIT for the last of it and the exit code.
        """
        main = self.main
        if main is None:
            return
        if main.running is not None:
            main.ask_to_end()
            self._turns(lambda: main.running is None, self.grace)
        if main.attached:
            main.signal(KILL)
            waits = main.collection
            self._turns(
                lambda: main.running is None and not (waits.pending and waits.reader_there),
                bounds.COLLECT_WAIT,
            )

    def outlive(self, timeout: float) -> bool:
        """Turn until nobody is left, for at most `timeout` seconds; nobody is started again.

        Returns whether nobody is. Ends are still noted, and the workload's is reported.
        """
        self._last_phase = True
        deadline = time.monotonic() + timeout
        while not nobody_is_left():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self._turn(time.monotonic() + min(left, LOOK_AGAIN))
        return True

    def _turns(self, done: "Callable[[], bool]", timeout: float | None) -> bool:
        deadline = None if timeout is None else time.monotonic() + timeout
        while not done():
            if deadline is not None and time.monotonic() >= deadline:
                return False
            self._turn(deadline)
        return True

    def _turn(self, deadline: float | None) -> None:
        ready = self._wait(deadline)
        if self.signals.stop_requested:
            self._end("shutdown")
        for number in self.signals.take():
            if self.main is not None:
                self.main.signal(number)
        ended, self._more_to_reap = reap()
        if self.agent is not None:
            self._attend(self.agent, ready, ended)
        for pid, status, usage in ended:
            self._reaped(pid, status, usage)
        self._act_in_time()

    def _wait(self, deadline: float | None) -> set[int]:
        """One wait for all that can happen. Calls who reads; returns what was ready."""
        readers, reading, writing = dict(self._readers), list(self._readers), []
        if self.agent is not None:
            if self.agent.words is not None and self.agent.words.fileno() >= 0:
                readers[self.agent.words.fileno()] = self.agent.words.read
            pair = [self.agent.fileno()] if self.agent.fileno() >= 0 else []
            reading = [*readers, *pair]
            writing = pair if self.agent.has_more_to_say else []
        life = None if self.main is None else self.main.running
        if life is not None and life.ending.look_at is None:
            readers[life.pidfd] = life.ending.begin
            reading = [*reading, life.pidfd]
        ready = self.signals.wait(self._patience(deadline), read=reading, write=writing)
        for fd, act in readers.items():
            if fd in ready:
                act()
        return ready

    def _patience(self, deadline: float | None) -> float | None:
        """Seconds until the next thing that has to happen by itself."""
        if self._more_to_reap:
            return 0.0
        moments = [deadline]
        if self.agent is not None and not self._last_phase:
            moments += [self.agent.restart_at, self.agent.watchdog.look_at]
        if self.main is not None and not self.status:
            moments += [self.main.restart_at, self.main.collection.until]
        moments += [ending.look_at for ending in self._endings()]
        known = [moment for moment in moments if moment is not None]
        return max(0.0, min(known) - time.monotonic()) if known else None

    # ── what happened ────────────────────────────────────────────────────────────────────────────

    def _attend(
        self, agent: AgentProcess, ready: set[int], ended: list[tuple[int, int, struct_rusage]]
    ) -> None:
        """Hear the agent. A child of it is only PID 1's when the agent has said its last."""
        pair = agent.fileno()
        if pair in ready:
            agent.say_more()
        agent.reaped |= any(pid == agent.pid for pid, _, _ in ended)
        if pair in ready or ended:
            self._hear(agent)

    def _hear(self, agent: AgentProcess) -> None:
        """All that it has said, but for who says ever more."""
        for _ in range(MESSAGES_AT_ONCE):
            message = agent.receive()
            if message is None:
                return
            self._heard(message, agent.starts)

    def _heard(self, message: "Record", starts: int) -> None:
        if isinstance(message, ShutdownRequest):
            if 0.0 <= message.grace <= bounds.STOP_GRACE_MAX:
                self.grace = message.grace
            self._end("reboot" if message.reboot else "shutdown")
        elif isinstance(message, MainCollected | MainReader):
            self._heard_of_reader(message)
        elif isinstance(message, AgentReady):
            if self.main is not None:
                self.main.collection.agent_serves(time.monotonic())
            if starts > 1:
                self.reporter.send(AgentServes(starts=starts, boot_ms=message.boot_ms))
        elif isinstance(message, ExecStarted) and not self._first_exec_told:
            self._first_exec_told = True
            self.reporter.send(FirstExec(boot_ms=message.boot_ms))

    def _heard_of_reader(self, message: MainCollected | MainReader) -> None:
        if self.main is None:
            return
        if isinstance(message, MainReader):
            self.main.collection.reader(time.monotonic(), there=message.there)
        elif self.main.collection.pending:
            self._collected(self.main)

    def _reaped(self, pid: int, status: int, usage: struct_rusage) -> None:
        if pid in self._told:
            self._told.remove(pid)
        elif not self._ended(pid, status) and self.agent is not None:
            self.agent.kept_reaped(pid, status, usage)

    def _endings(self) -> list[Ending]:
        """Of the two children that are known."""
        found = []
        if self.main is not None and self.main.running is not None:
            found.append(self.main.running.ending)
        if self.agent is not None and self.agent.pid:
            found.append(self.agent.ending)
        return found

    def _ended(self, pid: int, status: int) -> bool:
        """Whether it is one of these."""
        main, agent = self.main, self.agent
        if agent is not None and pid == agent.pid:
            exited = agent.ended(status)
            if main is not None:
                again = exited.restart_in is not None
                main.collection.agent_died(time.monotonic(), comes_again=again)
            # An init that ends everything in handoff ends the agent as well as the keeper.
            if not (self._last_phase or self.signals.stop_requested):
                self.reporter.send(exited)
        elif main is not None and main.running is not None and pid == main.running.pid:
            self._main_ended(main, status)
        else:
            return False
        return True

    def _main_ended(self, main: MainProcess, status: int) -> None:
        exited = main.ended(status, for_good=self.status != "")
        self.reporter.send(exited)
        if self.agent is not None:
            self.agent.main_exited(restarts=exited.restart_in is not None)
        if exited.restart_in is not None:
            return
        if main.attached and self.agent is not None:
            main.collection.workload_ended(time.monotonic())
        else:
            self._end("done")

    def _act_in_time(self) -> None:
        """What is due by now."""
        now = time.monotonic()
        if self.main is not None and is_due(self.main.collection.until, now):
            self._collected(self.main)
        for ending in self._endings():
            if is_due(ending.look_at, now):
                self._look_after(ending)
        if self.agent is not None and not self._last_phase:
            if is_due(self.agent.restart_at, now):
                self.agent.start_again()
            if is_due(self.agent.watchdog.look_at, now) and self.agent.watch():
                self._hear(self.agent)
                self.agent.let_end()
        if self.main is not None and not self.status and is_due(self.main.restart_at, now):
            report = self.main.start_again()
            self.reporter.send(report)
            self._tell_of(self.main)
            if isinstance(report, WorkloadFailed) and report.restart_in is None:
                self._end("workload-failed")

    def _look_after(self, ending: Ending) -> None:
        """What should have been reaped is not."""
        status = ending.look(0 if self.agent is None else self.agent.pid)
        if status is not None:
            self._told.add(ending.pid)
            self._ended(ending.pid, status)

    def _collected(self, main: MainProcess) -> None:
        """The ended workload's output: all of it, or as long as it could wait."""
        main.collection.done()
        self._end("done")

    def _end(self, status: str) -> None:
        if self.status in ("", "done"):
            self.status = status


def await_agent(supervisor: Supervisor, agent: AgentProcess) -> None:
    """Until the agent serves, or the machine was told to end meanwhile.

    A workload that is done sooner does not end the wait: its host has to hear of a whole boot.
    """
    in_time = supervisor.run(
        lambda: agent.ready or agent.crashes >= bounds.AGENT_BOOT_CRASHES,
        timeout=bounds.AGENT_READY_TIMEOUT,
        despite="done",
    )
    if agent.ready or supervisor.status not in ("", "done"):
        return
    after = f"{agent.crashes} crashes" if in_time else f"{bounds.AGENT_READY_TIMEOUT:g} s"
    raise Failure(f"the agent does not serve after {after}; what it said is on the console")


def is_due(moment: float | None, now: float) -> bool:
    """Whether it has come; None never does."""
    return moment is not None and now >= moment


def reap(most: int = REAPED_AT_ONCE) -> tuple[list[tuple[int, int, struct_rusage]], bool]:
    """(pid, wait status, usage) of children that ended, and whether there may be more.

    At most `most` are looked at. A child may have asked to be traced by its parent (ptrace(2),
    PTRACE_TRACEME): then wait4(2) tells its stops as well, and each time it is let go.
    """
    ended: list[tuple[int, int, struct_rusage]] = []
    for _ in range(most):
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return ended, False
        if pid == 0:
            return ended, False
        if os.WIFSTOPPED(status):
            _guestsys.let_go(pid, os.WSTOPSIG(status))
        else:
            ended.append((pid, status, usage))
    return ended, True


def nobody_is_left() -> bool:
    """Every process but PID 1 descends from a child of PID 1: none, nobody. Reaps nothing."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return True
    return False
