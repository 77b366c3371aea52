"""The protocol: stored byte strings, and both sides against each other in memory.

The byte strings are in `data/protocol-vectors.json`, so that another implementation can be held
against the same ones.
"""

import ast
import json
import re
import signal
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microguest.guest import bounds, report
from microguest.guest.errors import START_CODES, LocalProtocolError, RemoteProtocolError
from microguest.guest.record import Record
from microguest.guest.wire import frames, messages
from microguest.guest.wire.connection import (
    AGENT_MAY_SEND,
    HOST_MAY_SEND,
    Connection,
    Data,
    End,
    Event,
    Request,
    Response,
    Role,
    State,
)
from microguest.guest.wire.frames import Kind
from microguest.guest.wire.messages import (
    Acknowledge,
    Attach,
    Credit,
    Detach,
    Exited,
    Failure,
    Forget,
    Hello,
    Info,
    ListProcesses,
    Ping,
    PingResult,
    ProcessInfo,
    ProcessList,
    Resize,
    Shutdown,
    ShutdownResult,
    Signal,
    SignalProcess,
    Start,
    Started,
    Wait,
    Welcome,
    Winsize,
)

PROJECT = Path(__file__).parent.parent
VECTORS = json.loads((Path(__file__).parent / "data" / "protocol-vectors.json").read_text())
CONVERSATIONS = {each["name"]: each for each in VECTORS["conversations"]}
PROTOCOL = (PROJECT / "docs" / "reference" / "protocol.md").read_text()

TOKEN = "0123456789abcdef0123456789abcdef"
HELLO = Hello(token=TOKEN, client="test")
WELCOME = Welcome(agent="0")
PING = Request(op="ping", args=Ping())
PONG = Response(result=PingResult(uptime=1.0, root_ready=True))


# ── stored vectors ───────────────────────────────────────────────────────────────────────────────


def to_event(stored: dict[str, Any]) -> Event:
    ((name, fields),) = stored.items()
    match name:
        case "Data":
            return Data(stream=fields["stream"], data=bytes.fromhex(fields["data"]))
        case "End":
            return End(**fields)
        case "Request":
            plain = dict(fields["args"])
            if "files" in plain:
                plain["files"] = [
                    {**file, "data": bytes.fromhex(file["data"])} for file in plain["files"]
                ]
            args = messages.OPERATIONS[fields["op"]][0].from_map(plain)
            return Request(op=fields["op"], args=args)
        case "Response":
            return Response(result=getattr(messages, fields["record"]).from_map(fields["result"]))
    event: Event = getattr(messages, name).from_map(fields)
    return event


def after(name: str, steps: int, receiver: str) -> Connection:
    """The receiver's connection after the first steps of a stored conversation."""
    connection = Connection(Role(receiver))
    for step in CONVERSATIONS[name]["steps"][:steps]:
        if step["from"] == receiver:
            for event in step["events"]:
                connection.send(to_event(event))
        else:
            connection.receive(bytes.fromhex(step["hex"]))
    return connection


def joined(events: Iterable[Event]) -> list[Event]:
    """Neighbouring pieces of one stream as one: how they were cut means nothing."""
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, Data) and isinstance(last, Data) and last.stream == event.stream:
            result[-1] = last.replace(data=last.data + event.data)
        else:
            result.append(event)
    return result


def by_name(kind: str) -> Any:
    return pytest.mark.parametrize("vector", VECTORS[kind], ids=lambda vector: vector["name"])


@by_name("conversations")
@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_conversations_encode_and_decode_as_stored(vector: dict[str, Any], piece: int) -> None:
    wire = Wire()
    for step in vector["steps"]:
        events = [to_event(event) for event in step["events"]]
        raw = b"".join(wire.send(Role(step["from"]), event) for event in events)
        assert raw.hex() == step["hex"]
        for role in Role:
            wire.deliver_all(role, piece)
    assert joined(wire.received[Role.HOST]) == wire.sent[Role.AGENT]
    seen = joined(wire.received[Role.AGENT])
    assert seen == wire.sent[Role.HOST][: len(seen)]
    if wire.sides[Role.AGENT].state is not State.DONE:
        assert len(seen) == len(wire.sent[Role.HOST])
    assert {side.state.value for side in wire.sides.values()} == {vector["ends_in"]}


@by_name("accepted")
def test_what_a_tolerant_receiver_accepts(vector: dict[str, Any]) -> None:
    connection = after(*vector["after"], vector["receiver"])
    events = connection.receive(bytes.fromhex(vector["hex"]))
    assert events == [to_event(event) for event in vector["events"]]


