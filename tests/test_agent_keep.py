"""Kept processes: what outlives a connection, and what is said of bytes that are gone."""

import contextlib
import hashlib
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from agentharness import TIMEOUTS, WAIT, AgentProcess, Host, Refused
from sleepers import Sleeper

from microguest.guest import bounds
from microguest.guest.supervision import (
    AreYouThere,
    Configure,
    Deposit,
    ExecStarted,
    KeptExited,
    Restored,
    Withdraw,
)
from microguest.guest.wire.connection import Data, Event, Request, Response, State
from microguest.guest.wire.messages import (
    Acknowledge,
    Attach,
    Detach,
    Exited,
    Forget,
    Keep,
    ListProcesses,
    ProcessInfo,
    ProcessList,
    SignalProcess,
    Start,
    Started,
    Wait,
    Winsize,
)

PAGE = 4096


class KeepingAgent(AgentProcess):
    """`deposits`: what PID 1 would hold, without the descriptors.

    `left`: an earlier agent's deposit of itself.
    """

    def __init__(self, left: Deposit | None = None) -> None:
        self.left = left
        super().__init__()
        self.deposits: dict[str, Deposit] = {}

    def send(self, message: Any, descriptors: Sequence[int] = ()) -> None:
        if isinstance(message, Configure) and self.left is not None:
            super().send(message.replace(starts=2), descriptors)
            message = Restored(id=self.left.id, pid=self.left.pid, meta=self.left.meta)
        super().send(message, descriptors)

    def hear(self) -> None:
        """Take what the agent has said to PID 1, before the pair is full."""
        while select.select([self.pid1], [], [], 0)[0]:
            message = self.receive_any()
            if isinstance(message, Deposit):
                self.deposits[message.id] = message
            elif isinstance(message, Withdraw):
                self.deposits.pop(message.id, None)
            else:
                assert isinstance(message, KeptExited | ExecStarted)


@pytest.fixture
def agent() -> Iterator[KeepingAgent]:
    with KeepingAgent() as process:
        yield process


def start(agent: KeepingAgent, *argv: str, **options: Any) -> str:
    """Start a kept process and leave it alone, with nothing acknowledged; its id."""
    options.setdefault("keep", Keep())
    with Host(agent) as host:
        request = Request(op="start", args=Start(argv=argv, **options))
        host.send(request, Acknowledge())
        response = host.receive()
        assert isinstance(response, Response)
        assert isinstance(response.result, Started)
        send_while_it_runs(host, Detach())
    agent.hear()
    return response.result.id


def send_while_it_runs(host: Host, event: Event) -> None:
    """The connection may have come to its end already."""
    if host.connection.state is State.PROCESS:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            host.send(event)


def attach(host: Host, process_id: str, **options: Any) -> Started:
    started = host.request("attach", Attach(id=process_id, **options))
    assert isinstance(started, Started)
    return started


def attach_writer(agent: KeepingAgent, process_id: str, **options: Any) -> tuple[Host, Started]:
    """As the writer, once the agent has seen that the last one is gone."""
    deadline = time.monotonic() + WAIT
    while True:
        host = Host(agent)
        try:
            return host, attach(host, process_id, **options)
        except Refused as refused:
            host.sock.close()
            if refused.failure.code != "stdin_taken" or time.monotonic() > deadline:
                raise


def wait(agent: KeepingAgent, process_id: str) -> Exited:
    """Its end. PID 1 hears the agent meanwhile: its copy of a stdin keeps that from ending."""
    deadline = time.monotonic() + WAIT
    while True:
        agent.hear()
        try:
            with Host(agent) as host:
                exited = host.request("wait", Wait(id=process_id, timeout=0.2))
            break
        except Refused as refused:
            if refused.failure.code != "still_running" or time.monotonic() > deadline:
                raise
    agent.hear()
    assert isinstance(exited, Exited)
    return exited


def withdrawn(agent: KeepingAgent, process_id: str) -> bool:
    """Whether PID 1 has nothing of it any more."""
    agent.hear()
    return process_id not in agent.deposits


def deposited(agent: KeepingAgent, process_id: str) -> tuple[str, ...]:
    """The names of the descriptors that PID 1 is to hold open."""
    agent.hear()
    return agent.deposits[process_id].names


def input_ended(agent: KeepingAgent, process_id: str) -> bool:
    """Whether PID 1 is not to hold its stdin open any more."""
    return "stdin" not in deposited(agent, process_id)


