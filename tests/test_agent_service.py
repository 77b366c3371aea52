"""What the agent does to peers that do not behave: a stated limit, a typed answer, no damage."""

import os
import socket
import struct
import time
from collections.abc import Iterator

import pytest
from agentharness import TOKEN, AgentProcess, Closed, Host, execute
from patience import PATIENCE, SLACK

from microguest.guest import bounds
from microguest.guest.supervision import ShutdownRequest
from microguest.guest.wire import frames, messages
from microguest.guest.wire.connection import Request
from microguest.guest.wire.messages import Hello, Shutdown, ShutdownResult

PREFACE = frames.preface()


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentProcess]:
    with AgentProcess() as process:
        yield process


@pytest.fixture
def stranger(agent: AgentProcess) -> Iterator[Host]:
    """A connection that has said nothing yet."""
    with Host(agent, hello=False) as host:
        yield host


def frame(kind: int, payload: bytes = b"", channel: int = 0) -> bytes:
    return frames.header(len(payload), kind, channel) + payload


HELLO = PREFACE + frame(frames.Kind.HELLO, messages.pack({"token": TOKEN}))


def test_one_connection_answers_many_requests(agent: AgentProcess) -> None:
    execute(agent, "true")  # waits for the root
    with Host(agent) as host:
        first, second = host.ping(), host.ping()
        assert first.root_ready
        assert second.uptime > first.uptime
        info = host.info()
    assert info.agent_pid == agent.pid
    assert info.connections >= 1
    assert info.resident_kib > 1000
    assert info.kernel == os.uname().release
    assert info.versions == {"microguest": "test"}
    assert info.agent_ready_ms > 0


def test_shutdown_reaches_pid_1(agent: AgentProcess) -> None:
    with Host(agent) as host:
        assert isinstance(host.request("shutdown", Shutdown(grace=1.5)), ShutdownResult)
    assert agent.receive() == ShutdownRequest(grace=1.5)


def test_attach_without_the_right_id(agent: AgentProcess) -> None:
    with Host(agent) as host:
        host.send(Request(op="attach", args=messages.Attach(id="p1")))
        assert host.refusal().code == "no_such_process"


# ── strangers ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("token", ["", "wrong", TOKEN[:-1], TOKEN + "x"])
def test_wrong_token_is_unauthorized(stranger: Host, token: str) -> None:
    payload = messages.pack({"token": token})
    stranger.send_raw(PREFACE + frame(frames.Kind.HELLO, payload))
    stranger.connection.send(Hello(token="counted as sent"))
    assert stranger.refusal().code == "unauthorized"
    with pytest.raises(Closed):
        stranger.receive()


def test_a_request_behind_a_wrong_token_is_not_served(agent: AgentProcess) -> None:
    with Host(agent, hello=False) as host:
        host.send(Hello(token="wrong"), Request(op="shutdown", args=Shutdown()))
        assert host.refusal().code == "unauthorized"
    agent.pid1.settimeout(0.2)
    with pytest.raises(TimeoutError):
        agent.receive()
    agent.pid1.settimeout(PATIENCE)


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 64, b"\x89mgst\r\n", PREFACE[:-1] + b"\x63"],
    ids=["http", "zeros", "text mode", "version"],
)
def test_garbage_is_refused_at_once(stranger: Host, garbage: bytes) -> None:
    stranger.send_raw(garbage)
    answer = stranger.read_until_closed()  # and not "hello_timeout"
    assert answer.startswith(PREFACE)
    assert b"bad_preface" in answer or b"unsupported_version" in answer


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (PREFACE + struct.pack(">IBBH", 2**32 - 1, frames.Kind.HELLO, 0, 0), b"frame_too_large"),
        (HELLO + struct.pack(">IBBH", 2**32 - 1, frames.Kind.REQUEST, 0, 0), b"frame_too_large"),
        (HELLO + struct.pack(">IBBH", 2**32 - 1, frames.Kind.DATA, 0, 0), b"frame_too_large"),
        (HELLO + struct.pack(">IBBH", 8, 77, 0, 0), b"bad_request"),
        (HELLO + struct.pack(">IBBH", 8, frames.Kind.REQUEST, 1, 0), b"bad_request"),
        (HELLO + frame(frames.Kind.REQUEST, b"\xc1"), b"bad_request"),
        (HELLO + frame(frames.Kind.DATA, b"x"), b"bad_request"),
        (HELLO + frame(frames.Kind.EXITED, messages.pack({"code": 0})), b"bad_request"),
        (
            HELLO + frame(frames.Kind.REQUEST, messages.pack({"op": "format_disk", "args": {}})),
            b"unknown_operation",
        ),
        (
            HELLO + frame(frames.Kind.REQUEST, messages.pack({"op": "start", "args": {"argv": 1}})),
            b"bad_request",
        ),
    ],
)
def test_broken_frames_are_refused_and_the_agent_goes_on(
    agent: AgentProcess, stranger: Host, data: bytes, code: bytes
) -> None:
    resident = agent.resident_kib()
    stranger.send_raw(data)
    assert code in stranger.read_until_closed()
    assert agent.resident_kib() - resident < 1024
    assert execute(agent, "echo", "ok").stdout == b"ok\n"


