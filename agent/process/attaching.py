"""Hosts at a kept process: the operations `start` with `keep` and `attach`, and what follows.

Each host gets the output out of the rings, from its own offset, at its own speed. One of them may
write. Losing a connection ends nothing here.
"""

import select

import trio

from microguest.agent.channel import BUFFER, Channel, ConnectionLost
from microguest.agent.process import plain
from microguest.agent.process.kept import MAIN_ID, KeptProcess, claimed, forgotten, keep, place
from microguest.agent.process.starting import Starter
from microguest.agent.process.workload import find_main
from microguest.agent.state import Agent
from microguest.guest import bounds
from microguest.guest.errors import OperationError, RemoteProtocolError
from microguest.guest.record import Record
from microguest.guest.supervision import MainCollected, MainReader
from microguest.guest.wire.connection import Data, End, Event, Response
from microguest.guest.wire.messages import (
    STREAMS,
    Acknowledge,
    Attach,
    Detach,
    Failure,
    Resize,
    Signal,
    Start,
    Started,
)

__all__ = ["Attachment", "attach", "start"]

IN = select.EPOLLIN
OUT = select.EPOLLOUT
CLOSED = select.EPOLLRDHUP
OUTPUTS = (1, 2)
# All of a frame is sent before anything else may be, and the part that the socket did not take is
# held here, for each host that does not read: so frames are short, and several go at a time.
FRAME = 16 * 1024
ROUNDS = 16  # of sending before other connections get their turn
WRITER_LOOKS = 125  # for a connection that was closed to be seen so
WRITER_LOOK = 0.002  # seconds between two of them


async def start(
    starter: Starter, agent: Agent, channel: Channel, args: Record, early: list[Event]
) -> None:
    """The operation. Raises OperationError."""
    assert isinstance(args, Start)
    if args.keep is None:
        await plain.start(starter, agent, channel, args, early)
        return
    await agent.wait_root()
    with claimed(agent, args.id):
        async with place(agent):
            process = await keep(agent, await starter.begin(args), args)
    attachment = Attachment(channel, process, dict.fromkeys(OUTPUTS, 0), write=True)
    channel.queue(Response(result=Started(id=process.id, pid=process.pid)))
    await attachment.run(early)
    await attachment.take_leave()


async def attach(agent: Agent, channel: Channel, args: Record, early: list[Event]) -> None:
    """The operation. Raises OperationError."""
    assert isinstance(args, Attach)
    await agent.wait_root()
    process = await find_main(agent) if args.id == MAIN_ID else agent.processes.find(args.id)
    if not isinstance(process, KeptProcess):
        raise OperationError("no_such_process", f"process {args.id} is not kept")
    for _ in range(WRITER_LOOKS):  # it may have left before this host came: let it be seen
        if not args.write or process.writer is None:
            break
        await trio.sleep(WRITER_LOOK)
    if args.write and process.writer is not None:
        why = f"another connection writes to {process.id}: attach with write=False to watch it"
        raise OperationError("stdin_taken", f"{why}, or again when that one has left")
    if process.goes:  # meanwhile
        raise forgotten(process.id)
    offsets, dropped = starting_points(process, args.offsets or {})
    attachment = Attachment(channel, process, offsets, write=args.write)
    channel.queue(
        Response(
            result=Started(
                id=process.id,
                pid=process.pid,
                offsets={STREAMS[stream]: offset for stream, offset in offsets.items() if offset},
                dropped=dropped,
                stdin=process.takes_input,
            )
        )
    )
    if args.write and process.id == MAIN_ID:
        await read_main(agent, channel, attachment, early)
    else:
        await attachment.run(early)
    await attachment.take_leave()


async def read_main(
    agent: Agent, channel: Channel, attachment: "Attachment", early: list[Event]
) -> None:
    """As `Attachment.run`, for who may write to the workload: PID 1 waits for it to have all."""
    agent.main_readers += 1
    tell_of_readers(agent)
    try:
        if await attachment.run(early):
            await wait_for_close(channel)
            await agent.link.deliver(lambda: (MainCollected(), ()))
    finally:
        agent.main_readers -= 1
        tell_of_readers(agent)


def tell_of_readers(agent: Agent) -> None:
    """PID 1, what is so at the moment of telling: the order of two tellings does not matter."""
    assert agent.nursery is not None
    agent.nursery.start_soon(
        agent.link.deliver, lambda: (MainReader(there=agent.main_readers > 0), ())
    )


