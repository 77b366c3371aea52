"""Calls that are cancelled, in every way that asyncio and trio have: nothing lost, nothing left.

The agents are real, and so are the processes; each test tries many moments.
"""

import asyncio
import contextlib
import itertools
import os
import random
import select
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
import trio
from agentharness import TOKEN, AgentProcess
from hostkit import Peer, agent_at, answer_pings, serving
from patience import PATIENCE

from microguest import Agent, Keep, aio, connect
from microguest.errors import ConnectionLost, OutputTooLarge
from microguest.guest import bounds
from microguest.guest.errors import OperationError
from microguest.guest.wire.connection import Data
from microguest.guest.wire.messages import Acknowledge, Credit
from microguest.host_client.aio.machine import GIVEN_UP_WAIT

BYTES = 20_000
PIECE = 7  # of what the process writes at a time
# A known sequence in small pieces, so that most reads wait and many are cancelled as bytes arrive.
WRITER = """
import os, sys, time
data = b"".join(b"%d\\n" % number for number in range(100000))[:int(sys.argv[1])]
for at in range(0, len(data), 7):
    if sys.argv[2:] and at == 7000:
        sys.stdin.read()
    os.write(1, data[at : at + 7])
    if at % 70 == 0:
        time.sleep(0.0005)
"""
WRITTEN = b"".join(b"%d\n" % number for number in range(100000))

Attempt = Callable[[Callable[[], Awaitable[Any]], float], Awaitable[Any]]


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentProcess]:
    with AgentProcess() as process, heard(process):
        yield process


@contextlib.contextmanager
def heard(process: AgentProcess) -> Iterator[None]:
    """Take what the agent says to PID 1, which would have it wait once the pair is full."""
    over = threading.Event()

    def hear() -> None:
        while not over.is_set():
            if select.select([process.pid1], [], [], 0.05)[0]:
                process.receive_any()

    thread = threading.Thread(target=hear)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.fixture
def client(agent: AgentProcess) -> Iterator[Agent]:
    with connect(f"unix://{agent.path}", token=TOKEN) as connected:
        yield connected


# ── ways to give up: each gives what the call gave, or None ──────────────────────────────────────


async def wait_for(call: Callable[[], Awaitable[Any]], seconds: float) -> Any:
    try:
        return await asyncio.wait_for(call(), seconds)  # type: ignore[arg-type]
    except TimeoutError:
        return None


async def timeout(call: Callable[[], Awaitable[Any]], seconds: float) -> Any:
    try:
        async with asyncio.timeout(seconds):
            return await call()
    except TimeoutError:
        return None


async def cancel_the_task(call: Callable[[], Awaitable[Any]], seconds: float) -> Any:
    task = asyncio.ensure_future(call())
    await asyncio.wait([task], timeout=seconds)
    task.cancel()
    try:
        return await task
    except asyncio.CancelledError:
        return None


async def fail_its_group(call: Callable[[], Awaitable[Any]], seconds: float) -> Any:
    task = None

    async def fail() -> None:
        await asyncio.sleep(seconds)
        raise ZeroDivisionError

    with contextlib.suppress(ExceptionGroup):
        async with asyncio.TaskGroup() as group:
            task = group.create_task(call())  # type: ignore[arg-type]
            group.create_task(fail())
    assert task is not None
    return None if task.cancelled() else task.result()


async def move_on(call: Callable[[], Awaitable[Any]], seconds: float) -> Any:
    with anyio.move_on_after(seconds):
        return await call()


async def cancel_scope_of_another(call: Callable[[], Awaitable[Any]], seconds: float) -> Any:
    result = None
    async with anyio.create_task_group() as tasks:

        async def run() -> None:
            nonlocal result
            result = await call()
            tasks.cancel_scope.cancel()

        tasks.start_soon(run)
        await anyio.sleep(seconds)
        tasks.cancel_scope.cancel()
    return result


async def trio_move_on(call: Callable[[], Awaitable[Any]], seconds: float) -> Any:
    with trio.move_on_after(seconds):
        return await call()


ASYNCIO: list[tuple[str, Attempt]] = [
    ("asyncio", way)
    for way in (
        wait_for,
        timeout,
        cancel_the_task,
        fail_its_group,
        move_on,
        cancel_scope_of_another,
    )
]
TRIO: list[tuple[str, Attempt]] = [
    ("trio", way) for way in (move_on, cancel_scope_of_another, trio_move_on)
]
WAYS = [pytest.param(*way, id=f"{way[0]}-{way[1].__name__}") for way in ASYNCIO + TRIO]


