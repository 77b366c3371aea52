"""The protocol as a state machine without I/O: bytes in, events out; events in, bytes out.

One `Connection` per transport connection, the same class on both sides. It holds no socket, clock
or thread. What may be sent and received in which state is in the tables of `guest.wire.states`;
everything else is a LocalProtocolError (we wanted to send it) or a RemoteProtocolError (the peer
did send it).

A connection's life, seen from the host:

    preface+hello ─▶ READY ─ request ─▶ BUSY ─ response/error ─▶ READY …           small requests
                       └──── start/attach ─▶ STARTING ─ response ─▶ PROCESS ─ exited ─▶ DONE
                                                 └── error ─▶ DONE
              STARTING, PROCESS ─ detach ─▶ DONE, with what is still on its way dropped

The host may send preface, hello and its first request in one piece, and stdin right after `start`.

Stdin has a window where both sides name the feature "credit": the host sends no more of it than it
has credit for, and so the agent can read on, and sees what stands behind it, however little of its
input the process takes.

Bytes are copied once on their way through: out of what the caller read into the event. Only a
preface, a header or a control payload that has not arrived as a whole is kept between two calls.
"""

from microguest.guest import bounds
from microguest.guest.errors import LocalProtocolError, RemoteProtocolError
from microguest.guest.record import Record
from microguest.guest.wire import frames, messages
from microguest.guest.wire.frames import FrameHeader, Kind
from microguest.guest.wire.messages import (
    STREAMS,
    Acknowledge,
    Attach,
    Credit,
    Detach,
    Exited,
    Failure,
    Hello,
    Resize,
    Signal,
    Start,
    Welcome,
)
from microguest.guest.wire.states import (
    AGENT_MAY_SEND,
    AGENT_STREAMS,
    HOST_MAY_SEND,
    HOST_STREAMS,
    Role,
    State,
)

__all__ = ["Connection", "Control", "Data", "End", "Event", "Request", "Response", "Role", "State"]


class Request(Record):
    """An operation that the host asks for, with its checked arguments."""

    op: str
    args: Record


class Response(Record):
    """The result of the operation asked for last."""

    result: Record


class Data(Record):
    """Bytes of a stream, in order. A long frame arrives as several of these."""

    stream: int
    data: bytes


class End(Record):
    """No more bytes on this stream."""

    stream: int


Control = Signal | Resize | Acknowledge | Detach
Event = Hello | Welcome | Request | Response | Failure | Data | End | Control | Credit | Exited


