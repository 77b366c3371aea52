"""Kept processes in whole machines: what an agent that is killed leaves to the next one."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agentharness import Closed, Host, Refused
from init_machine import (
    TOKEN,
    Machine,
    boot_config,
    children,
    command_of,
    descendants,
    make_root,
    require_program,
    state_of,
    wait_for,
)
from patience import PATIENCE, SLACK

from microguest.guest.wire.connection import Data, Event, Request, Response, State
from microguest.guest.wire.messages import (
    Acknowledge,
    Attach,
    Exited,
    Forget,
    Hello,
    Info,
    InfoResult,
    Keep,
    ListProcesses,
    ProcessInfo,
    ProcessList,
    Start,
    Started,
    Wait,
    Winsize,
)

GONE = (Closed, BrokenPipeError, ConnectionResetError)  # how an agent's death looks
LINES = 120_000
EXPECTED = b"".join(b"%d\n" % number for number in range(1, LINES + 1))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_program()
    return make_root(tmp_path_factory.mktemp("image"))


@pytest.fixture
def machine(root: Path) -> Iterator[Machine]:
    with Machine(root, boot_config()) as machine:
        machine.report("ready")
        yield machine


class Door:
    """What `Host` dials."""

    def __init__(self, machine: Machine) -> None:
        self.path = str(machine.host / "agent.sock")


def dial(machine: Machine) -> Host:
    """Said hello to, by an agent that lives at least so long."""
    deadline = time.monotonic() + PATIENCE
    while True:
        host = Host(Door(machine), hello=False)  # type: ignore[arg-type]
        try:
            host.send(Hello(token=TOKEN))
        except GONE:
            host.sock.close()
            assert time.monotonic() < deadline
        else:
            return host


def ask(machine: Machine, op: str, args: Any) -> Any:
    """A small request, again where the agent died meanwhile."""
    deadline = time.monotonic() + PATIENCE
    while True:
        with dial(machine) as host:
            try:
                return host.request(op, args)
            except GONE:
                assert time.monotonic() < deadline


def start(machine: Machine, *argv: str, **options: Any) -> Started:
    """Start a kept process and leave it alone, with nothing acknowledged."""
    options.setdefault("keep", Keep())
    with dial(machine) as host:
        host.send(Request(op="start", args=Start(argv=argv, **options)), Acknowledge())
        response = host.receive()
    assert isinstance(response, Response)
    assert isinstance(response.result, Started)
    return response.result


def attach(machine: Machine, process_id: str, **options: Any) -> tuple[Host, Started]:
    """As soon as there is an agent, and as soon as the last writer is seen to be gone."""
    deadline = time.monotonic() + PATIENCE
    while True:
        host = dial(machine)
        request = Request(op="attach", args=Attach(id=process_id, **options))
        acknowledged = (options.get("offsets") or {}).get("stdout", 0)
        try:
            host.send(request, Acknowledge(stdout=max(0, acknowledged)))
            event = host.receive()
        except (*GONE, Refused) as error:
            host.sock.close()
            if isinstance(error, Refused) and error.failure.code != "stdin_taken":
                raise
            assert time.monotonic() < deadline
            continue
        assert isinstance(event, Response)
        assert isinstance(event.result, Started)
        return host, event.result


def kill_agent(machine: Machine) -> None:
    """It is gone, and reported to be."""
    os.kill(machine.agent_pid(), signal.SIGKILL)
    machine.report("agent_exited")


def listed(machine: Machine) -> dict[str, ProcessInfo]:
    result = ask(machine, "processes", ListProcesses())
    assert isinstance(result, ProcessList)
    return {info.id: info for info in result.processes}


def wait(machine: Machine, process_id: str) -> Exited:
    exited = ask(machine, "wait", Wait(id=process_id, timeout=PATIENCE))
    assert isinstance(exited, Exited)
    return exited


def test_streams_stay_the_users_after_the_agents_death(machine: Machine) -> None:
    script = "read a; echo $a >/dev/stdout; read b </dev/stdin; echo $b >>/proc/self/fd/2"
    started = start(machine, "sh", "-c", script, user="tester", stdin=True)
    os.kill(machine.agent_pid(), signal.SIGKILL)
    host, _ = attach(machine, started.id)
    with host:
        host.write(b"one\n")
        assert host.read_until(b"one\n") == b"one\n"
        host.write(b"two\n")
        assert host.read_until(b"two\n", outputs=(2,)) == b"two\n"


@pytest.mark.parametrize("seed", [1, 2])
def test_output_is_whole_however_often_the_agent_is_killed(machine: Machine, seed: int) -> None:
    chance = random.Random(seed)
    script = f"seq 1 {LINES}; exit 5"
    process_id = start(machine, "sh", "-c", script, keep=Keep(buffer=16 * 1024)).id
    have = bytearray()
    kills, exited = 0, None
    while exited is None:
        host, started = attach(machine, process_id, offsets={"stdout": len(have)})
        until = len(have) + chance.randrange(1, len(EXPECTED) // 4)
        try:
            with host:
                assert started.offsets.get("stdout", 0) == len(have)
                exited = read_until(host, have, until)
                if exited is None and kills < 4:
                    os.kill(machine.agent_pid(), signal.SIGKILL)
                    kills += 1
                    exited = read_until(host, have, len(EXPECTED))
        except GONE:
            machine.report("agent_exited")
    assert kills == 4
    assert bytes(have) == EXPECTED
    assert (exited.code, exited.dropped) == (5, {})


def read_until(host: Host, have: bytearray, until: int) -> Exited | None:
    acknowledged = len(have)
    while len(have) < until:
        event: Event = host.receive()
        if isinstance(event, Data):
            have += event.data
        elif isinstance(event, Exited):
            return event
        if len(have) > acknowledged + 5000:
            acknowledged = len(have)
            if host.connection.state is State.PROCESS:  # it may be at its end already
                host.send(Acknowledge(stdout=acknowledged))
    return None


def test_an_end_that_no_agent_saw(machine: Machine) -> None:
    script = "until test -e /tmp/end; do sleep 0.05; done; echo last; exit 9"
    process_id = start(machine, "sh", "-c", script).id
    agent = machine.agent_pid()
    (pid,) = children(agent)
    os.kill(agent, signal.SIGSTOP)
    time.sleep(0.3)
    Path(f"/proc/{pid}/root/tmp/end").touch()
    wait_for(lambda: state_of(pid) == "Z", "its end")
    kill_agent(machine)
    exited = wait(machine, process_id)
    assert exited.code == 9
    assert 0.25 < exited.duration < 5 + SLACK
    host, _ = attach(machine, process_id)
    with host:
        assert host.collect().stdout == b"last\n"
    wait_for(lambda: not state_of(pid), "it to be reaped")


def test_an_end_that_an_agent_saw_is_still_known(machine: Machine) -> None:
    process_id = start(machine, "sh", "-c", "echo x; kill -SEGV $$", label="known").id
    before = wait(machine, process_id)
    kill_agent(machine)
    info = listed(machine)[process_id]
    assert (info.exited, info.label, info.argv[0]) == (before, "known", "sh")
    assert info.retained == {"stdout": 2, "stderr": 0}
    ask(machine, "forget", Forget(id=process_id))
    kill_agent(machine)
    assert listed(machine) == {}


def test_input_goes_on_with_the_next_agent(machine: Machine) -> None:
    process_id = start(machine, "cat", stdin=True).id
    for line in (b"one\n", b"two\n", b"six\n"):
        host, _ = attach(machine, process_id, offsets={"stdout": -1})
        with host:
            host.write(line)
            event = host.receive()
            assert isinstance(event, Data)
            assert event.data == line
        kill_agent(machine)
    host, _ = attach(machine, process_id)
    with host:
        host.write(b"", end=True)
        assert host.collect().stdout == b"one\ntwo\nsix\n"


def test_a_terminal_goes_on_with_the_next_agent(machine: Machine) -> None:
    script = "read a; stty size; read b; echo $a $b"
    size = Winsize(rows=20, columns=70)
    process_id = start(machine, "sh", "-c", script, tty=size, stdin=True).id
    host, _ = attach(machine, process_id)
    with host:
        host.write(b"one\n")
        seen = host.read_until(b"20 70\r\n")
    kill_agent(machine)
    host, started = attach(machine, process_id, offsets={"stdout": len(seen)})
    with host:
        assert started.offsets["stdout"] == len(seen)
        host.resize(30, 80)
        host.write(b"two\n")
        assert host.collect().stdout == b"two\r\none two\r\n"


def test_an_ended_input_stays_ended(machine: Machine) -> None:
    script = "cat; echo ended; sleep 0.5; cat; echo over"
    process_id = start(machine, "sh", "-c", script, stdin=True).id
    host, _ = attach(machine, process_id)
    with host:
        host.write(b"line\n", end=True)
        host.read_until(b"ended\n")
    kill_agent(machine)
    host, _ = attach(machine, process_id)
    with host:
        assert host.collect().stdout == b"line\nended\nover\n"


def test_the_next_agent_kills_and_times_out_as_the_first(machine: Machine) -> None:
    first = start(machine, "sh", "-c", "setsid sleep 4343 & sleep 4343").id
    second = start(machine, "sleep", "4343", timeout=1.0).id
    kill_agent(machine)
    exited = wait(machine, second)
    assert (exited.timed_out, exited.signal) == (True, signal.SIGTERM)
    ask(machine, "forget", Forget(id=first))
    wait_for(lambda: not sleepers(machine), "the end of all of it")


def test_what_is_not_kept_dies_with_the_agent(machine: Machine) -> None:
    kept = start(machine, "sleep", "4343").id
    with dial(machine) as host:
        host.start("sh", "-c", "setsid sleep 4343 & (sleep 4343 &) ; sleep 4343")
        wait_for(lambda: len(sleepers(machine)) == 4, "all of it")
        kill_agent(machine)
    wait_for(lambda: len(sleepers(machine)) == 1, "the end of what is not kept")
    time.sleep(0.1)
    assert list(listed(machine)) == [kept]
    assert len(sleepers(machine)) == 1


def sleepers(machine: Machine, seconds: str = "4343") -> list[int]:
    return [
        pid
        for pid in descendants(machine.process.pid)
        if command_of(pid) == ["sleep", seconds] and state_of(pid) != "Z"
    ]


def test_a_full_house_survives_a_restart(machine: Machine) -> None:
    ids = [start(machine, "sleep", "4343").id for _ in range(256)]
    with dial(machine) as host:
        host.send(Request(op="start", args=Start(argv=("true",), keep=Keep())))
        assert host.refusal().code == "cannot_keep"
    kill_agent(machine)
    info = ask(machine, "info", Info())
    assert isinstance(info, InfoResult)
    assert sorted(listed(machine)) == sorted(ids)
    for process_id in ids:
        ask(machine, "forget", Forget(id=process_id))
    wait_for(lambda: not sleepers(machine), "their end")


def test_processes_get_the_limits_of_pid_1(machine: Machine) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = max(soft, min(hard, 2**20))
    process_id = start(machine, "sh", "-c", "ulimit -n; ulimit -Hn").id
    wait(machine, process_id)
    host, _ = attach(machine, process_id)
    with host:
        assert host.collect().stdout == f"{soft}\n{hard}\n".encode()


def test_the_workload_is_kept_as_well(root: Path) -> None:
    script = "while read line; do echo got $line; done; echo over; exit 3"
    with Machine(root, boot_config(["sh", "-c", script], stdio="attached")) as machine:
        machine.report("ready")
        machine.report("workload_started")
        for number in (1, 2):
            host, _ = attach(machine, "main", offsets={"stdout": -1})
            with host:
                host.write(b"%d\n" % number)
                event = host.receive()
                assert isinstance(event, Data)
                assert event.data == b"got %d\n" % number
            kill_agent(machine)
        wait_for(lambda: "main" in listed(machine), "the workload to be served again")
        with dial(machine) as watcher:
            watcher.request("attach", Attach(id="main", write=False))
            host, started = attach(machine, "main", offsets={"stdout": 6})
            with host:
                assert started.offsets["stdout"] == 6
                host.write(b"", end=True)
                result = host.collect()
                # When the writer has gone the machine ends.
                assert watcher.collect().stdout == b"got 1\ngot 2\nover\n"
            assert result.stdout == b"got 2\nover\n"
        assert result.exited.code == 3
        assert machine.report("workload_exited")["code"] == 3
        assert machine.report("stopping")["status"] == "done"
        assert machine.wait() == 0


SPLICE = {"x86_64": "275", "aarch64": "76"}[os.uname().machine]


@pytest.fixture(scope="module")
def holder(root: Path) -> str:
    """A program in the image that holds the lock of its own pipe: tests/data/holder.c."""
    if shutil.which("gcc") is None:
        pytest.skip("needs a C compiler: apt install gcc")
    source = Path(__file__).parent / "data" / "holder.c"
    command = ["gcc", "-static", "-pthread", "-o", str(root / "bin" / "holder"), str(source)]
    subprocess.run(command, check=True)
    return "holder"


def holders(machine: Machine) -> list[int]:
    """Those that wait in splice(2), with the lock."""
    return [pid for pid in descendants(machine.process.pid) if splices(pid)]


def splices(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/syscall").read_text().split()[0] == SPLICE
    except OSError:
        return False


def test_input_that_ends_while_its_pipe_is_held_stops_neither_pid_1_nor_the_agent(
    machine: Machine, holder: str
) -> None:
    process_id = start(machine, holder, "stdin", stdin=True).id
    host, _ = attach(machine, process_id)
    with host:
        host.write(b"go on")
        wait_for(lambda: holders(machine), "the lock to be held")
        host.write(b"", end=True)
        assert host.collect().exited.signal == signal.SIGKILL
    assert listed(machine)[process_id].exited is not None
    ask(machine, "forget", Forget(id=process_id))
    pid_1_turns(machine)


def test_output_that_is_cut_while_its_pipe_is_held_stops_neither_pid_1_nor_the_agent(
    machine: Machine, holder: str
) -> None:
    started = start(machine, holder, "orphan")
    assert wait(machine, started.id).code == 7
    wait_for(lambda: not holders(machine), "the end of who held it")
    pid_1_turns(machine)


def pid_1_turns(machine: Machine) -> None:
    """It starts another agent, which serves."""
    kill_agent(machine)
    listed(machine)


@pytest.mark.parametrize("stdio", ["console", "attached"])
def test_a_workload_that_is_traced_when_it_ends_ends_its_machine(root: Path, stdio: str) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("needs a C compiler: apt install gcc")
    source = Path(__file__).parent / "data" / "traced.c"
    subprocess.run(["gcc", "-static", "-o", str(root / "bin" / "traced"), str(source)], check=True)
    config = boot_config()
    argv = ["sh", "-c", "until [ -e /tmp/go ]; do sleep 0.05; done; exec traced"]
    config["workload"] = {"argv": argv, "stdio": stdio, "output_wait": 0.5}
    with Machine(root, config) as machine:
        machine.report("ready")
        machine.report("workload_started")
        start(machine, "touch", "/tmp/go")
        assert machine.report("workload_exited")["code"] == 7
        assert machine.report("stopping")["status"] == "done"
        assert machine.wait() == 0


def test_a_killed_agent_whose_pipe_is_held_is_replaced(root: Path, holder: str) -> None:
    config = boot_config()
    config["agent"]["watchdog"] = 0.2
    with Machine(root, config) as machine:
        machine.report("ready")
        kept = start(machine, "sleep", "4343").id
        with dial(machine) as host:
            host.start(holder, "stdout")
            wait_for(lambda: holders(machine), "the lock to be held")
            kill_agent(machine)
        assert list(listed(machine)) == [kept]
        assert len(sleepers(machine)) == 1
        assert not holders(machine)


@pytest.mark.parametrize("stdio", ["console", "attached"])
def test_the_workload_is_listed_as_it_was_started(root: Path, stdio: str) -> None:
    """What /proc shows is in memory of its own, for which a reader may have to wait."""
    started = ("sh", "-c", "exec sleep 4348")
    config = boot_config(list(started), stdio=stdio)
    with Machine(root, config) as machine:
        machine.report("ready")
        machine.report("workload_started")
        assert wait_for(lambda: listed(machine).get("main"), "the workload").argv == started
        wait_for(lambda: sleepers(machine, "4348"), "another program")
        kill_agent(machine)
        assert wait_for(lambda: listed(machine).get("main"), "the workload").argv == started
