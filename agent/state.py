"""What the agent knows: one `Agent`, made at the start and passed to whoever needs it.

And `Process`, what everybody may know of a process, whoever started it.
"""

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
from guest import limits
from guest.errors import OperationError
from guest.messages import Exited, Limits, ProcessInfo
from guest.supervision import AGENT_ID, Configure, Deposit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.supervision import Link

__all__ = ["Agent", "Process", "listed_argv", "log"]


class Process:
    """A process with streams: one that a host started, a kept one, or the workload.

    Every one is in `Agent.processes` under its id until nothing of it is retained any more. A
    subclass says how to signal and how to learn the end; its owner calls `finish` once, when the
    end is known and the streams are drained.

    `exit_fd`: readable once it has ended. `stdin`: -1 where it has none, or none any more.
    `outputs`: descriptors of the streams that have not ended, by number; a terminal is only 1.
    `exited`: what `finish` was given. `finished`: set then; the operation `wait` waits for it.
    """

    kept = False
    tty = False
    # Whose descriptor is being closed, which, and its inode: the guard cannot ask for that then.
    letting_go: "tuple[Process, int, int] | None" = None

    def __init__(
        self,
        process_id: str,
        pid: int,
        *,
        exit_fd: int,
        stdin: int,
        outputs: dict[int, int],
        argv: tuple[str, ...] = (),
        label: str = "",
    ) -> None:
        self.id = process_id
        self.pid = pid
        self.exit_fd = exit_fd
        self.stdin = stdin
        self.outputs = outputs
        self.argv = listed_argv(argv)
        self.label = label
        self.started = time.monotonic()
        self.attached = 0  # connections that have its streams
        self.exited: Exited | None = None
        self.finished = trio.Event()

    def signal(self, number: int, target: str) -> bool:
        """Send a signal to "process", "group" or "tree": everything that descends from it.

        Returns whether somebody was there to receive it; a process that was reaped gets nothing.
        Where a tree has to be looked for, that takes a while: `settled`. Raises nothing.
        """
        raise NotImplementedError

    async def deliver(self, number: int, target: str) -> bool:
        """As `signal`, and wait until everybody has it; exact also where they were looked for."""
        return self.signal(number, target)

    async def settled(self) -> None:
        """Once it has ended: until it can be reaped, and no signal is under way that needs its pid.

        Nobody holds that up for longer than TRACED_END.
        """

    def status(self) -> Exited:
        """How it ended; only after `exit_fd` is readable, and only once."""
        raise NotImplementedError

    def resize(self, rows: int, columns: int) -> None:
        """Give its terminal a size, and SIGWINCH in any case. Does nothing without a terminal."""

    def retained(self) -> dict[str, int]:
        """Bytes of each output that can be read again, by stream name."""
        return {}

    async def forget(self) -> None:
        """Drop what is retained; one that runs is killed first. Raises OperationError.

        Also takes it out of `Agent.processes`. Only for kept ones.
        """
        raise OperationError("bad_request", f"process {self.id} is not kept; end it by a signal")

    def finish(self, exited: Exited) -> None:
        """The end is known: tell those who wait for it."""
        self.exited = exited
        self.finished.set()

    def info(self) -> ProcessInfo:
        """What a list says of it."""
        exited = self.exited
        return ProcessInfo(
            id=self.id,
            pid=self.pid,
            argv=self.argv,
            label=self.label,
            kept=self.kept,
            tty=self.tty,
            running_seconds=exited.duration if exited else time.monotonic() - self.started,
            attached=self.attached,
            retained=self.retained(),
            exited=exited,
        )

    def put_down(self) -> None:
        """SIGKILL to all that descends from it, now; from the guard's thread."""

    def close_streams(self) -> None:
        """Close what is still open of its pipes."""
        descriptors = [fd for fd in (self.stdin, *self.outputs.values()) if fd >= 0]
        self.stdin = -1
        self.outputs.clear()
        for fd in descriptors:
            self.let_go(fd)

    def let_go(self, fd: int) -> None:
        """Close a descriptor of one of its streams, which is out of `stdin` and `outputs`."""
        self.close(fd)

    def close(self, fd: int) -> None:
        """Close it now. That may stand, like all that touches a stream: `agent.guard`."""
        Process.letting_go = self, fd, os.fstat(fd).st_ino
        try:
            os.close(fd)
        finally:
            Process.letting_go = None


class Agent:
    """`processes`: all that `Process` speaks of, by id, in the order of their starts.

    `connections`: those past hello. `child_limits`: resource limits that every process gets back,
    (resource, soft, hard) each. `claimed`: ids that hosts chose for what is not in `processes`, yet
    or any more.
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
        self.nursery: trio.Nursery | None = None  # for what outlives the connection it came from
        self.main: Process | None = None
        self.main_unserved = ""  # why the workload has no streams here, although it runs
        self.main_readers = 0  # hosts that may write to the workload, or have just taken its end
        self.accounts = Accounts()
        self.cgroups: Cgroups | None = None
        self._memory_for_processes = free_memory() if configure.starts == 1 else None
        self._looked_for_cgroups = False
        self._pidfd = -1  # of the agent itself
        self.processes: dict[str, Process] = {}
        self.connections = 0
        self.pauses = 0  # that `agent.clock` has found out, and how many seconds the last one was
        self.last_pause = 0.0
        self._last_id = 0
        self.claimed: set[str] = set()

    def next_id(self) -> str:
        """A process id that was never used before in this boot, also not by an earlier agent."""
        self._last_id += 1
        starts = self.configure.starts
        return f"p{self._last_id}" if starts == 1 else f"p{starts}-{self._last_id}"

    def find(self, process_id: str) -> Process:
        """The process with this id. Raises OperationError no_such_process."""
        process = self.processes.get(process_id)
        if process is None:
            raise OperationError("no_such_process", f"there is no process {process_id!r:.100}")
        return process

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


def listed_argv(argv: tuple[str, ...]) -> tuple[str, ...]:
    """What a list shows of the arguments: LISTED_ARGV characters together, with … for the rest."""
    room = limits.LISTED_ARGV  # a word takes one more than its length, so that empty ones count
    shown: list[str] = []
    for word in argv:
        room -= len(word) + 1
        if room <= 0:
            return (*shown, word[: room + len(word)] + "…")
        shown.append(word)
    return tuple(shown)


def log(message: str) -> None:
    """One line on the console."""
    os.write(2, f"agent: {message}\n".encode("utf-8", "backslashreplace"))
