"""A process of the agent's own: who it can be signalled with, when it ends, and how it ended.

Each is waited for by nobody else.
"""

import contextlib
import os
import signal
import threading
import time

import trio

from microguest.agent.process import terminals, tracers, tree
from microguest.agent.process.hunting import Hunters, Quarry
from microguest.agent.process.leaf import Leaf
from microguest.agent.registry import Process
from microguest.guest import bounds
from microguest.guest.wire.messages import Exited

__all__ = ["REAPING", "ChildProcess", "Ends"]

# Whoever has it may use the ids and cgroups of processes: the guard's thread to kill, and the event
# loop to give them back. So nobody is killed who has got them since.
REAPING = threading.Lock()

Ends = tuple[int, dict[int, int]]  # of its streams, ours: stdin, outputs


class ChildProcess(Process):
    """A process of our own. Until it is reaped, its pid and process group cannot be another's.

    `leaf`: its cgroup, None where the guest has none; then `mark` is in its environment.
    """

    def __init__(
        self,
        process_id: str,
        pid: int,
        pidfd: int,
        streams: Ends,
        *,
        leaf: Leaf | None = None,
        mark: bytes = b"",
        argv: tuple[str, ...] = (),
        label: str = "",
    ) -> None:
        stdin, outputs = streams
        super().__init__(
            process_id, pid, exit_fd=pidfd, stdin=stdin, outputs=outputs, argv=argv, label=label
        )
        self.leaf = leaf
        self.mark = mark
        self._reaped = False
        self._hunts: list[Quarry] = []  # that are under way, and need the pid

    def signal(self, number: int, target: str) -> bool:
        """See `Process.signal`."""
        if self._reaped:
            return False
        if target == "tree":
            return self._signal_tree(number)
        try:
            if target == "process":
                os.kill(self.pid, number)
            else:
                os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):
            return False
        return True

    def _signal_tree(self, number: int) -> bool:
        if self.leaf is None:
            self._hunt(number)
            return True
        if number != signal.SIGKILL:
            return self.leaf.signal(number)
        delivered = self.leaf.populated()
        if not self.leaf.kill():
            self._hunt(number)
        return delivered

    async def deliver(self, number: int, target: str) -> bool:
        """See `Process.deliver`."""
        if target != "tree" or self.leaf is not None or self._reaped:
            return self.signal(number, target)
        hunt = self._hunt(number)
        await hunt.done.wait()
        return hunt.delivered

    def _hunt(self, number: int) -> Quarry:
        """One for each number that has not begun, as the kernel has one pending signal of each."""
        self._hunts = [hunt for hunt in self._hunts if not hunt.over]
        for hunt in self._hunts:
            if hunt.number == number and not hunt.begun:
                return hunt
        hunt = Hunters.send(self.pid, self.mark or tree.UNMARKED, number)
        self._hunts.append(hunt)
        return hunt

    async def settled(self) -> None:
        """See `Process.settled`."""
        while self._hunts:
            await self._hunts[0].done.wait()
            self._hunts = [hunt for hunt in self._hunts if not hunt.over]
        if not self._reaped and not tracers.has_ended(self.pid):
            await tracers.until_reapable(self.pid)

    def resize(self, rows: int, columns: int) -> None:
        """See `Process.resize`."""
        if self.tty and 1 in self.outputs:
            terminals.resize(self.outputs[1], rows, columns)

    def status(self) -> Exited:
        """Reap it, which must have ended and be `settled`; or later, where it is traced still."""
        with REAPING:
            reaped, status, usage = os.wait4(self.pid, os.WNOHANG)
            self._reaped = True
            oom_killed = self._leave()
        tracers.ended(self.pid)
        if not reaped:
            status = tracers.wait_status(self.pid)
            tracers.reap_later(self.pid)
        duration = time.monotonic() - self.started
        killed = os.WIFSIGNALED(status)
        return Exited(
            code=None if killed else os.WEXITSTATUS(status),
            signal=os.WTERMSIG(status) if killed else None,
            core_dumped=os.WCOREDUMP(status),
            oom_killed=oom_killed,
            duration=duration,
            user_seconds=usage.ru_utime,
            system_seconds=usage.ru_stime,
            max_rss_kib=usage.ru_maxrss,
        )

    def _leave(self) -> bool:
        """Give back its cgroup, with REAPING held. Whether the kernel killed it for memory."""
        if self.leaf is None:
            return False
        oom_killed = self.leaf.oom_killed()
        self.leaf.give_back()
        self.leaf = None
        return oom_killed

    def put_down(self) -> None:
        """See `Process.put_down`. The event loop may go on at any moment of this."""
        with REAPING:
            if self.leaf is not None and self.leaf.kill():
                return
            if self._is_reaped():
                return
            kill_now(self.pid)
        hunt = tree.Hunt(self.pid, self.mark or tree.UNMARKED)
        while not hunt.over:
            for seconds in tree.passes([hunt]):
                time.sleep(seconds)
                with REAPING:
                    if self._is_reaped():
                        return

    def _is_reaped(self) -> bool:
        """Also by PID 1, of which the event loop has not heard while it stands."""
        try:
            if not self._reaped:
                signal.pidfd_send_signal(self.exit_fd, 0)
        except ProcessLookupError:
            return True
        return self._reaped

    async def end(self) -> None:
        """Kill what still runs, reap it, close every descriptor: what is dead locks no pipe."""
        if not self._reaped:
            self.signal(signal.SIGKILL, "tree")
            with trio.CancelScope(shield=True):
                await self.dead()
                await self.settled()
            self.finish(self.status())
        self.close_streams()
        os.close(self.exit_fd)

    async def dead(self) -> None:
        """Until it has ended, or SIGKILL has ended it: what traces one of its threads is killed."""
        while True:
            with trio.move_on_after(bounds.TRACER_WAIT):
                await trio.lowlevel.wait_readable(self.exit_fd)
                return
            await tracers.kill_tracers(self.pid)


def kill_now(pid: int) -> None:
    """It and its group, which are looked for by nobody first."""
    for kill in (os.kill, os.killpg):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)