class Connection:
    """One side of one connection.

    `send(event)` gives the bytes to write; `receive(data)` takes what was read and gives the events
    in it. After a RemoteProtocolError the state is FAILED: an agent may send one Failure with the
    error's code, then the transport is closed. A LocalProtocolError changes nothing.
    """

    def __init__(self, role: Role) -> None:
        self.role = role
        self.state = State.HELLO
        self.peer_version: int | None = None
        self._welcomed = False
        self._preface_sent = False
        self._op = ""
        self._ended: set[int] = set()  # streams that carry nothing more
        self.input_bytes = 0  # of stdin, that passed here or were announced by a header
        self._windowed = False  # both sides name the feature, as far as is known
        self._credit: int | None = None  # how many these may be; None: any number
        self._watches = False  # attached without the right to write
        self._ended_by_us = False  # what the peer had sent before it knew is dropped
        self._inbox = bytearray()  # the part of one preface, header or control payload that came
        self._fresh = memoryview(b"")  # what receive() was given and has not looked at yet
        self._current: FrameHeader | None = None
        self._data_left = 0  # bytes of the current data frame that have not arrived
        self._failure: RemoteProtocolError | None = None

    @property
    def buffered(self) -> int:
        """Bytes of an unfinished preface, header or control payload that are held."""
        return len(self._inbox)

    @property
    def detached(self) -> bool:
        """The host has left by `Detach`: it drops whatever would be sent now."""
        return self.role is Role.AGENT and self.state is State.DONE and not self._ended_by_us

    @property
    def windowed(self) -> bool:
        """Whether stdin has a window, as far as is known by now."""
        return self._windowed

    @property
    def input_arrived(self) -> int:
        """For an agent: of `input_bytes`, those that have come."""
        return self.input_bytes - self._data_left

    @property
    def input_credit(self) -> int | None:
        """Bytes of stdin that may be sent by now, from the connection's first.

        None: any number, or none any more.
        """
        return None if self._ended >= HOST_STREAMS else self._credit

    # ── sending ──────────────────────────────────────────────────────────────────────────────────

    def send(self, event: Event) -> bytes:
        """The bytes of one event. Raises LocalProtocolError where it is not allowed now.

        Also for what the peer would refuse: a field of the wrong type, a payload that is too long.
        """
        kind, channel, payload = self._encode(event)
        head = FrameHeader(len(payload), kind, channel)
        self._check(head, ours=True)
        header = frames.header(head.length, kind, channel)
        if kind == Kind.END:  # has nothing that could be wrong, and is never the first
            self._advance(channel, event)
            return header
        self._check_event(event, ours=True)
        try:
            if head.length > frames.MAX_PAYLOAD[kind]:
                FrameHeader.parse(header)
            if kind != Kind.DATA and not _surely_accepted(event):
                self._decode(head, payload)
        except RemoteProtocolError as error:
            raise LocalProtocolError(f"{type(event).__name__} cannot be sent: {error}") from None
        if kind == Kind.DATA:
            self._count(channel, head.length)
        opening = b"" if self._preface_sent else frames.preface()
        self._advance(channel, event)
        self._preface_sent = True
        self._ended_by_us = self.state is State.DONE
        return b"".join((opening, header, payload))

    def send_data_header(self, stream: int, length: int) -> bytes:
        """The header of a data frame whose `length` bytes the caller writes itself (splice).

        It must write all of them before anything else. Raises LocalProtocolError as `send` does.
        """
        if not 0 < length <= bounds.DATA_PAYLOAD:
            raise LocalProtocolError(
                f"data frame of {length} bytes, must have 1 to {bounds.DATA_PAYLOAD}"
            )
        self._check(FrameHeader(length, Kind.DATA, stream), ours=True)
        self._count(stream, length)
        return frames.header(length, Kind.DATA, stream)

    def _encode(self, event: Event) -> tuple[int, int, bytes]:
        match event:
            case Data():
                return Kind.DATA, event.stream, event.data
            case End():
                return Kind.END, event.stream, b""
            case Request():
                self._require(event.args, event.op, 0)
                request = {"op": event.op, "args": event.args.to_map()}
                return Kind.REQUEST, 0, messages.pack(request)
            case Response():
                self._require(event.result, self._op, 1)
                return Kind.RESPONSE, 0, messages.pack(event.result.to_map())
            case Failure():
                return Kind.ERROR, 0, messages.pack(_shortened(event).to_map())
            case Hello() | Welcome() | Credit() | Exited():
                return _KIND_OF[type(event)], 0, messages.pack(event.to_map())
        if type(event) in messages.CONTROLS.values():  # by type: SignalProcess is not a control
            return Kind.CONTROL, 0, messages.encode_control(event)
        raise LocalProtocolError(f"{type(event).__name__} is not an event of the protocol")

    def _require(self, record: Record, op: str, side: int) -> None:
        pair = messages.OPERATIONS.get(op)
        if pair is None:
            raise LocalProtocolError(f"there is no operation {op!r:.100} to send this for")
        if type(record) is not pair[side]:
            wanted = pair[side].__name__
            raise LocalProtocolError(f"{op} takes {wanted} here, not {type(record).__name__}")

    # ── receiving ────────────────────────────────────────────────────────────────────────────────

    def receive(self, data: bytes | bytearray | memoryview) -> list[Event]:
        """The events that `data` completes. Raises RemoteProtocolError for what the peer did wrong.

        Events that stand before a violation in the same `data` are not delivered. An agent must
        answer a Hello before it feeds more (LocalProtocolError otherwise), so that a peer without
        the token makes it hold no more than a hello and what was read together with it. What still
        arrives after this side's own last frame was on its way already, and is dropped.
        """
        if self._ended_by_us:
            return []
        self._refuse_after_failure()
        if self._hello_waits() and len(data):
            raise LocalProtocolError("the hello must be answered before more is received")
        self._fresh = memoryview(data)
        events: list[Event] = []
        try:
            while (event := self._next()) is not None:
                events.append(event)
        except RemoteProtocolError as error:
            self._fail(error)
            raise
        finally:
            self._fresh = memoryview(b"")
        return events

    def receive_eof(self) -> None:
        """The peer closed its side. Raises RemoteProtocolError where it may not have, yet."""
        if self.state is State.DONE:
            return
        self._refuse_after_failure()
        problem = ""
        if self._current is not None or self._inbox:
            problem = f"connection closed inside a frame, in state {self.state.value}"
        elif self.role is Role.HOST:
            problem = f"connection closed by the agent in state {self.state.value}"
        if problem:
            error = RemoteProtocolError(problem)
            self._fail(error)
            raise error

    def _fail(self, error: RemoteProtocolError) -> None:
        self._failure = error
        self.state = State.FAILED
        self._inbox = bytearray()
        self._current = None

    def _refuse_after_failure(self) -> None:
        if self._failure is not None:
            first = self._failure
            raise RemoteProtocolError(f"nothing can follow: {first}", code=first.code)

    def _hello_waits(self) -> bool:
        answered = self._welcomed or self.state in (State.HELLO, State.DONE, State.FAILED)
        return self.role is Role.AGENT and not answered

    def _next(self) -> Event | None:
        if self.peer_version is None and not self._take_preface():
            return None
        if self._current is None and not self._take_header():
            return None
        head = self._current
        assert head is not None
        if head.kind == Kind.DATA:
            return self._take_data(head)
        return self._take_message(head)

    def _take_preface(self) -> bool:
        """Check the peer's preface byte by byte, so that garbage is refused at its first byte."""
        whole = self._take(frames.PREFACE_SIZE)
        start = bytes(self._inbox if whole is None else whole)
        magic = start[: len(frames.MAGIC)]
        if not frames.MAGIC.startswith(magic):
            raise RemoteProtocolError("the peer does not speak this protocol", code="bad_preface")
        if whole is None:
            return False
        version = int.from_bytes(start[len(frames.MAGIC) :], "big")
        if version != frames.VERSION and self.role is Role.AGENT:
            raise RemoteProtocolError(
                f"protocol version {version} is not supported, only {frames.VERSION}",
                code="unsupported_version",
            )
        self.peer_version = version
        return True

    def _take_header(self) -> bool:
        raw = self._take(frames.HEADER.size)
        if raw is None:
            return False
        head = FrameHeader.parse(raw)
        if self.peer_version != frames.VERSION and head.kind != Kind.ERROR:
            raise RemoteProtocolError(
                f"the agent speaks protocol version {self.peer_version}, not {frames.VERSION}",
                code="unsupported_version",
            )
        self._check(head, ours=False)
        if head.kind == Kind.DATA:
            self._count(head.channel, head.length)
        self._current = head
        self._data_left = head.length
        return True

    def _take_data(self, head: FrameHeader) -> Event | None:
        piece = bytes(self._fresh[: self._data_left])
        if not piece:
            return None
        self._fresh = self._fresh[len(piece) :]
        self._data_left -= len(piece)
        if self._data_left == 0:
            self._current = None
        return Data(stream=head.channel, data=piece)

    def _take_message(self, head: FrameHeader) -> Event | None:
        payload = self._take(head.length)
        if payload is None:
            return None
        self._current = None
        event = self._decode(head, payload)
        self._check_event(event, ours=False)
        self._advance(head.channel, event)
        return event

    def _take(self, size: int) -> bytes | bytearray | None:
        """Exactly `size` bytes once they have all arrived; until then they wait in the inbox."""
        missing = size - len(self._inbox)
        piece = self._fresh[:missing]
        self._fresh = self._fresh[missing:]
        if not self._inbox and len(piece) == size:
            return bytes(piece)
        self._inbox += piece
        if len(self._inbox) < size:
            return None
        whole, self._inbox = self._inbox, bytearray()
        return whole

    def _decode(self, head: FrameHeader, payload: bytes | bytearray) -> Event:
        if head.kind == Kind.END:
            return End(stream=head.channel)
        if head.kind == Kind.REQUEST:
            return _decode_request(payload)
        if head.kind == Kind.RESPONSE:
            result = messages.OPERATIONS[self._op][1]
            values = messages.unpack(payload, f"result of {self._op}")
            return Response(result=messages.check(result, values, f"result of {self._op}"))
        message = messages.decode(head.kind, payload)
        assert isinstance(message, Hello | Welcome | Failure | Control | Credit | Exited)
        return message

    # ── state ────────────────────────────────────────────────────────────────────────────────────

    def _check(self, head: FrameHeader, *, ours: bool) -> None:
        """Refuse a frame that the tables do not allow in this state, or on an ended stream."""
        by_host = (self.role is Role.HOST) == ours
        state, kind = self.state, head.kind
        settled = (State.HELLO, State.DONE, State.FAILED)
        if not by_host and not self._welcomed and state not in settled:
            state = State.WELCOME  # a first request may wait behind the hello
        problem = ""
        if kind not in (HOST_MAY_SEND if by_host else AGENT_MAY_SEND)[state]:
            problem = f"{_SHORT[kind]} frame in state {state.value}"
        elif kind in (Kind.DATA, Kind.END):
            problem = self._stream_problem(head, by_host=by_host)
        elif kind == Kind.CREDIT and self._credit is None:
            problem = "credit frame where stdin has no window"
        elif kind == Kind.EXITED and not self._ended >= AGENT_STREAMS:
            problem = "exited before the end of stdout and stderr"
        if problem:
            raise LocalProtocolError(problem) if ours else RemoteProtocolError(problem)

    def _stream_problem(self, head: FrameHeader, *, by_host: bool) -> str:
        """What is wrong with a data or end frame; "" where nothing is."""
        if head.channel not in (HOST_STREAMS if by_host else AGENT_STREAMS):
            return f"stream {head.channel} belongs to the other side or does not exist"
        if head.channel in self._ended:
            return f"stream {STREAMS[head.channel]} has ended or was not asked for"
        if head.kind == Kind.END:
            return ""
        if head.length == 0:
            return "data frame without data"
        credit = self._credit if by_host else None
        if credit is not None and self.input_bytes + head.length > credit:
            return f"stdin beyond the {credit} bytes that there is credit for"
        return ""

    def _check_event(self, event: Event, *, ours: bool) -> None:
        """Refuse what a frame's header does not show to be wrong."""
        if isinstance(event, Credit) and self._credit is not None and event.stdin <= self._credit:
            problem = f"credit of {event.stdin} bytes after one of {self._credit}"
            raise LocalProtocolError(problem) if ours else RemoteProtocolError(problem)
        if self._watches and type(event) is Acknowledge:
            problem = "acknowledge on a connection that was attached without write"
            raise LocalProtocolError(problem) if ours else RemoteProtocolError(problem)

    def _count(self, stream: int, length: int) -> None:
        if stream in HOST_STREAMS:
            self.input_bytes += length

    def _advance(self, channel: int, event: Event) -> None:
        match event:
            case Hello():
                self._windowed = messages.CREDIT in event.features
                self.state = State.WELCOME
            case Welcome():
                self._welcome(event)
            case Request():
                self._request(event)
            case Credit():
                self._credit = event.stdin
            case Response():
                self.state = State.PROCESS if self.state is State.STARTING else State.READY
            case Failure():
                answered = self._welcomed and self.state is State.BUSY
                self.state = State.READY if answered else State.DONE
            case End():
                self._ended.add(channel)
            case Exited() | Detach():
                self.state = State.DONE
            case _:
                pass

    def _welcome(self, event: Welcome) -> None:
        self._welcomed = True
        if messages.CREDIT not in event.features:
            self._windowed = False
            self._credit = None
        if self.state is State.WELCOME:
            self.state = State.READY

    def _request(self, event: Request) -> None:
        self._op = event.op
        args = event.args
        starting = event.op in messages.PROCESS_OPERATIONS
        self.state = State.STARTING if starting else State.BUSY
        self._watches = isinstance(args, Attach) and not args.write
        if self._watches or (isinstance(args, Start) and not args.stdin):
            self._ended |= HOST_STREAMS
        elif starting and self._windowed:
            self._credit = bounds.INPUT_WINDOW if isinstance(args, Start) else 0


