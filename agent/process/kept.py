"""Processes that outlive their connections, the host program and the agent itself.

A task of its own moves a kept process's output into rings, whether or not anybody is attached, and
hands what is new to those who are. Everything that it cannot do without is deposited with PID 1, so
that the next agent can go on. Times that must outlive the agent are CLOCK_MONOTONIC's.
"""

import errno
import math
import os
import select
import signal
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Protocol

import trio

from microguest.agent.channel import readable_bytes
from microguest.agent.process import tracers
from microguest.agent.process.adopted import Adopted
from microguest.agent.process.child import ChildProcess
from microguest.agent.process.pumps import InputPump, enlarge
from microguest.agent.process.ring import CUT, ENDED, Ring
from microguest.agent.registry import Process
from microguest.agent.state import Agent, log
from microguest.guest import bounds
from microguest.guest.errors import OperationError
from microguest.guest.record import Record
from microguest.guest.status import exit_fields
from microguest.guest.supervision import Deposit, KeptExited, KeptStatus, MainExited, Withdraw
from microguest.guest.wire.messages import STREAMS, Exited, Keep, Start

__all__ = [
    "MAIN_ID",
    "Attached",
    "KeptProcess",
    "Notes",
    "claimed",
    "forgotten",
    "keep",
    "place",
]

MAIN_ID = "main"
IN = select.EPOLLIN
READY = 4  # descriptors in the set
ROUNDS = 16  # of work before other processes get their turn


class Notes(Record):
    """What the next agent has to know: the deposit's `meta`. Seconds are CLOCK_MONOTONIC's."""

    keep: Keep
    started: float
    argv: tuple[str, ...] = ()
    label: str = ""
    tty: bool = False
    leaf: str = ""  # name of its cgroup
    mark: str = ""  # entry of its environment
    deadline: float | None = None  # of the timeout
    grace: float = 0.0
    timed_out: bool = False
    drain_idle: float = bounds.STREAM_IDLE_AFTER_EXIT
    drain_cap: float = bounds.STREAM_CAP_AFTER_EXIT
    reader_wait: float = bounds.OUTPUT_GRACE  # of the workload's terminal, for its first
    ended: float = 0.0
    exited: Exited | None = None


@asynccontextmanager
async def place(agent: Agent) -> AsyncIterator[None]:
    """Room for one more, held until it is listed, or is not.

    Of those that have ended and that nobody is attached to, the oldest make room. Raises
    OperationError cannot_keep where all others run, or are being read.
    """
    agent.processes.places += 1  # so that two who come at once do not count on the same room
    try:
        while kept_by(agent) > bounds.KEPT_PROCESSES:
            ended = [each for each in agent.processes.values() if is_spare(each)]
            if not ended:
                raise OperationError(
                    "cannot_keep",
                    f"{bounds.KEPT_PROCESSES} processes are kept, and every one of them runs or is "
                    "being read: end one first",
                )
            await min(ended, key=ended_at).forget()
        yield
    finally:
        agent.processes.places -= 1


def kept_by(agent: Agent) -> int:
    """How many there are, with those that are being started."""
    return agent.processes.places + sum(each.kept for each in agent.processes.values())


def is_spare(process: Process) -> bool:
    """Whether it may make room: its end is told, and nobody is reading."""
    if not isinstance(process, KeptProcess) or process.id == MAIN_ID:
        return False
    return process.exited is not None and not process.attachments


def ended_at(process: Process) -> float:
    """Seconds of CLOCK_MONOTONIC, of one that has ended."""
    assert isinstance(process, KeptProcess)
    return process.notes.ended


async def keep(agent: Agent, child: ChildProcess, args: Start) -> "KeptProcess":
    """Deposit a process that was just started, and let it live. Raises OperationError."""
    assert args.keep is not None
    notes = Notes(
        keep=args.keep,
        started=child.started,
        argv=child.argv,
        label=child.label,
        tty=child.tty,
        leaf="" if child.leaf is None else child.leaf.name,
        mark=os.fsdecode(child.mark),
        deadline=None if args.timeout is None else child.started + args.timeout,
        grace=args.grace,
        drain_idle=args.drain_idle,
        drain_cap=args.drain_cap,
    )
    try:
        process = KeptProcess.new(agent, child, notes)
    except OSError as error:
        await child.end()
        raise OperationError("out_of_memory", f"no buffer for output: {error.strerror}") from None
    await process.begin()
    return process