def written(agent: KeepingAgent, process_id: str) -> int:
    """Bytes of its stdout so far."""
    with Host(agent) as host:
        started = attach(host, process_id, offsets={"stdout": -1}, write=False)
    return started.offsets.get("stdout", 0)


def listed(agent: KeepingAgent) -> dict[str, ProcessInfo]:
    with Host(agent) as host:
        result = host.request("processes", ListProcesses())
    assert isinstance(result, ProcessList)
    return {info.id: info for info in result.processes}


def eventually(look: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + WAIT
    while not look():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def forget(agent: KeepingAgent, process_id: str) -> None:
    with Host(agent) as host:
        host.request("forget", Forget(id=process_id))
    agent.hear()


def writer(size: int, seed: int = 1, after: str = "") -> tuple[str, ...]:
    """A program that writes `size` bytes which `expected` knows."""
    code = (
        "import random, sys\n"
        f"left, source = {size}, random.Random({seed})\n"
        "while left:\n"
        "    piece = source.randbytes(min(left, 10000))\n"
        "    sys.stdout.buffer.write(piece)\n"
        "    left -= len(piece)\n"
        "sys.stdout.flush()\n"
        f"{after}\n"
    )
    return (sys.executable, "-c", code)


def expected(size: int, seed: int = 1) -> bytes:
    source, data = random.Random(seed), bytearray()
    while len(data) < size:
        data += source.randbytes(min(size - len(data), 10000))
    return bytes(data)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_reattaching_anywhere_loses_and_repeats_nothing(agent: KeepingAgent, seed: int) -> None:
    size = 3_000_000
    chance = random.Random(seed)
    process_id = start(agent, *writer(size), keep=Keep(buffer=64 * 1024))
    have = bytearray()
    connections = 0
    exited: Exited | None = None
    while exited is None:
        connections += 1
        agent.hear()
        until = len(have) + chance.randrange(1, 120_000)
        exited = read_some(agent, process_id, have, until)
    assert connections > 30
    assert hashlib.sha256(have).digest() == hashlib.sha256(expected(size)).digest()
    assert exited.code == 0
    assert exited.dropped == {}


def read_some(agent: KeepingAgent, process_id: str, have: bytearray, until: int) -> Exited | None:
    """Attach as the writer behind what is there, read on, and break off; or the process's end."""
    deadline = time.monotonic() + WAIT
    while True:
        with Host(agent) as host:
            request = Attach(id=process_id, offsets={"stdout": len(have)})
            host.send(Request(op="attach", args=request), Acknowledge(stdout=len(have)))
            try:
                event = host.receive()
            except Refused as refused:
                if refused.failure.code != "stdin_taken" or time.monotonic() > deadline:
                    raise
                continue
            assert isinstance(event, Response)
            assert isinstance(event.result, Started)
            assert event.result.offsets.get("stdout", 0) == len(have)
            assert event.result.dropped == {}
            acknowledged = len(have)
            while len(have) < until:
                event = host.receive()
                if isinstance(event, Data):
                    have += event.data
                elif isinstance(event, Exited):
                    return event
                if len(have) - acknowledged > 30_000:
                    acknowledged = len(have)
                    send_while_it_runs(host, Acknowledge(stdout=acknowledged))
            return None


def test_a_killed_host_loses_nothing(agent: KeepingAgent) -> None:
    process_id = start(agent, *writer(2_000_000), keep=Keep(buffer=128 * 1024))
    reader, ready = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with Host(agent) as host:
                request = Attach(id=process_id, offsets={"stdout": 0})
                host.send(Request(op="attach", args=request), Acknowledge())
                size = 0
                while True:
                    event = host.receive()
                    size += len(event.data) if isinstance(event, Data) else 0
                    if size > 50_000:
                        os.write(ready, b"x")
        finally:
            os._exit(1)
    os.close(ready)
    os.read(reader, 1)
    os.close(reader)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    have = bytearray()
    while read_some(agent, process_id, have, len(have) + 1_000_000) is None:
        pass
    assert bytes(have) == expected(2_000_000)


def test_block_makes_the_process_wait_for_acknowledgements(agent: KeepingAgent) -> None:
    size, buffer = 1_000_000, 16 * PAGE
    process_id = start(agent, *writer(size), keep=Keep(buffer=buffer))
    eventually(lambda: listed(agent)[process_id].retained["stdout"] == buffer, "a full buffer")
    time.sleep(0.2)
    info = listed(agent)[process_id]
    assert (info.exited, info.retained["stdout"]) == (None, buffer)
    # Whoever watches does not free anything.
    with Host(agent) as watcher:
        attach(watcher, process_id, write=False)
        assert take(watcher, buffer) == expected(size)[:buffer]
        watcher.sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            watcher.receive()
    host, _ = attach_writer(agent, process_id)
    with host:
        result = host.collect()
    assert result.stdout == expected(size)
    assert result.exited.dropped == {}


def take(host: Host, size: int) -> bytes:
    """Exactly `size` bytes of output."""
    data = b""
    while len(data) < size:
        event = host.receive()
        assert isinstance(event, Data)
        data += event.data
    assert len(data) == size
    return data


def test_drop_counts_every_byte(agent: KeepingAgent) -> None:
    size, buffer = 1_000_003, 8 * PAGE
    process_id = start(agent, *writer(size), keep=Keep(buffer=buffer, on_full="drop"))
    exited = wait(agent, process_id)
    oldest = size - buffer
    assert exited.dropped == {"stdout": oldest}
    with Host(agent) as host:
        started = attach(host, process_id, offsets={"stdout": 17})
        assert started.offsets["stdout"] == oldest
        assert started.dropped == {"stdout": oldest - 17}
        result = host.collect()
    assert result.stdout == expected(size)[oldest:]
    assert result.exited == exited


def test_drop_counts_only_what_was_not_acknowledged(agent: KeepingAgent) -> None:
    size, buffer = 100 * PAGE, 4 * PAGE
    with Host(agent) as host:
        argv = writer(size, after="sys.stdin.read()")
        start = Start(argv=argv, stdin=True, keep=Keep(buffer=buffer, on_full="drop"))
        host.send(Request(op="start", args=start), Acknowledge())
        started = host.receive()
        assert isinstance(started, Response)
        process_id = started.result.id  # type: ignore[attr-defined]
        received = 0
        try:
            while received < size:
                event = host.receive()
                assert isinstance(event, Data)
                received += len(event.data)
        except Refused as refused:  # it may go faster than is read here
            if refused.failure.code != "fell_behind":
                raise
    eventually(lambda: written(agent, process_id) == size, "all of it")
    host, _ = attach_writer(agent, process_id, offsets={"stdout": size - PAGE})
    with host:
        host.send(Acknowledge(stdout=size))
        host.write(b"", end=True)
        eventually(lambda: input_ended(agent, process_id), "the end of its input")
        exited = host.collect().exited
    assert exited.dropped == {"stdout": size - buffer}


def test_a_watcher_that_is_overtaken_is_told(agent: KeepingAgent) -> None:
    size, buffer = 4_000_000, 16 * PAGE
    argv = writer(size, after="")
    with Host(agent) as first:
        code = "import sys; sys.stdin.read(1); exec(sys.argv[1])"
        started = first.start(
            sys.executable, "-c", code, argv[2], stdin=True,
            keep=Keep(buffer=buffer, on_full="drop"),
        )  # fmt: skip
        watcher = Host(agent)
        with watcher:
            attach(watcher, started.id, write=False)
            first.write(b"x")
            first.send(Detach())
            eventually(lambda: listed(agent)[started.id].exited is not None, "its end")
            data, refusal = b"", None
            while refusal is None:
                try:
                    event = watcher.receive()
                    assert isinstance(event, Data)
                    data += event.data
                except Refused as refused:
                    refusal = refused.failure
            assert refusal.code == "fell_behind"
            assert data == expected(size)[: len(data)]
    with Host(agent) as again:
        resumed = attach(again, started.id, offsets={"stdout": len(data)}, write=False)
        gap = resumed.dropped["stdout"]
        assert data + bytes(gap) + again.collect().stdout == (
            data + bytes(gap) + expected(size)[len(data) + gap :]
        )
    agent.hear()


def test_two_watch_and_one_writes(agent: KeepingAgent) -> None:
    process_id = start(agent, "cat", stdin=True)
    host, _ = attach_writer(agent, process_id)
    with host, Host(agent) as first, Host(agent) as second, Host(agent) as other:
        for watcher in (first, second):
            attach(watcher, process_id, write=False)
        other.send(Request(op="attach", args=Attach(id=process_id)))
        assert other.refusal().code == "stdin_taken"
        host.write(b"hello\n")
        for each in (host, first, second):
            assert take(each, 6) == b"hello\n"
        assert listed(agent)[process_id].attached == 3
        host.write(b"", end=True)
        ends: list[Exited] = []
        agent.hear()
        eventually(lambda: input_ended(agent, process_id), "END")
        ends = [each.collect().exited for each in (host, first, second)]
        assert [end.code for end in ends] == [0, 0, 0]


def test_stdin_outlives_its_writers_until_one_ends_it(agent: KeepingAgent) -> None:
    process_id = start(agent, "cat", stdin=True)
    for line in (b"one\n", b"two\n"):
        host, _ = attach_writer(agent, process_id, offsets={"stdout": -1})
        with host:
            host.write(line)
            assert take(host, 4) == line
    assert listed(agent)[process_id].exited is None
    host, _ = attach_writer(agent, process_id)
    with host:
        host.write(b"three\n", end=True)
        eventually(lambda: input_ended(agent, process_id), "END")
        assert host.collect().stdout == b"one\ntwo\nthree\n"


def test_input_that_a_full_pipe_did_not_take_outlives_its_writer(agent: KeepingAgent) -> None:
    size = 100_000
    code = "import sys, time; time.sleep(0.5); print(len(sys.stdin.buffer.read(100000)))"
    with Host(agent) as host:
        process_id = host.start(sys.executable, "-c", code, stdin=True, keep=Keep()).id
        host.write(bytes(size))
        send_while_it_runs(host, Detach())
    assert wait(agent, process_id).code == 0
    with Host(agent) as host:
        attach(host, process_id)
        assert host.collect().stdout == b"100000\n"


def test_exit_before_anybody_attaches(agent: KeepingAgent) -> None:
    process_id = start(agent, "sh", "-c", "echo out; echo err >&2; exit 7", label="early")
    exited = wait(agent, process_id)
    assert exited.code == 7
    info = listed(agent)[process_id]
    assert (info.label, info.kept, info.exited) == ("early", True, exited)
    assert info.retained == {"stdout": 4, "stderr": 4}
    for _ in range(2):
        host, _ = attach_writer(agent, process_id)
        with host:
            result = host.collect()
        assert (result.stdout, result.stderr, result.exited) == (b"out\n", b"err\n", exited)
    with Host(agent) as host:
        signalled = host.request("signal", SignalProcess(id=process_id, signal=9))
        assert not signalled.delivered  # type: ignore[attr-defined]
    eventually(
        lambda: deposited(agent, process_id) == ("stdout-ring", "stderr-ring"), "its last deposit"
    )


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (Attach(id="stranger"), "no_such_process"),
        (Attach(id="other"), "no_such_process"),
        (Attach(id="kept", offsets={"stdout": 1_000_000}), "bad_request"),
    ],
)
def test_attaching_to_what_cannot_be(agent: KeepingAgent, request_: Attach, code: str) -> None:
    with Host(agent) as other:
        ids = {"stranger": "p99", "other": other.start("cat", stdin=True).id}
        ids["kept"] = start(agent, "sleep", "100")
        with Host(agent) as host:
            host.send(Request(op="attach", args=request_.replace(id=ids[request_.id])))
            assert host.refusal().code == code
    forget(agent, ids["kept"])


