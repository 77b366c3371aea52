"""The asynchronous client under asyncio and trio, against agents that follow a script."""

import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import pytest
from hostkit import TOKEN, Peer, Script, agent_at, answer_pings, serving
from patience import PATIENCE

from microguest import aio
from microguest.errors import ConnectionLost, DeadlineExceeded, OutputStalled
from microguest.guest import bounds
from microguest.guest.errors import OperationError, StartError
from microguest.guest.wire.connection import Data, End, Response
from microguest.guest.wire.messages import (
    Acknowledge,
    Detach,
    Exited,
    Failure,
    ForgetResult,
    InfoResult,
    ProcessList,
    Resize,
    ShutdownResult,
    Signal,
    SignalResult,
)

FLOOD = 8 * 1024 * 1024
Scene = Callable[[aio.Agent], Awaitable[None]]
Play = Callable[..., None]


@pytest.fixture(params=["asyncio", "trio"])
def play(request: pytest.FixtureRequest, tmp_path: Path) -> Play:
    """Run a scene with an agent whose connections follow the scripts, in order."""
    path = tmp_path / "agent.sock"

    def run(scene: Scene, *scripts: Script, **options: object) -> None:
        async def main() -> None:
            with anyio.fail_after(2 * PATIENCE):
                async with aio.Agent.of(agent_at(path, **options)) as agent:
                    await scene(agent)

        with serving(path, *scripts):
            anyio.run(main, backend=request.param)

    return run


def hang(peer: Peer) -> None:
    """Start a process that does nothing, until the host goes away."""
    peer.start()
    while True:
        peer.next()


def echo(peer: Peer) -> None:
    peer.start()
    while not isinstance(event := peer.next(), End):
        assert isinstance(event, Data)
        peer.send(Data(stream=1, data=event.data))
    peer.finish(code=0)