@pytest.mark.parametrize("size", [3, len(PREFACE), len(PREFACE) + 3, len(HELLO) - 1])
def test_truncated_hello_costs_only_itself(agent: AgentProcess, stranger: Host, size: int) -> None:
    stranger.send_raw(HELLO[:size])
    stranger.sock.shutdown(socket.SHUT_WR)
    assert b"internal" not in stranger.read_until_closed()
    with Host(agent) as host:
        host.ping()


def test_truncated_request_costs_only_itself(agent: AgentProcess, stranger: Host) -> None:
    stranger.send_raw(HELLO + struct.pack(">IBBH", 100, frames.Kind.REQUEST, 0, 0) + b"\x82")
    stranger.sock.shutdown(socket.SHUT_WR)
    assert b"internal" not in stranger.read_until_closed()


def test_a_hello_byte_by_byte_is_served(stranger: Host) -> None:
    for value in stranger.connection.send(Hello(token=TOKEN)):
        stranger.send_raw(bytes([value]))
    stranger.ping()


def test_silence_is_not_waited_for_longer_than_the_limit(agent: AgentProcess) -> None:
    started = time.monotonic()
    with Host(agent, hello=False) as stranger:
        stranger.send_raw(PREFACE)
        assert b"hello_timeout" in stranger.read_until_closed()
    assert bounds.HELLO_TIMEOUT - 0.1 < time.monotonic() - started < bounds.HELLO_TIMEOUT + SLACK


def test_five_hundred_silent_connections(agent: AgentProcess) -> None:
    """The newest are kept, within the limit, and a proper host is served meanwhile."""
    execute(agent, "true")
    before, resident = agent.open_descriptors(), agent.resident_kib()
    silent = []
    try:
        for _ in range(500):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(agent.path)
            silent.append(sock)
        started = time.monotonic()
        assert execute(agent, "echo", "ok").stdout == b"ok\n"
        assert time.monotonic() - started < SLACK
        settle(agent, before + bounds.UNAUTHENTICATED)
        assert agent.resident_kib() - resident < 4096
        silent[0].settimeout(PATIENCE)
        assert silent[0].recv(100) == b"", "the oldest must have been dropped"
    finally:
        for sock in silent:
            sock.close()
    settle(agent, before)


def settle(agent: AgentProcess, descriptors: int) -> None:
    """What is dropped or done is closed by its own task, a moment later."""
    deadline = time.monotonic() + PATIENCE
    while agent.open_descriptors() > descriptors:
        assert time.monotonic() < deadline, agent.open_descriptors()
        time.sleep(0.01)


# ── before the root, and the end ─────────────────────────────────────────────────────────────────


def test_a_start_waits_for_the_root() -> None:
    with AgentProcess(root=None) as agent:
        with Host(agent) as host:
            assert not host.ping().root_ready
        with Host(agent) as host:
            host.send(Request(op="start", args=messages.Start(argv=("echo", "late"))))
            host.sock.settimeout(0.2)
            with pytest.raises(TimeoutError):
                host.receive()
            host.sock.settimeout(PATIENCE)
            agent.send_root("/")
            host.receive()
            assert host.collect().stdout == b"late\n"


def test_the_agent_ends_with_pid_1_and_takes_its_processes_along() -> None:
    with AgentProcess() as agent, Host(agent) as host:
        started = host.start("sleep", "100")
        agent.pid1.close()
        assert agent.popen.wait(PATIENCE) == 0
        deadline = time.monotonic() + PATIENCE
        while is_running(started.pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
