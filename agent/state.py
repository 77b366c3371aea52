"""What the agent knows: one `Agent`, made at the start and passed to whoever needs it."""

import os
import signal
import time

import trio

from agent.accounts import Accounts
from agent.cgroups import (
    Cgroups,
    needed_controllers,
    open_cgroups,
    unavailable,
    workload_memory,
)
from agent.hunting import Hunters
from agent.leaf import Leaf
from agent.link import Link
from agent.registry import Process, Registry
from guest import limits
from guest.errors import OperationError
from guest.messages import Limits
from guest.supervision import AGENT_ID, Configure, Deposit

__all__ = ["Agent", "log"]


class Agent:
    """`connections`: those past hello.

    `child_limits`: resource limits that every process gets back, (resource, soft, hard) each.
    """

    def __init__(
        self,
        configure: Configure,
        link: Link,
        child_limits: tuple[tuple[int, int, int], ...],
    ) -> None:
        self.configure = configure
        self.link = link
        self.child_limits = child_limits
        self.token = configure.token.encode("utf-8", "surrogatepass")
        self.started = time.monotonic()
        self.ready_ms = 0.0
        self.root_ready = trio.Event()
        self.main_started = trio.Event()
        self.nursery: trio.Nursery | None = None  # for what outlives the connection it came from
        self.main: Process | None = None
        self.main_unserved = ""  # why the workload has no streams here, although it runs
        self.main_readers = 0  # hosts that may write to the workload, or have just taken its end
        self.accounts = Accounts()
        self.cgroups: Cgroups | None = None
        self._memory_for_processes = free_memory() if configure.starts == 1 else None
        self._looked_for_cgroups = False
        self._pidfd = -1  # of the agent itself
        self.processes = Registry(configure.starts)
        self.connections = 0
        self.pauses = 0  # that `agent.clock` has found out, and how many seconds the last one was
        self.last_pause = 0.0

    def take_cgroup(self, wanted: Limits | None) -> Leaf | None:
        """A cgroup for a process that starts; None where the guest has none that can be written.

        Raises OperationError cgroup_unavailable for limits that cannot be kept.
        """
        cgroups = self.own_cgroups()
        if cgroups is not None:
            return cgroups.take(wanted)
        if needed_controllers(wanted):
            raise unavailable("the guest has no cgroup v2 that its agent may write to")
        return None

    def adopt_cgroup(self, name: str) -> Leaf | None:
        """That of a process which an earlier agent started. Raises OSError where it is gone."""
        cgroups = self.own_cgroups()
        return None if cgroups is None else cgroups.adopt(name)

    def own_cgroups(self) -> Cgroups | None:
        """Where the guest has any that can be written."""
        if not self._looked_for_cgroups:  # only now, as the image's root has to be in place
            self._looked_for_cgroups = True
            self.cgroups = open_cgroups(self._memory_for_processes)
            if self.cgroups is not None:
                self.cgroups.shelter()
                assert self.nursery is not None
                self.nursery.start_soon(self.link.deliver, self._as_deposit)
        return self.cgroups

    def _as_deposit(self) -> tuple[Deposit, tuple[int, ...]]:
        """What the next agent has to know of this one: where its processes are."""
        assert self.cgroups is not None
        meta = self.cgroups.path
        if self._pidfd < 0:
            self._pidfd = os.pidfd_open(os.getpid())
        return Deposit(id=AGENT_ID, pid=os.getpid(), meta=meta), (self._pidfd,)

    async def wait_known(self) -> None:
        """Until what an earlier agent has kept is served again. Raises OperationError not_ready."""
        if self.configure.starts > 1:
            await self.wait_root()

    async def wait_root(self) -> None:
        """Until processes can be started. Raises OperationError not_ready after ROOT_WAIT."""
        if self.root_ready.is_set():
            return
        with trio.move_on_after(limits.ROOT_WAIT):
            await self.root_ready.wait()
            return
        raise OperationError("not_ready", "the guest's root is not in place yet; try again later")

    def kill_everything(self) -> None:
        """SIGKILL to all that is not kept: the agent is about to end."""
        Hunters.ending = True
        for process in self.processes.values():
            if not process.kept:
                process.signal(signal.SIGKILL, "tree")
        Hunters.finish()
        if self.cgroups is not None:
            self.cgroups.close()


def free_memory() -> int | None:
    """Bytes for processes, asked before there are any but the workload, whose memory counts as
    free; None where there is not enough to divide."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + workload_memory()
    free -= limits.MEMORY_RESERVE
    return free if free > limits.MEMORY_RESERVE else None


def log(message: str) -> None:
    """One line on the console."""
    os.write(2, f"agent: {message}\n".encode("utf-8", "backslashreplace"))