def test_retention_ends(agent: KeepingAgent) -> None:
    def retained() -> str:
        process_id = start(agent, "echo", "x", keep=Keep(retain=0.3))
        eventually(lambda: process_id not in listed(agent), "its end")
        eventually(lambda: withdrawn(agent, process_id), "PID 1's hearing of it")
        return process_id

    retained()  # what an agent opens with its first process stays open
    before = agent.open_descriptors()
    process_id = retained()
    eventually(lambda: agent.open_descriptors() <= before, "the end of its pipes")
    with Host(agent) as host:
        host.send(Request(op="attach", args=Attach(id=process_id)))
        assert host.refusal().code == "no_such_process"


def test_forgetting_what_runs_kills_everything_of_it(agent: KeepingAgent, sleeper: Sleeper) -> None:
    sleep = f"sleep {sleeper.argument}"
    process_id = start(agent, "sh", "-c", f"setsid {sleep} & sh -c '{sleep} & {sleep}' & {sleep}")
    sleeper.wait_for(4)
    watcher = Host(agent)
    with watcher:
        attach(watcher, process_id, write=False)
        forget(agent, process_id)
        assert watcher.refusal().code == "no_such_process"
    sleeper.wait_until_gone()
    assert process_id not in listed(agent)
    eventually(lambda: withdrawn(agent, process_id), "PID 1's hearing of it")
    eventually(lambda: agent.children() == [], "its end")