@contextmanager
def claimed(agent: Agent, name: str) -> Iterator[None]:
    """Nobody else gets an id that a host chose, until its process is listed under it, or is not.

    Raises OperationError id_taken.
    """
    if not name:
        yield
        return
    if name in agent.processes or name in agent.processes.claimed:
        raise OperationError(
            "id_taken",
            f"there is a process {name!r} already: attach to it, forget it, or choose another id",
        )
    agent.processes.claimed.add(name)
    try:
        yield
    finally:
        agent.processes.claimed.discard(name)


def forgotten(process_id: str) -> OperationError:
    """For those who are attached to it, or would be."""
    return OperationError("no_such_process", f"process {process_id} was forgotten")


def new_rings(child: ChildProcess, notes: Notes) -> dict[int, Ring]:
    """One for each output. Raises OSError, and then there is none."""
    rings: dict[int, Ring] = {}
    try:
        for stream in child.outputs:
            rings[stream] = Ring.create(notes.keep.buffer, drops=notes.keep.on_full == "drop")
    except OSError:
        for ring in rings.values():
            ring.close()
        raise
    return rings


class Attached(Protocol):
    """A host that gets the output of one."""

    def push(self) -> None:
        """Send what is new, as far as the host takes it. Raises nothing."""

    def refuse(self, error: OperationError) -> None:
        """The process goes: there will be nothing more."""


