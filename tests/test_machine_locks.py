"""Locks of pipes that are held by who does not show the pipe among its descriptors.

In machines: in the end all processes of a user are killed, which on a host are others' too.
"""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from agentharness import Host
from init_machine import (
    Config,
    Machine,
    boot_config,
    command_of,
    descendants,
    make_root,
    require_program,
    shell,
    state_of,
    wait_for,
)
from test_machine_keep import dial

from microguest.guest.wire.connection import Data, End
from microguest.guest.wire.messages import Exited

OWNER, OTHER = "1000", "1001"
VICTIM = ("tail", "-f", "/dev/null")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with tests/data/holder.c."""
    require_program()
    if shutil.which("gcc") is None:
        pytest.skip("needs a C compiler: apt install gcc")
    root = make_root(tmp_path_factory.mktemp("image"))
    source = Path(__file__).parent / "data" / "holder.c"
    command = ["gcc", "-static", "-pthread", "-o", str(root / "bin" / "holder"), str(source)]
    subprocess.run(command, check=True)
    return root


def workload(user: str, way: str, of: str = OWNER) -> Config:
    """Of that user: it stays, and leaves a holder of the other one."""
    holder = f"holder hidden tail {way}"
    holder = holder if user == of else f"su tester -c '{holder}'"
    return boot_config(shell(f"{holder} & exec sleep 4343"), user=f"{user}:{user}")


def serves(machine: Machine) -> None:
    with dial(machine) as host:
        host.start("echo", "served", user="0:0")
        assert host.collect().stdout == b"served\n"


def is_left_alone(bystander: Host) -> None:
    bystander.write(b"still there", end=True)
    result = bystander.collect()
    assert (result.stdout, result.exited.code) == (b"still there", 0)


def hold(machine: Machine, *, agent_dies: bool = False) -> None:
    """While the agent is stopped, so that it finds both what it has to read and the lock."""
    wait_for(lambda: "has the pipe" in machine.console, "the holder to find the pipe")
    agent = machine.agent_pid()
    os.kill(agent, signal.SIGSTOP)
    wait_for(lambda: state_of(agent) == "T", "the agent to stop")
    (holder,) = (pid for pid in descendants(machine.process.pid) if command_of(pid)[0] == "holder")
    os.kill(holder, signal.SIGUSR1)
    wait_for(lambda: "holds the lock" in machine.console, "the lock to be held")
    if agent_dies:
        os.kill(agent, signal.SIGKILL)
    os.kill(agent, signal.SIGCONT)


@pytest.mark.parametrize("way", ["closed", "apart"])
def test_a_hidden_holder_is_killed_and_nobody_else(root: Path, way: str) -> None:
    with Machine(root, workload(OWNER, way)) as machine:
        machine.report("ready")
        with dial(machine) as bystander, dial(machine) as same_user, dial(machine) as victim:
            bystander.start("cat", user=OTHER, stdin=True)
            same_user.start("cat", user=OWNER, stdin=True)
            victim.start(*VICTIM, user=OWNER)
            hold(machine)
            assert victim.collect().exited.signal == signal.SIGKILL
            serves(machine)
            is_left_alone(bystander)
            is_left_alone(same_user)
        assert "as user" not in machine.console


def test_a_holder_that_looks_like_others_is_killed_with_its_user(root: Path) -> None:
    with Machine(root, workload("0", "replaced")) as machine:
        machine.report("ready")
        with dial(machine) as bystander, dial(machine) as victim:
            bystander.start("cat", user=OTHER, stdin=True)
            victim.start(*VICTIM, user=OWNER)
            hold(machine)
            assert victim.collect().exited.signal == signal.SIGKILL
            serves(machine)
            is_left_alone(bystander)
        wait_for(lambda: "as user 1000" in machine.console, "the console's word")


def test_roots_hidden_holder_ends_with_all_processes(root: Path) -> None:
    with Machine(root, workload("0", "replaced", "0")) as machine:
        machine.report("ready")
        with dial(machine) as victim:
            victim.start(*VICTIM, user="0:0")
            hold(machine)
            machine.report("workload_started")
            assert machine.report("workload_exited")["signal"] == signal.SIGKILL


@pytest.mark.parametrize("user", [OWNER, "0"])
def test_a_killed_agent_whose_pipe_is_held_by_who_hides_is_replaced(root: Path, user: str) -> None:
    config = workload("0", "closed", user)
    config["agent"]["watchdog"] = 0.2
    with Machine(root, config) as machine:
        machine.report("ready")
        machine.report("workload_started")
        with dial(machine) as victim:
            victim.start(*VICTIM, user=f"{user}:{user}")
            hold(machine, agent_dies=True)
        if user == OWNER:
            assert machine.report("agent_exited")["signal"] == signal.SIGKILL
            serves(machine)
        else:  # the agent's end may be told before, or not any more
            reports = dict(iter(machine.next_report, ("", {})))
            assert reports["workload_exited"]["signal"] == signal.SIGKILL


@pytest.mark.parametrize("milliseconds", ["100", "300"])
def test_who_holds_locks_again_and_again_is_killed(root: Path, milliseconds: str) -> None:
    with Machine(root, boot_config()) as machine:
        machine.report("ready")
        with dial(machine) as bystander, dial(machine) as host:
            bystander.start("cat", user=OTHER, stdin=True)
            host.start("holder", "again", milliseconds, user=OWNER)
            assert host.collect().exited.signal == signal.SIGKILL
            is_left_alone(bystander)
        wait_for(lambda: "with all that it started" in machine.console, "the console's word")


def test_who_writes_much_is_left_alone(root: Path) -> None:
    """Also without a processor of its own, so that it is stopped with the lock in its hands."""
    with Machine(root, boot_config(), under=("taskset", "-c", "0")) as machine:
        machine.report("ready")
        with dial(machine) as host:
            busy = "for n in 1 2 3 4 5 6 7 8; do timeout 8 yes & done; wait"
            host.start("sh", "-c", busy, user=OWNER)
            while not isinstance(event := host.receive(), Exited):
                assert isinstance(event, Data | End)
            assert event.code == 0
        assert "lock" not in machine.console