def test_timeout_goes_on_without_anybody(agent: KeepingAgent) -> None:
    script = "trap 'echo term' TERM; echo up; while :; do sleep 0.05; done"
    for timeout in TIMEOUTS:
        process_id = start(agent, "sh", "-c", script, timeout=timeout, grace=timeout)
        exited = wait(agent, process_id)
        with Host(agent) as host:
            attach(host, process_id)
            output = host.collect().stdout
        if output.startswith(b"up\n"):
            break
    assert output == b"up\nterm\n"
    assert (exited.signal, exited.timed_out) == (signal.SIGKILL, True)


def test_a_terminal_is_kept_as_well(agent: KeepingAgent) -> None:
    size = Winsize(rows=20, columns=70)
    process_id = start(
        agent, "sh", "-c", "read a; stty size; read b; echo $a $b", tty=size, stdin=True
    )
    host, _ = attach_writer(agent, process_id)
    with host:
        host.write(b"one\n")
        seen = b""
        while b"20 70" not in seen:
            event = host.receive()
            seen += event.data if isinstance(event, Data) else b""
    host, started = attach_writer(agent, process_id, offsets={"stdout": len(seen)})
    with host:
        assert started.offsets["stdout"] == len(seen)
        host.write(b"two\n")
        result = host.collect()
    assert (seen + result.stdout).split() == [b"one", b"20", b"70", b"two", b"one", b"two"]
    assert result.stderr == b""
    assert result.exited.code == 0


