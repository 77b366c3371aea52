"""What the agent knows: one `Agent`, made at the start and passed to whoever needs it.

And `Process`, what everybody may know of a process, whoever started it.
"""

import os
import signal
import time

import trio

from agent.accounts import Accounts
from guest import limits
from guest.errors import OperationError
from guest.messages import Exited
from guest.supervision import Configure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.supervision import Link

__all__ = ["Agent", "Process", "log"]


class Process:
    """A running process with pipes.

    `exit_fd`: readable once it has ended. `stdin`: -1 where it has none, or none any more.
    `outputs`: descriptors of the streams that have not ended, by number.
    """

    def __init__(
        self, process_id: str, pid: int, *, exit_fd: int, stdin: int, outputs: dict[int, int]
    ) -> None:
        self.id = process_id
        self.pid = pid
        self.exit_fd = exit_fd
        self.stdin = stdin
        self.outputs = outputs

    def signal(self, number: int, target: str) -> None:
        """Send a signal to "process" or "group". Raises RemoteProtocolError for a bad number."""
        raise NotImplementedError

    def status(self) -> Exited:
        """How it ended; only after `exit_fd` is readable, and only once."""
        raise NotImplementedError

    def close_streams(self) -> None:
        """Close what is still open of its pipes."""
        for fd in (self.stdin, *self.outputs.values()):
            if fd >= 0:
                os.close(fd)
        self.stdin = -1
        self.outputs.clear()


class Agent:
    """`processes`: those running, by id. `connections`: those past hello.

    `child_limits`: resource limits that every process gets back, (resource, soft, hard) each.
    """

    def __init__(
        self,
        configure: Configure,
        link: "Link",
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
        self.main: Process | None = None
        self.accounts = Accounts()
        self.processes: dict[str, Process] = {}
        self.connections = 0
        self._last_id = 0

    def next_id(self) -> str:
        """A process id that was never used before."""
        self._last_id += 1
        return f"p{self._last_id}"

    async def wait_root(self) -> None:
        """Until processes can be started. Raises OperationError not_ready after ROOT_WAIT."""
        if self.root_ready.is_set():
            return
        with trio.move_on_after(limits.ROOT_WAIT):
            await self.root_ready.wait()
            return
        raise OperationError("not_ready", "the guest's root is not in place yet; try again later")

    def kill_everything(self) -> None:
        """SIGKILL to every process group: the agent is about to end."""
        for process in self.processes.values():
            process.signal(signal.SIGKILL, "group")


def log(message: str) -> None:
    """One line on the console."""
    os.write(2, f"agent: {message}\n".encode("utf-8", "backslashreplace"))
