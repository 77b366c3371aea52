"""Deadlines hold against peers that always have one more byte: no loop looks only when it is idle.

The bounds here are far above what a call may take, and far below what its peer would make it take.
"""

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import anyio
import pytest
from agentharness import AgentProcess
from hostkit import TOKEN, Peer, Script, agent_at, serving
from patience import SLACK

from microguest import Agent, aio
from microguest.errors import ConnectError, DeadlineExceeded
from microguest.guest import bounds
from microguest.guest.report import REPORTS, AgentServes
from microguest.guest.wire.connection import Connection, Data, Response, Role
from microguest.guest.wire.messages import FEATURES, Failure, Hello, PingResult, Welcome
from microguest.guest.wire.renewal import ClockResult
from microguest.host_client.aio.waiting import run as aio_run
from microguest.host_client.client.address import HybridAddress
from microguest.host_client.client.channel import Channel
from microguest.host_client.client.deadline import Deadline
from microguest.host_client.client.operations import KILL_ALLOWANCE
from microguest.host_client.client.steps import run
from microguest.host_client.event_loop import EventLoop
from microguest.host_client.monitor.reports import ReportReader

LONG = 25.0  # seconds that a peer goes on
TIMEOUT = 1.0  # seconds, of whatever has one
BOUND = KILL_ALLOWANCE + 30.0  # seconds that no call here may take, whatever else runs


def trickle(peer: Peer, data: bytes, every: float = 0.002) -> None:
    """A byte at a time, for LONG or until the host has gone."""
    end = time.monotonic() + LONG
    for byte in data:
        if time.monotonic() > end:
            return
        peer.sock.sendall(bytes([byte]))
        time.sleep(every)


# A process of its own sends without a pause, so that there is always a next byte.
SENDER = """
import socket, sys, time
sock, frame = socket.socket(fileno=int(sys.argv[1])), sys.stdin.buffer.read()
size, end = int(sys.argv[2]), time.monotonic() + float(sys.argv[3])
sock.settimeout(1)
while time.monotonic() < end:
    for at in range(0, len(frame), size):
        sock.sendall(frame[at : at + size])
"""


def send_for_long(peer: Peer, data: bytes, piece: int) -> None:
    """`data` again and again in such pieces, until the host has gone."""
    peer.sock.settimeout(None)
    with peer.sock.dup() as sock:
        sock.setblocking(True)
        subprocess.run(
            [sys.executable, "-c", SENDER, str(sock.fileno()), str(piece), str(LONG)],
            input=data,
            pass_fds=(sock.fileno(),),
            stderr=subprocess.DEVNULL,
            check=False,
        )


def sends_single_bytes(peer: Peer) -> None:
    """Bytes of a long frame, one at a time."""
    peer.start()
    send_for_long(peer, peer.connection.send(Data(stream=1, data=bytes(bounds.DATA_PAYLOAD))), 1)


def floods_output(peer: Peer) -> None:
    """Whole frames, as fast as they go."""
    peer.start()
    frame = peer.connection.send(Data(stream=1, data=b"x"))
    send_for_long(peer, frame * 10_000, 10_000 * len(frame))


def trickles_its_greeting(peer: Peer) -> None:
    peer.next()
    trickle(peer, peer.connection.send(Welcome(agent="a" * 3000, features=FEATURES)), 0.02)


def trickles_its_answer(peer: Peer) -> None:
    peer.greet()
    data = peer.connection.send(Response(result=PingResult(uptime=1.0, root_ready=True)))
    trickle(peer, data, 0.2)


@contextlib.contextmanager
def bounded(bound: float = BOUND) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < bound


Blocking = Callable[[Agent], object]
Awaiting = Callable[[aio.Agent], Awaitable[object]]


def execute(agent: Agent) -> object:
    return agent.exec(["x"], timeout=TIMEOUT)


async def aio_execute(agent: aio.Agent) -> object:
    return await agent.exec(["x"], timeout=TIMEOUT)


def communicate(agent: Agent) -> object:
    with agent.start(["x"]) as process:
        return process.communicate(timeout=TIMEOUT)


def wait(agent: Agent) -> object:
    with agent.start(["x"], max_unread=10**9) as process:
        return process.wait(TIMEOUT)