def test_no_more_than_agreed_are_kept(agent: KeepingAgent) -> None:
    ids = [start(agent, "sleep", "1000") for _ in range(bounds.KEPT_PROCESSES)]
    with Host(agent) as host:
        host.send(Request(op="start", args=Start(argv=("true",), keep=Keep())))
        refusal = host.refusal()
    assert refusal.code == "cannot_keep"
    assert "every one of them runs or is being read: end one first" in refusal.message
    assert set(listed(agent)) == set(ids)
    with Host(agent) as host:
        host.request("signal", SignalProcess(id=ids[7], signal=signal.SIGKILL))
    wait(agent, ids[7])
    last = start(agent, "true")
    assert set(listed(agent)) == {*ids, last} - {ids[7]}


def test_those_that_ended_first_make_room(agent: KeepingAgent) -> None:
    """Also for several at a time, and not those that run or are being read."""
    running = [start(agent, "sleep", "1000") for _ in range(bounds.KEPT_PROCESSES - 5)]
    read = start(agent, "head", "-c", "1000000", "/dev/zero")  # more than a socket takes
    with Host(agent) as reader:
        attach(reader, read, write=False)
        wait(agent, read)
        slow = start(agent, "cat", stdin=True)
        ended = [start(agent, "true") for _ in range(3)]
        for each in ended:
            wait(agent, each)
        forget(agent, slow)
        ended.insert(0, start(agent, "false"))
        wait(agent, ended[0])
        order = [*ended[1:], ended[0]]  # as they ended, not as they are listed
        hosts = [Host(agent) for _ in range(2)]
        for host in hosts:
            host.ping()
        for host in hosts:
            host.send(Request(op="start", args=Start(argv=("sleep", "1000"), keep=Keep())))
        new = []
        for host in hosts:
            response = host.receive()
            assert isinstance(response, Response)
            assert isinstance(response.result, Started)
            new.append(response.result.id)
        agent.hear()
        assert set(listed(agent)) == {*running, read, *order[2:], *new}
        assert set(agent.deposits) - {"agent"} == set(listed(agent))
        for host in hosts:
            host.sock.close()


def test_memory_of_many_idle_ones(agent: KeepingAgent) -> None:
    count = 200
    for _ in range(8):
        start(agent, "sleep", "100")
    before = agent.resident_kib()
    for _ in range(count):
        start(agent, "sleep", "100")
    each = (agent.resident_kib() - before) / count
    print(f"{each:.1f} KiB for each kept process")
    assert each <= 24
    for info in listed(agent).values():
        forget(agent, info.id)


def test_nothing_is_left_of_many(agent: KeepingAgent) -> None:
    forget(agent, start(agent, "cat", stdin=True))
    before = agent.open_descriptors()
    for _ in range(20):
        forget(agent, start(agent, "cat", stdin=True))
    eventually(lambda: agent.open_descriptors() <= before, "descriptors to be closed")
    eventually(lambda: only_itself_deposited(agent), "PID 1's hearing of it")
    eventually(lambda: agent.children() == [], "their end")


def only_itself_deposited(agent: KeepingAgent) -> bool:
    agent.hear()
    return agent.deposits.keys() <= {"agent"}