def starting_points(
    process: KeptProcess, wanted: dict[str, int]
) -> tuple[dict[int, int], dict[str, int]]:
    """By stream the first offset to send; by name the bytes asked for that are gone.

    Raises OperationError.
    """
    offsets = dict.fromkeys(OUTPUTS, 0)
    dropped = {}
    for stream, ring in process.rings.items():
        name = STREAMS[stream]
        offset = wanted.get(name, ring.oldest)
        if offset > ring.written:
            raise OperationError(
                "bad_request", f"offsets.{name}: {offset} is beyond its {ring.written} bytes"
            )
        offsets[stream] = ring.written if offset < 0 else max(offset, ring.oldest)
        if 0 <= offset < ring.oldest:
            dropped[name] = ring.oldest - offset
    return offsets, dropped


async def wait_for_close(channel: Channel) -> None:
    """Until the host has read everything, which it shows by closing. How long a host may take that
    is there, PID 1 knows, and ends the machine."""
    try:
        with trio.move_on_after(bounds.OUTPUT_WAIT_MAX):
            while True:
                await channel.receive()
    except (ConnectionLost, RemoteProtocolError):
        pass


class Attachment:
    """One host at a process, from its making on. `run` once.

    The process's task calls `push` and `watch`, which therefore raise nothing.
    """

    def __init__(
        self, channel: Channel, process: KeptProcess, offsets: dict[int, int], *, write: bool
    ) -> None:
        self.offsets = offsets  # by stream: of the first byte that is not queued
        self._channel = channel
        self._process = process
        self._write = write
        self._explicit = False  # the host acknowledges; until then what was sent counts
        self._ended: set[int] = set()  # streams whose END is queued
        self._epoll = select.epoll(1)
        self._mask = 0
        self._behind = True  # there is something to send
        self._scope = trio.CancelScope()
        self._refusal: OperationError | None = None
        self._lost: Exception | None = None
        self._detached = False
        self._forgets = False  # it detached from what nobody is to find again
        process.enter(self, write=write)

    async def run(self, early: list[Event]) -> bool:
        """Until `exited` is written, which is True, or the host detached.

        Raises OperationError, ConnectionLost and RemoteProtocolError; the process lives on.
        """
        try:
            self._take(early)
            self.push()
            with self._scope:
                while not self._leaving():
                    await trio.lowlevel.wait_readable(self._epoll)
                    self._work()
            if self._lost is not None:
                self._hear_the_rest(acts=True)
        finally:
            self._process.leave(self)
            self._epoll.close()
        if not self._detached and self._lost is None:
            await self._wait_for_room()
        if self._detached:
            return False
        if self._lost is not None:
            raise self._lost
        if self._refusal is not None:
            error = self._refusal
            self._channel.queue(Failure(code=error.code, message=error.message))
        else:
            assert self._process.exited is not None
            self._channel.queue(self._process.exited)
        await self._channel.flush()
        return self._refusal is None

    async def _wait_for_room(self) -> None:
        """For the last frame: what the host says after that is dropped, and it may leave till then.

        Raises RemoteProtocolError.
        """
        sock, room = self._channel.sock, select.poll()
        room.register(sock, select.POLLOUT)
        try:
            if self._channel.flush_now() and room.poll(0) == [(sock.fileno(), select.POLLOUT)]:
                return
            await self._channel.flush()
            await trio.lowlevel.wait_writable(sock)
        except ConnectionLost as error:
            self._lost = error
        self._hear_the_rest(acts=False)

    async def take_leave(self) -> None:
        """After `run`: forget the process where the host asked for that. OperationError."""
        if self._forgets:
            await self._process.forget()

    def _leaving(self) -> bool:
        if self._detached or self._refusal is not None or self._lost is not None:
            return True
        return self._process.exited is not None and not self._behind and len(self._ended) == 2

    # ── from the process ─────────────────────────────────────────────────────────────────────────

    def push(self) -> None:
        """Send what is new, as far as the socket takes it, to who has not left."""
        if self._detached:
            self._scope.cancel()
            return
        try:
            for _ in range(ROUNDS):
                if self._write:
                    self._channel.grant_input(self._process.input_held)
                if not self._channel.flush_now():
                    self._behind = True
                    break
                self._acknowledge_sent()
                if not self._send_some():
                    break
        except ConnectionLost as error:
            self._lost = error
        self.watch()
        if self._leaving():
            self._scope.cancel()

    def refuse(self, error: OperationError) -> None:
        """End it, with an error as its last frame."""
        self._refusal = self._refusal or error
        self._scope.cancel()

    def _send_some(self) -> bool:
        """Whether there was something to send, which may be held by the channel in part."""
        self._behind = False
        for stream in OUTPUTS:
            ring = self._process.rings.get(stream)
            if ring is not None and self.offsets[stream] < ring.oldest:
                why = "output went before it was sent here; attach again"
                self.refuse(OperationError("fell_behind", why))
                return False
            if ring is not None and self.offsets[stream] < ring.written:
                self._behind = True
                self._send_output(stream, ring.read(self.offsets[stream], BUFFER))
                return True
            if stream not in self._ended and stream not in self._process.outputs:
                self._ended.add(stream)
                self._channel.queue(End(stream=stream))
                self._behind = True
                return True
        return False

    def _send_output(self, stream: int, count: int) -> None:
        """`count` bytes of BUFFER as frames, whole ones undone that the socket does not take."""
        pieces: list[bytes | memoryview] = []
        for begin in range(0, count, FRAME):
            end = min(begin + FRAME, count)
            pieces.append(self._channel.connection.send_data_header(stream, end - begin))
            pieces.append(BUFFER[begin:end])
        try:
            sent = self._channel.sock.sendmsg(pieces)
        except BlockingIOError:
            sent = 0
        except OSError:
            raise ConnectionLost from None
        for header, payload in zip(pieces[0::2], pieces[1::2], strict=True):
            size = len(header) + len(payload)
            if sent < size:
                if sent:
                    self._channel.outgoing.append(b"".join((header, payload))[sent:])
                    self.offsets[stream] += len(payload)
                return
            sent -= size
            self.offsets[stream] += len(payload)

    def _acknowledge_sent(self) -> None:
        if self._write and not self._explicit:
            for stream in self._process.rings:
                self._process.acknowledge(stream, self.offsets[stream])

    # ── from the host ────────────────────────────────────────────────────────────────────────────

    def watch(self) -> None:
        """Wait for what can happen next: room in the socket, and what the host says."""
        mask = CLOSED | (OUT if self._behind else 0) | (IN if self._room() else 0)
        if self._mask == 0:
            self._epoll.register(self._channel.sock, mask)
        elif mask != self._mask:
            self._epoll.modify(self._channel.sock, mask)
        self._mask = mask

    def _work(self) -> None:
        for _, ready in self._epoll.poll(0, 1):
            if ready & IN and (room := self._room()):
                self._take(self._channel.receive_now(room) or [])
            elif ready & ~OUT:
                self._lost = ConnectionLost()
        self.push()

    def _hear_the_rest(self, *, acts: bool) -> None:
        """What the host had sent before it left, as that may be that the process shall not stay.

        With `acts` all of it is done, else only that.
        """
        try:
            for _ in range(ROUNDS):
                room = 0 if self._detached else self._room()
                if not room:
                    return
                events = self._channel.receive_now(room)
                if events is None:
                    return
                self._take([event for event in events if acts or isinstance(event, Detach)])
        except (ConnectionLost, RemoteProtocolError) as error:
            self._lost = self._lost or error  # that was all

    def _room(self) -> int:
        """How much may be read; what waits is of no concern to who cannot write."""
        return self._channel.input_room(self._process.input_held if self._write else 0)

    def _take(self, events: list[Event]) -> None:
        """What the host sent: input, its end, controls."""
        process = self._process
        for event in events:
            match event:
                case Data():
                    process.feed(event.data)
                case End():
                    process.end_input()
                case Signal():
                    process.signal(event.signal, event.target)
                case Resize():
                    process.resize(event.rows, event.columns)
                case Acknowledge():
                    self._acknowledge(event)
                case Detach():
                    self._detached = True
                    self._forgets = event.forget
                case _:
                    raise AssertionError(f"{event!r} must have been refused")

    def _acknowledge(self, event: Acknowledge) -> None:
        self._explicit = True
        for stream, offset in ((1, event.stdout), (2, event.stderr)):
            if stream in self._process.rings and offset <= self.offsets[stream]:
                self._process.acknowledge(stream, offset)
