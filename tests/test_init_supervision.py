"""PID 1 and the workload: its lives, signals to it, orphans beside it."""

import os
import signal
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
    state_of,
    wait_for,
)

from microguest.host_client.client.address import UnixAddress
from microguest.host_client.client.agent import Agent

EACH = ("HUP", "QUIT", "ABRT", "USR1", "USR2", "ALRM", "TSTP", "WINCH", "CONT", "URG", "IO")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_program()
    return make_root(tmp_path_factory.mktemp("image"))


def lives(machine: Machine) -> list[Report]:
    """All reports but those about the agent, to the last."""
    reports = list(iter(machine.next_report, ("", {})))
    return [(name, fields) for name, fields in reports if name not in ("ready", "agent_serves")]


# ── restarts ─────────────────────────────────────────────────────────────────────────────────────


def test_on_failure_starts_again_until_it_works(root: Path) -> None:
    script = "echo x >> /count; [ $(wc -l < /count) = 3 ] || exit 4"
    restart = {"policy": "on-failure", "delay": 0.05}
    with Machine(root, boot_config(shell(script), restart=restart)) as machine:
        assert machine.wait() == 0
        told = lives(machine)
    assert [name for name, _ in told] == [
        *("workload_started", "workload_exited") * 3, "stopping"
    ]  # fmt: skip
    starts = [fields for name, fields in told if name == "workload_started"]
    assert [start.get("starts", 1) for start in starts] == [1, 2, 3]
    ends = [fields for name, fields in told if name == "workload_exited"]
    assert [end["code"] for end in ends] == [4, 4, 0]
    assert [end.get("restart_in") for end in ends] == [0.05, 0.1, None]
    for end, start in zip(ends, [told[2][1], told[4][1]], strict=False):
        assert start["boot_ms"] - end["boot_ms"] >= end["restart_in"] * 1000
    assert told[-1][1]["status"] == "done"


def test_on_failure_counts_signals_and_gives_up_at_its_limit(root: Path) -> None:
    restart = {"policy": "on-failure", "limit": 3, "delay": 0.02, "delay_max": 0.05}
    config = boot_config(shell("kill -KILL $$"), restart=restart)
    with Machine(root, config) as machine:
        assert machine.wait() == 0
        told = lives(machine)
    ends = [fields for name, fields in told if name == "workload_exited"]
    assert [end["signal"] for end in ends] == [9, 9, 9, 9]
    assert [end.get("restart_in") for end in ends] == [0.02, 0.04, 0.05, None]
    assert told[-1] == ("stopping", {"status": "done", "boot_ms": told[-1][1]["boot_ms"]})


def test_always_starts_again_what_has_worked_until_the_shutdown(root: Path) -> None:
    restart = {"policy": "always", "delay": 0.01, "delay_max": 0.01}
    with Machine(root, boot_config(shell("exit 0"), restart=restart)) as machine:
        for starts in range(1, 8):
            assert later(machine, "workload_started").get("starts", 1) == starts
            assert later(machine, "workload_exited")["restart_in"] == 0.01
        machine.process.terminate()
        assert machine.wait() == 0
        told = lives(machine)
    assert told[-1][1]["status"] == "shutdown"


def later(machine: Machine, name: str) -> dict[str, object]:
    """The fields of the next report of that name."""
    while True:
        found, fields = machine.next_report()
        if found == name:
            return fields
        assert found, f"no {name}; console: {machine.console}"


def test_a_shutdown_does_not_wait_for_a_restart(root: Path) -> None:
    restart = {"policy": "always", "delay": 3600.0, "delay_max": 3600.0}
    with Machine(root, boot_config(shell("exit 0"), restart=restart)) as machine:
        assert later(machine, "workload_exited")["restart_in"] == 3600.0
        machine.process.terminate()
        assert machine.wait() == 0


def test_a_workload_that_cannot_be_started_again_is_a_failed_run(root: Path) -> None:
    restart: dict[str, object] = {"policy": "always", "delay": 0.02}
    config = boot_config(shell("rm /bin/sh"), restart=restart)
    with Machine(root, config) as machine:
        assert later(machine, "workload_exited")["restart_in"] == 0.02
        failed = later(machine, "workload_failed")
        assert (failed["code"], failed["restart_in"]) == ("not_found", 0.04)
        assert later(machine, "workload_failed")["restart_in"] == 0.08
        machine.process.terminate()
        assert machine.wait() == 0
    config["workload"]["restart"] = {"policy": "on-failure", "limit": 2, "delay": 0.02}
    config["workload"]["argv"] = shell("rm /bin/sh; exit 1")
    with Machine(root, config) as machine:
        assert machine.wait() == 0
        told = lives(machine)
    assert [name for name, _ in told] == [
        "workload_started", "workload_exited", "workload_failed", "workload_failed", "stopping"
    ]  # fmt: skip
    assert told[-2][1].get("restart_in") is None
    assert told[-1][1]["status"] == "workload-failed"


# ── signals ──────────────────────────────────────────────────────────────────────────────────────


TRAPS = """
    for name in {names}; do trap "echo got $name" $name; done
    trap 'echo got TERM; exit 0' TERM
    echo ready
    while :; do sleep 0.05; done
"""


def test_signals_are_passed_on_and_none_ends_pid_1(root: Path) -> None:
    with Machine(root, boot_config(shell(TRAPS.format(names=" ".join(EACH))))) as machine:
        machine.report("ready")
        wait_for(lambda: "ready" in machine.console, "the traps")
        init = machine.init_pid()
        for name in EACH:
            os.kill(init, getattr(signal, f"SIG{name}"))
            wait_for(lambda name=name: f"got {name}\n" in machine.console, name)  # type: ignore[misc]
        os.kill(init, signal.SIGTERM)
        assert machine.wait() == 0
        assert machine.console.split()[-2:] == ["got", "TERM"]


