"""The agent's own part of the cgroups: had when first needed, its leaves given and taken back."""

import os

from microguest.agent.process.cgroups import (
    Cgroups,
    needed_controllers,
    open_cgroups,
    unavailable,
    workload_memory,
)
from microguest.agent.process.leaf import Leaf
from microguest.agent.state import Agent
from microguest.guest import bounds
from microguest.guest.supervision import AGENT_ID, Deposit
from microguest.guest.wire.messages import Limits

__all__ = ["Groups"]


class Groups:
    """Made before there are any processes but the workload. `close` it when there are none."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._memory = free_memory() if agent.configure.starts == 1 else None
        self._cgroups: Cgroups | None = None
        self._looked = False
        self._pidfd = -1  # of the agent itself

    def take(self, wanted: Limits | None) -> Leaf | None:
        """A cgroup for a process that starts; None where the guest has none that can be written.

        Raises OperationError cgroup_unavailable for limits that cannot be kept.
        """
        cgroups = self.own()
        if cgroups is not None:
            return cgroups.take(wanted)
        if needed_controllers(wanted):
            raise unavailable("the guest has no cgroup v2 that its agent may write to")
        return None

    def adopt(self, name: str) -> Leaf | None:
        """That of a process which an earlier agent started. Raises OSError where it is gone."""
        cgroups = self.own()
        return None if cgroups is None else cgroups.adopt(name)

    def own(self) -> Cgroups | None:
        """Where the guest has any that can be written."""
        if not self._looked:  # only now, as the image's root has to be in place
            self._looked = True
            self._cgroups = open_cgroups(self._memory)
            if self._cgroups is not None:
                self._cgroups.shelter()
                assert self._agent.nursery is not None
                self._agent.nursery.start_soon(self._agent.link.deliver, self._as_deposit)
        return self._cgroups

    def _as_deposit(self) -> tuple[Deposit, tuple[int, ...]]:
        """What the next agent has to know of this one: where its processes are."""
        assert self._cgroups is not None
        meta = self._cgroups.path
        if self._pidfd < 0:
            self._pidfd = os.pidfd_open(os.getpid())
        return Deposit(id=AGENT_ID, pid=os.getpid(), meta=meta), (self._pidfd,)

    def close(self) -> None:
        """Remove what is empty, as the agent is about to end."""
        if self._cgroups is not None:
            self._cgroups.close()


def free_memory() -> int | None:
    """Bytes for processes, asked before there are any but the workload, whose memory counts as
    free; None where there is not enough to divide."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + workload_memory()
    free -= bounds.MEMORY_RESERVE
    return free if free > bounds.MEMORY_RESERVE else None
