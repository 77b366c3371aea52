"""Processes through the blocking client, against agents that do exactly what a test says."""

import gc
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostkit import TOKEN, Peer, agent_at, answer_pings, serving
from patience import PATIENCE

from microguest import Agent, connect
from microguest.errors import (
    ConnectionLost,
    DeadlineExceeded,
    OutputStalled,
    OutputTooLarge,
)
from microguest.guest import bounds
from microguest.guest.errors import OperationError, RemoteProtocolError
from microguest.guest.wire.connection import Data, End, Request, Response
from microguest.guest.wire.messages import (
    FEATURES,
    Acknowledge,
    Attach,
    Detach,
    Exited,
    Failure,
    ForgetResult,
    Keep,
    Limits,
    PingResult,
    ProcessInfo,
    ProcessList,
    Resize,
    Signal,
    SignalProcess,
    SignalResult,
    StagedFile,
    Start,
    Started,
    Wait,
    Winsize,
)
from microguest.host_client.client.backlog import Backlog, Taking
from microguest.host_client.client.request import signal_number, start_record
from microguest.host_client.client.result import CommandFailed, Result

FLOOD = 8 * 1024 * 1024


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "agent.sock"


def flood(peer: Peer, stream: int, size: int = FLOOD) -> None:
    for _ in range(size // bounds.DATA_PAYLOAD):
        peer.send(Data(stream=stream, data=bytes(bounds.DATA_PAYLOAD)))


# ── what a request says ──────────────────────────────────────────────────────────────────────────


def test_every_option_travels() -> None:
    start = start_record(
        ["prog", "arg"],
        {
            "env": {"A": "b"},
            "clear_env": True,
            "cwd": "/tmp",
            "user": "nobody",
            "groups": ["audio", 7],
            "timeout": 3,
            "grace": 2,
            "limits": Limits(memory=1 << 20, rlimits={"nofile": (10, 20)}),
            "umask": 0o77,
            "capabilities": ["net_admin"],
            "no_new_privs": True,
            "keep": True,
            "files": {"/etc/x": b"y"},
            "label": "mine",
            "drain_idle": 1,
            "drain_cap": 2,
        },
        stdin=False,
        tty=(24, 80),
    )
    assert start == Start(
        argv=("prog", "arg"),
        env={"A": "b"},
        clear_env=True,
        cwd="/tmp",
        user="nobody",
        groups=("audio", "7"),
        tty=Winsize(rows=24, columns=80),
        stdin=True,
        timeout=3,
        grace=2,
        umask=0o77,
        capabilities=("net_admin",),
        no_new_privs=True,
        keep=Keep(),
        files=(StagedFile(path="/etc/x", data=b"y"),),
        label="mine",
        drain_idle=1,
        drain_cap=2,
        limits=Limits(memory=1 << 20, rlimits={"nofile": (10, 20)}),
    )


def test_what_is_not_given_does_not_travel() -> None:
    start = start_record(["x"], {"env": None, "keep": False, "clear_env": False}, stdin=False)
    assert start.to_map() == {"argv": ["x"]}
    assert start_record((), {"shell": "a | b"}, stdin=False).to_map() == {
        "argv": [],
        "shell": "a | b",
    }
    assert start_record(["x"], {"keep": Keep(buffer=8192)}, stdin=True).keep == Keep(buffer=8192)


@pytest.mark.parametrize(
    ("argv", "options"),
    [
        (["x"], {"shell": "x"}),
        ([], {}),
        (["x"], {"env": {"A": "b\0c"}}),
        (["x"], {"env": {"A\0": "b"}}),
        ([], {"shell": "a\0b"}),
        (["x"], {"timeout": -1}),
        (["x"], {"umask": 0o1777}),
        (["x"], {"label": "x" * 1000}),
    ],
)
def test_requests_that_are_refused_here(argv: list[str], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        start_record(argv, options, stdin=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "number"),
    [("TERM", 15), ("SIGTERM", 15), ("sigkill", 9), (1, 1), (signal.SIGHUP, 1), ("RTMIN", 34),
     ("RTMIN+3", 37), ("SIGRTMAX", 64)],
)  # fmt: skip
def test_signal_names(name: str | int, number: int) -> None:
    assert signal_number(name) == number


@pytest.mark.parametrize(
    "name",
    [
        "",
        "TERMINATE",
        "SIG",
        0,
        65,
        -9,
        "TERM+x",
        "RTMAX+1",
        "9",
        "9" * 5000,
        "RTMIN+" + "9" * 5000,
    ],
)
def test_unknown_signals(name: str | int) -> None:
    with pytest.raises(ValueError, match="is not a signal"):
        signal_number(name)


def test_an_older_agent_is_not_asked_for_what_it_would_ignore(path: Path) -> None:
    def old(peer: Peer) -> None:
        peer.greet(features=())
        peer.send(Response(result=PingResult(uptime=1, root_ready=True)))
        peer.next()

    with serving(path, old), agent_at(path) as agent:
        with pytest.raises(OperationError, match="limits") as caught:
            agent.exec(["x"], limits=Limits(processes=1))
        assert caught.value.code == "unknown_operation"


# ── streams ──────────────────────────────────────────────────────────────────────────────────────


def test_output_one_by_one(path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.start()
        peer.send(Data(stream=1, data=b"out"), Data(stream=2, data=b"err"))
        peer.send(Data(stream=1, data=b"put"))
        peer.finish(code=3)

    with serving(path, script), agent_at(path) as agent, agent.start(["x"]) as process:
        assert (process.id, process.pid) == ("1", 42)
        assert process.stderr.read() == b"err"
        assert process.stdout.read(2) == b"ou"
        assert process.offsets == {"stdout": 2, "stderr": 3}
        assert process.stdout.read() == b"tput"
        assert process.stdout.read(5) == b""
        result = process.wait()
        assert (result.returncode, result.stdout) == (3, b"")
        assert process.poll() == result


def test_iteration_keeps_the_order(path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.start()
        for number in range(50):
            peer.send(Data(stream=1 + number % 2, data=b"%d\n" % number))
        peer.finish(code=0)

    with serving(path, script), agent_at(path) as agent, agent.start(["x"]) as process:
        chunks = list(process)
    assert b"".join(data for _, data in chunks) == b"".join(b"%d\n" % n for n in range(50))
    assert b"".join(d for s, d in chunks if s == "stderr") == b"".join(
        b"%d\n" % n for n in range(1, 50, 2)
    )


def test_order_is_bounded_and_loses_no_byte(path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.start()
        peer.next()  # the client looks at nothing before it has all
        for _ in range(100):
            peer.send(*(Data(stream=1 + n % 2, data=b"x") for n in range(100)))
        peer.finish(code=0)

    with serving(path, script), agent_at(path) as agent, agent.start(["x"], stdin=True) as process:
        process.stdin.write(b"go")
        process.wait(PATIENCE)
        assert len(process._session.unread._runs) <= 1025
        counted = {"stdout": 0, "stderr": 0}
        for name, data in process:
            counted[name] += len(data)
    assert counted == {"stdout": 5000, "stderr": 5000}


def test_lines(path: Path) -> None:
    pieces = [b"one\ntw", b"o\n", b"\nthr", b"ee \xc3\xa9\nrest"]

    def script(peer: Peer) -> None:
        peer.start()
        for piece in pieces:
            peer.send(Data(stream=1, data=piece))
            time.sleep(0.01)
        peer.finish(code=0)

    with serving(path, script, script), agent_at(path) as agent:
        with agent.start(["x"]) as process:
            assert list(process.stdout.lines()) == [
                b"one\n", b"two\n", b"\n", "three é\n".encode(), b"rest"
            ]  # fmt: skip
        with agent.start(["x"]) as process:
            assert list(process.stdout.text()) == ["one", "two", "", "three é", "rest"]


def test_a_line_longer_than_the_buffer_comes_in_pieces(path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.start()
        flood(peer, 1)
        peer.send(Data(stream=1, data=b"\nend"))
        peer.finish(code=0)

    with serving(path, script), agent_at(path) as agent, agent.start(["x"]) as process:
        lines = list(process.stdout.lines())
    assert max(map(len, lines)) < 2 * 1024 * 1024
    assert b"".join(lines) == bytes(FLOOD) + b"\nend"
    assert lines[-1] == b"end"


def test_reading_while_the_other_output_floods(path: Path) -> None:
    """A single caller who waits for stdout while only stderr comes is told, and loses nothing."""

    def script(peer: Peer) -> None:
        peer.start()
        flood(peer, 2)
        peer.send(Data(stream=1, data=b"at last"))
        peer.finish(code=0)

    with serving(path, script), agent_at(path) as agent, agent.start(["x"]) as process:
        with pytest.raises(OutputStalled, match="stderr") as caught:
            process.stdout.read()
        assert caught.value.stream == "stderr"
        held = process._session.unread.size(2)
        assert held < 2 * 1024 * 1024  # what is not read is not received either
        with pytest.raises(OutputStalled):
            process.wait()
        assert len(process.stderr.read()) == FLOOD
        assert process.stdout.read() == b"at last"


def test_two_threads_read_one_output_each(path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.start()
        flood(peer, 2)
        flood(peer, 1)
        flood(peer, 2)
        peer.finish(code=0)

    sizes: dict[str, int] = {}
    with serving(path, script), agent_at(path) as agent, agent.start(["x"]) as process:

        def read(name: str) -> None:
            sizes[name] = len(getattr(process, name).read())

        threads = [threading.Thread(target=read, args=(name,)) for name in ("stdout", "stderr")]
        for thread in threads:
            thread.start()
        assert process.wait(PATIENCE).returncode == 0
        for thread in threads:
            thread.join(PATIENCE)
    assert sizes == {"stdout": FLOOD, "stderr": 2 * FLOOD}


def test_communicate(path: Path) -> None:
    payload = os.urandom(6 * 1024 * 1024)

    def echo(peer: Peer) -> None:
        peer.start()
        while not isinstance(event := peer.next(), End):
            assert isinstance(event, Data)
            peer.send(Data(stream=1, data=event.data), Data(stream=2, data=event.data))
        peer.finish(code=0)

    with serving(path, echo), agent_at(path) as agent, agent.start(["x"], stdin=True) as process:
        result = process.communicate(payload, timeout=PATIENCE)
    assert result.stdout == payload
    assert result.stderr == payload


def test_communicate_until_its_time_is_over(path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.start()
        peer.send(Data(stream=1, data=b"half"))
        peer.next()
        peer.send(Data(stream=1, data=b"rest"))
        peer.finish(code=0)

    with serving(path, script), agent_at(path) as agent, agent.start(["x"], stdin=True) as process:
        assert process.stdout.read(1) == b"h"  # by now all of it is there
        with pytest.raises(DeadlineExceeded) as caught:
            process.communicate(timeout=0.2)
        assert caught.value.stdout == b"alf"
        assert process.communicate(b"x").stdout == b"rest"


def test_communicate_with_more_output_than_wanted(path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.start()
        flood(peer, 1)
        peer.next()

    with (
        serving(path, script),
        agent_at(path) as agent,
        agent.start(["x"]) as process,
        pytest.raises(OutputTooLarge),
    ):
        process.communicate(max_output=1024)


def test_writing_while_another_thread_reads(path: Path) -> None:
    payload = os.urandom(6 * 1024 * 1024)

    def echo(peer: Peer) -> None:
        peer.start()
        while not isinstance(event := peer.next(), End):
            assert isinstance(event, Data)
            peer.send(Data(stream=1, data=event.data))
        peer.finish(code=0)

    with serving(path, echo), agent_at(path) as agent, agent.start(["x"], stdin=True) as process:

        def feed() -> None:
            with process.stdin as stdin:
                stdin.write(bytearray(payload))

        feeder = threading.Thread(target=feed)
        feeder.start()
        assert b"".join(process.stdout) == payload
        feeder.join(PATIENCE)
        process.stdin.close()
        with pytest.raises(ValueError, match="was closed: nothing can follow"):
            process.stdin.write(b"too late")


def test_input_that_an_ended_process_cannot_read_is_dropped(path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.start()
        peer.finish(code=0)

    with serving(path, script), agent_at(path) as agent, agent.start(["x"], stdin=True) as process:
        process.wait(PATIENCE)
        process.stdin.write(b"too late, and dropped")
        assert process.communicate(b"so is this").stdout == b""


def test_a_process_that_has_ended_is_dropped_without_a_warning(path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.start()
        peer.finish(code=0)

    with serving(path, script), agent_at(path) as agent, warnings.catch_warnings():
        warnings.simplefilter("error")
        process = agent.start(["x"])
        assert process.communicate().returncode == 0
        exchange = process._session.exchange
        del process
        gc.collect()
        assert exchange.fileno() < 0


def test_a_command_that_failed_is_told_with_its_last_words() -> None:
    stderr = b"first\n" + b"y" * 500 + b"\x1b[2J the reason\n\n"
    with pytest.raises(CommandFailed, match=r"x exited with 3: y+.*the reason$") as caught:
        Result(argv=("x",), returncode=3, stdout=b"", stderr=stderr).check()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300
    with pytest.raises(CommandFailed, match=r"x exited with 3$"):
        Result(argv=("x",), returncode=3, stdout=b"", stderr=b"\n").check()


def no_input(peer: Peer) -> None:
    peer.start()
    peer.until(Signal)
    peer.finish(code=0)


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize(
    ("open_it", "match"),
    [
        (lambda agent: agent.start(["x"]), r"'x' \(process \w+\) has no stdin: .* stdin=True"),
        (lambda agent: agent.attach(write=False), "only watched here: attach without write=False"),
    ],
    ids=["start", "watch"],
)
def test_input_without_a_stdin_is_the_same_error_at_any_time(
    path: Path, ended: bool, open_it: Callable[[Agent], Any], match: str
) -> None:
    with (
        serving(path, answer_pings, no_input),
        agent_at(path) as agent,
        agent.ping() and open_it(agent) as process,
    ):
        if ended:
            process.kill()
            process.wait(PATIENCE)
        for feed in (process.stdin.write, process.communicate):
            with pytest.raises(ValueError, match=match):
                feed(b"x")
        if not ended:  # the connection is as good as before
            process.kill()
            assert process.communicate(timeout=PATIENCE).returncode == 0


def test_closing_a_stdin_that_was_not_asked_for_does_nothing(path: Path) -> None:
    with serving(path, no_input), agent_at(path) as agent, agent.start(["x"]) as process:
        process.stdin.close()
        process.kill()
        assert process.wait(PATIENCE).returncode == 0


def test_controls(path: Path) -> None:
    seen: list[object] = []

    def script(peer: Peer) -> None:
        request = peer.start()
        assert request.args.tty == Winsize(rows=24, columns=80)  # type: ignore[attr-defined]
        seen.extend(peer.next() for _ in range(5))
        peer.finish(signal=9)

    with (
        serving(path, answer_pings, script),
        agent_at(path) as agent,
        agent.start(["x"], tty=(24, 80)) as process,
    ):
        process.signal("INT")
        process.signal(15, "process")
        process.resize(25, 81)
        process.kill()
        process.stdin.close()
        result = process.wait(PATIENCE)
        process.signal("TERM")  # too late is no error
        with pytest.raises(ValueError, match="signal"):
            process.signal("NONSENSE")
        with pytest.raises(ValueError, match="rows"):
            process.resize(0, 80)
    assert (result.returncode, result.signal) == (-9, 9)
    assert seen == [
        Signal(signal=2),
        Signal(signal=15, target="process"),
        Resize(rows=25, columns=81),
        Signal(signal=9, target="tree"),
        End(stream=0),
    ]


def test_wait_with_a_timeout(path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.start()
        peer.next()
        peer.finish(code=0)

    with serving(path, script), agent_at(path) as agent, agent.start(["x"], stdin=True) as process:
        assert process.poll() is None
        with pytest.raises(DeadlineExceeded, match="still runs"):
            process.wait(0.1)
        process.stdin.write(b"end")
        assert process.wait(PATIENCE).returncode == 0


def test_loss_comes_after_what_had_arrived(path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.start()
        peer.send(Data(stream=1, data=b"last words"))

    with serving(path, script), agent_at(path) as agent, agent.start(["x"]) as process:
        assert process.stdout.read(100) == b"last words"
        with pytest.raises(ConnectionLost):
            process.stdout.read(100)
        with pytest.raises(ConnectionLost):
            process.wait()


def test_closing_wakes_who_waits(path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.start()
        peer.next()

    raised: list[BaseException] = []
    with serving(path, script), agent_at(path) as agent:
        process = agent.start(["x"])

        def wait() -> None:
            try:
                process.wait()
            except ConnectionLost as error:
                raised.append(error)

        waiter = threading.Thread(target=wait)
        waiter.start()
        time.sleep(0.1)
        process.close()
        process.close()
        waiter.join(PATIENCE)
        with pytest.raises(ConnectionLost, match="closed here"):
            process.wait()
    assert len(raised) == 1


# ── kept processes ───────────────────────────────────────────────────────────────────────────────


def test_what_was_read_is_acknowledged_when_the_reader_comes_back(path: Path) -> None:
    seen: list[object] = []

    def script(peer: Peer) -> None:
        peer.start()
        seen.append(peer.next())
        peer.send(Data(stream=1, data=b"12345"))
        seen.append(peer.next())
        peer.send(Data(stream=2, data=b"678"))
        seen.append(peer.next())
        peer.finish(code=0)

    with (
        serving(path, answer_pings, script),
        agent_at(path) as agent,
        agent.start(["x"], keep=True) as process,
    ):
        assert list(process) == [("stdout", b"12345"), ("stderr", b"678")]
    assert seen == [
        Acknowledge(),
        Acknowledge(stdout=5),
        Acknowledge(stdout=5, stderr=3),
    ]


def test_acknowledging_by_hand(path: Path) -> None:
    seen: list[object] = []

    def script(peer: Peer) -> None:
        peer.start()
        peer.send(Data(stream=1, data=b"12345"))
        seen.extend(peer.next() for _ in range(3))
        peer.finish(code=0)

    with (
        serving(path, answer_pings, script),
        agent_at(path) as agent,
        agent.start(["x"], keep=True, acknowledge=False) as process,
    ):
        assert process.stdout.read(5) == b"12345"
        process.acknowledge(stdout=2)
        process.acknowledge()
        process.wait(PATIENCE)
    assert seen == [Acknowledge(), Acknowledge(stdout=2), Acknowledge(stdout=5)]


def test_resuming(path: Path) -> None:
    requests: list[object] = []
    last: list[object] = []

    def first(peer: Peer) -> None:
        requests.append(peer.greet().args)
        peer.send(Response(result=Started(id="p7", pid=9)))
        assert peer.next() == Acknowledge()
        peer.send(Data(stream=1, data=b"0123456789"))
        last.extend([peer.next(), peer.next()])

    def second(peer: Peer) -> None:
        requests.append(peer.start(id="p7", offsets={"stdout": 6}, dropped={"stdout": 2}).args)
        assert peer.next() == Acknowledge(stdout=4)
        peer.send(Data(stream=1, data=b"6789"))
        peer.finish(code=0)

    with serving(path, answer_pings, first, second), agent_at(path) as agent:
        process = agent.start(["x"], keep=Keep(buffer=8192))
        assert process.stdout.read(4) == b"0123"
        offsets = process.offsets
        process.detach()
        with agent.attach(process.id, offsets=offsets) as process:
            assert process.dropped == {"stdout": 2}
            assert process.offsets == {"stdout": 6, "stderr": 0}
            assert process.stdout.read() == b"6789"
            assert process.offsets["stdout"] == 10
            assert process.wait().argv == ("p7",)
    assert requests == [
        Start(argv=("x",), keep=Keep(buffer=8192)),
        Attach(id="p7", offsets={"stdout": 4, "stderr": 0}),
    ]
    assert last == [Acknowledge(stdout=4), Detach()]


@pytest.mark.parametrize(
    ("allowed", "said"),
    [
        (b"\x05", b"\xff"),  # -1, as msgpack has it
        (b"\xcf" + (2**62).to_bytes(8), b"\xcf" + (2**62 + 1).to_bytes(8)),
        (b"\xcf" + (2**62).to_bytes(8), b"\xcf" + (2**63 - 1).to_bytes(8)),
    ],
)
@pytest.mark.parametrize("field", ["offsets", "dropped"])
def test_offsets_that_no_stream_has_are_refused(
    path: Path, field: str, allowed: bytes, said: bytes
) -> None:
    """They would be sent back, added to, and shown."""
    number = int.from_bytes(allowed[-8:])

    def script(peer: Peer) -> None:
        peer.greet()
        started = Started(id="p1", pid=9, **{field: {"stdout": number}})
        sent = peer.connection.send(Response(result=started))
        assert b"stdout" + allowed in sent
        peer.sock.sendall(sent.replace(b"stdout" + allowed, b"stdout" + said))
        with pytest.raises(EOFError):
            peer.until(Exited)

    with (
        serving(path, answer_pings, script),
        agent_at(path) as agent,
        pytest.raises(RemoteProtocolError, match="offsets, dropped"),
    ):
        agent.attach("p1")


def test_who_only_watches_acknowledges_nothing(path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.start()
        peer.send(Data(stream=1, data=b"12345"))
        with pytest.raises(EOFError):
            peer.next()

    with (
        serving(path, answer_pings, script),
        agent_at(path) as agent,
        agent.attach("p1", write=False) as process,
    ):
        assert process.stdout.read(5) == b"12345"
        assert process.poll() is None


def test_attaching_to_the_workload_of_an_older_agent(path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.greet(features=())
        peer.send(Response(result=Started(id="main", pid=9)))
        peer.send(Data(stream=1, data=b"12345"))
        peer.finish(code=0)
        with pytest.raises(EOFError):
            peer.next()

    def pings(peer: Peer) -> None:
        peer.greet(features=())
        peer.send(Response(result=PingResult(uptime=1, root_ready=True)))
        peer.next()

    with serving(path, pings, script), agent_at(path) as agent, agent.attach() as process:
        assert process.stdout.read() == b"12345"


@pytest.mark.parametrize("code", ["stdin_taken", "no_such_process", "cannot_keep"])
def test_refusals(path: Path, code: str) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        peer.send(Failure(code=code, message="no"))

    with serving(path, answer_pings, script), agent_at(path) as agent:
        with pytest.raises(OperationError) as caught:
            agent.attach("p1")
        assert caught.value.code == code


def test_operations_by_id(path: Path) -> None:
    seen: list[Request] = []

    def answering(*answers: object) -> Callable[[Peer], None]:
        def script(peer: Peer) -> None:
            seen.append(peer.greet())
            for number, answer in enumerate(answers):
                peer.send(answer if isinstance(answer, Failure) else Response(result=answer))  # type: ignore[arg-type]
                if number + 1 < len(answers):
                    request = peer.next()
                    assert isinstance(request, Request)
                    seen.append(request)
            peer.next()

        return script

    listed = ProcessInfo(id="p1", pid=3, argv=("x",), exited=Exited(code=0))
    running = Failure(code="still_running", message="later")
    with (
        serving(
            path,
            answering(ProcessList(processes=(listed,)), running, running, Exited(code=4)),
            answering(SignalResult(delivered=True)),
            answering(ForgetResult()),
        ),
        agent_at(path) as agent,
    ):
        assert agent.processes() == [listed]
        assert agent.wait("p1").returncode == 4
        assert agent.signal("p1", "HUP", "process")
        agent.forget("p1")
    assert [request.op for request in seen] == [
        "processes", "wait", "wait", "wait", "signal", "forget"
    ]  # fmt: skip
    assert seen[1].args == Wait(id="p1", timeout=2.0)
    assert seen[4].args == SignalProcess(id="p1", signal=1, target="process")


def test_waiting_by_id_until_the_time_is_over(path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        peer.send(Failure(code="still_running", message="later"))
        peer.next()

    with (
        serving(path, script),
        agent_at(path) as agent,
        pytest.raises(DeadlineExceeded, match="p1 still runs"),
    ):
        agent.wait("p1", timeout=0.0)


# ── signs of life ────────────────────────────────────────────────────────────────────────────────


def test_a_frozen_guest_is_an_error_within_seconds(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("microguest.host_client.client.channel.PROBE_AFTER", 0.5)
    monkeypatch.setattr("microguest.host_client.client.channel.CHECK_EVERY", 0.1)
    monkeypatch.setattr("microguest.host_client.client.streams.CHECK_EVERY", 0.1)

    noticed = threading.Event()

    def script(peer: Peer) -> None:
        peer.start()
        noticed.wait(PATIENCE)  # nobody accepts the probe's connection either

    with serving(path, script), agent_at(path) as agent, agent.start(["x"]) as process:
        with pytest.raises(ConnectionLost, match="not alive"):
            process.wait()
        noticed.set()


def test_a_silent_process_of_a_guest_that_lives(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("microguest.host_client.client.channel.PROBE_AFTER", 0.2)
    monkeypatch.setattr("microguest.host_client.client.channel.CHECK_EVERY", 0.05)
    done = threading.Event()

    def silent(peer: Peer) -> None:
        peer.start()
        threading.Thread(target=finish_later, args=(peer.sock.dup(), peer), daemon=True).start()

    def finish_later(sock: Any, peer: Peer) -> None:
        done.wait(PATIENCE)
        with sock:
            sock.sendall(
                b"".join(map(peer.connection.send, (End(stream=1), End(stream=2), Exited(code=0))))
            )

    def pings(peer: Peer) -> None:
        answer = PingResult(uptime=1, root_ready=True)
        peer.greet()
        for _ in range(3):
            peer.send(Response(result=answer))
            peer.next()
        done.set()
        peer.send(Response(result=answer))
        peer.next()

    with serving(path, silent, pings), agent_at(path, timeout=PATIENCE) as agent:
        assert agent.exec(["sleep"]).returncode == 0
    assert done.is_set()


# ── results and buffers ──────────────────────────────────────────────────────────────────────────


def test_results_print_well() -> None:
    exited = Exited(
        signal=9,
        core_dumped=True,
        timed_out=True,
        oom_killed=True,
        open_streams=("stdout",),
        dropped={"stderr": 5},
        user_seconds=0.5,
        system_seconds=0.25,
        max_rss_kib=1000,
    )
    result = Result.of(("prog",), exited, b"x" * 100, b"")
    shown = repr(result)
    for part in ("prog", "signal 9 (SIGKILL)", "core dumped", "time was over", "memory", "stdout",
                 "5 bytes of stderr", "(100 bytes)"):  # fmt: skip
        assert part in shown
    assert (result.oom_killed, result.user_seconds, result.max_rss_kib) == (True, 0.5, 1000)
    with pytest.raises(CommandFailed) as caught:
        result.check()
    assert caught.value.result is result
    assert Result.of(("prog",), Exited(code=0), b"", b"").check().returncode == 0


def test_single_bytes_cost_no_multiple_of_their_size() -> None:
    backlog = Backlog()
    for _ in range(100_000):
        backlog.add(b"x")
    assert len(backlog._pieces) < 100
    assert backlog.take(10, Taking()) == b"x" * 10
    assert backlog.size == 99_990
    assert len(backlog.take_all(Taking())) == 99_990
    assert backlog.take_line(Taking()) == b""


@pytest.mark.parametrize("size", [1, 3, 5000])
def test_lines_of_a_backlog(size: int) -> None:
    text = b"".join(b"%d" % n * (n % 7) + b"\n" for n in range(3000)) + b"tail"
    backlog = Backlog()
    lines = []
    for start in range(0, len(text), size):
        backlog.add(text[start : start + size])
        while line := backlog.take_line(Taking()):
            lines.append(line)
    assert b"".join(lines) + backlog.take_all(Taking()) == text
    assert lines == text.splitlines(keepends=True)[:-1]


def test_connections_are_closed_by_name(path: Path) -> None:
    with serving(path, answer_pings), connect(f"unix://{path}", token=TOKEN) as agent:
        assert isinstance(agent, Agent)
        assert FEATURES[0] in (agent.driver._features or ())