_KIND_OF: dict[type[Record], int] = {
    Hello: Kind.HELLO,
    Welcome: Kind.WELCOME,
    Credit: Kind.CREDIT,
    Exited: Kind.EXITED,
}
_SHORT = {value: name.lower() for name, value in vars(Kind).items() if name.isupper()}


def _surely_accepted(event: Event) -> bool:
    """Whether the peer takes an event's payload, as far as that can be seen without decoding it."""
    match event:
        case Response():
            return messages.exactly_typed(event.result)
        case Request():
            return messages.exactly_typed(event.args)
    return messages.exactly_typed(event)


def _decode_request(payload: bytes | bytearray) -> Request:
    values = messages.unpack(payload, "request")
    op = values.get("op")
    if not isinstance(op, str):
        raise RemoteProtocolError("request: missing field op")
    if op not in messages.OPERATIONS:
        raise RemoteProtocolError(f"unknown operation {op!r:.100}", code="unknown_operation")
    args = messages.check(messages.OPERATIONS[op][0], values.get("args", {}), op)
    return Request(op=op, args=args)


def _shortened(failure: Failure) -> Failure:
    """The failure within its limits: an error must never fail to be sent for being too long."""
    fields = list(failure.fields.items())[: bounds.ERROR_FIELDS]
    return failure.replace(
        message=_cut(failure.message),
        fields={key: _cut(value) if isinstance(value, str) else value for key, value in fields},
    )


def _cut(text: str) -> str:
    maximum = bounds.ERROR_MESSAGE
    return text if len(text) <= maximum else text[: maximum - 1] + "…"
