"""What everybody may know of a process, whoever started it, and all of them by their ids."""

import os
import time

import trio

from microguest.guest.errors import OperationError
from microguest.guest.launch import listed_argv
from microguest.guest.wire.messages import Exited, ProcessInfo

__all__ = ["Process", "Registry"]


class Process:
    """A process with streams: one that a host started, a kept one, or the workload.

    Every one is in the registry under its id until nothing of it is retained any more. A
    subclass says how to signal and how to learn the end; its owner calls `finish` once, when the
    end is known and the streams are drained.

    `exit_fd`: readable once it has ended. `stdin`: -1 where it has none, or none any more.
    `outputs`: descriptors of the streams that have not ended, by number; a terminal is only 1.
    `exited`: what `finish` was given. `finished`: set then; the operation `wait` waits for it.
    """

    kept = False
    tty = False
    # Whose descriptor is being closed, which, and its fstat(2): the guard cannot ask for that then.
    letting_go: "tuple[Process, int, os.stat_result] | None" = None

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

        Also takes it out of the registry. Only for kept ones.
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
        """Close it now. That may stand, like all that touches a stream: `agent.process.guard`."""
        Process.letting_go = self, fd, os.fstat(fd)
        try:
            os.close(fd)
        finally:
            Process.letting_go = None


class Registry(dict[str, Process]):
    """All that `Process` speaks of, by id, in the order of their starts.

    `claimed`: ids that hosts chose for what is not in it, yet or any more. `places`: how many kept
    ones are being started, which count as if they were in it.
    """

    def __init__(self, starts: int) -> None:
        """`starts`: how many agents this boot has had, this one included."""
        super().__init__()
        self.claimed: set[str] = set()
        self.places = 0
        self._starts = starts
        self._last_id = 0

    def next_id(self) -> str:
        """A process id that was never used before in this boot, also not by an earlier agent."""
        self._last_id += 1
        return f"p{self._last_id}" if self._starts == 1 else f"p{self._starts}-{self._last_id}"

    def find(self, process_id: str) -> Process:
        """The process with this id. Raises OperationError no_such_process."""
        process = self.get(process_id)
        if process is None:
            raise OperationError("no_such_process", f"there is no process {process_id!r:.100}")
        return process
