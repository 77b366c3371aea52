"""Processes of real machines, while they run: one suite for every kind of machine."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import machinekit
import pytest
from patience import PATIENCE, SLACK

from microguest import Agent, Keep, Limits, aio, boot, connect
from microguest.errors import ConnectError, ConnectionLost, DeadlineExceeded, OutputStalled
from microguest.guest import bounds
from microguest.guest.errors import MicroguestError, OperationError, StartError
from microguest.host_client.client.process import Process
from microguest.host_client.machines.machine import Machine

MIB = 1024 * 1024
TICKS = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done"


@pytest.fixture(scope="module", params=machinekit.KINDS)
def machine(
    request: pytest.FixtureRequest, module_machines_home: Path, elf: Path
) -> Iterator[Machine]:
    with boot(machinekit.demo_image(), machine=request.param) as machine:
        machine.agent.ping()
        yield machine


@pytest.fixture
def agent(machine: Machine) -> Iterator[Agent]:
    """Its agent; no process of a test may be left."""
    with connect(machine.name) as agent:
        yield agent
        machinekit.wait_until("its processes end", lambda: not running(agent))


def running(agent: Agent) -> list[str]:
    return [each.id for each in agent.processes() if each.exited is None and each.id != "main"]


# ── streams ──────────────────────────────────────────────────────────────────────────────────────


def test_output_arrives_while_it_runs(agent: Agent) -> None:
    script = "echo one; echo two >&2; read answer; echo $answer; exit 4"
    with agent.start(["sh", "-c", script], stdin=True) as process:
        lines = process.stdout.lines()
        assert next(lines) == b"one\n"
        assert process.stderr.read(100) == b"two\n"
        assert process.poll() is None
        process.stdin.write(b"three\n")
        assert next(lines) == b"three\n"
        result = process.wait(PATIENCE)
    assert result.returncode == 4
    assert result.max_rss_kib > 0
    assert process.pid > 1


def test_interleaved_output(agent: Agent) -> None:
    script = "for i in 1 2 3; do echo out$i; read go; echo err$i >&2; read go; done"
    with agent.start(shell=script, stdin=True) as process:
        chunks = []
        for chunk in process:
            chunks.append(chunk)
            process.stdin.write(b"\n")
    assert chunks == [
        (name, b"%s%d\n" % (name[3:].encode(), number))
        for number in (1, 2, 3)
        for name in ("stdout", "stderr")
    ]


def test_much_data_both_ways_on_all_streams(agent: Agent) -> None:
    payload = os.urandom(8 * MIB)
    with agent.start(["sh", "-c", "tee /dev/stderr"], stdin=True) as process:
        result = process.communicate(payload, timeout=100)
    wanted = hashlib.sha256(payload).digest()
    assert hashlib.sha256(result.stdout).digest() == wanted
    assert hashlib.sha256(result.stderr).digest() == wanted


def test_one_thread_feeds_while_another_reads(agent: Agent) -> None:
    payload = os.urandom(8 * MIB)
    with agent.start(["cat"], stdin=True) as process:

        def feed() -> None:
            with process.stdin as stdin:
                stdin.write(payload)

        feeder = threading.Thread(target=feed)
        feeder.start()
        assert process.stdout.read() == payload
        feeder.join(PATIENCE)
        assert process.wait(PATIENCE).returncode == 0


def test_a_flood_on_the_output_that_nobody_reads(agent: Agent) -> None:
    script = "head -c 8000000 /dev/zero >&2; echo done"
    with agent.start(["sh", "-c", script]) as process:
        with pytest.raises(OutputStalled):
            process.stdout.read()
        assert len(process.stderr.read()) == 8_000_000
        assert process.stdout.read() == b"done\n"


def test_many_lines(agent: Agent) -> None:
    with agent.start(["seq", "100000"]) as process:
        count = 0
        for count, line in enumerate(process.stdout.text(), 1):
            assert line == str(count)
    assert count == 100000


def test_output_after_the_exit_is_still_there(agent: Agent) -> None:
    with agent.start(["seq", "10000"]) as process:
        assert process.wait(PATIENCE).returncode == 0
        assert process.stdout.read().count(b"\n") == 10000


# ── starting ─────────────────────────────────────────────────────────────────────────────────────


def test_options(agent: Agent) -> None:
    run = agent.exec
    assert run(shell="echo $0 | tr a-z A-Z").stdout.strip().endswith(b"SH")
    assert run(["env"], env={"A": "b"}, clear_env=True).stdout.count(b"A=b\n") == 1
    assert run(["sh", "-c", "umask"], umask=0o77).stdout == b"0077\n"
    assert b"4242" in run(["id", "-G"], groups=[4242]).stdout.split()
    assert run(["cat", "f"], cwd="/tmp", files={"f": b"\0x"}).stdout == b"\0x"
    limits = Limits(rlimits={"nofile": (33, 44)})
    assert run(["sh", "-c", "ulimit -n; ulimit -Hn"], limits=limits).stdout == b"33\n44\n"
    status = run(
        ["cat", "/proc/self/status"], capabilities=["net_admin"], no_new_privs=True
    ).stdout.decode()
    assert "NoNewPrivs:\t1\n" in status
    assert "CapBnd:\t0000000000001000\n" in status


@pytest.mark.parametrize(
    ("argv", "options", "error", "code"),
    [
        (["true"], {"user": "nobody-here"}, StartError, "bad_user"),
        (["true"], {"groups": ["no-such-group"]}, StartError, "bad_user"),
        (["true"], {"cwd": "/etc/passwd"}, StartError, "bad_cwd"),
        (["true"], {"files": {"/no/such/place": b""}}, StartError, "bad_file"),
        (["true"], {"capabilities": ["fly"]}, ValueError, ""),
        (["true"], {"limits": Limits(rlimits={"luck": (1, 1)})}, ValueError, ""),
        (["true"], {"env": {"A=B": "c"}}, ValueError, ""),
        (["true", "x" * 3 * MIB], {}, StartError, "argument_list_too_long"),
        ([], {}, ValueError, ""),
        (["true", "a\0b"], {}, ValueError, ""),
        (["true"], {"env": {"A": "b\0"}}, ValueError, ""),
        (["true", "x" * 5 * MIB], {}, ValueError, ""),
    ],
)
def test_bad_requests(
    agent: Agent,
    argv: list[str],
    options: dict[str, Any],
    error: type[Exception],
    code: str,
) -> None:
    for call in (agent.exec, agent.start):
        with pytest.raises(error) as caught:
            call(argv, **options)  # type: ignore[operator]
        assert getattr(caught.value, "code", "") == code
    assert not running(agent)


def test_bad_operations(agent: Agent) -> None:
    for call in (
        lambda: agent.attach("p999999"),
        lambda: agent.wait("p999999"),
        lambda: agent.signal("p999999", "TERM"),
        lambda: agent.forget("p999999"),
    ):
        with pytest.raises(OperationError) as caught:
            call()
        assert caught.value.code == "no_such_process"
    with agent.start(["sleep", "100"]) as process:
        with pytest.raises(OperationError) as caught:
            agent.attach(process.id)  # not kept: it is its connection's alone
        assert caught.value.code == "no_such_process"
        for bad in ("NONSENSE", 0, 65):
            with pytest.raises(ValueError, match="signal"):
                process.signal(bad)
            with pytest.raises(ValueError, match="signal"):
                agent.signal(process.id, bad)
        with pytest.raises(ValueError, match="target"):
            process.signal("TERM", "everybody")
        assert process.poll() is None


# ── ending ───────────────────────────────────────────────────────────────────────────────────────


def test_signals_by_name(agent: Agent) -> None:
    script = "trap 'echo got' USR1; echo ready; while :; do sleep 0.05; done"
    with agent.start(["sh", "-c", script]) as process:
        lines = process.stdout.lines()
        assert next(lines) == b"ready\n"
        process.signal("SIGUSR1", "process")
        assert next(lines) == b"got\n"
        assert agent.signal(process.id, "USR1", "process")
        assert next(lines) == b"got\n"
        process.signal("KILL")
        result = process.wait(PATIENCE)
    assert (result.signal, result.shell_code) == (9, 137)


def test_kill_ends_the_whole_tree(agent: Agent) -> None:
    script = "setsid sh -c 'setsid sleep 4321 & sleep 4321' & echo up; sleep 4321"
    with agent.start(["sh", "-c", script]) as process:
        assert next(process.stdout.lines()) == b"up\n"
        process.kill()
        assert process.wait(PATIENCE).signal == 9
    machinekit.wait_until("all of it ends", lambda: b"4321" not in agent.exec(["ps"]).stdout)


def test_timeout_with_grace(agent: Agent) -> None:
    polite = "trap 'echo bye; exit 3' TERM; echo up; while :; do sleep 0.05; done"
    stubborn = "trap '' TERM; echo up; while :; do sleep 0.05; done"
    for script, grace, said, ended in (
        (polite, PATIENCE, b"up\nbye\n", (3, None)),
        (stubborn, 0.3, b"up\n", (-9, 9)),
    ):
        for timeout in (0.5, 5.0, 30.0):  # the next one where its trap was not set by then
            with agent.start(["sh", "-c", script], timeout=timeout, grace=grace) as process:
                result = process.wait(PATIENCE)
                output = process.stdout.read()
            if output:
                break
        assert (output, result.timed_out) == (said, True)
        assert (result.returncode, result.signal) == ended
    assert result.duration >= timeout + 0.25


@pytest.mark.parametrize("phase", ["started", "reading", "input blocked", "output blocked"])
def test_leaving_the_context_kills(agent: Agent, phase: str) -> None:
    argv = {
        "started": ["sleep", "1000"],
        "reading": ["sh", "-c", TICKS],
        "input blocked": ["sleep", "1000"],
        "output blocked": ["cat", "/dev/zero"],
    }[phase]
    with agent.start(argv, stdin=phase == "input blocked") as process:
        if phase == "reading":
            process.stdout.read(10)
        elif phase == "input blocked":
            feeder = threading.Thread(target=feed_until_lost, args=(process,))
            feeder.start()
            time.sleep(0.2)
        elif phase == "output blocked":
            time.sleep(0.2)
    if phase == "input blocked":
        feeder.join(PATIENCE)
        assert not feeder.is_alive()
    try:
        machinekit.wait_until("it ends", lambda: not running(agent))
    finally:
        for left in running(agent):
            agent.signal(left, "KILL", "tree")


def feed_until_lost(process: Process) -> None:
    with suppress(ConnectionLost):
        process.stdin.write(bytes(64 * MIB))


def test_host_killed_with_9(machine: Machine, agent: Agent) -> None:
    program = """