@by_name("refused")
@pytest.mark.parametrize("piece", [1, 1 << 20])
def test_what_is_refused_and_with_which_code(vector: dict[str, Any], piece: int) -> None:
    connection = after(*vector["after"], vector["receiver"])
    raw = bytes.fromhex(vector["hex"])
    pieces = [raw[start : start + piece] for start in range(0, len(raw), piece)]
    with pytest.raises(RemoteProtocolError) as caught:
        [connection.receive(each) for each in pieces]
    assert caught.value.code == vector["code"]
    assert len(str(caught.value)) < 1000
    assert connection.state is State.FAILED
    assert connection.buffered == 0
    with pytest.raises(RemoteProtocolError, match="nothing can follow"):
        connection.receive(b"\x00")
    answer = Failure(code=caught.value.code, message=str(caught.value))
    if connection.role is Role.AGENT:
        assert connection.send(answer)
        assert connection.state is State.DONE
        assert connection.receive(raw) == []
    with pytest.raises(LocalProtocolError):
        connection.send(answer)


# ── the documentation names everything ───────────────────────────────────────────────────────────


def named(text: str) -> bool:
    return re.search(rf"`[^`\n]*\b{re.escape(text)}\b[^`\n]*`", PROTOCOL) is not None


def test_every_message_and_field_is_documented() -> None:
    records = [
        record
        for module in (messages, report)
        for record in vars(module).values()
        if isinstance(record, type) and issubclass(record, Record) and record is not Record
    ]
    names = [record.__name__ for record in records]
    names += [field for record in records for field in record._fields]
    names += [*messages.OPERATIONS, *report.REPORTS.records, *messages.STREAMS.values()]
    assert not [name for name in names if not named(name)]


def test_every_kind_state_limit_and_constant_is_documented() -> None:
    names = [name for name in vars(Kind) if name.isupper()]
    names += [state.name for state in State]
    names += [name for name in vars(bounds) if name.isupper()]
    assert not [name for name in names if not named(name)]
    assert frames.MAGIC.hex(" ") in PROTOCOL


