"""The machine's end in namespaces: who is asked, in which order, and that nothing prevents it."""

import contextlib
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from init_machine import (
    TOKEN,
    Machine,
    Report,
    boot_config,
    children,
    command_of,
    make_root,
    require_program,
    shell,
    wait_for,
)
from patience import PATIENCE, SLACK

from microguest.errors import ConnectionLost
from microguest.guest import bounds
from microguest.guest.wire.connection import Connection, Request, Role
from microguest.guest.wire.messages import Hello, Shutdown
from microguest.host_client.client.address import UnixAddress
from microguest.host_client.client.agent import Agent

RESTARTED = 3  # the launcher's exit code


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_program()
    return make_root(tmp_path_factory.mktemp("image"))


def rest(machine: Machine) -> list[Report]:
    """The reports to the last, without those about the agent's start."""
    reports = iter(machine.next_report, ("", {}))
    return [(name, fields) for name, fields in reports if name not in ("ready", "first_exec")]


def ask(machine: Machine, request: Shutdown) -> None:
    """A host's request to end the machine."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE)
        connection.connect(str(machine.host / "agent.sock"))
        protocol = Connection(Role.HOST)
        for event in (Hello(token=TOKEN), Request(op="shutdown", args=request)):
            connection.sendall(protocol.send(event))
        while connection.recv(4096):
            pass


STUBBORN = """
    trap '' HUP INT QUIT USR1 USR2 TERM ALRM CONT TSTP
    sh -c 'while :; do sleep 1; done' &
    echo ready
    while :; do sleep 1; done
"""


def test_a_workload_that_ignores_everything_is_killed_after_its_grace(root: Path) -> None:
    with Machine(root, boot_config(shell(STUBBORN))) as machine:
        machine.report("ready")
        wait_for(lambda: "ready" in machine.console, "the traps")
        began = time.monotonic()
        ask(machine, Shutdown(grace=0.4))
        assert machine.wait() == 0
        assert time.monotonic() - began >= 0.8  # its own grace, and then everybody's
        names = [(name, fields.get("signal")) for name, fields in rest(machine)]
    assert names == [("workload_started", None), ("workload_exited", 9), ("stopping", None)]


def test_no_grace_is_no_wait(root: Path) -> None:
    quickest = PATIENCE
    for _ in range(3):  # a busy machine may need longer than the grace that there is else
        with Machine(root, boot_config(shell(STUBBORN))) as machine:
            machine.report("ready")
            wait_for(lambda machine=machine: "ready" in machine.console, "the traps")  # type: ignore[misc]
            began = time.monotonic()
            ask(machine, Shutdown(grace=0.0))
            assert machine.wait() == 0
            quickest = min(quickest, time.monotonic() - began)
            assert rest(machine)[-1][1]["status"] == "shutdown"
        if quickest < bounds.STOP_GRACE:
            break
    assert quickest < bounds.STOP_GRACE


def test_the_workload_is_asked_first_and_by_its_own_signal(root: Path) -> None:
    """What it has started may not be told before it: it still waits for their last answers."""
    heard = "until test -e /tmp/heard; do sleep 0.05; done"
    worker = (
        "trap 'echo worker TERM; exit' TERM; trap 'echo worker USR2; : >/tmp/heard' USR2; echo up; "
    )
    script = f"""
        trap 'echo main TERM' TERM
        trap 'echo main QUIT; sleep 0.3; kill -USR2 $!; {heard}; echo main ends; exit 6' QUIT
        sh -c "{worker} while :; do sleep 0.05; done" 2> /dev/null &
        while :; do sleep 0.05; done
    """
    config = boot_config(shell(script), stop_signal="QUIT")
    with Machine(root, config) as machine:
        machine.report("ready")
        wait_for(lambda: "up" in machine.console, "the worker")
        ask(machine, Shutdown(grace=PATIENCE))
        assert machine.wait() == 0
        told = rest(machine)
        assert machine.console.split("\n")[1:] == [
            "main QUIT", "worker USR2", "main ends", "worker TERM", ""
        ]  # fmt: skip
    assert [name for name, _ in told] == ["workload_started", "workload_exited", "stopping"]
    assert told[1][1]["code"] == 6


def test_the_agent_is_there_until_the_workload_has_ended(root: Path) -> None:
    at_term = "echo asked; until test -e /tmp/heard; do sleep 0.05; done; echo last words; exit 0"
    script = f"trap '{at_term}' TERM; echo up; while :; do sleep 0.05; done"
    with Machine(root, boot_config(shell(script))) as machine:
        machine.report("ready")
        wait_for(lambda: "up" in machine.console, "the workload")
        with Agent(UnixAddress(str(machine.host / "agent.sock")), TOKEN) as agent:
            ask(machine, Shutdown(grace=PATIENCE))
            wait_for(lambda: "asked" in machine.console, "the signal")
            said = agent.exec(["sh", "-c", ": >/tmp/heard; echo still here"]).stdout
            assert said == b"still here\n"
        assert machine.wait() == 0
        assert "last words" in machine.console


def test_stopped_processes_end_as_well(root: Path) -> None:
    script = "sh -c 'echo up; kill -STOP $$' & sleep 1000"
    with Machine(root, boot_config(shell(script))) as machine:
        machine.report("ready")
        wait_for(lambda: "up" in machine.console, "the child")
        began = time.monotonic()
        machine.process.terminate()
        assert machine.wait() == 0
        assert time.monotonic() - began < bounds.STOP_GRACE + SLACK


def test_a_host_asks_for_another_start(root: Path) -> None:
    with Machine(root, boot_config(["sleep", "1000"])) as machine:
        machine.report("ready")
        ask(machine, Shutdown(grace=1.0, reboot=True))
        assert machine.wait() == RESTARTED
        assert rest(machine)[-1][1]["status"] == "reboot"


def test_busyboxs_commands_are_signals_as_any_other(root: Path) -> None:
    """`reboot` sends TERM; `poweroff` sends USR2, which is the workload's."""
    script = "trap 'echo got USR2' USR2; echo up; while :; do sleep 0.05; done"
    with Machine(root, boot_config(shell(script))) as machine:
        machine.report("ready")
        wait_for(lambda: "up" in machine.console, "the trap")
        with Agent(UnixAddress(str(machine.host / "agent.sock")), TOKEN) as agent:
            agent.exec(["poweroff"], check=True)
            wait_for(lambda: "got USR2" in machine.console, "the signal")
            with contextlib.suppress(ConnectionLost):  # the agent may be gone before its answer
                agent.exec(["reboot"])
        assert machine.wait() == 0
        assert rest(machine)[-1][1]["status"] == "shutdown"