def run(backend: str, main: Callable[[], Awaitable[None]]) -> None:
    async def within() -> None:
        with anyio.fail_after(2 * PATIENCE):
            await main()

    anyio.run(within, backend=backend)


# ── what is read ─────────────────────────────────────────────────────────────────────────────────


async def by_read(process: aio.Process) -> tuple[Callable[[], Awaitable[Any]], Any]:
    return (lambda: process.stdout.read(65536)), b""


async def by_receive(process: aio.Process) -> tuple[Callable[[], Awaitable[Any]], Any]:
    async def receive() -> bytes:
        try:
            return await process.stdout.receive(3)
        except anyio.EndOfStream:
            return b""

    return receive, b""


async def by_line(process: aio.Process) -> tuple[Callable[[], Awaitable[Any]], Any]:
    lines = process.stdout.lines()
    return (lambda: anext(lines, b"")), b""  # type: ignore[arg-type]


async def by_text(process: aio.Process) -> tuple[Callable[[], Awaitable[Any]], Any]:
    lines = process.stdout.text()

    async def ask() -> bytes:
        try:
            return (await anext(lines)).encode() + b"\n"
        except StopAsyncIteration:
            return b""

    return ask, b""


async def by_iteration(process: aio.Process) -> tuple[Callable[[], Awaitable[Any]], Any]:
    chunks = aiter(process)

    async def ask() -> bytes:
        try:
            return (await anext(chunks))[1]
        except StopAsyncIteration:
            return b""

    return ask, b""


READS = [by_read, by_receive, by_line, by_text, by_iteration]


@pytest.mark.parametrize("read", READS, ids=lambda read: read.__name__)
@pytest.mark.parametrize(("backend", "attempt"), WAYS)
def test_cancelled_reads_give_every_byte_once(
    client: Agent, backend: str, attempt: Attempt, read: Callable[..., Any]
) -> None:
    moments = random.Random(1)
    read_bytes = bytearray()

    async def main() -> None:
        async with await aio.Agent.of(client).start(
            ["python3", "-c", WRITER, str(BYTES)]
        ) as process:
            call, end = await read(process)
            while True:
                piece = await attempt(call, moments.choice((0.0, 0.0003, 0.001, 0.004)))
                if piece is None:
                    continue
                if piece == end:
                    return
                read_bytes.extend(piece)

    run(backend, main)
    expected = WRITTEN[:BYTES]
    if read is by_text:
        expected += b"" if expected.endswith(b"\n") else b"\n"
    assert bytes(read_bytes) == expected


@pytest.mark.parametrize(("backend", "attempt"), WAYS)
@pytest.mark.parametrize("how", ["read", "communicate"])
def test_what_a_cancelled_collection_had_is_read_again(
    client: Agent, backend: str, attempt: Attempt, how: str
) -> None:
    moments = random.Random(2)

    async def main() -> None:
        argv = ["python3", "-c", WRITER, str(BYTES), "waits in the middle"]
        async with await aio.Agent.of(client).start(argv, stdin=True) as process:

            async def collect() -> bytes:
                if how == "read":
                    return await process.stdout.read()
                return (await process.communicate()).stdout

            for _ in range(5):
                assert await attempt(collect, moments.uniform(0.001, 0.03)) is None
            await process.stdin.aclose()
            first = await process.stdout.read(1000)
            assert process.offsets["stdout"] == len(first)
            assert first + await collect() == WRITTEN[:BYTES]

    run(backend, main)


def test_what_was_too_large_is_still_there(client: Agent) -> None:
    with client.start(["sh", "-c", "head -c 3000000 /dev/zero; echo end"]) as process:
        with pytest.raises(OutputTooLarge):
            process.communicate(max_output=2_000_000)
        assert process.offsets["stdout"] == 0
        assert process.stdout.read() == bytes(3_000_000) + b"end\n"


