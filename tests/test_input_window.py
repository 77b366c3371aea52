"""What a host says to a process acts however full the process's input is: stdin has a window.

The process never reads. Its host has sent all that its window allows and would send more.
"""

import pathlib
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import anyio
import pytest
from agentharness import TOKEN, AgentProcess, Closed, Host
from hostkit import Peer, agent_at, serving
from machinekit import KINDS, demo_image
from patience import PATIENCE

from microguest import aio, boot
from microguest.errors import ConnectionLost
from microguest.guest import bounds
from microguest.guest.errors import LocalProtocolError, RemoteProtocolError
from microguest.guest.wire import frames
from microguest.guest.wire.connection import Connection, Data, Request, Response, Role
from microguest.guest.wire.frames import Kind
from microguest.guest.wire.messages import (
    FEATURES,
    HOST_FEATURES,
    Attach,
    Credit,
    Hello,
    Keep,
    Start,
    Started,
    Welcome,
)
from microguest.host_client.client.address import UnixAddress
from microguest.host_client.client.agent import Agent
from microguest.host_client.client.process import Process

MUCH = bytes(3_000_000)
NEVER_READS = ("sleep", "1000")
# Says what it gets, and reads nothing.
TELLS = """
import os, signal, time
def tell(number, _):
    os.write(1, signal.Signals(number).name.encode() + b"\\n")
for each in ("SIGUSR1", "SIGWINCH", "SIGTERM"):
    signal.signal(getattr(signal, each), tell)
print("ready", flush=True)
while True:
    time.sleep(1000)
"""


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentProcess]:
    with AgentProcess() as process:
        thread = threading.Thread(target=be_pid1, args=(process.pid1,))
        thread.start()
        yield process
        process.pid1.shutdown(socket.SHUT_RDWR)
        thread.join(PATIENCE)


def be_pid1(pair: socket.socket) -> None:
    """Take every deposit and drop it."""
    try:
        while socket.recv_fds(pair, 65536, 0)[0]:
            pass
    except OSError:
        pass


@pytest.fixture
def client(agent: AgentProcess) -> Iterator[Agent]:
    with Agent(UnixAddress(agent.path), TOKEN) as client:
        yield client
        for process in client.processes():
            if process.kept:
                client.forget(process.id)


@contextmanager
def flooded(process: Process) -> Iterator[threading.Thread]:
    """While a thread writes more than there is room for, and waits."""

    def write() -> None:
        try:
            process.stdin.write(MUCH)
        except ConnectionLost:
            pass

    thread = threading.Thread(target=write)
    thread.start()
    try:
        wait_until_stuck(process)
        assert thread.is_alive()
        yield thread
    finally:
        process.close()
        thread.join(PATIENCE)
    assert not thread.is_alive()


def wait_until_stuck(process: Process) -> None:
    """Until the process's pipe is full and all that may wait on the way does."""
    before, pending = -1, len(MUCH)
    deadline = time.monotonic() + PATIENCE
    while pending != before or pending >= len(MUCH):
        assert time.monotonic() < deadline
        time.sleep(0.1)
        with process._run._lock:
            before, pending = pending, process._session.exchange.pending
    assert pending > 0


@pytest.fixture(params=["plain", "kept"])
def keep(request: pytest.FixtureRequest) -> Keep | None:
    return Keep() if request.param == "kept" else None


def test_kill(client: Agent, keep: Keep | None) -> None:
    process = client.start(NEVER_READS, stdin=True, keep=keep)
    with flooded(process):
        process.kill()
        assert process.wait(PATIENCE).signal == signal.SIGKILL


def test_signal(client: Agent, keep: Keep | None) -> None:
    process = client.start([sys.executable, "-c", TELLS], stdin=True, keep=keep)
    lines = process.stdout.lines()
    assert next(lines) == b"ready\n"
    with flooded(process):
        for name in ("USR1", "TERM"):
            process.signal(name, "process")
            assert next(lines) == f"SIG{name}\n".encode()


def test_resize(client: Agent, keep: Keep | None) -> None:
    argv = ["sh", "-c", f'stty raw -echo; exec "{sys.executable}" -c "$1"', "sh", TELLS]
    process = client.start(argv, tty=(24, 80), keep=keep)
    lines = process.stdout.lines()
    assert next(lines).strip() == b"ready"
    with flooded(process):
        process.resize(30, 90)
        assert next(lines).strip() == b"SIGWINCH"


def test_detach_and_what_the_next_writer_finds(client: Agent) -> None:
    process = client.start(NEVER_READS, stdin=True, keep=Keep())
    with flooded(process) as writer:
        process.detach()
        writer.join(PATIENCE)
    again = client.attach(process.id)  # stdin_taken if the agent had not heard of it
    with flooded(again):
        again.kill()
        assert again.wait(PATIENCE).signal == signal.SIGKILL


