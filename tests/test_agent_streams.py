"""Every byte of every stream: in races with the exit, in bulk, past slow readers and thieves."""

import contextlib
import hashlib
import itertools
import os
import pathlib
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from agentharness import AgentProcess, Closed, Host, Result, execute, run_into_timeout
from patience import PATIENCE, SLACK

from microguest.guest import bounds
from microguest.guest.wire.connection import Data, End
from microguest.guest.wire.messages import Acknowledge, Detach, Exited

MIB = 1024 * 1024
ROUNDS = 500  # of each race, over THREADS connections at a time
THREADS = 4
GONE = PATIENCE  # seconds in which a killed process must have disappeared


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentProcess]:
    with AgentProcess() as process:
        yield process


def shell(agent: AgentProcess, script: str, **options: object) -> Result:
    return execute(agent, "sh", "-c", script, **options)


def numbers(count: int) -> bytes:
    """What seq(1) writes."""
    return b"".join(b"%d\n" % number for number in range(1, count + 1))


def wait_for_children(agent: AgentProcess) -> None:
    deadline = time.monotonic() + GONE
    while agent.children():
        assert time.monotonic() < deadline, agent.children()
        time.sleep(0.01)


# ── races with the exit ──────────────────────────────────────────────────────────────────────────


class Race:
    """Rounds of one kind, in several threads; what went wrong is collected, not raised."""

    def __init__(self, agent: AgentProcess) -> None:
        self.agent = agent
        self.failures: list[str] = []

    def round(self, number: int) -> str:
        """One process; what was wrong with it, "" for nothing."""
        raise NotImplementedError

    def run(self) -> None:
        numbers = iter(range(ROUNDS))
        lock = threading.Lock()

        def work() -> None:
            while not self.failures:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                try:
                    problem = self.round(number)
                except Exception as error:  # noqa: BLE001  a thread's error must fail the test
                    problem = repr(error)
                if problem:
                    self.failures.append(f"round {number}: {problem}")

        threads = [threading.Thread(target=work) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert self.failures == []


class WriteThenExit(Race):
    def round(self, number: int) -> str:
        size, code = 1 + number * 397 % 150_000, number % 256
        script = f"head -c {size} /dev/zero; echo {number} >&2; exit {code}"
        result = shell(self.agent, script)
        got = (len(result.stdout), result.stderr, result.exited.code)
        return "" if got == (size, b"%d\n" % number, code) else f"{got}, not {size} and {code}"


class ExitWithFullPipe(Race):
    def round(self, number: int) -> str:
        with Host(self.agent) as host:
            host.start("sh", "-c", f"head -c 65536 /dev/zero; exit {number % 256}")
            time.sleep(0.001 * (number % 4))
            result = host.collect()
        got = (len(result.stdout), result.exited.code)
        return "" if got == (65536, number % 256) else repr(got)


class InstantExit(Race):
    def round(self, number: int) -> str:
        result = shell(self.agent, f"exit {number % 256}")
        got = (result.stdout, result.stderr, result.exited.code)
        return "" if got == (b"", b"", number % 256) else repr(got)


class KilledMidWrite(Race):
    """Kills itself behind a last line, or is killed by the host while it pours out numbers."""

    pattern = numbers(800_000)

    def round(self, number: int) -> str:
        if number % 2:
            count = 1 + number * 13 % 3000
            result = shell(self.agent, f"seq 1 {count}; kill -KILL $$")
            return "" if result.stdout == numbers(count) else f"{len(result.stdout)} bytes"
        with Host(self.agent) as host:
            host.start("seq", "1", "100000000")
            seen = host.read_until(b"\n")
            host.signal(signal.SIGKILL, "process")
            result = host.collect()
        output = seen + result.stdout
        if result.exited.signal != signal.SIGKILL:
            return repr(result.exited)
        if len(output) > len(self.pattern):
            return f"{len(output)} bytes, more than pipe and socket hold"
        return "" if self.pattern.startswith(output) else "a gap in the output"


@pytest.mark.parametrize("race", [WriteThenExit, ExitWithFullPipe, InstantExit, KilledMidWrite])
def test_exit_races_lose_nothing(agent: AgentProcess, race: type[Race]) -> None:
    race(agent).run()
    wait_for_children(agent)


def test_what_was_written_when_it_was_killed_arrives(
    agent: AgentProcess, tmp_path: pathlib.Path
) -> None:
    """The process keeps a record, after each line, of the lines that it has written."""
    record = tmp_path / "record"
    script = f"i=0; while :; do i=$((i+1)); echo $i; echo $i > {record}; done"
    for _ in range(20):
        with Host(agent) as host:
            host.start("sh", "-c", script)
            seen = host.read_until(b"\n100\n")
            host.signal(signal.SIGKILL)
            lines = (seen + host.collect().stdout).split()
        written = record.read_text().strip()
        assert lines == [b"%d" % number for number in range(1, len(lines) + 1)]
        assert len(lines) >= int(written or 0)


# ── bulk ─────────────────────────────────────────────────────────────────────────────────────────


def test_bulk_through_all_streams_at_once(agent: AgentProcess) -> None:
    """200 MiB in, and the same out of stdout and of stderr."""
    size, block = 200 * MIB, os.urandom(MIB)
    expected = hashlib.sha256(block * 200).hexdigest()
    digests = {1: hashlib.sha256(), 2: hashlib.sha256()}
    counts = {1: 0, 2: 0}
    with Host(agent) as host:
        host.start("tee", "/dev/stderr", stdin=True)
        feeder = threading.Thread(target=feed, args=(host, block, size // len(block)))
        feeder.start()
        while not isinstance(event := host.receive(), Exited):
            if isinstance(event, Data):
                digests[event.stream].update(event.data)
                counts[event.stream] += len(event.data)
        feeder.join()
    assert event.code == 0
    assert counts == {1: size, 2: size}
    assert {digest.hexdigest() for digest in digests.values()} == {expected}


def feed(host: Host, block: bytes, times: int) -> None:
    """Sending is independent of receiving in the protocol's state machine, once started."""
    for _ in range(times):
        host.write(block)
    host.write(b"", end=True)


def test_reader_that_takes_a_little_at_a_time(agent: AgentProcess) -> None:
    """Headers and payloads are taken apart wherever a write to the socket can stop."""
    expected = numbers(150_000)
    with Host(agent) as host:
        host.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host.start("sh", "-c", "seq 1 150000; seq 1 150000 >&2")
        outputs = {1: bytearray(), 2: bytearray()}
        sizes = itertools.cycle([1, 7, 8, 9, 4095, 16385, 100_003])
        while not isinstance(event := host.receive(), Exited):
            host.read_size = next(sizes)
            if isinstance(event, Data):
                outputs[event.stream] += event.data
    assert event.code == 0
    assert event.open_streams == ()
    assert outputs == {1: expected, 2: expected}


def test_pieces_of_every_size_keep_their_order(agent: AgentProcess) -> None:
    """From single bytes to more than a pipe holds, so that both ways of moving them take turns."""
    script = "for n in 1 100000 3 20000 16384 16385 5 300000 4096 4095 1; do seq 1 $n; done"
    sizes = (1, 100000, 3, 20000, 16384, 16385, 5, 300000, 4096, 4095, 1)
    expected = b"".join(numbers(size) for size in sizes)
    for _ in range(5):
        assert shell(agent, script).stdout == expected


def test_stalled_readers_cost_the_agent_no_memory() -> None:
    with AgentProcess() as agent:
        for _ in range(20):
            execute(agent, "true")
        before = agent.resident_kib()
        with contextlib.ExitStack() as stack:
            for _ in range(64):
                host = stack.enter_context(Host(agent))
                host.start("sh", "-c", "head -c 5000000 /dev/zero & yes >&2")
            time.sleep(2.5)
            assert agent.resident_kib() - before < 2 * 1024
            with Host(agent) as other:
                started = time.monotonic()
                other.ping()
                assert time.monotonic() - started < SLACK
        wait_for_children(agent)


def test_stolen_output_ends_that_connection_only(agent: AgentProcess) -> None:
    """Another process opens the pipe through /proc and reads what was announced to the host."""
    with Host(agent) as host:
        started = host.start("sh", "-c", "yes & exec yes")
        try:
            thief = os.open(f"/proc/{started.pid}/fd/1", os.O_RDONLY | os.O_NONBLOCK)
        except PermissionError:
            pytest.skip("another process's descriptors cannot be opened here")
        host.sock.settimeout(0.5)
        deadline = time.monotonic() + 2
        with contextlib.suppress(Closed, TimeoutError):
            while time.monotonic() < deadline:
                with contextlib.suppress(BlockingIOError):
                    os.read(thief, MIB)
                event = host.receive()  # raises for frames that are not in order
                assert isinstance(event, Data)
                assert set(event.data) <= set(b"y\n")
        os.close(thief)
    assert execute(agent, "echo", "on").stdout == b"on\n"
    wait_for_children(agent)


# ── input ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("target", ["process", "group", "tree"])
def test_signal_behind_stuck_input_is_seen(agent: AgentProcess, target: str) -> None:
    with Host(agent) as host:
        host.start("sleep", "100", stdin=True)
        host.write(b"x" * bounds.DATA_PAYLOAD)
        host.signal(signal.SIGTERM, target)
        assert host.collect().exited.signal == signal.SIGTERM


def test_detach_behind_stuck_input_kills_what_is_not_kept(agent: AgentProcess) -> None:
    with Host(agent) as host:
        host.start("sh", "-c", "sleep 100 & exec sleep 100", stdin=True)
        host.write(b"x" * bounds.DATA_PAYLOAD)
        host.send(Detach())
        assert host.sock.recv(1) == b""
    wait_for_children(agent)


def test_stuck_input_is_bounded(agent: AgentProcess) -> None:
    resident = agent.resident_kib()
    with Host(agent) as host:
        host.start("sleep", "100", stdin=True)
        host.sock.settimeout(0.3)
        sent = 0
        with contextlib.suppress(TimeoutError):
            for _ in range(8):
                host.write(b"x" * MIB)
                sent += MIB
        assert sent < 4 * MIB
        assert agent.resident_kib() - resident < 512
    wait_for_children(agent)


def test_acknowledging_what_is_not_kept_changes_nothing(agent: AgentProcess) -> None:
    with Host(agent) as host:
        host.start("sh", "-c", "read line; echo $line", stdin=True)
        host.send(Acknowledge(stdout=1))
        host.write(b"x\n")
        assert host.collect().stdout == b"x\n"


# ── the drain ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("idle", "cap", "expected"), [(0.3, 90.0, 0.3), (90.0, 0.4, 0.4), (0, 0, 0)]
)
def test_drain_is_as_asked(agent: AgentProcess, idle: float, cap: float, expected: float) -> None:
    started = time.monotonic()
    script = "exec 2>&-; setsid sleep 300 & echo $!; exit 6"
    result = shell(agent, script, drain_idle=idle, drain_cap=cap)
    elapsed = time.monotonic() - started
    os.kill(int(result.stdout), signal.SIGKILL)
    assert expected <= elapsed < expected + SLACK
    assert result.exited.open_streams == ("stdout",)
    assert result.exited.code == 6


def test_drain_waits_for_a_reader(agent: AgentProcess) -> None:
    """The clock stands still while the host does not read; then what comes meanwhile counts."""
    script = "(head -c 3000000 /dev/zero; echo end) & exit 0"
    with Host(agent) as host:
        host.start("sh", "-c", script, drain_idle=4.0, drain_cap=4.0)
        time.sleep(4.5)
        result = host.collect()
    assert len(result.stdout) == 3_000_004
    assert result.exited.open_streams == ()


def test_streams_end_one_by_one(agent: AgentProcess) -> None:
    with Host(agent) as host:
        host.start("sh", "-c", "exec >&-; read line; echo still >&2", stdin=True)
        assert host.receive() == End(stream=1)
        host.write(b"go on\n")
        assert host.collect().stderr == b"still\n"


FAST = 0.0015  # seconds between two lines; the agent gathers those within 2 ms


def test_lines_that_are_written_one_by_one_are_gathered(agent: AgentProcess) -> None:
    """Where they come fast: on a busy machine they may not, and are sent as they come then."""
    script = "i=0; while [ $i -lt 400 ]; do i=$((i+1)); echo $i; /bin/true; done"
    for _ in range(10):
        began = time.monotonic()
        with Host(agent) as host:
            host.start("sh", "-c", script)
            output, frames = b"", 0
            while not isinstance(event := host.receive(), Exited):
                if isinstance(event, Data):
                    output += event.data
                    frames += 1
        assert output == numbers(400)
        if frames < max(200, (time.monotonic() - began) / FAST):
            break
    else:
        pytest.fail(f"{frames} frames")


def test_grace_is_as_asked(agent: AgentProcess) -> None:
    script = "trap '' TERM; echo up; while :; do sleep 0.02; done"
    result, timeout = run_into_timeout(agent, script, grace=2.0)
    assert timeout + 2.0 <= result.exited.duration < timeout + 2.0 + SLACK
    assert result.exited.timed_out
    assert result.exited.signal == signal.SIGKILL


def test_wrong_stream_is_refused(agent: AgentProcess) -> None:
    with Host(agent) as host:
        host.start("sleep", "100")
        host.send_raw(bytes.fromhex("00000001 06 00 0000") + b"x")  # no stdin was asked for
        assert host.refusal().code == "bad_request"
    wait_for_children(agent)