def test_real_time_signals_are_passed_on_one_by_one(root: Path) -> None:
    script = """
        trap 'echo got 40' 40; trap 'echo got 64' 64; echo ready; while :; do sleep 0.05; done
    """
    with Machine(root, boot_config(shell(script))) as machine:
        machine.report("ready")
        wait_for(lambda: "ready" in machine.console, "the traps")
        init = machine.init_pid()
        for number in (40, 64):
            os.kill(init, number)
            wait_for(lambda number=number: f"got {number}\n" in machine.console, str(number))  # type: ignore[misc]


def test_every_real_time_signal_is_counted(root: Path) -> None:
    """The shell coalesces, so the receiver is a stopped program whose queue /proc shows.

    The queue is counted by user, so that it has one of its own.
    """
    user = str(100_000 + os.getpid())  # no other test's, also of another run
    with Machine(root, boot_config(["sleep", "1000"], user=user)) as machine:
        machine.report("ready")
        init = machine.init_pid()
        workload = wait_for(lambda: sleeper_of(init), "the workload")
        os.kill(workload, signal.SIGSTOP)
        wait_for(lambda: state_of(workload) == "T", "the stop")
        for _ in range(100):
            os.kill(init, 40)
            os.kill(init, signal.SIGUSR2)
        wait_for(lambda: queued(workload) > 100, "the signals")
        assert queued(workload) == 100 + 1  # ordinary signals coalesce


def sleeper_of(init: int) -> int:
    """The workload, once it is what was asked for; 0 before."""
    return next((pid for pid in children(init) if command_of(pid)[:1] == ["sleep"]), 0)


def queued(pid: int) -> int:
    """Signals that wait for it, as its user's count has them: SigQ of proc_pid_status(5)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("SigQ:")[2].split("/")[0])


def test_a_fault_signal_from_outside_is_nobodys(root: Path) -> None:
    with Machine(root, boot_config(["sleep", "1000"])) as machine:
        machine.report("ready")
        init = machine.init_pid()
        for name in ("SEGV", "BUS", "FPE", "ILL", "TRAP", "SYS", "PIPE"):
            inside = f"kill -{name} 1"
            with agent(machine) as caller:
                assert caller.exec(["sh", "-c", inside]).returncode == 0
        wait_for(lambda: state_of(init) == "S", "PID 1 to wait for what comes next")
        wait_for(lambda: sleeper_of(init), "the workload")


def agent(machine: Machine) -> Agent:
    """A client of the machine's agent."""
    return Agent(UnixAddress(str(machine.host / "agent.sock")), TOKEN)


def test_signals_reach_the_group_if_asked(root: Path) -> None:
    script = """
        trap 'echo parent got it' USR1
        sh -c 'trap "echo child got it" USR1; echo ready; while :; do sleep 0.05; done' &
        while :; do wait; done
    """
    for group, expected in ((True, 1), (False, 0)):
        config = boot_config(shell(script), signal_group=group)
        with Machine(root, config) as machine:
            machine.report("ready")
            wait_for(lambda: "ready" in machine.console, "the child's trap")
            os.kill(machine.init_pid(), signal.SIGUSR1)
            wait_for(lambda: "parent got it" in machine.console, "the parent")
            if group:
                wait_for(lambda: "child got it" in machine.console, "the child")
            assert machine.console.count("child got it") == expected


# ── orphans ──────────────────────────────────────────────────────────────────────────────────────


ORPHANS = """
    i=0
    while [ $i -lt {forks} ]; do
        (for n in 1 2 3 4 5 6 7 8 9 10; do sleep 0 & done)
        i=$((i + 1))
    done
    exit 5
"""


def check_orphans(root: Path, forks: int) -> tuple[float, int]:
    """Ten orphans a fork, with execs beside them. Returns seconds, and KiB that PID 1 grew by."""
    with Machine(root, boot_config(["sleep", "1000"])) as machine:
        machine.report("ready")
        init = machine.init_pid()
        with agent(machine) as caller:
            caller.exec(["sh", "-c", ORPHANS.format(forks=20)])
            before, began = private_kib(init), time.monotonic()
            expected = [n % 200 for n in range(forks // 10)]
            with caller.start(["sh", "-c", ORPHANS.format(forks=forks)]) as flood:
                codes = [caller.exec(["sh", "-c", f"exit {code}"]).returncode for code in expected]
                assert codes == expected
                assert flood.wait().returncode == 5
            took = time.monotonic() - began
            wait_for(lambda: not zombies(machine), "every orphan reaped")
        grown = private_kib(init) - before
        machine.process.terminate()
        assert machine.wait() == 0
        assert later(machine, "workload_exited")["signal"] == signal.SIGTERM
        return took, grown


def zombies(machine: Machine) -> list[int]:
    return [pid for pid in machine.everybody() if state_of(pid) == "Z"]


def private_kib(pid: int) -> int:
    """Memory that is its own alone: Private_* of proc_pid_smaps_rollup(5)."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_"))


def test_thousands_of_orphans_beside_a_busy_agent(root: Path) -> None:
    _, grown = check_orphans(root, 300)
    assert grown <= 256


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_fifty_thousand_orphans(root: Path) -> None:
    took, grown = check_orphans(root, 5000)
    print(f"50,000 orphans in {took:.1f} s; PID 1 grew by {grown} KiB")
    assert grown <= 256
