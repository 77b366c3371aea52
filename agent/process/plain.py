"""A process and one host's connection, from start to the last frame: whose turn it is, and when.

The connection is the process's: while it is open the process runs, and when it is lost everything
that descends from the process is killed.

One coroutine serves everything that a process has: its outputs, its input, its end, its timeout
and the socket. They are in an epoll set of their own and trio waits for that set, because a task
for each would cost more than the whole exec. Nothing here blocks. The bytes themselves are moved by
the pumps; while the host does not read, the pipes are not read, and the process waits.
"""

import math
import select
import signal

import trio

from microguest.agent.channel import Channel, ConnectionLost, readable_bytes
from microguest.agent.process.pumps import InputPump, OutputPump
from microguest.agent.process.starting import Starter
from microguest.agent.registry import Process
from microguest.agent.state import Agent
from microguest.guest import bounds
from microguest.guest.record import Record
from microguest.guest.wire.connection import Data, End, Event, Response
from microguest.guest.wire.messages import (
    STREAMS,
    Acknowledge,
    Detach,
    Resize,
    Signal,
    Start,
    Started,
)

__all__ = ["Exchange", "start"]

IN = select.EPOLLIN
OUT = select.EPOLLOUT
CLOSED = select.EPOLLRDHUP  # the host shut its side, perhaps behind data that waits to be read
ROUNDS = 16  # of work before other connections get their turn
# A program that writes line by line wakes us for each line, and is itself kept waiting for that on
# a single processor. After some such turns in a row its lines are left to gather for a moment.
SMALL = 4 * 1024  # bytes in one turn
SOON = 0.002  # seconds since the turn before
IN_A_ROW = 8
GATHER = 0.005  # seconds: less than anybody sees
READY = 5  # descriptors in the set


async def start(
    starter: Starter, agent: Agent, channel: Channel, args: Record, early: list[Event]
) -> None:
    """The operation: spawn, exchange bytes until it has ended, leave nothing. OperationError."""
    assert isinstance(args, Start)
    await agent.wait_root()
    process = await starter.begin(args)
    agent.processes[process.id] = process
    try:
        channel.queue(Response(result=Started(id=process.id, pid=process.pid)))
        process.attached = 1
        exchange = Exchange(
            channel,
            process,
            args.timeout,
            grace=args.grace,
            drain_idle=args.drain_idle,
            drain_cap=args.drain_cap,
        )
        await exchange.run(early)
    finally:
        await process.end()
        del agent.processes[process.id]