import sys
from microguest import connect
with connect(sys.argv[1]) as agent, agent.start(["sleep", "1000"]) as process:
    print("up", flush=True)
    process.wait()
"""
    with machinekit.python(program, machine.name) as host:
        assert host.stdout is not None
        assert host.stdout.readline() == b"up\n"
        assert len(running(agent)) == 1
        host.kill()
    machinekit.wait_until("it ends", lambda: not running(agent))


# ── kept processes ───────────────────────────────────────────────────────────────────────────────


def test_resuming_in_another_program(machine: Machine, agent: Agent) -> None:
    process = agent.start(["sh", "-c", TICKS], keep=True, label="ticks")
    first = [next(process.stdout.lines()) for _ in range(5)]
    process.detach()
    listed = {each.id: each for each in agent.processes()}[process.id]
    assert (listed.label, listed.kept, listed.exited) == ("ticks", True, None)
    program = f"""
import sys
from microguest import connect
with connect({machine.name!r}) as agent:
    with agent.attach({process.id!r}, offsets={process.offsets!r}) as process:
        lines = process.stdout.lines()
        for _ in range(5):
            sys.stdout.buffer.write(next(lines))
        process.kill()
        process.wait({PATIENCE})
"""
    second = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, timeout=60
    ).stdout
    assert b"".join(first) + second == b"".join(b"%d\n" % n for n in range(1, 11))
    assert agent.wait(process.id, 10).signal == 9
    agent.forget(process.id)
    assert process.id not in {each.id for each in agent.processes()}


def fed_in_vain(process: Process) -> None:
    """What feeds its stdin says so, each time; to end that once more is no error."""
    for feed in (
        lambda: process.stdin.write(b"lost"),
        lambda: process.communicate(b"lost", timeout=PATIENCE),
    ):
        with pytest.raises(ValueError, match="takes no input: it was started without stdin=True"):
            feed()
    process.stdin.close()


@pytest.mark.parametrize("tty", [False, True])
def test_input_that_can_reach_nobody_is_refused_after_an_attach(agent: Agent, tty: bool) -> None:
    """Of a process without stdin, and of one whose stdin an earlier connection has ended."""
    with agent.start(["sleep", "1000"], keep=True) as silent:
        silent.detach()
    with agent.attach(silent.id) as again:
        fed_in_vain(again)
        again.kill()
        again.wait(PATIENCE)
        fed_in_vain(again)
    with agent.start(shell="cat; exec sleep 1000", stdin=True, tty=tty or None, keep=True) as ended:
        ended.stdin.write(b"all\n")
        ended.stdin.close()
        assert next(ended.stdout.lines()).strip() == b"all"
        ended.detach()
    with agent.attach(ended.id) as again:
        fed_in_vain(again)
        again.kill()
    with agent.start(["cat"], stdin=True, keep=True) as open_one:
        open_one.detach()
    with agent.attach(open_one.id) as again:
        assert again.communicate(b"more").stdout == b"more"
    for each in (silent, ended, open_one):
        agent.forget(each.id)


def test_a_machine_without_a_workload_says_so_at_once(agent: Agent) -> None:
    began = time.monotonic()
    with pytest.raises(OperationError, match="no workload to attach to") as caught:
        agent.attach()
    assert caught.value.code == "no_such_process"
    assert time.monotonic() - began < bounds.MAIN_WAIT


def test_one_writes_and_several_watch(agent: Agent) -> None:
    with agent.start(["cat"], stdin=True, keep=True) as writer:
        with pytest.raises(OperationError) as caught:
            agent.attach(writer.id)
        assert caught.value.code == "stdin_taken"
        with (
            agent.attach(writer.id, write=False) as one,
            agent.attach(writer.id, write=False) as two,
        ):
            writer.stdin.write(b"hello\n")
            assert one.stdout.read(100) == two.stdout.read(100) == b"hello\n"
            writer.stdin.close()
            assert writer.wait(PATIENCE).returncode == 0
            assert one.wait(PATIENCE).returncode == two.wait(PATIENCE).returncode == 0
    agent.forget(writer.id)


def test_what_is_not_acknowledged_can_be_read_again(agent: Agent) -> None:
    with agent.start(["seq", "200000"], keep=Keep(buffer=4096), acknowledge=False) as process:
        time.sleep(0.5)
        assert process.poll() is None  # it waits for room in its buffer
        offsets = process.offsets
    with agent.attach(process.id, offsets=offsets) as process:
        assert process.stdout.read() == b"".join(b"%d\n" % n for n in range(1, 200001))
        assert process.wait(PATIENCE).returncode == 0
    agent.forget(process.id)


# ── terminals ────────────────────────────────────────────────────────────────────────────────────


def test_terminal(agent: Agent) -> None:
    script = "trap 'stty size' WINCH; stty size; read x; while :; do sleep 0.05; done"
    with agent.start(["sh", "-c", script], tty=(33, 77)) as process:
        lines = process.stdout.lines()
        assert next(lines) == b"33 77\r\n"
        process.stdin.write(b"go\n")
        assert next(lines) == b"go\r\n"
        process.resize(34, 78)
        assert next(lines) == b"34 78\r\n"
        process.resize(34, 78)
        assert next(lines) == b"34 78\r\n"
        process.stdin.write(b"\x03")
        assert process.wait(PATIENCE).signal == signal.SIGINT


# ── asyncio and trio ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_same_from_an_event_loop(machine: Machine, backend: str) -> None:
    payload = os.urandom(2 * MIB)

    async def main() -> None:
        async with await aio.connect(machine.name) as agent:
            assert (await agent.exec(["cat"], input=payload)).stdout == payload
            with anyio.move_on_after(0.5):
                await agent.exec(["sleep", "1000"])
            async with await agent.start(["sh", "-c", TICKS]) as process:
                lines = process.stdout.lines()
                assert [await anext(lines) for _ in range(3)] == [b"1\n", b"2\n", b"3\n"]
                await process.kill()
                assert (await process.wait(PATIENCE)).signal == 9
            results = []

            async def run(number: int) -> None:
                results.append((await agent.exec(["echo", str(number)])).stdout)

            async with anyio.create_task_group() as tasks:
                for number in range(16):
                    tasks.start_soon(run, number)
            assert sorted(results) == sorted(b"%d\n" % number for number in range(16))

    anyio.run(main, backend=backend)


# ── dead machines ────────────────────────────────────────────────────────────────────────────────

SLEEP = ["sleep", "1000"]


def wait_in_exec(agent: Agent) -> None:
    agent.exec(SLEEP)


def wait_in_read(agent: Agent) -> None:
    with agent.start(SLEEP) as process:
        process.stdout.read()


def wait_for_end(agent: Agent) -> None:
    with agent.start(SLEEP) as process:
        process.wait()


def wait_by_id(agent: Agent) -> None:
    with agent.start(SLEEP) as process:
        agent.wait(process.id)


def wait_in_write(agent: Agent) -> None:
    with agent.start(SLEEP, stdin=True) as process:
        process.stdin.write(bytes(64 * MIB))


WAITS: list[Callable[[Agent], None]] = [
    wait_in_exec,
    wait_in_read,
    wait_for_end,
    wait_by_id,
    wait_in_write,
]


@pytest.mark.parametrize("how", ["killed", pytest.param("frozen", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", machinekit.KINDS)
def test_a_dead_machine_ends_every_wait(
    kind: str, how: str, module_machines_home: Path, elf: Path
) -> None:
    """Frozen: stopped by SIGSTOP, which closes no connection."""
    with (
        boot(machinekit.demo_image(), machine=kind) as machine,
        connect(machine.name, timeout=3) as by_name,
    ):
        agents = {"by name": by_name, "its own": machine.agent}
        machine.agent.driver.timeout = 3
        ended: dict[tuple[str, str], tuple[float, BaseException]] = {}

        def wait(whose: str, call: Callable[[Agent], None]) -> None:
            try:
                call(agents[whose])
            except (MicroguestError, OSError) as error:
                ended[whose, call.__name__] = (time.monotonic(), error)

        threads = [
            threading.Thread(target=wait, args=(whose, call)) for whose in agents for call in WAITS
        ]
        for thread in threads:
            thread.start()
        machinekit.wait_until(
            "all are started",
            lambda: len(running(machine.agent)) == len(threads),
        )
        time.sleep(0.5)
        vmm = machine.state.vmm
        family = machinekit.family(vmm)
        died = time.monotonic()
        for pid in family if how == "frozen" else [vmm]:
            os.kill(pid, signal.SIGSTOP if how == "frozen" else signal.SIGKILL)
        try:
            for thread in threads:
                thread.join(PATIENCE)
            assert not any(thread.is_alive() for thread in threads)
        finally:
            for pid in family:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            machine.kill()
    for (whose, what), (at, error) in ended.items():
        assert at - died < (5 if how == "killed" else 15) + SLACK, (whose, what)
        expected = ConnectionLost | DeadlineExceeded | ConnectError
        assert isinstance(error, expected), (whose, what, error)
        if how == "killed":
            assert machine.name in str(error), (whose, what, error)
    assert len(ended) == len(threads)