def flood(peer: Peer, stream: int) -> None:
    for _ in range(FLOOD // bounds.DATA_PAYLOAD):
        peer.send(Data(stream=stream, data=bytes(bounds.DATA_PAYLOAD)))


def answering(*answers: object) -> Script:
    def script(peer: Peer) -> None:
        peer.greet()
        for answer in answers:
            peer.send(Response(result=answer))  # type: ignore[arg-type]
            peer.next()

    return script


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_connect(backend: str, tmp_path: Path) -> None:
    def refuses(peer: Peer) -> None:
        peer.next()
        peer.send(Failure(code="unauthorized", message="wrong token"))

    async def main(url: str) -> None:
        async with await aio.connect(url, token=TOKEN) as agent:
            assert (await agent.ping()).root_ready
            assert str(agent.address) == url
        with pytest.raises(OperationError, match="wrong token"):
            await aio.connect(url, token=TOKEN)

    with serving(tmp_path / "s", answer_pings, refuses) as url:
        anyio.run(main, url, backend=backend)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_connect_through_a_hybrid_device(backend: str, tmp_path: Path) -> None:
    def device(peer: Peer) -> None:
        assert peer.sock.recv(64) == b"CONNECT 77\n"
        for byte in b"OK 12\n":
            peer.sock.sendall(bytes([byte]))
            time.sleep(0.005)
        answer_pings(peer)

    async def main(url: str) -> None:
        async with await aio.connect(f"{url}?port=77", token=TOKEN) as agent:
            assert (await agent.ping()).root_ready

    with serving(tmp_path / "s", lambda _peer: None, device) as url:
        anyio.run(main, url.replace("unix:", "hybrid:"), backend=backend)


def test_exec(play: Play) -> None:
    payload = os.urandom(6 * 1024 * 1024)

    def fails(peer: Peer) -> None:
        peer.greet()
        peer.send(Failure(code="not_found", message="no such program"))

    async def scene(agent: aio.Agent) -> None:
        assert (await agent.exec(["cat"], input=payload)).stdout == payload
        with pytest.raises(StartError, match="no such program"):
            await agent.exec(["x"])

    play(scene, echo, fails)


def test_input_without_a_stdin_is_the_same_error_at_any_time(play: Play) -> None:
    def no_input(peer: Peer) -> None:
        peer.start()
        peer.until(Signal)
        peer.finish(code=0)

    async def refused(process: aio.Process, match: str) -> None:
        for feed in (process.stdin.send, process.communicate):
            with pytest.raises(ValueError, match=match):
                await feed(b"x")

    async def scene(agent: aio.Agent) -> None:
        async with await agent.start(["x"]) as process:
            await process.stdin.aclose()
            await refused(process, "has no stdin: start it with stdin=True")
            await process.kill()
            await process.wait(PATIENCE)
            await refused(process, "has no stdin: start it with stdin=True")
        async with await agent.attach(write=False) as process:
            await refused(process, "only watched here: attach without write=False")
        async with await agent.start(["x"], stdin=True) as process:
            await process.stdin.aclose()
            await refused(process, "was closed: nothing can follow")

    play(scene, no_input, hang, hang)


def test_small_requests(play: Play) -> None:
    info = InfoResult(
        versions={}, kernel="", machine="", hostname="", boot_id="", agent_pid=1, agent_starts=1,
        agent_ready_ms=1.0, processes=0, connections=1, resident_kib=1,
    )  # fmt: skip

    async def scene(agent: aio.Agent) -> None:
        assert await agent.processes() == []
        assert await agent.info() == info
        assert (await agent.wait("p1")).returncode == 5
        await agent.shutdown()
        assert await agent.signal("p1", "TERM")
        await agent.forget("p1")

    play(
        scene,
        answering(ProcessList(processes=()), info, Exited(code=5), ShutdownResult()),
        answering(SignalResult(delivered=True)),
        answering(ForgetResult()),
    )


def test_streams(play: Play) -> None:
    def script(peer: Peer) -> None:
        peer.start()
        assert peer.next() == Data(stream=0, data=b"in")
        assert peer.next() == Signal(signal=15)
        assert peer.next() == Resize(rows=2, columns=3)
        assert peer.next() == Signal(signal=9, target="tree")
        assert peer.next() == End(stream=0)
        peer.send(Data(stream=1, data=b"one\ntw"), Data(stream=2, data=b"err"))
        peer.send(Data(stream=1, data=b"o\nthree\n"))
        peer.finish(code=1)

    async def scene(agent: aio.Agent) -> None:
        async with await agent.start(["x"], stdin=True) as process:
            await process.stdin.send(b"in")
            await process.signal("TERM")
            await process.resize(2, 3)
            await process.kill()
            await process.stdin.aclose()
            lines = process.stdout.lines()
            assert await anext(lines) == b"one\n"
            assert await anext(lines) == b"two\n"
            assert [text async for text in process.stdout.text()] == ["three"]
            assert await process.stderr.receive(2) == b"er"
            assert await process.stderr.read() == b"r"
            with pytest.raises(anyio.EndOfStream):
                await process.stderr.receive()
            result = await process.wait()
            assert result.returncode == 1
            assert await process.poll() == result

    play(scene, script)


def test_both_outputs_by_iteration(play: Play) -> None:
    def script(peer: Peer) -> None:
        peer.start()
        peer.send(Data(stream=1, data=b"1"), Data(stream=2, data=b"2"), Data(stream=1, data=b"3"))
        peer.finish(code=0)

    async def scene(agent: aio.Agent) -> None:
        async with await agent.start(["x"]) as process:
            chunks = [chunk async for chunk in process]
        assert chunks == [("stdout", b"1"), ("stderr", b"2"), ("stdout", b"3")]

    play(scene, script)


def test_tasks_share_a_process(play: Play) -> None:
    payload = os.urandom(6 * 1024 * 1024)
    read = bytearray()

    async def scene(agent: aio.Agent) -> None:
        async with (
            await agent.start(["cat"], stdin=True) as process,
            anyio.create_task_group() as tasks,
        ):

            async def feed() -> None:
                await process.stdin.send(payload)
                await process.stdin.aclose()

            async def collect() -> None:
                async for piece in process.stdout:
                    read.extend(piece)

            async def await_end() -> None:
                assert (await process.wait(PATIENCE)).returncode == 0

            for task in (feed, collect, await_end):
                tasks.start_soon(task)

    play(scene, echo)
    assert read == payload


def test_communicate(play: Play) -> None:
    payload = os.urandom(3 * 1024 * 1024)

    async def scene(agent: aio.Agent) -> None:
        async with await agent.start(["cat"], stdin=True) as process:
            assert (await process.communicate(payload)).stdout == payload

    play(scene, echo)


def test_reading_one_output_while_the_other_floods(play: Play) -> None:
    def script(peer: Peer) -> None:
        peer.start()
        flood(peer, 2)
        peer.send(Data(stream=1, data=b"at last"))
        peer.finish(code=0)

    async def scene(agent: aio.Agent) -> None:
        async with await agent.start(["x"]) as process:
            with pytest.raises(OutputStalled):
                await process.stdout.read()
            assert len(await process.stderr.read()) == FLOOD
            assert await process.stdout.read() == b"at last"

    play(scene, script)


# ── cancellation, at each phase ──────────────────────────────────────────────────────────────────


def test_cancelled_before_the_agent_greets(play: Play) -> None:
    def silent(peer: Peer) -> None:
        while peer.sock.recv(65536):
            pass

    async def scene(agent: aio.Agent) -> None:
        with anyio.move_on_after(0.1) as scope:
            await agent.exec(["x"])
        assert scope.cancelled_caught

    play(scene, silent)


@pytest.mark.parametrize("data", [None, bytes(16 * 1024 * 1024)])
def test_cancelled_exec_closes_its_connection(play: Play, data: bytes | None) -> None:
    def reads_nothing(peer: Peer) -> None:
        peer.start()
        time.sleep(0.3)
        while True:
            peer.next()

    async def scene(agent: aio.Agent) -> None:
        with anyio.move_on_after(0.1) as scope:
            await agent.exec(["x"], input=data)
        assert scope.cancelled_caught

    play(scene, reads_nothing)


def test_cancelled_read_loses_nothing(play: Play) -> None:
    def script(peer: Peer) -> None:
        peer.start()
        for number in range(100):
            peer.send(Data(stream=1, data=b"%d\n" % number))
            time.sleep(0.002)
        peer.finish(code=0)

    async def scene(agent: aio.Agent) -> None:
        read = b""
        async with await agent.start(["x"]) as process:
            for _ in range(60):
                with anyio.move_on_after(0.001):
                    read += await process.stdout.read(7)
            read += await process.stdout.read()
        assert read == b"".join(b"%d\n" % number for number in range(100))

    play(scene, script)


def test_leaving_the_context_while_tasks_wait(play: Play) -> None:
    lost = []

    async def scene(agent: aio.Agent) -> None:
        process = await agent.start(["x"], stdin=True)

        async def wait(read: bool) -> None:
            try:
                await (process.stdout.read() if read else process.wait())
            except ConnectionLost:
                lost.append(read)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait, True)
            tasks.start_soon(wait, False)
            await anyio.sleep(0.05)
            process.close()

    play(scene, hang)
    assert sorted(lost) == [False, True]