def test_every_stop_signal_ends_it(root: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGPWR):
        with Machine(root, boot_config()) as machine:
            machine.report("ready")
            os.kill(machine.init_pid(), number)
            assert machine.wait() == 0
            assert machine.report("stopping")["status"] == "shutdown"


def test_a_full_root_does_not_prevent_it(root: Path) -> None:
    script = "dd if=/dev/zero of=/big bs=64k 2>/dev/null; echo full; while :; do sleep 1; done"
    config = boot_config(shell(f"trap '' TERM; {script}"))
    config["root"]["upper"] = {"size": "1m"}
    with Machine(root, config) as machine:
        machine.report("ready")
        wait_for(lambda: "full" in machine.console, "a full root")
        ask(machine, Shutdown(grace=0.1))
        assert machine.wait() == 0
        assert rest(machine)[-1][1]["status"] == "shutdown"


def test_a_host_that_reads_no_reports_does_not_prevent_it(root: Path) -> None:
    restart = {"policy": "always", "delay": 0.0, "delay_max": 0.0}
    with Machine(root, boot_config(shell("exit 1"), restart=restart)) as machine:
        init = machine.init_pid()
        wait_for(lambda: _agent_started(init), "the agent")
        time.sleep(1)  # some hundred reports, more than a socket holds
        machine.process.terminate()
        assert machine.wait() == 0


def _agent_started(init: int) -> bool:
    return any(command_of(pid) == ["agent"] for pid in children(init))


def test_a_console_that_takes_nothing_does_not_prevent_it(root: Path) -> None:
    """The workload waits for the console; PID 1 and the agent do not."""
    script = "trap '' TERM; while :; do echo a line for a console that nobody reads; done"
    reader, writer = os.pipe()
    try:
        with Machine(root, boot_config(shell(script)), console_fd=writer) as machine:
            os.close(writer)
            writer = -1
            machine.report("ready")
            machine.report("workload_started")
            time.sleep(0.5)
            os.kill(machine.agent_pid(), signal.SIGKILL)
            assert machine.report("agent_exited")["restart_in"] == 0.0
            assert machine.report("agent_serves")["starts"] == 2
            ask(machine, Shutdown(grace=0.2))
            assert machine.wait() == 0
            assert rest(machine)[-1][1]["status"] == "shutdown"
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)
