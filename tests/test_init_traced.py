"""PID 1 and debuggers of its children, which keep their ends from it: ptrace(2)."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from init_machine import (
    Machine,
    boot_config,
    command_of,
    make_root,
    require_program,
    state_of,
    wait_for,
)
from patience import SLACK
from test_agent_traced import PRELUDE
from test_machine_keep import attach, kill_agent, listed, start, wait

from microguest.guest import bounds
from microguest.guest.wire.connection import Data

NOTHING, TRACEEXIT = 0, 0x40  # options of ptrace(2)
WALL = 0x40000000  # __WALL of wait(2): threads as well
DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a program that traces its parent, and one that has its parent trace it."""
    require_program()
    if shutil.which("gcc") is None:
        pytest.skip("needs a C compiler: apt install gcc")
    root = make_root(tmp_path_factory.mktemp("image"))
    for name in ("tracer", "traceme"):
        program, source = str(root / "bin" / name), str(DATA / f"{name}.c")
        subprocess.run(["gcc", "-static", "-o", program, source], check=True)
    return root


def trace_agent(machine: Machine, options: int, threads: str) -> str:
    """From within; the id of the kept process that does."""
    tracer = start(machine, "tracer", str(options), threads).id
    host, _ = attach(machine, tracer)
    with host:
        wait_for(lambda: host.receive() == Data(stream=1, data=b"traced\n"), "it is traced")
    return tracer


@contextlib.contextmanager
def traced_from_outside(pid: int) -> Iterator[None]:
    """By the test, with all its threads; it has ended at the end of this, and is let go then."""
    names: dict[str, Any] = {}
    exec(PRELUDE, names)
    threads = [int(thread) for thread in os.listdir(f"/proc/{pid}/task")]
    for thread in threads:
        names["trace"](thread)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # where the test has failed
        for thread in sorted(threads, key=lambda thread: thread == pid):  # the first one last
            with contextlib.suppress(ChildProcessError):
                os.waitpid(thread, WALL)


@pytest.mark.parametrize(
    ("options", "threads", "watchdog"),
    [(NOTHING, "first", 0), (NOTHING, "all", 0), (TRACEEXIT, "all", 0.2)],
    ids=["ended", "ended-threads", "ending"],
)
def test_an_agent_that_is_traced_when_it_is_killed_is_replaced(
    root: Path, options: int, threads: str, watchdog: float
) -> None:
    """One that stands in its end has closed nothing yet, and so is found by the watchdog."""
    config = boot_config()
    config["agent"]["watchdog"] = watchdog
    with Machine(root, config) as machine:
        machine.report("ready")
        kept = start(machine, "sleep", "4344").id
        tracer = trace_agent(machine, options, threads)
        os.kill(machine.agent_pid(), signal.SIGKILL)
        assert machine.report("agent_exited")["signal"] == signal.SIGKILL
        assert machine.report("agent_serves")["starts"] == 2
        assert listed(machine)[kept].exited is None
        wait_for(lambda: listed(machine)[tracer].exited is not None, "the end of who traced it")
        assert "was kept from its end by who traces it" in machine.console


def test_an_agent_that_is_traced_from_outside_is_replaced(root: Path) -> None:
    """PID 1 cannot kill who does; what is reaped in the end is nobody's."""
    with Machine(root, boot_config()) as machine:
        machine.report("ready")
        kept = start(machine, "sleep", "4345").id
        agent = machine.agent_pid()
        with traced_from_outside(agent):
            os.kill(agent, signal.SIGKILL)
            began = time.monotonic()
            assert machine.report("agent_exited")["signal"] == signal.SIGKILL
            assert machine.report("agent_serves")["starts"] == 2
            assert time.monotonic() - began < bounds.TRACED_END + SLACK
            assert state_of(agent) == "Z"
            assert listed(machine)[kept].exited is None
        wait_for(lambda: not state_of(agent), "it is reaped")
        assert listed(machine)[kept].exited is None


@pytest.mark.parametrize("stdio", ["console", "attached"])
def test_a_workload_that_is_traced_from_outside_ends_its_machine(root: Path, stdio: str) -> None:
    config = boot_config(["sleep", "4346"], stdio=stdio, output_wait=0.5)
    with Machine(root, config) as machine:
        machine.report("ready")
        machine.report("workload_started")
        workload = wait_for(lambda: process_of(machine, "sleep 4346"), "the workload")
        with traced_from_outside(workload):
            os.kill(workload, signal.SIGKILL)
            began = time.monotonic()
            assert machine.report("workload_exited")["signal"] == signal.SIGKILL
            assert machine.report("stopping")["status"] == "done"
            assert time.monotonic() - began < bounds.TRACED_END + SLACK
        assert machine.wait() == 0


def test_what_an_earlier_agent_kept_and_is_traced_from_outside_has_an_end(root: Path) -> None:
    """PID 1 is the one that waits for it. The next agent knows of the end as well."""
    with Machine(root, boot_config()) as machine:
        machine.report("ready")
        kept = start(machine, "sleep", "4347")
        kill_agent(machine)
        pid = wait_for(lambda: process_of(machine, "sleep 4347"), "the process")
        with traced_from_outside(pid):
            os.kill(pid, signal.SIGKILL)
            began = time.monotonic()
            assert wait(machine, kept.id).signal == signal.SIGKILL
            assert time.monotonic() - began < bounds.TRACED_END + SLACK
            assert state_of(pid) == "Z"
            kill_agent(machine)
            assert wait(machine, kept.id).signal == signal.SIGKILL
        wait_for(lambda: not state_of(pid), "it is reaped")
        assert wait(machine, kept.id).signal == signal.SIGKILL


@pytest.mark.parametrize("words", [(), ("exec",)], ids=["", "exec"])
def test_a_workload_that_has_pid_1_trace_it_stops_and_ends_as_others_do(
    root: Path, words: tuple[str, ...]
) -> None:
    """To its tracer alone wait4(2) tells a stop as well. PID 1 does not take it for an end."""
    config = boot_config(["traceme", *words, "0"], user="tester", stdio="attached")
    with Machine(root, config) as machine:
        machine.report("ready")
        machine.report("workload_started")
        go_on_after_its_stop(machine)
        assert machine.report("workload_exited")["code"] == 6


def test_what_an_earlier_agent_kept_and_has_pid_1_trace_it_runs_on(root: Path) -> None:
    with Machine(root, boot_config()) as machine:
        machine.report("ready")
        script = "read go; exec traceme 0"
        kept = start(machine, "sh", "-c", script, stdin=True, user="tester")
        kill_agent(machine)
        host, _ = attach(machine, kept.id)
        with host:
            host.write(b"\n")
            stopped = go_on_after_its_stop(machine, then=lambda: listed(machine)[kept.id].exited)
            assert stopped is None
            assert wait(machine, kept.id).code == 6


def go_on_after_its_stop(machine: Machine, then: Callable[[], Any] = lambda: None) -> Any:
    """What `then` says while the traceme of a machine stands, as if it was not traced."""
    pid = wait_for(lambda: process_of(machine, "traceme"), "traceme")
    wait_for(lambda: state_of(pid) == "T", "it has stopped")
    said = then()
    os.kill(pid, signal.SIGCONT)
    return said


def process_of(machine: Machine, words: str) -> int:
    """Whose command has these words, as the host numbers it; 0 before it is there."""
    return next((pid for pid in machine.everybody() if words in " ".join(command_of(pid))), 0)