def test_wait_with_a_timeout(play: Play) -> None:
    async def scene(agent: aio.Agent) -> None:
        async with await agent.start(["x"]) as process:
            with pytest.raises(DeadlineExceeded):
                await process.wait(0.1)
            assert await process.poll() is None

    play(scene, hang)


# ── kept processes, and loss ─────────────────────────────────────────────────────────────────────


def test_kept_process(play: Play) -> None:
    seen: list[object] = []

    def first(peer: Peer) -> None:
        peer.start(id="p3")
        seen.append(peer.next())
        peer.send(Data(stream=1, data=b"0123"))
        seen.extend([peer.next(), peer.next()])

    def second(peer: Peer) -> None:
        request = peer.start(id="p3", offsets={"stdout": 4})
        assert request.args.offsets == {"stdout": 4, "stderr": 0}  # type: ignore[attr-defined]
        peer.send(Data(stream=1, data=b"45"))
        peer.finish(code=0)

    async def scene(agent: aio.Agent) -> None:
        process = await agent.start(["x"], keep=True)
        assert await process.stdout.read(10) == b"0123"
        await process.detach()
        async with await agent.attach("p3", offsets=process.offsets) as process:
            assert await process.stdout.read() == b"45"
            assert process.offsets["stdout"] == 6

    play(scene, answer_pings, first, second)
    assert seen == [Acknowledge(), Acknowledge(stdout=4), Detach()]


def test_loss(play: Play) -> None:
    async def scene(agent: aio.Agent) -> None:
        with pytest.raises(ConnectionLost):
            await agent.exec(["x"])

    play(scene, lambda peer: peer.start() and None)


def test_dead_machine_is_noticed_while_waiting(play: Play) -> None:
    async def scene(agent: aio.Agent) -> None:
        with pytest.raises(ConnectionLost, match="machine m1 was killed"):
            await agent.exec(["sleep", "inf"])

    began = time.monotonic()

    def obituary(_seconds: float) -> str:
        return "machine m1 was killed by signal 9" if time.monotonic() - began > 0.5 else ""

    play(scene, hang, obituary=obituary)