def test_acknowledging(client: Agent) -> None:
    """Without it the process is held up by its full buffer."""
    argv = ["sh", "-c", "yes | head -c 200000; exec sleep 1000"]
    keep = Keep(buffer=bounds.KEEP_BUFFER_MIN)
    process = client.start(argv, stdin=True, keep=keep, acknowledge=False)
    with flooded(process):
        taken = 0
        while taken < 200_000:
            piece = process.stdout.read(65536)
            taken += len(piece)
            process.acknowledge()
        process.kill()


def test_closing(agent: AgentProcess, client: Agent) -> None:
    process = client.start(NEVER_READS, stdin=True)
    with flooded(process):
        process.close()
        deadline = time.monotonic() + PATIENCE
        while pathlib.Path(f"/proc/{process.pid}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_who_only_watches_is_heard_too(client: Agent) -> None:
    process = client.start(NEVER_READS, stdin=True, keep=Keep())
    with flooded(process), client.attach(process.id, write=False) as watcher:
        watcher.kill()
        assert watcher.wait(PATIENCE).signal == signal.SIGKILL


def test_bare_events(client: Agent) -> None:
    """What the CLI uses: never more queued than has credit, and a signal goes past the rest."""
    with client.open_process(Start(argv=NEVER_READS, stdin=True)) as process:
        process.write(MUCH)
        while process.unsent or any(select.select([process], [], [], 0.5)):
            process.take()
        assert process.pending > 0
        process.signal(signal.SIGTERM)
        process.flush()
        assert list(process)[-1] == process.exited
    assert process.exited is not None
    assert process.exited.signal == signal.SIGTERM


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_awaiting(agent: AgentProcess, backend: str, keep: Keep | None) -> None:
    async def run() -> None:
        async with await aio.connect(f"unix://{agent.path}", token=TOKEN) as client:
            process = await client.start(NEVER_READS, stdin=True, keep=keep)
            async with process, anyio.create_task_group() as tasks:
                tasks.start_soon(process.stdin.send, MUCH)
                before, pending = -1, len(MUCH)
                while pending != before or pending >= len(MUCH):
                    await anyio.sleep(0.1)
                    before, pending = pending, process._session.exchange.pending
                await process.kill()
                result = await process.wait(PATIENCE)
                assert result.signal == signal.SIGKILL

    anyio.run(run, backend=backend)


# ── bounds ───────────────────────────────────────────────────────────────────────────────────────


def test_what_a_process_does_not_take_is_bounded(agent: AgentProcess, client: Agent) -> None:
    """Of each process one window, and of wide ones no more than there are."""
    before = agent.resident_kib()
    processes = []
    for _ in range(40):
        # Takes much, quickly, and then nothing: its window is as wide as it gets.
        argv = ["sh", "-c", "head -c 20000000 >/dev/null; exec sleep 1000"]
        processes.append(client.open_process(Start(argv=tuple(argv), stdin=True)))
        processes[-1].write(bytes(40_000_000))
    deadline = time.monotonic() + 10 * PATIENCE
    sent_before = -1
    while True:
        ready, _, _ = select.select(processes, [p for p in processes if p.unsent], [], 0.5)
        for process in processes:
            process.take()
        sent = sum(process.pending for process in processes)
        if sent == sent_before and not ready:
            break
        sent_before = sent
        assert time.monotonic() < deadline
    assert all(process.pending > 10_000_000 for process in processes)
    grown = (agent.resident_kib() - before) * 1024
    bound = bounds.BULK_INPUT + len(processes) * (bounds.INPUT_WINDOW + 64 * 1024)
    assert grown < 2 * bound  # a bytearray that grows has up to an eighth more, and moves
    for process in processes:
        process.close()


def test_beyond_its_credit_a_host_is_refused(agent: AgentProcess) -> None:
    with Host(agent, hello=False) as host:
        host.send(Hello(token=TOKEN, features=HOST_FEATURES))
        host.start(*NEVER_READS, stdin=True)
        with pytest.raises(LocalProtocolError, match="there is credit for"):
            host.send(Data(stream=0, data=bytes(bounds.INPUT_WINDOW + 1)))
        host.send_raw(frames.header(bounds.INPUT_WINDOW + 1, Kind.DATA, 0))
        failure = host.refusal()
        assert failure.code == "bad_request"
        assert "credit" in failure.message
        with pytest.raises(Closed):
            host.receive()


def test_what_is_only_announced_is_on_its_way_and_has_not_been_taken(agent: AgentProcess) -> None:
    with Host(agent, hello=False) as host:
        host.send(Hello(token=TOKEN, features=HOST_FEATURES))
        host.start(*NEVER_READS, stdin=True)
        host.send_raw(frames.header(bounds.INPUT_WINDOW, Kind.DATA, 0))
        for _ in range(3):  # the agent has seen it by then
            with Host(agent) as other:
                other.ping()
        assert not select.select([host.sock], [], [], 0)[0]
        host.send_raw(bytes(bounds.INPUT_WINDOW))  # which the pipe takes
        credit = host.receive()
        assert isinstance(credit, Credit)
        assert credit.stdin > bounds.INPUT_WINDOW


def pair(op: str = "start", agent_features: tuple[str, ...] = FEATURES) -> list[Connection]:
    """Host and agent of a process that has been started, or attached to."""
    host, agent = Connection(Role.HOST), Connection(Role.AGENT)
    agent.receive(host.send(Hello(token=TOKEN, features=HOST_FEATURES)))
    args = Start(argv=("a",), stdin=True) if op == "start" else Attach()
    flying = host.send(Request(op=op, args=args))
    assert host.input_credit == (bounds.INPUT_WINDOW if op == "start" else 0)
    host.receive(agent.send(Welcome(agent="0", features=agent_features)))
    agent.receive(flying)
    host.receive(agent.send(Response(result=Started(id="1", pid=1))))
    assert host.input_credit == agent.input_credit
    return [host, agent]


def test_who_attaches_has_credit_only_when_told_so() -> None:
    """What an earlier writer has left behind waits in the same place."""
    host, agent = pair("attach")
    with pytest.raises(LocalProtocolError, match="0 bytes that there is credit for"):
        host.send(Data(stream=0, data=b"x"))
    assert host.receive(agent.send(Credit(stdin=5))) == [Credit(stdin=5)]
    agent.receive(host.send(Data(stream=0, data=b"12345")))
    assert host.input_bytes == agent.input_bytes == 5
    with pytest.raises(LocalProtocolError, match="credit"):
        host.send_data_header(0, 1)


def test_credit_only_grows() -> None:
    host, agent = pair()
    with pytest.raises(LocalProtocolError, match="after one of"):
        agent.send(Credit(stdin=bounds.INPUT_WINDOW))
    raw = agent.send(Credit(stdin=bounds.INPUT_WINDOW + 1))
    host.receive(raw)
    with pytest.raises(RemoteProtocolError, match="after one of"):
        host.receive(raw)


def test_without_the_feature_there_is_no_window() -> None:
    host, agent = pair(agent_features=("engine",))
    assert host.input_credit is agent.input_credit is None
    with pytest.raises(LocalProtocolError, match="no window"):
        agent.send(Credit(stdin=1_000_000))
    agent.receive(host.send(Data(stream=0, data=bytes(bounds.DATA_PAYLOAD))))


def test_an_older_agent_gets_all_input_without_credit(tmp_path: pathlib.Path) -> None:
    got = bytearray()

    def script(peer: Peer) -> None:
        peer.greet(("engine",))
        peer.send(Response(result=Started(id="1", pid=42)))
        while len(got) < len(MUCH):
            event = peer.until(Data)
            got.extend(event.data)
        peer.finish(code=0)

    path = tmp_path / "agent"
    with (
        serving(path, script),
        agent_at(path) as client,
        client.start(["x"], stdin=True) as process,
    ):
        process.stdin.write(MUCH)
        assert process.wait(PATIENCE).returncode == 0
    assert got == MUCH


def test_all_input_arrives_whatever_credit_comes(tmp_path: pathlib.Path) -> None:
    """By an agent that gives an odd number of bytes at a time, and hears of no more than that."""
    got = bytearray()
    text = bytes(range(256)) * 1500

    def script(peer: Peer) -> None:
        peer.takes_input = False
        peer.start()
        while len(got) < len(text):
            event = peer.until(Data)
            got.extend(event.data)
            if len(got) == peer.connection.input_credit:
                peer.send(Credit(stdin=len(got) + 7_777))
        peer.finish(code=0)

    path = tmp_path / "agent"
    with serving(path, script), agent_at(path) as client:
        assert client.exec(["x"], input=text).returncode == 0
    assert got == text


@pytest.mark.parametrize("kind", KINDS)
def test_cli_passes_signals_on(kind: Literal["namespaces", "qemu"]) -> None:
    """`timeout 2 microguest exec -i M sleep 30 </dev/zero`: TERM arrives."""
    with boot(demo_image(), machine=kind) as machine, open("/dev/zero", "rb") as zero:
        command = [sys.executable, "-m", "microguest", "exec", "-i", machine.name]
        popen = subprocess.Popen([*command, "sleep", "1000"], stdin=zero)
        try:
            while not any(p.argv[:1] == ("sleep",) for p in machine.agent.processes()):
                time.sleep(0.02)
            time.sleep(1)  # of input
            popen.send_signal(signal.SIGTERM)
            assert popen.wait(PATIENCE) == 128 + signal.SIGTERM
        finally:
            popen.kill()
            popen.wait()
