"""What the agent knows: one `Agent`, made at the start and passed to whoever needs it."""

import os
import time

import trio

from microguest.agent.link import Link
from microguest.agent.registry import Process, Registry
from microguest.guest import bounds
from microguest.guest.errors import OperationError
from microguest.guest.supervision import Configure

__all__ = ["Agent", "log"]


class Agent:
    """`connections`: those past hello."""

    def __init__(self, configure: Configure, link: Link) -> None:
        self.configure = configure
        self.link = link
        self.token = configure.token.encode("utf-8", "surrogatepass")
        self.started = time.monotonic()
        self.ready_ms = 0.0
        self.root_ready = trio.Event()
        self.main_started = trio.Event()
        self.nursery: trio.Nursery | None = None  # for what outlives the connection it came from
        self.main: Process | None = None
        self.main_unserved = ""  # why the workload has no streams here, although it runs
        self.main_readers = 0  # hosts that may write to the workload, or have just taken its end
        self.processes = Registry(configure.starts)
        self.connections = 0

    async def wait_known(self) -> None:
        """Until what an earlier agent has kept is served again. Raises OperationError not_ready."""
        if self.configure.starts > 1:
            await self.wait_root()

    async def wait_root(self) -> None:
        """Until processes can be started. Raises OperationError not_ready after ROOT_WAIT."""
        if self.root_ready.is_set():
            return
        with trio.move_on_after(bounds.ROOT_WAIT):
            await self.root_ready.wait()
            return
        raise OperationError("not_ready", "the guest's root is not in place yet; try again later")


def log(message: str) -> None:
    """One line on the console."""
    os.write(2, f"agent: {message}\n".encode("utf-8", "backslashreplace"))