BUSY = [
    pytest.param(sends_single_bytes, execute, aio_execute, id="single-bytes-exec"),
    pytest.param(floods_output, execute, aio_execute, id="flooded-exec"),
    pytest.param(trickles_its_greeting, Agent.ping, aio.Agent.ping, id="greeting"),
    pytest.param(trickles_its_answer, Agent.ping, aio.Agent.ping, id="answer"),
    pytest.param(trickles_its_greeting, execute, aio_execute, id="greeting-of-exec"),
    pytest.param(sends_single_bytes, communicate, None, id="single-bytes-communicate"),
    pytest.param(floods_output, communicate, None, id="flooded-communicate"),
    pytest.param(floods_output, wait, None, id="flooded-wait"),
]


@pytest.mark.parametrize(("script", "call", "aio_call"), BUSY)
@pytest.mark.parametrize("face", ["blocking", "asyncio", "trio"])
def test_a_busy_agent_cannot_postpone_a_deadline(
    tmp_path: Path, script: Script, call: Blocking, aio_call: Awaiting | None, face: str
) -> None:
    if face != "blocking" and aio_call is None:
        aio_call = aio_communicate

    async def main() -> None:
        assert aio_call is not None
        await aio_call(aio.Agent.of(agent))

    with (
        serving(tmp_path / "s", script),
        agent_at(tmp_path / "s", timeout=TIMEOUT) as agent,
        bounded(),
        pytest.raises(DeadlineExceeded),
    ):
        call(agent) if face == "blocking" else anyio.run(main, backend=face)


async def aio_communicate(agent: aio.Agent) -> object:
    async with await agent.start(["x"]) as process:
        return await process.communicate(timeout=TIMEOUT)


def test_a_device_that_trickles_its_answer(tmp_path: Path) -> None:
    def device(peer: Peer) -> None:
        trickle(peer, b"OK " + b"1" * 60, 0.4)

    with (
        serving(tmp_path / "s", device),
        Agent(HybridAddress(str(tmp_path / "s")), TOKEN, timeout=TIMEOUT) as agent,
        bounded(),
        pytest.raises(ConnectError, match="did not answer"),
    ):
        agent.ping()


def test_an_agent_that_says_at_once_that_a_process_runs(tmp_path: Path) -> None:
    """It is not asked again and again as fast as it answers."""
    asked = 0

    def script(peer: Peer) -> None:
        nonlocal asked
        peer.greet()
        while True:
            asked += 1
            peer.send(Failure(code="still_running", message="it runs"))
            peer.next()

    with (
        serving(tmp_path / "s", script),
        agent_at(tmp_path / "s") as agent,
        bounded(),
        pytest.raises(DeadlineExceeded),
    ):
        agent.wait("p1", timeout=0.5)
    assert asked < 100


def trickles_a_refusal(peer: Peer) -> None:
    peer.greet()
    trickle(peer, peer.connection.send(Failure(code="internal", message="x" * 3000)), 0.02)


@pytest.mark.parametrize("script", [trickles_its_greeting, trickles_a_refusal])
@pytest.mark.parametrize("seconds", [0.0, TIMEOUT])
@pytest.mark.parametrize("face", ["blocking", "asyncio", "trio"])
def test_a_wait_for_a_process_keeps_its_own_time(
    tmp_path: Path, script: Script, seconds: float, face: str
) -> None:
    """It holds for the greeting too, whatever small requests may take."""

    async def main() -> None:
        await aio.Agent.of(agent).wait("p1", timeout=seconds)

    with (
        serving(tmp_path / "s", script),
        agent_at(tmp_path / "s", timeout=4 * SLACK) as agent,
        bounded(TIMEOUT + SLACK),
        pytest.raises(DeadlineExceeded, match=f"within {seconds:g} s whether process p1") as caught,
    ):
        agent.wait("p1", timeout=seconds) if face == "blocking" else anyio.run(main, backend=face)
    assert caught.value.seconds == seconds