def test_every_error_code_is_documented() -> None:
    used = set(START_CODES)
    for package in ("guest", "agent"):
        for path in (PROJECT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                match node:
                    case ast.keyword(arg="code", value=ast.Constant(value=str(code))):
                        used.add(code)
                    case ast.Call(
                        func=ast.Name(id="OperationError" | "StartError"),
                        args=[ast.Constant(value=str(code)), *_],
                    ):
                        used.add(code)
    assert len(used) > len(START_CODES)
    assert not [code for code in sorted(used) if not named(code)]


def test_the_state_tables_are_the_documented_ones() -> None:
    kinds = {value: name for name, value in vars(Kind).items() if name.isupper()}
    for state in State:
        cells = [
            ", ".join(f"`{kinds[kind]}`" for kind in sorted(table[state])) or "nothing"
            for table in (HOST_MAY_SEND, AGENT_MAY_SEND)
        ]
        row = f"| `{state.name}` | {cells[0]} | {cells[1]} |"
        assert row in PROTOCOL, row


def test_the_walkthrough_shows_the_stored_bytes() -> None:
    dumped = "".join(re.findall(r"^[0-9a-f]{4}  ((?:[0-9a-f]{2} )+) *\|", PROTOCOL, re.MULTILINE))
    stored = "".join(step["hex"] for step in CONVERSATIONS["exec"]["steps"])
    assert dumped.replace(" ", "") == stored


# ── both sides against each other ────────────────────────────────────────────────────────────────

short = st.text(max_size=8)
EVENTS: st.SearchStrategy[Event] = st.one_of(
    st.just(HELLO),
    st.just(WELCOME),
    st.just(PING),
    st.just(PONG),
    st.builds(Request, op=st.just("info"), args=st.just(Info())),
    st.builds(Request, op=st.just("shutdown"), args=st.just(Shutdown())),
    st.builds(Response, result=st.just(ShutdownResult())),
    st.builds(Request, op=st.just("attach"), args=st.builds(Attach, id=short, write=st.booleans())),
    st.builds(Request, op=st.just("processes"), args=st.just(ListProcesses())),
    st.builds(
        Response,
        result=st.just(ProcessList(processes=(ProcessInfo(id="p1", pid=2, argv=("a",)),))),
    ),
    st.builds(Request, op=st.just("wait"), args=st.builds(Wait, id=short)),
    st.builds(Response, result=st.builds(Exited, code=st.integers(0, 255))),
    st.builds(
        Request, op=st.just("signal"), args=st.builds(SignalProcess, id=short, signal=st.just(15))
    ),
    st.builds(Request, op=st.just("forget"), args=st.builds(Forget, id=short)),
    st.builds(
        Request,
        op=st.just("start"),
        args=st.builds(Start, argv=st.tuples(short), cwd=st.none() | short, stdin=st.booleans()),
    ),
    st.builds(Response, result=st.builds(Started, id=short, pid=st.integers(1, 99))),
    st.builds(Failure, code=short, message=short),
    st.builds(Data, stream=st.integers(0, 3), data=st.binary(max_size=40)),
    st.builds(End, stream=st.integers(0, 3)),
    st.builds(
        Signal, signal=st.integers(1, 64), target=st.sampled_from(("process", "group", "tree"))
    ),
    st.builds(Resize, rows=st.integers(1, 99), columns=st.integers(1, 99)),
    st.builds(Acknowledge, stdout=st.integers(0, 2**40), stderr=st.integers(0, 2**40)),
    st.just(Detach()),
    st.builds(Credit, stdin=st.integers(0, 90)),
    st.builds(Exited, code=st.integers(0, 255), timed_out=st.booleans()),
)
OPENINGS: list[list[tuple[Role, Event]]] = [
    [],
    [(Role.HOST, HELLO)],
    [(Role.HOST, HELLO), (Role.AGENT, WELCOME)],
    [(Role.HOST, HELLO), (Role.AGENT, WELCOME), (Role.HOST, PING)],
    [(Role.HOST, HELLO), (Role.HOST, Request(op="attach", args=Attach()))],
    [
        (Role.HOST, HELLO),
        (Role.AGENT, WELCOME),
        (Role.HOST, Request(op="start", args=Start(argv=("a",), stdin=True))),
        (Role.AGENT, Response(result=Started(id="1", pid=1))),
    ],
    [
        (Role.HOST, HELLO),
        (Role.AGENT, WELCOME),
        (Role.HOST, Request(op="attach", args=Attach(write=False))),
        (Role.AGENT, Response(result=Started(id="1", pid=1, offsets={"stdout": 7}))),
    ],
    [  # stdin has a window, and nothing fits into it yet
        (Role.HOST, HELLO.replace(features=messages.HOST_FEATURES)),
        (Role.AGENT, WELCOME.replace(features=messages.FEATURES)),
        (Role.HOST, Request(op="attach", args=Attach())),
        (Role.AGENT, Response(result=Started(id="1", pid=1))),
    ],
]


class Wire:
    """Both sides, and what is on its way between them."""

    def __init__(self, opening: Iterable[tuple[Role, Event]] = ()) -> None:
        self.sides = {role: Connection(role) for role in Role}
        self.flying = {role: bytearray() for role in Role}  # by receiver
        self.sent: dict[Role, list[Event]] = {role: [] for role in Role}
        self.received: dict[Role, list[Event]] = {role: [] for role in Role}
        for role, event in opening:
            self.send(role, event)
            self.deliver(other(role), 1 << 20)

    def send(self, role: Role, event: Event) -> bytes:
        raw = self.sides[role].send(event)
        self.flying[other(role)] += raw
        self.sent[role].append(event)
        return raw

    def deliver(self, role: Role, count: int) -> bool:
        piece = bytes(self.flying[role][:count])
        try:
            events = self.sides[role].receive(piece)
        except LocalProtocolError:  # the hello waits for its answer: read on later
            return False
        del self.flying[role][:count]
        self.received[role] += events
        assert self.sides[role].buffered <= bounds.CONTROL_PAYLOAD
        return True

    def deliver_all(self, role: Role, piece: int) -> None:
        while self.flying[role] and self.deliver(role, piece):
            pass


def other(role: Role) -> Role:
    return Role.AGENT if role is Role.HOST else Role.HOST


def snapshot(connection: Connection) -> dict[str, object]:
    return {
        name: bytes(value) if isinstance(value, bytearray | memoryview) else repr(value)
        for name, value in vars(connection).items()
    }


@settings(max_examples=250)
@given(
    st.sampled_from(OPENINGS),
    st.lists(st.tuples(st.sampled_from(Role), EVENTS | st.integers(1, 60)), max_size=40),
)
def test_what_one_side_may_send_the_other_takes_however_it_crosses(
    opening: list[tuple[Role, Event]], steps: list[tuple[Role, Event | int]]
) -> None:
    wire = Wire(opening)
    for role, step in steps:
        if isinstance(step, int):
            wire.deliver(role, step)
            continue
        before = snapshot(wire.sides[role])
        try:
            wire.send(role, step)
        except LocalProtocolError:
            assert snapshot(wire.sides[role]) == before
    for role in (Role.AGENT, Role.HOST):
        wire.deliver(role, 1 << 20)
    to_host = joined(wire.received[Role.HOST])
    to_agent = joined(wire.received[Role.AGENT])
    from_agent = joined(wire.sent[Role.AGENT])
    if Detach() in wire.sent[Role.HOST]:  # what was on its way to the host then is not seen
        assert all(seen in from_agent or isinstance(seen, Data) for seen in to_host)
    else:
        assert to_host == from_agent
    host, agent = wire.sides[Role.HOST], wire.sides[Role.AGENT]
    if agent.state is not State.DONE and not wire.flying[Role.AGENT]:
        assert to_agent == joined(wire.sent[Role.HOST])
        assert host.state is agent.state
    else:  # what was on its way when the agent ended, or waits behind the hello, is not seen
        sent = joined(wire.sent[Role.HOST])
        assert all(seen in sent or isinstance(seen, Data) for seen in to_agent)


def stages() -> Iterator[tuple[str, int, str]]:
    for name, each in CONVERSATIONS.items():
        for steps in range(len(each["steps"]) + 1):
            for role in Role:
                yield name, steps, role.value


STAGES = sorted(stages())


@settings(max_examples=400)
@given(
    st.sampled_from(STAGES),
    st.lists(
        st.tuples(st.integers(0, 11), st.integers(0, 3), st.binary(max_size=64)), max_size=6
    ).flatmap(
        lambda parts: st.just(
            b"".join(
                frames.HEADER.pack(len(payload), kind, 0, channel) + payload
                for kind, channel, payload in parts
            )
        )
    )
    | st.binary(max_size=300),
    st.booleans(),
    st.integers(1, 40),
)
def test_garbage_raises_nothing_but_the_remote_error(
    stage: tuple[str, int, str], garbage: bytes, with_preface: bool, piece: int
) -> None:
    connection = after(*stage)
    raw = frames.preface() + garbage if with_preface else garbage
    feed(connection, raw, piece)


@settings(max_examples=400)
@given(
    st.sampled_from(sorted(CONVERSATIONS)),
    st.sampled_from(Role),
    st.lists(
        st.tuples(st.sampled_from(("set", "delete", "insert", "cut")), st.integers(0, 400),
                  st.integers(0, 255)),
        max_size=3,
    ),
    st.integers(1, 200),
)  # fmt: skip
def test_mutated_conversations_raise_nothing_but_the_remote_error(
    name: str, role: Role, mutations: list[tuple[str, int, int]], piece: int
) -> None:
    connection = Connection(role)
    for step in CONVERSATIONS[name]["steps"]:
        raw = bytearray.fromhex(step["hex"])
        if step["from"] == role.value:
            try:
                for event in step["events"]:
                    connection.send(to_event(event))
            except LocalProtocolError:  # a mutation has led elsewhere
                return
            continue
        for how, where, value in mutations:
            mutate(raw, how, where % (len(raw) + 1), value)
        feed(connection, bytes(raw), piece)


def mutate(raw: bytearray, how: str, where: int, value: int) -> None:
    match how:
        case "set" if where < len(raw):
            raw[where] = value
        case "delete":
            del raw[where : where + 1]
        case "insert":
            raw.insert(where, value)
        case "cut":
            del raw[where:]


def feed(connection: Connection, raw: bytes, piece: int) -> None:
    """Everything that may happen with bytes from outside; any other exception fails the test."""
    try:
        for start in range(0, len(raw), piece):
            try:
                connection.receive(raw[start : start + piece])
            except LocalProtocolError:
                connection.send(WELCOME)
                connection.receive(raw[start : start + piece])
            assert connection.buffered <= len(raw) + frames.PREFACE_SIZE
            if connection.state is State.HELLO:
                assert connection.buffered <= bounds.HELLO_PAYLOAD
        connection.receive_eof()
    except RemoteProtocolError as error:
        failure = error
    else:
        return
    assert connection.state is State.FAILED
    assert connection.buffered == 0
    assert len(str(failure)) < 1000


# ── limits and memory ────────────────────────────────────────────────────────────────────────────


@given(st.sampled_from(STAGES), st.sampled_from(sorted(frames.MAX_PAYLOAD)), st.data())
def test_a_length_over_its_limit_is_refused_by_the_header_alone(
    stage: tuple[str, int, str], kind: int, data: st.DataObject
) -> None:
    length = data.draw(st.integers(frames.MAX_PAYLOAD[kind] + 1, 2**32 - 1))
    with pytest.raises(RemoteProtocolError) as caught:
        frames.FrameHeader.parse(frames.header(length, kind))
    assert caught.value.code == "frame_too_large"
    connection = after(*stage)
    if connection.state in (State.DONE, State.FAILED) or connection.peer_version is None:
        return
    with pytest.raises((RemoteProtocolError, LocalProtocolError)):
        connection.receive(frames.header(length, kind))


START = Request(op="start", args=Start(argv=("a",), stdin=True))
STARTED = Response(result=Started(id="1", pid=1))


def process_pair(request: Request = START) -> tuple[Connection, Connection]:
    wire = Wire(
        [
            (Role.HOST, HELLO),
            (Role.AGENT, WELCOME),
            (Role.HOST, request),
            (Role.AGENT, STARTED),
        ]
    )
    return wire.sides[Role.HOST], wire.sides[Role.AGENT]


def test_bulk_data_is_copied_once() -> None:
    host, agent = process_pair()
    frame = agent.send(Data(stream=1, data=bytes(bounds.DATA_PAYLOAD)))
    raw = frame * 16
    tracemalloc.start()
    try:
        events = host.receive(raw)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(events) == 16
    assert peak < len(raw) * 1.1
    assert host.buffered == 0


def test_what_was_received_does_not_hold_the_callers_buffer() -> None:
    host, agent = process_pair()
    buffer = bytearray(agent.send(Data(stream=1, data=b"abc")) + b"\x00\x00")
    (event,) = host.receive(buffer)
    buffer.clear()  # BufferError if somebody still looks into it
    assert isinstance(event, Data)
    assert event.data == b"abc"


def test_a_peer_without_the_token_cannot_fill_memory() -> None:
    agent = Connection(Role.AGENT)
    host = Connection(Role.HOST)
    request = host.send(HELLO) + host.send(
        Request(op="start", args=Start(argv=("a",), env={"A": "x" * 3_000_000}))
    )
    events = agent.receive(request[:65536])
    assert events == [HELLO]
    assert agent.buffered < 65536
    with pytest.raises(LocalProtocolError, match="hello must be answered"):
        agent.receive(request[65536:])
    agent.send(WELCOME)
    (start,) = agent.receive(request[65536:])
    assert isinstance(start, Request)
    assert agent.state is State.STARTING


def test_an_error_is_cut_to_its_limits_and_not_refused() -> None:
    agent = Connection(Role.AGENT)
    fields: dict[str, str | int | None] = {f"path{n}": "\U0001f600" * 9999 for n in range(99)}
    failure = Failure(code="internal", message="\U0001f600" * 9999, fields=fields)
    raw = agent.send(failure)
    assert len(raw) <= bounds.ERROR_PAYLOAD + frames.PREFACE_SIZE + frames.HEADER.size
    (event,) = Connection(Role.HOST).receive(raw)
    assert isinstance(event, Failure)
    assert len(event.message) == bounds.ERROR_MESSAGE
    assert len(event.fields) == bounds.ERROR_FIELDS


# ── misuse on this side ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("event", "match"),
    [
        (Request(op="fly", args=Ping()), "no operation 'fly'"),
        (Request(op="ping", args=Info()), "takes Ping"),
        (Request(op="start", args=Start(argv="ls")), "argv"),  # type: ignore[arg-type]
        (Request(op="start", args=Start(argv=("\ud800",))), "encode"),
        (Request(op="start", args=Start(argv=("x" * bounds.CONTROL_PAYLOAD,))), "at most"),
        (Ping(), "not an event"),
        (Winsize(rows=1, columns=1), "not an event"),
        (SignalProcess(id="p1", signal=1), "not an event"),
        (Detach(), "control frame in state ready"),
        (Request(op="wait", args=Wait(id=7)), "id: expected str"),  # type: ignore[arg-type]
        (Data(stream=0, data=b"x"), "data frame in state ready"),
        (PONG, "no operation ''"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_the_peer_would_refuse_is_not_sent(event: Any, match: str) -> None:
    host = after("small-requests", 2, "host")
    before = snapshot(host)
    with pytest.raises(LocalProtocolError, match=match):
        host.send(event)
    assert snapshot(host) == before


@pytest.mark.parametrize("length", [0, -1, bounds.DATA_PAYLOAD + 1])
def test_a_data_header_has_the_limits_of_a_data_frame(length: int) -> None:
    host, agent = process_pair()
    with pytest.raises(LocalProtocolError):
        host.send_data_header(0, length)
    assert agent.receive(host.send_data_header(0, 3) + b"abc") == [Data(stream=0, data=b"abc")]


def test_stdin_needs_to_have_been_asked_for() -> None:
    host = after("start-fails", 3, "host")
    with pytest.raises(LocalProtocolError, match="was not asked for"):
        host.send(End(stream=0))


FEEDING: list[Event] = [Acknowledge(stdout=5), Data(stream=0, data=b"x"), End(stream=0)]


def test_who_only_watches_may_signal_resize_and_leave() -> None:
    host, agent = process_pair(Request(op="attach", args=Attach(write=False)))
    for event in FEEDING:
        before = snapshot(host)
        with pytest.raises(LocalProtocolError, match=r"without write|was not asked for"):
            host.send(event)
        assert snapshot(host) == before
    for event in (Signal(signal=2), Resize(rows=24, columns=80), Detach()):
        assert agent.receive(host.send(event)) == [event]
    assert host.state is agent.state is State.DONE


def test_who_attaches_to_write_may_feed_and_acknowledge() -> None:
    host, agent = process_pair(Request(op="attach", args=Attach()))
    for event in FEEDING:
        assert agent.receive(host.send(event)) == [event]


def test_after_a_detach_the_host_drops_what_was_on_its_way() -> None:
    host, agent = process_pair()
    flying = agent.send(Data(stream=1, data=b"x" * 100))
    host.receive(flying[:50])
    agent.receive(host.send(Detach()))
    assert host.receive(flying[50:]) == []
    host.receive_eof()
    with pytest.raises(LocalProtocolError, match="in state done"):
        agent.send(End(stream=1))


# What a record's own check cannot see, as it only compares; each was made with a wrong type.
WRONGLY_TYPED: list[Event] = [
    Response(result=Started(id=5, pid=1)),  # type: ignore[arg-type]
    Response(result=Started(id="p1", pid=True)),
    Response(result=Started(id="p1", pid=1, offsets={"stdout": True})),
    Exited(code=True),
    Exited(code=0, duration=float("nan")),
    Exited(code=0, duration=float("inf")),
    Exited(code=0, duration=None),  # type: ignore[arg-type]
    Exited(code=0, open_streams=(1,)),  # type: ignore[arg-type]
    Exited(code=0, max_rss_kib=1.5),  # type: ignore[arg-type]
    Exited(code=0, max_rss_kib=2**70),
    Exited(code=0, timed_out=1),
    Failure(code="internal", message=b"x"),  # type: ignore[arg-type]
    Failure(code="internal", message="x", fields={"errno": b"5"}),  # type: ignore[dict-item]
]


@pytest.mark.parametrize("event", WRONGLY_TYPED, ids=lambda event: f"{event!r:.60}")
def test_the_agent_sends_nothing_of_a_wrong_type(event: Event) -> None:
    agent = after("exec", 2 if isinstance(event, Response) else 9, "agent")
    before = snapshot(agent)
    with pytest.raises(LocalProtocolError):
        agent.send(event)
    assert snapshot(agent) == before


def test_a_number_of_the_standard_library_is_a_number() -> None:
    host, agent = process_pair()
    (event,) = agent.receive(host.send(Signal(signal=signal.SIGTERM)))
    assert event == Signal(signal=15)


# ── ends ─────────────────────────────────────────────────────────────────────────────────────────


def test_the_host_is_told_when_the_agent_closes_early() -> None:
    for steps in range(1, 10):
        with pytest.raises(RemoteProtocolError, match="closed by the agent"):
            after("exec", steps, "host").receive_eof()
    after("exec", 10, "host").receive_eof()


def test_the_host_may_close_between_frames_and_not_inside_one() -> None:
    for steps in range(2, 11):
        after("exec", steps, "agent").receive_eof()
    agent = after("exec", 3, "agent")
    agent.receive(frames.header(2, Kind.DATA) + b"x")
    with pytest.raises(RemoteProtocolError, match="inside a frame"):
        agent.receive_eof()
    assert agent.state is State.FAILED
