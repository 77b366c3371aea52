"""The host's side of the protocol against agents that behave well, badly or not at all."""

import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hostkit import TOKEN, Peer, Script, agent_at, answer_pings, serving
from patience import PATIENCE, SLACK

import microguest
from microguest import connect
from microguest.errors import (
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    OutputTooLarge,
)
from microguest.guest import bounds
from microguest.guest.errors import OperationError, RemoteProtocolError, StartError
from microguest.guest.wire import frames
from microguest.guest.wire.connection import Data, End, Request, Response
from microguest.guest.wire.frames import Kind
from microguest.guest.wire.messages import (
    Exited,
    Failure,
    PingResult,
    ShutdownResult,
    Signal,
    Started,
    Welcome,
)
from microguest.host_client.client.address import HybridAddress, UnixAddress, VsockAddress, parse
from microguest.host_client.client.result import CommandFailed


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "agent.sock"


# ── the surface ──────────────────────────────────────────────────────────────────────────────────


def test_public_names() -> None:
    for name in microguest.__all__:
        assert getattr(microguest, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = microguest.nonsense


def test_importing_costs_nothing() -> None:
    import subprocess
    import sys

    program = """
import sys
before = set(sys.modules)
import microguest
print(len(set(sys.modules) - before))
"""
    count = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout
    assert int(count) == 1


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("vsock://3:1024", VsockAddress(3, 1024)),
        ("unix:///run/a%20b.sock", UnixAddress("/run/a b.sock")),
        ("hybrid:///run/v.sock", HybridAddress("/run/v.sock", 1024)),
        ("hybrid:///run/v.sock?port=9", HybridAddress("/run/v.sock", 9)),
    ],
)
def test_urls(url: str, address: object) -> None:
    assert parse(url) == address
    assert parse(str(address)) == address


@pytest.mark.parametrize(
    "url",
    ["vsock://3", "vsock://x:1", "unix://relative", "http://x/", "hybrid:///s?a=1", "vsock://1:-1",
     "hybrid:///s?port=99999999999"],
)  # fmt: skip
def test_bad_urls(url: str) -> None:
    with pytest.raises(ConnectError) as caught:
        connect(url, token=TOKEN)
    assert url in str(caught.value)


def test_url_with_a_port_of_thousands_of_digits() -> None:
    with pytest.raises(ConnectError, match="is not a number from 0 to"):
        parse("vsock://3:" + "9" * 5000)


def test_nobody_listens(path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(ConnectError, match="No such file"):
        connect(f"unix://{path}", token=TOKEN)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))
        with pytest.raises(ConnectError, match="refused"):
            connect(f"unix://{path}", token=TOKEN)
    assert time.monotonic() - began < SLACK


def test_long_socket_path(tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 100) / ("e" * 100)
    folder.mkdir(parents=True)
    here = os.getcwd()
    os.chdir(folder)
    try:
        url = f"unix://{folder}/s"
        with serving(Path("s"), answer_pings), connect(url, token=TOKEN) as agent:
            assert agent.ping().root_ready
    finally:
        os.chdir(here)


# ── commands ─────────────────────────────────────────────────────────────────────────────────────


def test_exec_collects_everything(path: Path) -> None:
    seen: list[Request] = []

    def script(peer: Peer) -> None:
        seen.append(peer.start())
        peer.send(Data(stream=1, data=b"out"), Data(stream=2, data=b"err"))
        peer.send(Data(stream=1, data=b"put"))
        peer.finish(code=3, duration=0.5, open_streams=("stdout",))

    with serving(path, script), agent_at(path) as agent:
        result = agent.exec(
            ["prog", b"\xff", Path("/x")], env={"A": "b"}, cwd="/tmp", user="nobody", timeout=9
        )
    assert (result.returncode, result.stdout, result.stderr) == (3, b"output", b"err")
    assert (result.duration, result.open_streams, result.signal) == (0.5, ("stdout",), None)
    assert result.shell_code == 3
    args = seen[0].args
    assert args.argv == ("prog", "\udcff", "/x")  # type: ignore[attr-defined]
    assert (args.env, args.cwd, args.user) == ({"A": "b"}, "/tmp", "nobody")  # type: ignore[attr-defined]
    assert (args.timeout, args.stdin) == (9.0, False)  # type: ignore[attr-defined]
    assert "prog" in repr(result)
    assert "exited with 3" in repr(result)


