"""The protocol as a state machine without I/O: bytes in, events out; events in, bytes out.

One `Connection` per transport connection, the same class on both sides. It holds no socket, clock
or thread. What may be sent and received in which state is in the two tables below; everything else
is a LocalProtocolError (we wanted to send it) or a RemoteProtocolError (the peer did send it).

A connection's life, seen from the host:

    preface+hello ─▶ READY ─ request ─▶ BUSY ─ response/error ─▶ READY …           small requests
                       └──── start/attach ─▶ STARTING ─ response ─▶ PROCESS ─ exited ─▶ DONE
                                                 └── error ─▶ DONE

The host may send preface, hello and its first request in one piece, and stdin right after `start`.
"""

from enum import Enum

from guest import frames, limits, messages
from guest.errors import LocalProtocolError, RemoteProtocolError
from guest.frames import FrameHeader, Kind
from guest.messages import STREAMS, Exited, Failure, Hello, Signal, Welcome
from guest.record import Record

__all__ = ["Connection", "Data", "End", "Event", "Request", "Response", "Role", "State"]


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


Event = Hello | Welcome | Request | Response | Failure | Data | End | Signal | Exited


class Role(Enum):
    HOST = "host"
    AGENT = "agent"


class State(Enum):
    HELLO = "hello"  # the host has not said hello yet
    WELCOME = "welcome"  # the agent has not answered the hello yet
    READY = "ready"
    BUSY = "busy"  # a small request is being answered
    STARTING = "starting"  # a start or attach is being answered
    PROCESS = "process"
    DONE = "done"  # nothing more may be sent or received


HOST_MAY_SEND: dict[State, frozenset[int]] = {
    State.HELLO: frozenset({Kind.HELLO}),
    State.WELCOME: frozenset({Kind.REQUEST}),
    State.READY: frozenset({Kind.REQUEST}),
    State.BUSY: frozenset(),
    State.STARTING: frozenset({Kind.DATA, Kind.END, Kind.CONTROL}),
    State.PROCESS: frozenset({Kind.DATA, Kind.END, Kind.CONTROL}),
    State.DONE: frozenset(),
}

AGENT_MAY_SEND: dict[State, frozenset[int]] = {
    State.HELLO: frozenset({Kind.ERROR}),
    State.WELCOME: frozenset({Kind.WELCOME, Kind.ERROR}),
    State.READY: frozenset({Kind.ERROR}),
    State.BUSY: frozenset({Kind.RESPONSE, Kind.ERROR}),
    State.STARTING: frozenset({Kind.RESPONSE, Kind.ERROR}),
    State.PROCESS: frozenset({Kind.DATA, Kind.END, Kind.EXITED, Kind.ERROR}),
    State.DONE: frozenset(),
}

HOST_STREAMS = frozenset({0})
AGENT_STREAMS = frozenset({1, 2})