class Exchange:
    """`run` once, for a process that its connection owns.

    Seconds each: `timeout` from now until the process group gets TERM, None for never; `grace` from
    there to KILL for everything; `drain_idle` and `drain_cap` as in docs/reference/protocol.md.
    """

    def __init__(
        self,
        channel: Channel,
        process: Process,
        timeout: float | None = None,
        *,
        grace: float = bounds.TIMEOUT_GRACE,
        drain_idle: float = bounds.STREAM_IDLE_AFTER_EXIT,
        drain_cap: float = bounds.STREAM_CAP_AFTER_EXIT,
    ) -> None:
        self._channel = channel
        self._process = process
        self._deadline = math.inf if timeout is None else trio.current_time() + timeout
        self._grace = grace
        self._drain_idle = drain_idle
        self._drain_cap = drain_cap
        self._epoll = select.epoll(READY)
        self._socket_fd = channel.sock.fileno()
        self._socket_mask = 0
        self._outputs: dict[int, OutputPump] = {}  # by descriptor
        self._input = InputPump(process, self._epoll)
        self._blocked_since = math.inf  # the host does not read; the outputs are not watched
        self._flush_due = False  # output was queued, or the host reads again
        self._moved = 0  # bytes of output in the last turn
        self._small_turns = 0
        self._timed_out = False
        self._exited = False
        self._cap_at = math.inf
        self._cut: list[str] = []

    async def run(self, early: list[Event]) -> None:
        """Until `exited` is written. `early`: what arrived together with the request.

        Raises ConnectionLost and RemoteProtocolError; the process may still run then.
        """
        try:
            self._watch_everything()
            self._take(early)
            self._work()  # before `started` is written: of a quick one all is one write
            while not self._over():
                self._flush()
                await self._wait()
                if self._small_turns >= IN_A_ROW:
                    await trio.sleep(GATHER)
                self._work()
                self._check_clock()
        finally:
            self._epoll.close()
        await self._process.settled()
        status = self._process.status()
        if self._timed_out or self._cut:
            status = status.replace(timed_out=self._timed_out, open_streams=tuple(self._cut))
        self._process.finish(status)
        self._channel.queue(status)
        await self._channel.flush()

    def _over(self) -> bool:
        return self._exited and not self._outputs

    # ── waiting ──────────────────────────────────────────────────────────────────────────────────

    def _watch_everything(self) -> None:
        self._update_socket_mask()
        self._epoll.register(self._process.exit_fd, IN)
        for stream in (1, 2):
            if stream in self._process.outputs:
                pump = OutputPump(self._process, stream, self._epoll)
                self._outputs[pump.fd] = pump
            else:
                self._channel.queue(End(stream=stream))  # a terminal has only one

    async def _wait(self) -> None:
        began, deadline = trio.current_time(), self._next_deadline()
        if deadline == math.inf:
            await trio.lowlevel.wait_readable(self._epoll)
        else:
            with trio.CancelScope(deadline=deadline):
                await trio.lowlevel.wait_readable(self._epoll)
        small = 0 < self._moved < SMALL and trio.current_time() - began < SOON
        self._small_turns = self._small_turns + 1 if small else 0
        self._moved = 0

    def _next_deadline(self) -> float:
        if not self._exited:
            return self._deadline
        if self._blocked():
            return math.inf
        return min(self._cut_at(pump) for pump in self._outputs.values())

    def _work(self) -> None:
        """Handle what is ready, and what becomes ready meanwhile, but not without an end.

        Nothing is waited for here: a millisecond for a command's first or last event would save a
        turn of the event loop, which is 1 to 3 % of an exec, and hold up everybody else.
        """
        for _ in range(ROUNDS):
            ready = self._epoll.poll(0, READY)
            if ready:
                self._handle(ready)
            if not ready or self._over():
                return

    def _handle(self, ready: list[tuple[int, int]]) -> None:
        exited = False
        for fd, events in ready:
            if fd == self._socket_fd:
                self._serve_socket(events)
            elif fd in self._outputs:
                self._move_output(self._outputs[fd])
            elif fd == self._process.exit_fd:
                exited = True
            else:
                self._input.resume()
                self._update_socket_mask()
        if exited:
            if self._timed_out:
                self._process.signal(signal.SIGKILL, "tree")  # the rest had its grace, too
            self._note_exit()
        if self._flush_due and not self._over():
            self._flush()

    def _serve_socket(self, events: int) -> None:
        if events & OUT:
            self._flush_due = True
        if events & IN:
            room = self._channel.input_room(self._input.held)
            self._take(self._channel.receive_now(room) or [] if room else [])
        elif events & ~OUT:
            raise ConnectionLost

    def _blocked(self) -> bool:
        return self._blocked_since < math.inf

    def _flush(self) -> None:
        """Write what can be written; stop reading outputs while something is left."""
        self._flush_due = False
        if not self._blocked():
            self._channel.grant_input(self._input.held)
        blocked = not self._channel.flush_now()
        if blocked == self._blocked():
            return
        now = trio.current_time()
        if blocked:
            self._blocked_since = now
        else:
            self._cap_at += now - self._blocked_since  # the clock stood still
            self._blocked_since = math.inf
        self._update_socket_mask()
        for pump in self._outputs.values():
            if blocked:
                pump.unwatch()
            else:
                pump.watch()
                pump.last_data = now

    def _update_socket_mask(self) -> None:
        room = self._channel.input_room(self._input.held)
        mask = CLOSED | (IN if room else 0) | (OUT if self._blocked() else 0)
        if self._socket_mask == 0:
            self._epoll.register(self._channel.sock, mask)
        elif mask != self._socket_mask:
            self._epoll.modify(self._channel.sock, mask)
        self._socket_mask = mask

    # ── from the process ─────────────────────────────────────────────────────────────────────────

    def _move_output(self, pump: OutputPump) -> None:
        if self._blocked():
            return  # found ready together with what filled the socket
        count = pump.move(self._channel)
        if count is None:
            self._end_output(pump)
        elif count:
            self._moved += count
            self._flush_due = True
            if self._exited:
                pump.last_data = trio.current_time()
            if self._channel.urgent:
                self._flush()

    def _end_output(self, pump: OutputPump) -> None:
        del self._outputs[pump.fd]
        pump.close()
        self._channel.queue(End(stream=pump.stream))

    def _note_exit(self) -> None:
        """The process itself has ended; what it wrote may still be in the pipes."""
        self._exited = True
        if not self._outputs:
            return  # the common case, and all is said
        self._epoll.unregister(self._process.exit_fd)
        now = trio.current_time()
        self._cap_at = now + self._drain_cap
        if self._blocked():
            self._blocked_since = now
        for pump in self._outputs.values():
            pump.owed = readable_bytes(pump.fd)
            pump.last_data = now

    # ── to the process ───────────────────────────────────────────────────────────────────────────

    def _take(self, events: list[Event]) -> None:
        """What the host sent. Controls act at once, also where the input before them waits."""
        for event in events:
            match event:
                case Data():
                    self._input.feed(event.data)
                case End():
                    self._input.end()
                case Signal():
                    self._process.signal(event.signal, event.target)
                case Resize():
                    self._process.resize(event.rows, event.columns)
                case Detach():
                    raise ConnectionLost  # nobody will come back for it
                case Acknowledge():
                    pass  # nothing is retained
                case _:
                    raise AssertionError(f"{event!r} must have been refused")
        self._update_socket_mask()

    # ── time ─────────────────────────────────────────────────────────────────────────────────────

    def _check_clock(self) -> None:
        now = trio.current_time()
        if self._exited:
            self._cut_outputs(now)
        elif now >= self._deadline:
            if self._timed_out:
                self._process.signal(signal.SIGKILL, "tree")
                self._deadline = math.inf
            else:
                self._timed_out = True
                self._process.signal(signal.SIGTERM, "group")
                self._deadline = now + self._grace

    def _cut_outputs(self, now: float) -> None:
        """End the outputs that another process holds open, once there is no use in waiting."""
        for pump in list(self._outputs.values()):
            if self._blocked() or now < self._cut_at(pump):
                continue
            self._move_output(pump)  # the last look: its end may have come with the exit
            if pump.fd in self._outputs and not self._blocked() and now >= self._cut_at(pump):
                self._cut.append(STREAMS[pump.stream])
                self._end_output(pump)

    def _cut_at(self, pump: OutputPump) -> float:
        """Idle for long enough; or too late, but not before everything from before the exit."""
        idle = pump.last_data + self._drain_idle
        return idle if pump.still_owed() else min(idle, self._cap_at)
