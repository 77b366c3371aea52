"""Ctrl-C at every moment of a blocking call: nobody else's call hangs, and nothing hides it."""

import select
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import anyio
import pytest
from agentharness import TOKEN, AgentProcess
from interrupts import Interrupted, at_each_moment, interrupted_at
from machinekit import wait_until
from patience import PATIENCE

from microguest import (
    Agent,
    ConnectionLost,
    DeadlineExceeded,
    Process,
    ProcessStream,
    Result,
    aio,
    boot,
    connect,
)
from microguest.guest.wire.connection import Data, Event
from microguest.guest.wire.messages import Attach

# Between two bytecodes an interrupt can leave a socket to its reference count, which closes it.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def client(elf: object) -> Iterator[Agent]:
    with AgentProcess() as agent, connect(f"unix://{agent.path}", token=TOKEN) as client:
        yield client


def in_thread(call: Callable[[], object]) -> object:
    """What the call returns or raises in another thread, within PATIENCE."""
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(call())
        except Exception as error:  # noqa: BLE001 the test looks at it
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert outcome, "the call of another thread hangs"
    return outcome[0]


def test_an_interrupted_wait_leaves_the_process_to_other_threads(client: Agent) -> None:
    process = client.start(["sleep", "1000"])
    moments = 0
    for interrupted, outcome in at_each_moment(lambda: process.wait(0.001)):
        moments += 1
        assert isinstance(outcome, Interrupted if interrupted else DeadlineExceeded), outcome
        assert in_thread(process.poll) is None
        assert not process._session._reading
        assert not process._session._writing
    assert moments > 50
    process.close()


def test_an_interrupted_wait_beside_another_one_leaves_that_alone(client: Agent) -> None:
    process = client.start(["sleep", "1000"], keep=True)
    watcher: list[object] = []
    thread = threading.Thread(target=lambda: watcher.append(process.wait(PATIENCE)), daemon=True)
    thread.start()
    while not process._session._reading:
        pass
    for interrupted, outcome in at_each_moment(lambda: process.wait(0.001)):
        assert isinstance(outcome, Interrupted if interrupted else DeadlineExceeded), outcome
        assert isinstance(in_thread(lambda: process.wait(0.0)), DeadlineExceeded)
    process.kill()
    thread.join(PATIENCE)
    assert len(watcher) == 1
    process.close()


def test_an_interrupted_poll_loses_no_output_silently(client: Agent) -> None:
    """Either all of it is there, or the connection says that it is of no use any more."""
    process = client.start(["cat"], stdin=True, keep=True)

    def write(number: int) -> bytes:
        """A line that has come back and nobody has taken."""
        line = b"%06d\n" % number
        process.stdin.write(line)
        assert select.select([process._session.exchange.channel.sock], [], [], PATIENCE)[0]
        return line

    def poll() -> object:
        return process.poll()

    line, told = write(0), 0
    for number, (interrupted, outcome) in enumerate(at_each_moment(poll), 1):
        assert isinstance(outcome, Interrupted) if interrupted else outcome is None, outcome
        try:
            read = next(process.stdout.lines())
            process.poll()
        except ConnectionLost:
            told += 1
            process.close()
            process = client.attach(process.id, offsets=process.offsets)
            read = line if process.offsets["stdout"] == 7 * number else next(process.stdout.lines())
        assert read == line
        line = write(number)
    assert told > 10
    process.kill()
    process.close()
    client.forget(process.id)


# ── what a call has taken and not returned ───────────────────────────────────────────────────────

T = TypeVar("T")
WROTE = b"".join(b"%05d\n" % number for number in range(1000))
HELD: list[object] = []  # whose end would be one more moment


def first(pieces: Iterator[T]) -> T:
    HELD.append(pieces)
    return next(pieces)


READS: dict[str, Callable[[Process], bytes]] = {
    "read": lambda process: process.stdout.read(100),
    "read-all": lambda process: process.stdout.read(),
    "pieces": lambda process: first(iter(process.stdout)),
    "lines": lambda process: first(process.stdout.lines()),
    "text": lambda process: first(process.stdout.text()).encode() + b"\n",
    "both": lambda process: first(iter(process))[1],
    "communicate": lambda process: process.communicate().stdout,
}


@pytest.fixture
def job(client: Agent) -> Iterator[str]:
    """A kept process that has ended and whose output nobody has."""
    started = client.start(["printf", "%s", WROTE], keep=True, acknowledge=False)
    started.wait(PATIENCE)
    started.close()
    yield started.id
    client.forget(started.id)


def arrived(process: Process) -> bytes:
    """What can still be read, also where the connection is of no use any more."""
    found = b""
    try:
        while piece := process.stdout.read(100_000):
            found += piece
    except ConnectionLost:
        pass
    return found