@pytest.mark.parametrize(("backend", "attempt"), WAYS)
def test_only_what_was_delivered_is_acknowledged(
    tmp_path: Path, backend: str, attempt: Attempt
) -> None:
    """Each byte of a kept process that the agent is told to forget has been given to a caller."""
    pieces = 300
    acknowledged: list[int] = []
    delivered = bytearray()

    def script(peer: Peer) -> None:
        peer.start(id="p1")
        heard = threading.Thread(target=listen, args=(peer,))
        heard.start()
        for number in range(pieces):
            peer.sock.sendall(peer.connection.send(Data(stream=1, data=b"%4d" % number)))
            time.sleep(0.0005)
        peer.finish(code=0)
        heard.join(10)

    def listen(peer: Peer) -> None:
        with contextlib.suppress(EOFError, ConnectionError, TimeoutError):
            while True:
                if isinstance(event := peer.next(), Acknowledge):
                    acknowledged.append(event.stdout - len(delivered))

    async def main() -> None:
        async with await aio.Agent.of(client).start(["x"], keep=True) as process:
            while True:
                piece = await attempt(lambda: process.stdout.read(100), 0.0005)
                if piece == b"":
                    return
                delivered.extend(piece or b"")

    with serving(tmp_path / "s", answer_pings, script), agent_at(tmp_path / "s") as client:
        run(backend, main)
    assert bytes(delivered) == b"".join(b"%4d" % number for number in range(pieces))
    assert max(acknowledged) <= 0


# ── what is started ──────────────────────────────────────────────────────────────────────────────


def ours(client: Agent, label: str) -> list[str]:
    return [info.id for info in client.processes() if info.label == label]


def expect_none(client: Agent, label: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while ours(client, label):
        assert time.monotonic() < deadline, client.processes()
        time.sleep(0.01)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(("backend", "attempt"), WAYS)
def test_a_cancelled_start_leaves_no_process(
    client: Agent, backend: str, attempt: Attempt, keep: bool
) -> None:
    moments = random.Random(3)
    label = f"{backend}-{attempt.__name__}-{keep}"

    async def main() -> None:
        agent = aio.Agent.of(client)

        async def start() -> aio.Process:
            return await agent.start(["sleep", "1000"], keep=keep, label=label)

        for _ in range(60):
            process = await attempt(start, moments.choice((0.0, 0.0005, 0.001, 0.002, 0.004)))
            if process is not None:
                process.close()
                if keep:
                    await agent.forget(process.id)

    run(backend, main)
    expect_none(client, label)


@pytest.mark.parametrize(("backend", "attempt"), WAYS)
def test_cancelled_exec_attach_and_wait_leave_nothing(
    client: Agent, backend: str, attempt: Attempt
) -> None:
    moments = random.Random(4)
    label = f"others-{backend}-{attempt.__name__}"

    async def main() -> None:
        agent = aio.Agent.of(client)
        async with await agent.start(["cat"], stdin=True, keep=True, label=label) as kept:
            await kept.detach()

        async def attach() -> str:
            async with await agent.attach(kept.id) as process:
                return process.id

        async def execute() -> None:
            await agent.exec(["sleep", "1000"], label=label)

        async def wait() -> None:
            await agent.wait(kept.id)

        for call in itertools.islice(itertools.cycle((attach, execute, wait)), 60):
            await attempt(call, moments.choice((0.0, 0.0005, 0.001, 0.002, 0.004)))
        async with await agent.attach(kept.id) as process:  # its input was not ended, and is free
            await process.stdin.send(b"still here")
            assert await process.stdout.read(100) == b"still here"
        assert (await agent.exec(["echo", "right"])).stdout == b"right\n"
        await agent.forget(kept.id)

    run(backend, main)
    expect_none(client, label)


class Interrupted(BaseException):
    pass


# An interrupt between two bytecodes can leave a socket to its reference count, which closes it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("keep", [True, False])
def test_an_interrupted_start_leaves_no_process(client: Agent, keep: bool) -> None:
    """Ctrl-C at a blocking caller, at any moment from before the call to after its return."""
    moments = random.Random(5)
    label = f"interrupted-{keep}"
    armed = False

    def interrupt(_number: int, _frame: object) -> None:
        if armed:
            raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(200):
            process = None
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, moments.uniform(0.00005, 0.003))
                process = client.start(["sleep", "1000"], keep=keep, label=label)
                armed = False
            except Interrupted:
                pass
            finally:
                armed = False
                signal.setitimer(signal.ITIMER_REAL, 0)
            if process is not None:
                process.close()
                if keep:
                    client.forget(process.id)
    finally:
        signal.signal(signal.SIGALRM, before)
    expect_none(client, label)