def test_the_next_agent_ends_what_was_not_kept(sleeper: Sleeper) -> None:
    sleep = f"sleep {sleeper.argument}"
    with KeepingAgent() as first:
        with Host(first) as host:
            host.start("sh", "-c", f"setsid {sleep} > /dev/null 2>&1 & exit 0")
            host.collect()
        sleeper.wait_for(1)  # the shell may have ended before setsid has become it
        (left_behind,) = sleeper.pids()
        with Host(first) as host:
            host.start("sh", "-c", f"setsid {sleep} & ({sleep} &); {sleep}")
            sleeper.wait_for(4)
            first.hear()
            first.popen.kill()
            first.popen.wait()
    if "agent" not in first.deposits:
        pytest.skip("needs a writable cgroup v2")
    with KeepingAgent(first.deposits["agent"]):
        eventually(lambda: sleeper.pids() == [left_behind], "the end of what was not kept")
        time.sleep(0.1)
        assert sleeper.pids() == [left_behind]


def test_a_host_that_left_is_heard_to_the_end(agent: KeepingAgent) -> None:
    """What it says last is behind a socket that takes no more output: nobody shall find it."""
    for _ in range(30):
        with Host(agent) as host:
            process_id = host.start("yes", keep=Keep(), label="abandoned").id
            host.send(Detach(forget=True))
        eventually(lambda mine=process_id: mine not in listed(agent), "its end")  # type: ignore[misc]
        agent.hear()


def test_a_host_is_heard_until_there_is_room_for_its_last_frame(agent: KeepingAgent) -> None:
    """It fell behind, and often cannot be told, as its socket is full."""
    for _ in range(20):
        with Host(agent) as host:
            process_id = host.start("yes", keep=Keep(buffer=PAGE, on_full="drop")).id
            eventually(lambda mine=process_id: written(agent, mine) > 1_000_000, "its refusal")  # type: ignore[misc]
            try:
                host.send(Detach(forget=True))
            except (BrokenPipeError, ConnectionResetError):  # it was told, and would do this
                forget(agent, process_id)
        eventually(lambda mine=process_id: mine not in listed(agent), "its end")  # type: ignore[misc]
        agent.hear()


def test_the_last_who_reads_takes_along_what_is_retained_no_longer(agent: KeepingAgent) -> None:
    keep = Keep(buffer=4_000_000, retain=0.2)
    script = "head -c 4000000 /dev/zero; read line"
    process_id = start(agent, "sh", "-c", script, stdin=True, keep=keep)
    with Host(agent) as first:
        attach(first, process_id, write=False)
        host, _ = attach_writer(agent, process_id)
        with host:
            host.write(b"", end=True)
        wait(agent, process_id)
        time.sleep(0.5)  # beyond what it is retained for, but that somebody reads
        with Host(agent) as second:
            attach(second, process_id, write=False)
    eventually(lambda: process_id not in listed(agent), "its end")


def test_who_comes_to_what_is_being_forgotten_is_told(agent: KeepingAgent) -> None:
    process_id = start(agent, "sh", "-c", "echo hello; exec sleep 1000")
    pid = listed(agent)[process_id].pid
    for number in range(1000):  # so that the agent has to wait before it may reap
        agent.send(AreYouThere(number=number))
    with Host(agent) as forgetting, Host(agent) as host:
        forgetting.ping()  # what comes next is the answer
        forgetting.send(Request(op="forget", args=Forget(id=process_id)))
        eventually(lambda: state_of(pid) == "Z", "its end")
        host.send(Request(op="attach", args=Attach(id=process_id)))
        while not select.select([forgetting.sock], [], [], 0)[0]:
            if select.select([agent.pid1], [], [], 0.01)[0]:
                agent.receive_any()
        assert isinstance(forgetting.receive(), Response)
        refusal = host.refusal()
    assert refusal.code == "no_such_process"
    assert "forgotten" in refusal.message


def test_who_waits_for_a_writer_to_leave_is_told_of_the_end(agent: KeepingAgent) -> None:
    for _ in range(10):
        with Host(agent) as writer, Host(agent) as host:
            process_id = writer.start("sh", "-c", "echo hello; exec sleep 1000", keep=Keep()).id
            writer.read_until(b"hello")
            host.send(Request(op="attach", args=Attach(id=process_id)))
            forget(agent, process_id)
            assert host.refusal().code == "no_such_process"
        agent.hear()


def state_of(pid: int) -> str:
    """From proc_pid_stat(5)."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]