@pytest.mark.parametrize("again", [False, True], ids=["go-on", "attach-again"])
@pytest.mark.parametrize("name", READS)
def test_an_interrupted_read_loses_nothing(client: Agent, job: str, name: str, again: bool) -> None:
    """What it had taken is there for the next one, or comes with an attach from `offsets`."""
    process, had, moments = client.attach(job, acknowledge=False), b"", 0

    def read() -> bytes:
        return READS[name](process)

    for interrupted, outcome in at_each_moment(read):
        moments += 1
        if not interrupted:
            assert isinstance(outcome, bytes)
            had += outcome + arrived(process)
            break
        assert isinstance(outcome, Interrupted), outcome
        assert process.offsets["stdout"] == len(had)
        torn = isinstance(in_thread(process.poll), ConnectionLost)
        if torn:
            had += arrived(process)
        if torn or again:
            offsets = process.offsets
            process.close()
            process = client.attach(job, offsets=offsets, acknowledge=False)
    assert moments > 20
    assert had == WROTE
    process.close()


def test_an_interrupted_communicate_keeps_what_came_until_its_deadline(client: Agent) -> None:
    with client.start(shell="echo some; exec sleep 1000") as process:
        while not process._session.unread.size(1):
            assert process.poll() is None
        for interrupted, outcome in at_each_moment(lambda: process.communicate(timeout=0)):
            if interrupted:
                assert isinstance(outcome, Interrupted)
            else:
                assert isinstance(outcome, DeadlineExceeded)
                assert outcome.stdout == b"some\n"
            assert process.offsets["stdout"] == (0 if interrupted else 5)


def test_text_that_cannot_be_decoded_stays_to_be_read(client: Agent) -> None:
    with client.start(["printf", "one\n\\377\n"]) as process:
        lines = process.stdout.text(errors="strict")
        assert next(lines) == "one"
        with pytest.raises(UnicodeDecodeError):
            next(lines)
        assert process.stdout.read() == b"\xff\n"


def test_an_interrupted_stream_of_events_loses_none_silently(client: Agent) -> None:
    """Also for who has bare events: all of them, or an error that says that some are missing."""
    with client.start(["cat"], stdin=True, keep=True) as process:

        def watch() -> ProcessStream:
            return client.open_process(Attach(id=process.id, offsets={"stdout": -1}, write=False))

        stream, told = [watch()], 0

        def write(number: int) -> bytes:
            process.stdin.write(b"%06d\n" % number)
            assert select.select([stream[0]], [], [], PATIENCE)[0]
            return b"%06d\n" % number

        line = write(0)

        def take() -> list[Event]:
            return stream[0].take()

        for number, (interrupted, outcome) in enumerate(at_each_moment(take), 1):
            if not interrupted:
                assert outcome == [Data(stream=1, data=line)]
                break
            try:
                assert take() == [Data(stream=1, data=line)]
            except ConnectionLost:
                told += 1
                stream[0].close()
                stream[0] = watch()
            line = write(number)
        stream[0].close()
        assert told > 10
        process.kill()


@pytest.mark.slow
def test_an_interrupted_start_leaves_no_process(image: str, machines_home: Path) -> None:
    """Also where the agent has started it already: nobody would have its id."""
    with boot(image, machine="namespaces") as machine:
        client = machine.agent

        def left() -> list[str]:
            return [each.id for each in client.processes() if each.exited is None]

        moments = 0
        for interrupted, outcome in at_each_moment(
            lambda: client.start(["sleep", "77"], keep=True)
        ):
            moments += 1
            if interrupted:
                assert isinstance(outcome, Interrupted)
                wait_until("what was started is gone", lambda: not left())
            else:
                assert isinstance(outcome, Process)
                assert left() == [outcome.id]
                outcome.kill()
                outcome.close()
        assert moments > 50


TASKS: dict[str, Callable[[aio.Process], Awaitable[object]]] = {
    "read": lambda process: process.stdout.read(100),
    "read-all": lambda process: process.stdout.read(),
    "receive": lambda process: process.stdout.receive(100),
    "lines": lambda process: anext(process.stdout.lines()),
    "text": lambda process: anext(process.stdout.text()),
    "both": lambda process: anext(aiter(process)),
    "communicate": lambda process: process.communicate(),
}


def bytes_of(given: object) -> bytes:
    match given:
        case bytes():
            return given
        case str():
            return given.encode() + b"\n"
        case (_, bytes(data)):
            return data
        case Result(stdout=data):
            return data
    raise AssertionError(given)


@pytest.mark.parametrize("name", TASKS)
def test_an_interrupted_read_of_a_task_loses_nothing(client: Agent, job: str, name: str) -> None:
    """A handler that raises does so in the middle of a task, against which no loop shields."""
    agent = aio.Agent.of(client)

    async def rest(process: aio.Process) -> bytes:
        had = b""
        try:
            while piece := await process.stdout.read(100_000):
                had += piece
        except ConnectionLost:
            offsets = process.offsets
            async with await agent.attach(job, offsets=offsets, acknowledge=False) as again:
                had += await again.stdout.read()
        return had

    async def read(number: int) -> bool:
        async with await agent.attach(job, acknowledge=False) as process:
            had = b""
            with interrupted_at(number, "/host_client/") as tracer:
                try:
                    had = bytes_of(await TASKS[name](process))
                except Interrupted:
                    assert tracer.raised
            assert process.offsets["stdout"] == len(had)
            assert had + await rest(process) == WROTE
            return tracer.raised

    async def moments() -> int:
        number = 0
        while await read(number):
            number += 1
        return number

    assert anyio.run(moments) > 20