def test_a_start_that_takes_for_ever_ends_with_its_exec(tmp_path: Path) -> None:
    """The allowance of `exec` is for all of it, and not for what comes after the start."""

    def answers(peer: Peer) -> None:
        peer.greet()
        peer.send(Response(result=PingResult(uptime=1.0, root_ready=True)))
        peer.sock.recv(1)

    with (
        serving(tmp_path / "s", answers, trickles_a_refusal),
        agent_at(tmp_path / "s", timeout=TIMEOUT) as agent,
        bounded(0.2 + TIMEOUT + KILL_ALLOWANCE + SLACK),
    ):
        agent.ping()  # so that its features are known
        with pytest.raises(DeadlineExceeded, match="did not report its start"):
            agent.exec(["x"], timeout=0.1, grace=0.1)


def test_a_wrong_clock_costs_no_more_than_a_request(tmp_path: Path) -> None:
    """Nobody has asked for it to be set, so nobody waits long for that."""

    def script(peer: Peer) -> None:
        hello = peer.next()
        assert isinstance(hello, Hello)
        peer.send(Welcome(agent="test", features=FEATURES, clock=(1, 1)))
        peer.next()
        peer.send(Response(result=PingResult(uptime=1.0, root_ready=True)))
        while True:
            peer.next()
            time.sleep(4.0)
            peer.send(Response(result=ClockResult(realtime=1, boottime=1)))

    with (
        serving(tmp_path / "s", script),
        agent_at(tmp_path / "s", timeout=5.0) as agent,
        bounded(5.0 + SLACK),  # as few as three answers take longer
    ):
        assert agent.ping().root_ready


def test_looking_whether_an_agent_lives_does_not_outlast_a_wait(tmp_path: Path) -> None:
    def silent(peer: Peer) -> None:
        peer.start()
        while True:
            peer.next()

    def never_greets(peer: Peer) -> None:
        while peer.sock.recv(4096):
            pass

    with (
        serving(tmp_path / "s", silent, never_greets),
        agent_at(tmp_path / "s", timeout=60.0) as agent,
        agent.start(["x"]) as process,
        bounded(),
        pytest.raises(DeadlineExceeded),
    ):
        process.wait(4.0)


@pytest.mark.parametrize("face", ["blocking", "asyncio", "trio"])
def test_what_had_arrived_is_taken_by_who_comes_late(face: str) -> None:
    """As after being stopped, or on a slow host: the answer is there."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        channel = Channel(ours, lambda: "unix:///x", None)
        agent = Connection(Role.AGENT)
        channel.queue(Hello(token=TOKEN))
        channel.flush()
        agent.receive(theirs.recv(4096))
        theirs.sendall(agent.send(Welcome(agent="test")))
        deadline = Deadline(0.0)

        async def main() -> None:
            assert len(await aio_run(channel.step(deadline))) == 1

        if face == "blocking":
            assert len(run(channel.step(deadline))) == 1
        else:
            anyio.run(main, backend=face)
        with pytest.raises(DeadlineExceeded):
            run(channel.step(deadline))


def test_the_agent_waits_for_a_hello_no_longer_for_being_sent_bytes() -> None:
    hello = Connection(Role.HOST).send(Hello(token="t" * bounds.TOKEN_MAX, client="c" * 1000))
    with AgentProcess() as agent, socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(agent.path))
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            for byte in hello:
                sock.sendall(bytes([byte]))
                time.sleep(0.05)
        assert time.monotonic() - began < bounds.HELLO_TIMEOUT + SLACK


def test_the_last_reports_are_not_read_for_ever() -> None:
    """Another process may have got the guest's end of the connection, and go on."""
    ours, theirs = socket.socketpair()
    line = b" " * 60_000 + REPORTS.encode(AgentServes(starts=1, boot_ms=1.0)).strip() + b"\n"
    over = threading.Event()

    def go_on() -> None:
        with contextlib.suppress(OSError):
            while not over.is_set():
                for at in range(0, len(line), 16):
                    theirs.send(line[at : at + 16])

    loop = EventLoop()
    reader = ReportReader(loop, lambda _report: None, lambda _error: None)
    reader.take(ours)
    thread = threading.Thread(target=go_on)
    timer = threading.Timer(15, over.set)
    with theirs:
        thread.start()
        timer.start()
        try:
            with bounded(10.0):
                reader.drain()
        finally:
            over.set()
            reader.close()
            thread.join()
            timer.cancel()
            loop.close()