class KeptProcess(Process):
    """One of them, around the `child` that says how to signal it and how it ended.

    `attachments`: those who get its output, `writer` the one of them that may write. `rings`: by
    stream, for each that it has; a terminal has no stderr. `notes`: for the next agent.
    """

    kept = True

    def __init__(
        self,
        agent: Agent,
        child: ChildProcess,
        notes: Notes,
        rings: dict[int, Ring],
        stage: tuple[int, int] | None = None,
    ) -> None:
        """Raises OSError; then nothing was taken of what is given here."""
        self._epoll = select.epoll(READY)
        # Between a terminal and its ring: splice(2) needs a pipe on one side.
        self._stage = stage
        if notes.tty and stage is None and child.outputs:
            try:
                self._stage = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            except OSError:
                self._epoll.close()
                raise
        super().__init__(
            child.id, child.pid, exit_fd=child.exit_fd, stdin=child.stdin, outputs=child.outputs
        )
        child.stdin = -1
        self.argv, self.label, self.tty = notes.argv, notes.label, notes.tty
        self.started = notes.started
        self._served_since = time.monotonic()
        self.rings = rings
        self.attachments: list[Attached] = []
        self.writer: Attached | None = None
        self._agent = agent
        self._child = child
        self.notes = notes
        self._has_stdin = self.stdin >= 0
        self._input = InputPump(self, self._epoll)
        self._watched: set[int] = set()  # streams
        self._enlarged: set[int] = set()  # those whose pipe was found full
        self._exit_seen = math.inf  # trio.current_time() when its end was noticed
        self._owed: dict[int, int] = {}  # bytes that were in a pipe then
        self._last_data: dict[int, float] = {}
        self._kill_at = math.inf if notes.deadline is None else notes.deadline + notes.grace
        # The workload's terminal waits until then for the first to sit down: time.monotonic()
        self._is_main_terminal = self.tty and self.id == MAIN_ID
        self._unseen_at = math.inf
        if self._is_main_terminal:
            self._unseen_at = self.started + notes.reader_wait
        self._scope = trio.CancelScope()
        self._released = trio.Event()
        self.goes = False  # for good: nobody may attach any more
        self._gone = False  # its descriptors are closed
        self._alone = trio.Event()  # nobody is attached
        self._alone.set()
        # What is deposited changed while nobody could wait for PID 1 to hear of it.
        self._deposit_due = False
        self._parting: list[tuple[Process, int]] = []

    @classmethod
    def new(cls, agent: Agent, child: ChildProcess, notes: Notes) -> "KeptProcess":
        """With empty rings. Raises OSError; then `child` is as it was."""
        rings = new_rings(child, notes)
        try:
            return cls(agent, child, notes, rings)
        except OSError:
            for ring in rings.values():
                ring.close()
            raise

    # ── its life ─────────────────────────────────────────────────────────────────────────────────

    async def begin(self) -> None:
        """Deposit it, list it, and let it live in a task of its own."""
        await self._deposit()
        if self.notes.exited is not None:
            self.finish(self.notes.exited)
        self._agent.processes[self.id] = self
        assert self._agent.nursery is not None
        self._agent.nursery.start_soon(self._live)

    async def _live(self) -> None:
        """Until nothing of it is retained."""
        with self._scope:
            try:
                await self._until_dispensable()
            except Exception as error:  # noqa: BLE001  one process's bug must not end the agent
                log(f"process {self.id} cannot be kept: {type(error).__name__}: {error}")
                self._child.signal(signal.SIGKILL, "tree")
        with trio.CancelScope(shield=True):
            await self._release()

    async def _until_dispensable(self) -> None:
        if self.exited is None:
            await self._drain()
            await self._conclude()
        # Of one that ended under an earlier agent, hosts hear again only now.
        left = max(self.notes.ended, self._served_since) + self.notes.keep.retain - time.monotonic()
        await trio.sleep(max(0.0, left))
        while self.attachments:
            await self._alone.wait()

    async def _drain(self) -> None:
        """Move its output into the rings until it has ended and they have all of it."""
        self._epoll.register(self.exit_fd, IN)
        for stream in tuple(self.outputs):
            self._watch(stream)
        while self._exit_seen == math.inf or self.outputs:
            await self._wait()
            self._work()
            self._check_clock()
            if self._deposit_due:
                await self._deposit()

    async def _conclude(self) -> None:
        """Its end is known: first to PID 1, then to all."""
        status = await self._status()
        self.notes = self.notes.replace(ended=time.monotonic(), exited=status)
        self._input.unwatch()  # only now: writers may have come until here
        self.close_streams()
        await self._deposit()
        self.finish(status)
        for attachment in tuple(self.attachments):
            attachment.push()

    async def _status(self) -> Exited:
        await self._child.dead()
        await self._child.settled()
        if not isinstance(self._child, Adopted):
            message = self._kept_exited()
            await self._agent.link.deliver(lambda: (message, ()))
        cut = tuple(STREAMS[s] for s, ring in self.rings.items() if ring.state == CUT)
        return self._child.status().replace(
            timed_out=self.notes.timed_out, open_streams=cut, dropped=self.dropped()
        )

    def _kept_exited(self) -> KeptExited:
        """For PID 1, before the process is reaped."""
        result = tracers.has_ended(self.pid)
        ended_ms = time.clock_gettime(time.CLOCK_BOOTTIME) * 1000
        if result is None:  # its tracer is out of reach
            fields = exit_fields(tracers.wait_status(self.pid))
            return KeptExited.from_map({**fields, "id": self.id, "ended_ms": ended_ms})
        if result.si_code == os.CLD_EXITED:
            return KeptExited(id=self.id, code=result.si_status, ended_ms=ended_ms)
        dumped = result.si_code == os.CLD_DUMPED
        return KeptExited(
            id=self.id, signal=result.si_status, core_dumped=dumped, ended_ms=ended_ms
        )

    async def forget(self) -> None:
        """See `Process.forget`."""
        if self.exited is None:
            if self.id == MAIN_ID:
                raise OperationError("bad_request", "the workload runs: forget it after its end")
            self.signal(signal.SIGKILL, "tree")
        self._scope.cancel()
        await self._released.wait()

    async def _release(self) -> None:
        """Nothing of it is retained any more."""
        self.goes = True
        for attachment in tuple(self.attachments):
            attachment.refuse(forgotten(self.id))
        if self.exited is None:
            self.finish(self.notes.exited or await self._status())
        self._gone = True
        self._input.unwatch()
        self.close_streams()
        for ring in self.rings.values():
            ring.close()
        for fd in self._stage or ():
            os.close(fd)
        self._epoll.close()
        await self._child.end()
        self._agent.processes.pop(self.id, None)
        with claimed(self._agent, self.id):  # the next one's deposit comes after
            await self._agent.link.deliver(lambda: (Withdraw(id=self.id), ()), self._take_parting)
        self._released.set()

    async def _deposit(self) -> None:
        """Give PID 1 everything as it is now."""
        self._deposit_due = False
        await self._agent.link.deliver(self._as_deposit, self._take_parting)

    def let_go(self, fd: int) -> None:
        """See `Process.let_go`. PID 1 closes its copy first, with the next deposit."""
        self._parting.append((self, fd))

    def _take_parting(self) -> list[tuple[Process, int]]:
        parting, self._parting = self._parting, []
        return parting

    def _as_deposit(self) -> tuple[Deposit, Sequence[int]] | None:
        if self._gone:
            return None
        held = {"stdin": self.stdin} if self.stdin >= 0 else {}
        held |= {STREAMS[stream]: fd for stream, fd in self.outputs.items()}
        held |= {f"{STREAMS[stream]}-ring": ring.fd for stream, ring in self.rings.items()}
        if self._stage is not None:
            held |= dict(zip(("stage-out", "stage-in"), self._stage, strict=True))
        deposit = Deposit(id=self.id, pid=self.pid, meta=self.notes.to_json(), names=tuple(held))
        return deposit, (self.exit_fd, *held.values())

    # ── who is attached ──────────────────────────────────────────────────────────────────────────

    def enter(self, attachment: Attached, *, write: bool) -> None:
        """It gets the output from now on."""
        if not self.attachments:
            self._alone = trio.Event()
        self.attachments.append(attachment)
        self.attached += 1
        if write:
            self.writer = attachment
            if self._is_main_terminal:
                self._wait_for_reader(True)

    def leave(self, attachment: Attached) -> None:
        """It has what it gets."""
        self.attachments.remove(attachment)
        self.attached -= 1
        if self.writer is attachment:
            self.writer = None
            if self._is_main_terminal:
                self._wait_for_reader(False)
        if not self.attachments:
            self._alone.set()

    def _wait_for_reader(self, waits: bool) -> None:
        """Whether what a full ring has no room for waits, or the oldest makes room: without a
        reader a terminal holds nobody up."""
        self._unseen_at = math.inf
        for stream, ring in self.rings.items():
            ring.drops = not waits
            self._go_on(stream)

    def reaped(self, message: KeptStatus | MainExited) -> None:
        """PID 1 says how it ended."""
        if isinstance(self._child, Adopted):
            self._child.ended(message)

    # ── its output ───────────────────────────────────────────────────────────────────────────────

    async def _wait(self) -> None:
        with trio.CancelScope(deadline=self._next_deadline()):
            await trio.lowlevel.wait_readable(self._epoll)

    def _work(self) -> None:
        for _ in range(ROUNDS):
            ready = self._epoll.poll(0, READY)
            if not ready:
                return
            exited = False
            for fd, _ in ready:
                if fd == self.exit_fd:
                    exited = True
                elif fd == self.stdin:
                    self._input.resume()
                    self._input_moved()
                    if self.writer is not None:
                        self.writer.push()
                else:
                    self._read(next(s for s, other in self.outputs.items() if other == fd))
            if exited:
                self._note_exit()

    def _read(self, stream: int) -> None:
        """Into the ring and on to those who are attached."""
        ring = self.rings[stream]
        if not ring.room:
            self._unwatch(stream)
            return
        try:
            count = self._pour(stream, ring)
        except BlockingIOError:
            return
        except OSError as error:
            log(f"output of process {self.id} is lost: {error}")
            self._end_output(stream, CUT)
            return
        if not count:
            self._end_output(stream, ENDED)
            return
        if count >= bounds.STREAM_READ and stream not in self._enlarged:
            self._enlarged.add(stream)
            enlarge(self.outputs[stream])
        if self._exit_seen < math.inf:
            self._last_data[stream] = trio.current_time()
            self._owed[stream] -= count
        for attachment in tuple(self.attachments):
            attachment.push()
        if not ring.room:
            self._unwatch(stream)

    def _pour(self, stream: int, ring: Ring) -> int:
        """From the pipe or terminal to the ring; 0 at its end. Raises OSError."""
        if self._stage is None:
            return ring.fill(self.outputs[stream])
        reader, writer = self._stage
        try:
            return ring.fill(reader)  # what an earlier agent had no time for
        except BlockingIOError:
            pass
        try:
            if not os.splice(self.outputs[stream], writer, ring.room):
                return 0
        except OSError as error:
            if error.errno == errno.EIO:
                return 0  # how a terminal says that the last slave was closed
            raise
        return ring.fill(reader)

    def _end_output(self, stream: int, state: int) -> None:
        self._unwatch(stream)
        self.rings[stream].end(state)
        self.let_go(self.outputs.pop(stream))
        self._deposit_due = self.exited is None
        for attachment in tuple(self.attachments):
            attachment.push()

    def _watch(self, stream: int) -> None:
        if stream in self.outputs and stream not in self._watched and self.rings[stream].room:
            self._epoll.register(self.outputs[stream], IN)
            self._watched.add(stream)

    def _unwatch(self, stream: int) -> None:
        if stream in self._watched:
            self._epoll.unregister(self.outputs[stream])
            self._watched.remove(stream)

    def acknowledge(self, stream: int, offset: int) -> None:
        """The writer needs nothing before `offset` again."""
        self.rings[stream].acknowledge(offset)
        self._go_on(stream)

    def _go_on(self, stream: int) -> None:
        """Its ring may have room again."""
        if stream in self.outputs and stream not in self._watched and self.rings[stream].room:
            self._last_data[stream] = trio.current_time()
            self._watch(stream)

    def retained(self) -> dict[str, int]:
        """See `Process.retained`."""
        return {STREAMS[s]: ring.written - ring.oldest for s, ring in self.rings.items()}

    def dropped(self) -> dict[str, int]:
        """Bytes that went before they were acknowledged, by stream name."""
        return {STREAMS[s]: ring.dropped for s, ring in self.rings.items() if ring.dropped}

    # ── its input ────────────────────────────────────────────────────────────────────────────────

    @property
    def input_held(self) -> int:
        """Bytes of input that wait for the process."""
        return self._input.held

    @property
    def takes_input(self) -> bool:
        """Whether what is fed could reach it: it has a stdin, of which nobody has said the end."""
        return self._input.open

    def feed(self, data: bytes) -> None:
        """From the writer; what cannot be read by anybody any more is dropped."""
        self._input.feed(data)
        self._input_moved()

    def end_input(self) -> None:
        """The writer says that nothing follows, from nobody."""
        self._input.end()
        self._input_moved()

    def _input_moved(self) -> None:
        if self.stdin < 0 and self._has_stdin:
            self._has_stdin = False
            # PID 1's copy must go as well, or the process never sees the end.
            assert self._agent.nursery is not None
            self._agent.nursery.start_soon(self._deposit)

    # ── signals and time ─────────────────────────────────────────────────────────────────────────

    def signal(self, number: int, target: str) -> bool:
        """See `Process.signal`."""
        return self.exited is None and self._child.signal(number, target)

    async def deliver(self, number: int, target: str) -> bool:
        """See `Process.deliver`."""
        return self.exited is None and await self._child.deliver(number, target)

    def put_down(self) -> None:
        """See `Process.put_down`."""
        self._child.put_down()

    def resize(self, rows: int, columns: int) -> None:
        """See `Process.resize`."""
        self._child.resize(rows, columns)

    def _note_exit(self) -> None:
        self._epoll.unregister(self.exit_fd)
        self._exit_seen = trio.current_time()
        if self.notes.timed_out:
            self._child.signal(signal.SIGKILL, "tree")  # the rest had its grace, too
        for stream, fd in self.outputs.items():
            self._owed[stream] = readable_bytes(fd)
            self._last_data[stream] = self._exit_seen

    def _next_deadline(self) -> float:
        """On trio's clock."""
        if self._exit_seen == math.inf:
            moment = self._kill_at if self.notes.timed_out else self.notes.deadline
            moment = min(math.inf if moment is None else moment, self._unseen_at)
            return trio.current_time() + moment - time.monotonic()
        return min((self._cut_at(s) for s in self._watched), default=math.inf)

    def _check_clock(self) -> None:
        if self._exit_seen < math.inf:
            now = trio.current_time()
            for stream in tuple(self._watched):
                if now >= self._cut_at(stream):
                    self._end_output(stream, CUT)
            return
        now, deadline = time.monotonic(), self.notes.deadline
        if now >= self._unseen_at:
            self._wait_for_reader(False)
        if not self.notes.timed_out and deadline is not None and now >= deadline:
            self.notes = self.notes.replace(timed_out=True)
            self._deposit_due = True
            self._child.signal(signal.SIGTERM, "group")
        elif self.notes.timed_out and now >= self._kill_at:
            self._kill_at = math.inf
            self._child.signal(signal.SIGKILL, "tree")

    def _cut_at(self, stream: int) -> float:
        """As for every process: docs/reference/protocol.md, "After the exit"."""
        idle = self._last_data[stream] + self.notes.drain_idle
        if self._owed[stream] > 0:  # at most what is there: see `OutputPump.still_owed`
            self._owed[stream] = min(self._owed[stream], readable_bytes(self.outputs[stream]))
        if self._owed[stream] > 0:
            return idle
        return min(idle, self._exit_seen + self.notes.drain_cap)