# ── ids that a host has chosen ───────────────────────────────────────────────────────────────────


def test_a_process_is_found_by_the_id_that_its_host_chose(
    agent: AgentProcess, client: Agent
) -> None:
    """A program that is killed in the middle of `start` has left it, at most, under that id."""
    command = ["sh", "-c", "echo here; exec cat"]
    pid = os.fork()
    if pid == 0:
        try:
            with connect(f"unix://{agent.path}", token=TOKEN) as other:
                other.start(command, stdin=True, keep=True, id="nightly-1", label="chosen")
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    with pytest.raises(OperationError, match="nightly-1") as caught:
        client.start(command, stdin=True, keep=True, id="nightly-1")
    assert caught.value.code == "id_taken"
    assert ours(client, "chosen") == ["nightly-1"]
    with client.attach("nightly-1") as process:
        process.stdin.close()
        assert process.communicate().stdout == b"here\n"
    client.forget("nightly-1")
    with client.start(["true"], keep=Keep(), id="nightly-1") as process:
        assert (process.id, process.wait(60).returncode) == ("nightly-1", 0)
    client.forget("nightly-1")


@pytest.mark.parametrize(
    "name", ["main", "agent", "p1", "p2-3", "-x", ".", "a/b", "a b", "ä", "x" * 65]
)
def test_ids_that_cannot_be_chosen(client: Agent, name: str) -> None:
    with pytest.raises((OperationError, ValueError), match="id: "):
        client.start(["true"], keep=True, id=name)


def test_an_id_needs_keep(client: Agent) -> None:
    with pytest.raises((OperationError, ValueError), match=r"id: .*keep"):
        client.start(["true"], id="x")


def test_one_of_two_at_once_gets_the_id(client: Agent) -> None:
    outcomes: list[str] = []

    def start() -> None:
        try:
            client.start(["sleep", "1000"], keep=True, id="once", label="once").detach()
            outcomes.append("started")
        except OperationError as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["id_taken"] * 7 + ["started"]
    assert ours(client, "once") == ["once"]
    client.forget("once")


def test_a_lost_connection_keeps_what_was_received(tmp_path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.start()
        peer.send(Data(stream=1, data=b"so far"))

    with (
        serving(tmp_path / "s", script),
        agent_at(tmp_path / "s") as agent,
        agent.start(["x"]) as process,
    ):
        with pytest.raises(ConnectionLost):
            process.stdout.read()
        assert process.stdout.read(100) == b"so far"


# ── calls that another one ends ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_close_ends_a_call_that_both_reads_and_writes(tmp_path: Path, backend: str) -> None:
    """With the error of a closed connection, not a group of the event loop's own."""
    path = tmp_path / "agent.sock"
    done = threading.Event()

    def deaf(peer: Peer) -> None:
        peer.takes_input = False
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.start()
        peer.send(Credit(stdin=bounds.CREDIT_MAX))
        assert done.wait(PATIENCE)

    async def main() -> None:
        ended: list[BaseException] = []
        async with aio.Agent.of(agent_at(path)) as agent:
            process = await agent.start(["cat"], stdin=True)

            async def write() -> None:
                try:
                    await process.stdin.send(bytes(64 << 20))
                except ConnectionLost as error:
                    ended.append(error)

            async with anyio.create_task_group() as group:
                group.start_soon(write)
                session = process._session
                while not (session._reading and session._writing):
                    await anyio.sleep(0.01)
                process.close()
            assert len(ended) == 1
            done.set()

    try:
        with serving(path, deaf):
            run(backend, main)
    finally:
        done.set()


@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_boot_that_is_cancelled_before_it_begins_ends_at_once(
    backend: str, crowded: bool
) -> None:
    """There is nothing to wait for: neither for its thread, nor for a free one."""

    async def main() -> None:
        threads = anyio.to_thread.current_default_thread_limiter()
        others = [object() for _ in range(int(threads.available_tokens))] if crowded else []
        for other in others:
            threads.acquire_on_behalf_of_nowait(other)
        began = time.monotonic()
        with anyio.move_on_after(0.1 if crowded else 0.0) as scope:
            await aio.boot("oci:nowhere", machine="namespaces")
        assert scope.cancelled_caught
        assert time.monotonic() - began < GIVEN_UP_WAIT / 2
        for other in others:
            threads.release_on_behalf_of(other)

    run(backend, main)