def test_everything_in_one_piece(path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.next()
        welcome = peer.connection.send(Welcome(agent="x"))
        assert isinstance(peer.next(), Request)
        peer.sock.sendall(
            welcome
            + peer.connection.send(Response(result=Started(id="1", pid=1)))
            + peer.connection.send(Data(stream=1, data=b"fast"))
            + peer.connection.send(End(stream=1))
            + peer.connection.send(End(stream=2))
            + peer.connection.send(Exited(code=0))
        )

    with serving(path, script), agent_at(path) as agent:
        assert agent.exec(["x"]).stdout == b"fast"


def test_byte_by_byte(path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.start()
        packed = b"".join(
            peer.connection.send(event)
            for event in (
                Data(stream=1, data=b"slow"),
                End(stream=1),
                End(stream=2),
                Exited(code=0),
            )
        )
        for byte in packed:
            peer.sock.sendall(bytes([byte]))
            time.sleep(0.001)

    with serving(path, script), agent_at(path) as agent:
        assert agent.exec(["x"]).stdout == b"slow"


def test_killed_by_signal(path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.start()
        peer.finish(signal=9)

    with serving(path, script), agent_at(path) as agent:
        result = agent.exec(["x"])
    assert (result.returncode, result.signal, result.shell_code) == (-9, 9, 137)


def test_check(path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.start()
        peer.send(Data(stream=2, data=b"why"))
        peer.finish(code=1)

    with (
        serving(path, script),
        agent_at(path) as agent,
        pytest.raises(CommandFailed, match="exited with 1") as caught,
    ):
        agent.exec(["x"], check=True)
    assert caught.value.result.stderr == b"why"


def test_input_flows_while_output_does(path: Path) -> None:
    """An agent that stops reading until its output is read must not deadlock with us."""
    payload = os.urandom(6 * 1024 * 1024)

    def script(peer: Peer) -> None:
        peer.start()
        while True:
            event = peer.next()
            if isinstance(event, End):
                break
            assert isinstance(event, Data)
            peer.send(Data(stream=1, data=event.data))
        peer.finish(code=0)

    with serving(path, script), agent_at(path) as agent:
        assert agent.exec(["cat"], input=payload).stdout == payload


def test_process_that_does_not_read_its_input(path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.start()
        peer.send(Data(stream=1, data=b"bye"))
        peer.finish(code=0)

    with serving(path, script), agent_at(path) as agent:
        assert agent.exec(["true"], input=bytes(8 * 1024 * 1024)).stdout == b"bye"


def test_start_error(path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        peer.send(
            Failure(
                code="not_found", message="no such program", fields={"step": "exec", "errno": 2}
            )
        )

    with (
        serving(path, script),
        agent_at(path) as agent,
        pytest.raises(StartError, match="no such program") as caught,
    ):
        agent.exec(["x"])
    assert (caught.value.code, caught.value.step, caught.value.errno) == ("not_found", "exec", 2)


def test_timeout_carries_the_output(path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.start()
        peer.send(Data(stream=1, data=b"half"))
        peer.finish(signal=9, timed_out=True)

    with (
        serving(path, script),
        agent_at(path) as agent,
        pytest.raises(DeadlineExceeded, match=r"longer than 0\.5 s") as caught,
    ):
        agent.exec(["x"], timeout=0.5)
    assert (caught.value.stdout, caught.value.seconds) == (b"half", 0.5)


def test_agent_that_forgets_the_timeout(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microguest.host_client.client.operations.KILL_ALLOWANCE", 1.0)
    monkeypatch.setattr("microguest.host_client.client.channel.PROBE_AFTER", PATIENCE)

    def script(peer: Peer) -> None:
        peer.start()
        peer.send(Data(stream=1, data=b"half"))
        peer.next()

    with (
        serving(path, script),
        agent_at(path) as agent,
        pytest.raises(DeadlineExceeded, match="did not report") as caught,
    ):
        agent.exec(["x"], timeout=1.0)
    assert caught.value.stdout == b"half"


def test_output_limit(path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.start()
        while True:
            peer.send(Data(stream=2, data=bytes(bounds.DATA_PAYLOAD)))

    with (
        serving(path, script),
        agent_at(path) as agent,
        pytest.raises(OutputTooLarge, match="stderr") as caught,
    ):
        agent.exec(["x"], max_output=3 * 1024 * 1024)
    assert (caught.value.stream, caught.value.limit) == ("stderr", 3 * 1024 * 1024)


@pytest.mark.parametrize(
    ("argv", "error"),
    [("ls -l", TypeError), (b"ls", TypeError), (Path("/x"), TypeError), ([], ValueError),
     ([""], ValueError), (["a\0b"], ValueError), ([1], TypeError)],
)  # fmt: skip
def test_argv_that_is_refused_here(path: Path, argv: object, error: type[Exception]) -> None:
    with agent_at(path) as agent, pytest.raises(error):
        agent.exec(argv)  # type: ignore[arg-type]


def test_signals_and_streaming(path: Path) -> None:
    from microguest.guest.wire.messages import Start

    def script(peer: Peer) -> None:
        peer.start()
        assert peer.next() == Data(stream=0, data=b"in")
        assert peer.next() == Signal(signal=signal.SIGTERM)
        assert peer.next() == End(stream=0)
        peer.finish(signal=15)

    with (
        serving(path, script),
        agent_at(path) as agent,
        agent.open_process(Start(argv=("x",), stdin=True)) as process,
    ):
        assert process.started == Started(id="1", pid=42)
        process.write(b"in")
        process.signal(signal.SIGTERM)
        process.end_input()
        assert [type(event) for event in process] == [End, End, Exited]
        assert process.take() == []


# ── loss and garbage, at each phase ──────────────────────────────────────────────────────────────


def close_at_once(peer: Peer) -> None:
    pass


def close_after_hello(peer: Peer) -> None:
    peer.next()


def close_after_start(peer: Peer) -> None:
    peer.start()


def close_inside_a_frame(peer: Peer) -> None:
    peer.start()
    peer.sock.sendall(struct.pack(">IBBH", 100, Kind.DATA, 0, 1) + b"only a part")


def close_before_exited(peer: Peer) -> None:
    peer.start()
    peer.send(End(stream=1), End(stream=2))


@pytest.mark.parametrize(
    "script",
    [
        close_at_once,
        close_after_hello,
        close_after_start,
        close_inside_a_frame,
        close_before_exited,
    ],
)
def test_end_of_file_is_a_loss(path: Path, script: Script) -> None:
    with (
        serving(path, script),
        agent_at(path) as agent,
        pytest.raises(ConnectionLost, match=r"agent\.sock"),
    ):
        agent.exec(["x"])


@pytest.mark.parametrize(
    "garbage",
    [
        b"HTTP/1.0 400 Bad Request\r\n\r\n",
        frames.preface() + struct.pack(">IBBH", 2**32 - 1, Kind.WELCOME, 0, 0),
        frames.preface() + struct.pack(">IBBH", 1, 99, 0, 0),
        frames.preface() + struct.pack(">IBBH", 3, Kind.WELCOME, 0, 0) + b"\xc1\xc1\xc1",
        frames.preface() + struct.pack(">IBBH", 0, Kind.EXITED, 0, 0),
        frames.preface(99) + struct.pack(">IBBH", 0, Kind.WELCOME, 0, 0),
    ],
)
def test_garbage_is_a_protocol_error(path: Path, garbage: bytes) -> None:
    def script(peer: Peer) -> None:
        peer.next()
        peer.sock.sendall(garbage)
        peer.sock.recv(65536)

    with serving(path, script), agent_at(path) as agent, pytest.raises(RemoteProtocolError):
        agent.exec(["x"])


def test_silent_agent(path: Path) -> None:
    def silent(peer: Peer) -> None:
        peer.sock.recv(65536)
        peer.sock.recv(1)

    def greets_only(peer: Peer) -> None:
        peer.greet()
        peer.next()

    with serving(path, silent, greets_only), agent_at(path, timeout=0.2) as agent:
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            agent.exec(["x"])
        with pytest.raises(DeadlineExceeded):
            agent.ping()
        assert time.monotonic() - began < SLACK


def test_dead_machine_is_noticed_while_waiting(path: Path) -> None:
    dead = threading.Event()

    def obituary(_seconds: float) -> str:
        return "machine m1 was killed by signal 9" if dead.is_set() else ""

    def script(peer: Peer) -> None:
        peer.start()
        dead.set()
        peer.next()

    with serving(path, script), agent_at(path, obituary=obituary) as agent:
        began = time.monotonic()
        with pytest.raises(ConnectionLost, match="machine m1 was killed"):
            agent.exec(["sleep", "inf"])
        assert time.monotonic() - began < SLACK


# ── small requests and the connections kept for them ─────────────────────────────────────────────


def test_wrong_token(path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.next()
        peer.send(Failure(code="unauthorized", message="wrong token"))

    with serving(path, script), pytest.raises(OperationError, match="wrong token") as caught:
        connect(f"unix://{path}", token=TOKEN)
    assert caught.value.code == "unauthorized"


def test_requests_share_a_connection(path: Path) -> None:
    with serving(path, answer_pings), connect(f"unix://{path}", token=TOKEN) as agent:
        for _ in range(5):
            agent.ping()


def test_stale_connection_is_replaced(path: Path) -> None:
    def once(peer: Peer) -> None:
        peer.greet()
        peer.send(Response(result=PingResult(uptime=1.0, root_ready=True)))

    def closes_on_request(peer: Peer) -> None:
        once(peer)
        peer.next()

    with serving(path, once, closes_on_request, answer_pings), agent_at(path) as agent:
        for _ in range(4):
            assert agent.ping().root_ready
            time.sleep(0.05)


def test_kept_connection_that_went_silent_is_replaced(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a restore of the guest: nobody there knows the connection, and nobody says so."""
    monkeypatch.setattr("microguest.host_client.client.pool.REUSED_WAIT", 0.2)

    def falls_silent(peer: Peer) -> None:
        peer.greet()
        peer.send(Response(result=PingResult(uptime=1.0, root_ready=True)))
        peer.next()
        peer.sock.recv(1)

    with serving(path, falls_silent, answer_pings), agent_at(path) as agent:
        assert agent.ping().root_ready
        assert agent.ping().root_ready


def test_request_that_fails_keeps_its_connection(path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        peer.send(Failure(code="shutting_down", message="too late"))
        peer.next()
        peer.send(Response(result=ShutdownResult()))
        peer.next()

    with serving(path, script), agent_at(path) as agent:
        with pytest.raises(OperationError, match="too late"):
            agent.shutdown()
        agent.shutdown(grace=1)


def test_idle_connections_are_bounded(path: Path) -> None:
    count = 8
    barrier = threading.Barrier(count)

    def script(peer: Peer) -> None:
        peer.greet()
        peer.send(Response(result=PingResult(uptime=1.0, root_ready=True)))

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(count)
    agent = agent_at(path)

    def ping() -> None:
        barrier.wait(PATIENCE)
        agent.ping()

    callers = [threading.Thread(target=ping) for _ in range(count)]
    for caller in callers:
        caller.start()
    peers = [Peer(listener.accept()[0]) for _ in range(count)]
    for peer in peers:
        script(peer)
    for caller in callers:
        caller.join(PATIENCE)
    for peer in peers:
        peer.sock.setblocking(False)

    def is_open(peer: Peer) -> bool:
        try:
            return bool(peer.sock.recv(1))
        except BlockingIOError:
            return True

    assert sum(is_open(peer) for peer in peers) == 4
    agent.close()
    assert sum(is_open(peer) for peer in peers) == 0
    for peer in peers:
        peer.sock.close()
    listener.close()


# ── hybrid sockets ───────────────────────────────────────────────────────────────────────────────


@contextmanager
def hybrid(path: Path, *answers: bytes | None) -> Iterator[str]:
    """A device that answers CONNECT with each of these (None: closes), then serves pings."""

    def front(answer: bytes | None) -> Script:
        def script(peer: Peer) -> None:
            assert peer.sock.recv(64) == b"CONNECT 77\n"
            if answer is None:
                return
            for byte in answer:
                peer.sock.sendall(bytes([byte]))
            if answer.startswith(b"OK") and answer.endswith(b"\n"):
                answer_pings(peer)
            else:
                peer.sock.recv(1)

        return script

    with serving(path, *map(front, answers)) as url:
        yield url.replace("unix:", "hybrid:") + "?port=77"


def test_hybrid(path: Path) -> None:
    with hybrid(path, b"OK 1073741824\n") as url, connect(url, token=TOKEN) as agent:
        agent.ping()


def test_hybrid_waits_for_the_guest(path: Path) -> None:
    with hybrid(path, None, None, None, b"OK 1\n") as url, connect(url, token=TOKEN) as agent:
        agent.ping()


def test_hybrid_guest_never_comes(path: Path) -> None:
    stop = threading.Event()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(16)
    listener.settimeout(0.1)
    dials = 0

    def refuse() -> None:
        nonlocal dials
        while not stop.is_set():
            try:
                sock, _ = listener.accept()
            except TimeoutError:
                continue
            dials += 1
            sock.recv(64)
            sock.close()

    thread = threading.Thread(target=refuse)
    thread.start()
    with pytest.raises(ConnectError, match="does not accept"):
        connect(f"hybrid://{path}?port=77", token=TOKEN, timeout=3.0)
    stop.set()
    thread.join()
    listener.close()
    assert dials > 5


@pytest.mark.parametrize("answer", [b"NO 1\n", b"O" * 200, b"\n", b"OK 1"])
def test_hybrid_garbage(path: Path, answer: bytes) -> None:
    with hybrid(path, answer) as url, pytest.raises(ConnectError):
        connect(url, token=TOKEN, timeout=0.5)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda agent: agent.exec(["cat"], timeout=-1), id="exec"),
        pytest.param(lambda agent: agent.start(["cat"], tty=(0, 0)), id="start"),
        pytest.param(lambda agent: agent.shutdown(grace=-1), id="shutdown"),
    ],
)
def test_what_cannot_be_sent_is_a_plain_error(
    tmp_path: Path, call: Callable[[microguest.Agent], object]
) -> None:
    """Not one of a class that no page names."""
    with agent_at(tmp_path / "nobody") as agent, pytest.raises(ValueError, match=": ") as caught:
        call(agent)
    assert type(caught.value) is ValueError