class Connection:
    """One side of one connection.

    `send(event)` gives the bytes to write; `receive(data)` takes what was read and gives the events
    in it. After a ProtocolError the connection is unusable: close the transport.
    """

    def __init__(self, role: Role) -> None:
        self.role = role
        self.state = State.HELLO
        self.peer_version: int | None = None
        self._welcomed = False
        self._preface_sent = False
        self._inbox = bytearray()  # at most a preface, or one header and one control payload
        self._current: FrameHeader | None = None
        self._data_left = 0  # bytes of the current data frame that have not arrived
        self._op = ""
        self._ended: set[int] = set()

    # ── sending ──────────────────────────────────────────────────────────────────────────────────

    def send(self, event: Event) -> bytes:
        """The bytes of one event. Raises LocalProtocolError where it is not allowed now."""
        kind, channel, payload = self._encode(event)
        maximum = frames.MAX_PAYLOAD[kind]
        if len(payload) > maximum:
            raise LocalProtocolError(
                f"{type(event).__name__} of {len(payload)} bytes is larger than {maximum}"
            )
        opening = b"" if self._preface_sent else frames.preface()
        self._advance(kind, channel, event, ours=True)
        self._preface_sent = True
        return opening + frames.header(len(payload), kind, channel) + payload

    def send_data_header(self, stream: int, length: int) -> bytes:
        """The header of a data frame whose `length` bytes the caller writes itself (splice)."""
        if not 0 < length <= limits.DATA_PAYLOAD:
            raise LocalProtocolError(f"data frame of {length} bytes")
        self._check(Kind.DATA, stream, ours=True)
        return frames.header(length, Kind.DATA, stream)

    def _encode(self, event: Event) -> tuple[int, int, bytes]:
        match event:
            case Data():
                return Kind.DATA, event.stream, event.data
            case End():
                return Kind.END, event.stream, b""
            case Request():
                request = {"op": event.op, "args": event.args.to_map()}
                return Kind.REQUEST, 0, messages.pack(request)
            case Response():
                return Kind.RESPONSE, 0, messages.pack(event.result.to_map())
            case Failure():
                return Kind.ERROR, 0, messages.pack(_shortened(event).to_map())
            case _:
                kind = _KIND_OF[type(event)]
                return kind, 0, messages.pack(event.to_map())

    # ── receiving ────────────────────────────────────────────────────────────────────────────────

    def receive(self, data: bytes | bytearray | memoryview) -> list[Event]:
        """The events that `data` completes. Raises RemoteProtocolError; never anything else."""
        self._inbox += data
        events: list[Event] = []
        while True:
            event = self._next()
            if event is None:
                return events
            events.append(event)

    def receive_eof(self) -> None:
        """The peer closed its side. Raises RemoteProtocolError where it may not have, yet."""
        if self._current is not None or self._inbox:
            raise RemoteProtocolError(
                f"connection closed inside a frame, in state {self.state.value}"
            )
        if self.role is Role.HOST and self.state is not State.DONE:
            raise RemoteProtocolError(f"connection closed by the agent in state {self.state.value}")

    def _next(self) -> Event | None:
        if self.peer_version is None and not self._take_preface():
            return None
        if self._current is None:
            if len(self._inbox) < frames.HEADER.size:
                return None
            self._current = FrameHeader.parse(self._inbox)
            if self.peer_version != frames.VERSION and self._current.kind != Kind.ERROR:
                raise RemoteProtocolError(f"the agent speaks protocol version {self.peer_version}")
            self._check(self._current.kind, self._current.channel, ours=False)
            del self._inbox[: frames.HEADER.size]
            self._data_left = self._current.length
        if self._current.kind == Kind.DATA:
            return self._take_data(self._current)
        return self._take_message(self._current)

    def _take_preface(self) -> bool:
        """Check the peer's preface byte by byte, so that garbage is refused at its first byte."""
        start = bytes(self._inbox[: frames.PREFACE_SIZE])
        if not frames.MAGIC.startswith(start[: len(frames.MAGIC)]):
            raise RemoteProtocolError("the peer does not speak this protocol", code="bad_preface")
        if len(start) < frames.PREFACE_SIZE:
            return False
        version = int.from_bytes(start[len(frames.MAGIC) :], "big")
        if version != frames.VERSION and self.role is Role.AGENT:
            raise RemoteProtocolError(
                f"protocol version {version} is not supported, only {frames.VERSION}",
                code="unsupported_version",
            )
        self.peer_version = version
        del self._inbox[: frames.PREFACE_SIZE]
        return True

    def _take_data(self, head: FrameHeader) -> Event | None:
        if head.length == 0:
            raise RemoteProtocolError("data frame without data")
        if not self._inbox:
            return None
        piece = bytes(self._inbox[: self._data_left])
        del self._inbox[: len(piece)]
        self._data_left -= len(piece)
        if self._data_left == 0:
            self._current = None
        return Data(stream=head.channel, data=piece)

    def _take_message(self, head: FrameHeader) -> Event | None:
        if len(self._inbox) < head.length:
            return None
        payload = bytes(self._inbox[: head.length])
        del self._inbox[: head.length]
        self._current = None
        event = self._decode(head, payload)
        self._advance(head.kind, head.channel, event, ours=False)
        return event

    def _decode(self, head: FrameHeader, payload: bytes) -> Event:
        if head.kind == Kind.END:
            return End(stream=head.channel)
        if head.kind == Kind.REQUEST:
            return _decode_request(payload)
        if head.kind == Kind.RESPONSE:
            result = messages.OPERATIONS[self._op][1]
            values = messages.unpack(payload, f"result of {self._op}")
            return Response(result=messages.check(result, values, f"result of {self._op}"))
        message = messages.decode(head.kind, payload)
        assert isinstance(message, Hello | Welcome | Failure | Signal | Exited)
        return message

    # ── state ────────────────────────────────────────────────────────────────────────────────────

    def _check(self, kind: int, channel: int, *, ours: bool) -> None:
        """Refuse a frame that the tables do not allow in this state, or on an ended stream."""
        sender = self.role if ours else (Role.AGENT if self.role is Role.HOST else Role.HOST)
        table = HOST_MAY_SEND if sender is Role.HOST else AGENT_MAY_SEND
        streams = HOST_STREAMS if sender is Role.HOST else AGENT_STREAMS
        state = self.state
        if sender is Role.AGENT and not self._welcomed and state not in (State.HELLO, State.DONE):
            state = State.WELCOME  # a first request may wait behind the hello
        problem = ""
        if kind not in table[state]:
            problem = f"frame of kind {kind} in state {state.value}"
        elif kind in (Kind.DATA, Kind.END) and channel not in streams:
            problem = f"stream {channel} belongs to the other side or does not exist"
        elif kind in (Kind.DATA, Kind.END) and channel in self._ended:
            problem = f"stream {STREAMS[channel]} has ended already"
        elif kind == Kind.EXITED and not self._ended >= AGENT_STREAMS:
            problem = "exited before the end of stdout and stderr"
        if problem:
            raise LocalProtocolError(problem) if ours else RemoteProtocolError(problem)

    def _advance(self, kind: int, channel: int, event: Event, *, ours: bool) -> None:
        self._check(kind, channel, ours=ours)
        match event:
            case Hello():
                self.state = State.WELCOME
            case Welcome():
                self._welcomed = True
                if self.state is State.WELCOME:
                    self.state = State.READY
            case Request():
                self._op = event.op
                starting = event.op in messages.PROCESS_OPERATIONS
                self.state = State.STARTING if starting else State.BUSY
            case Response():
                self.state = State.PROCESS if self.state is State.STARTING else State.READY
            case Failure():
                answered = self._welcomed and self.state is State.BUSY
                self.state = State.READY if answered else State.DONE
            case End():
                self._ended.add(channel)
            case Exited():
                self.state = State.DONE
            case _:
                pass


_KIND_OF: dict[type[Record], int] = {
    Hello: Kind.HELLO,
    Welcome: Kind.WELCOME,
    Signal: Kind.CONTROL,
    Exited: Kind.EXITED,
}


def _decode_request(payload: bytes) -> Request:
    values = messages.unpack(payload, "request")
    op = values.get("op")
    if not isinstance(op, str):
        raise RemoteProtocolError("request: missing field op")
    if op not in messages.OPERATIONS:
        raise RemoteProtocolError(f"unknown operation {op!r:.100}", code="unknown_operation")
    args = messages.check(messages.OPERATIONS[op][0], values.get("args", {}), op)
    return Request(op=op, args=args)


def _shortened(failure: Failure) -> Failure:
    if len(failure.message) <= limits.ERROR_MESSAGE:
        return failure
    return failure.replace(message=failure.message[: limits.ERROR_MESSAGE - 1] + "…")
