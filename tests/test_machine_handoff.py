"""PID 1 that becomes an init of the image's own, in namespaces: busybox's, unknown ones, none.

systemd needs a virtual machine: tests/test_vm_handoff.py.
"""

import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from agentharness import Host
from init_machine import (
    ASIDES,
    TOKEN,
    TRIES,
    Config,
    Machine,
    agents_that_keep_dying,
    boot_config,
    children,
    command_of,
    descendants,
    make_root,
    require_program,
    shell,
    state_of,
    wait_for,
)
from patience import PATIENCE

from microguest.guest.wire.messages import Exited, Hello, Shutdown, ShutdownResult

RESTARTED = 3  # the launcher's exit code
INITTAB = """\
::sysinit:/bin/echo the init runs
::once:/bin/sh -c 'while ! test -e /tmp/end; do sleep 0.05; done; sh /tmp/end'
::shutdown:/bin/echo the init ends it
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_program()
    image = make_root(tmp_path_factory.mktemp("image"))
    (image / "etc" / "inittab").write_text(INITTAB)
    return image


def handoff(argv: list[str], **workload: object) -> Config:
    return {**boot_config(argv, **workload), "mode": "handoff"}


@pytest.fixture
def busybox(root: Path) -> Iterator[Machine]:
    with Machine(root, handoff(["init"])) as machine:
        machine.report("ready")
        machine.report("handed_off")
        wait_for(lambda: "the init runs" in machine.console, "the init")
        yield machine


def keeper_of(machine: Machine) -> int:
    """The keeper, as the host numbers it: the child of PID 1 that has the agent."""
    return wait_for(
        lambda: next(
            (
                pid
                for pid in children(machine.init_pid())
                if any(command_of(child) == ["agent"] for child in children(pid))
            ),
            0,
        ),
        "the keeper",
    )


def agent_of(machine: Machine) -> int:
    return wait_for(
        lambda: next((p for p in children(keeper_of(machine)) if command_of(p) == ["agent"]), 0),
        "the agent",
    )


class Door:
    """What `Host` dials."""

    def __init__(self, machine: Machine) -> None:
        self.path = str(machine.host / "agent.sock")


def dial(machine: Machine) -> Host:
    host = Host(Door(machine), hello=False)  # type: ignore[arg-type]
    host.send(Hello(token=TOKEN))
    return host


def run(machine: Machine, script: str) -> None:
    """Have the agent run its first script, to the end."""
    with dial(machine) as host:
        host.start(*shell(script))
        while not isinstance(host.receive(), Exited):
            pass


def ask_to_end(machine: Machine, grace: float = PATIENCE, *, reboot: bool = False) -> None:
    wanted = Shutdown(grace=grace, reboot=reboot)
    with dial(machine) as host:
        assert isinstance(host.request("shutdown", wanted), ShutdownResult)


def end_of(machine: Machine) -> str:
    """The status that the machine ends with, after everything of it is gone."""
    everybody = machine.everybody()
    name, fields = machine.next_report()
    while name in ASIDES:
        name, fields = machine.next_report()
    assert name == "stopping", fields
    status: str = fields["status"]
    machine.no_more_reports()
    machine.wait()
    wait_for(lambda: not any(map(state_of, everybody)), "all of it is gone")
    return status


# ── what the init finds ──────────────────────────────────────────────────────────────────────────


def test_the_init_is_pid_1_and_keeper_and_agent_stand_by(busybox: Machine) -> None:
    init = busybox.init_pid()
    assert Path(f"/proc/{init}/comm").read_text() == "init\n"
    keeper = keeper_of(busybox)
    assert Path(f"/proc/{keeper}/comm").read_text() == "microguest-keep\n"
    assert os.getsid(keeper) == keeper
    assert os.getsid(agent_of(busybox)) != keeper


def test_an_init_finds_nothing_of_ours(root: Path) -> None:
    config = handoff(["sleep", "1000"], env={"GIVEN": "yes"}, umask=0o27)
    config["image"] = {"env": {"FROM": "image"}, "cwd": "/tmp"}
    with Machine(root, config) as machine:
        machine.report("ready")
        machine.report("handed_off")
        pid = machine.init_pid()
        wait_for(lambda: command_of(pid) == ["sleep", "1000"], "its exec")
        init = Path(f"/proc/{pid}")
        status = dict(line.split(":\t") for line in (init / "status").read_text().splitlines())
        limit = next(line for line in (init / "limits").read_text().splitlines() if "files" in line)
        environment = set((init / "environ").read_bytes().rstrip(b"\0").split(b"\0"))
        assert (init / "cmdline").read_bytes().split(b"\0")[:2] == [b"sleep", b"1000"]
        assert {status[name].strip("0") for name in ("SigBlk", "SigIgn", "SigCgt")} == {""}
        assert status["Umask"] == "0027"
        assert sorted(os.listdir(init / "fd")) == ["0", "1", "2"]
        assert (init / "oom_score_adj").read_text() == "0\n"
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert limit.split()[3:5] == [str(max(soft, min(hard, 2**20))), str(hard)]
        assert (init / "cwd").stat().st_ino == (init / "root").stat().st_ino
    assert environment >= {b"GIVEN=yes", b"FROM=image", b"HOME=/root"}
    assert {entry.partition(b"=")[0] for entry in environment} == {
        b"GIVEN", b"FROM", b"HOME", b"PATH",
    }  # fmt: skip


def test_an_init_that_is_not_there_ends_the_boot(root: Path) -> None:
    with Machine(root, handoff(["/sbin/nothing"])) as machine:
        machine.report("ready")
        failed = machine.report("workload_failed")
        assert (failed["code"], failed["step"]) == ("not_found", "exec")
        assert "/sbin/nothing" in failed["message"]
        assert end_of(machine) == "workload-failed"


def test_an_init_has_to_be_root(root: Path) -> None:
    with Machine(root, handoff(["init"], user="tester")) as machine:
        machine.report("ready")
        assert machine.report("workload_failed")["code"] == "bad_user"
        assert end_of(machine) == "workload-failed"


def test_an_agent_that_keeps_dying_fails_the_boot(root: Path) -> None:
    reports, console = agents_that_keep_dying(root, handoff(["init"]))
    assert [name for name, _ in reports] == [
        *("agent_exited", "agent_exited", "agent_exited", "agent_exited"),
        *("boot_failed", "stopping"),
    ]
    failed = reports[-2][1]
    assert (failed["step"], reports[-1][1]["status"]) == ("agent-ready", "boot-failed")
    assert "4 crashes" in failed["message"]
    assert "the init runs" not in console


def test_pid_1_that_is_told_to_end_hands_nothing_over(root: Path) -> None:
    for _ in range(TRIES):
        with Machine(root, handoff(["init"])) as machine:
            init = machine.init_pid()
            os.kill(init, signal.SIGSTOP)  # in the middle of its boot
            wait_for(lambda init=init: state_of(init) == "T", "PID 1 stands still")
            os.kill(init, signal.SIGTERM)
            os.kill(init, signal.SIGCONT)
            reports = list(iter(machine.next_report, ("", {})))
            ended, console = machine.wait(), machine.console
            if "handed_off" not in [name for name, _ in reports]:  # in time
                break
    assert [name for name, _ in reports] == ["stopping"]
    assert reports[0][1]["status"] == "shutdown"
    assert ended == 0
    assert "the init runs" not in console


# ── the keeper's work ────────────────────────────────────────────────────────────────────────────


def test_a_killed_agent_is_started_again(busybox: Machine) -> None:
    first = agent_of(busybox)
    os.kill(first, signal.SIGKILL)
    assert busybox.report("agent_exited")["signal"] == signal.SIGKILL
    busybox.report("agent_serves")
    assert agent_of(busybox) != first
    ask_to_end(busybox)
    assert end_of(busybox) == "shutdown"


def test_orphans_of_the_agents_are_reaped_by_the_keeper(busybox: Machine) -> None:
    run(busybox, "(sleep 0.2; exit 3) & exec setsid sleep 0.1")
    keeper = keeper_of(busybox)
    wait_for(lambda: len(descendants(keeper)) == 1, "nobody is left, not even dead")
    wait_for(
        lambda: "Z" not in {state_of(pid) for pid in busybox.everybody()}, "nobody dead elsewhere"
    )


# ── the end ──────────────────────────────────────────────────────────────────────────────────────


def test_a_host_ends_it_through_the_init(busybox: Machine) -> None:
    ask_to_end(busybox)
    assert end_of(busybox) == "shutdown"
    assert "the init ends it" in busybox.console
    assert busybox.wait() == 0


def test_a_host_restarts_it_through_the_init(busybox: Machine) -> None:
    ask_to_end(busybox, reboot=True)
    assert end_of(busybox) == "reboot"
    assert busybox.wait() == RESTARTED


def test_the_init_ends_it_by_itself(busybox: Machine) -> None:
    run(busybox, "echo poweroff >/tmp/end")
    assert end_of(busybox) == "done"
    assert "the init ends it" in busybox.console


def test_an_unknown_init_is_asked_with_the_stop_signal(root: Path) -> None:
    script = "trap 'echo asked; poweroff -f' USR1; echo up; while :; do sleep 0.05; done"
    with Machine(root, handoff(shell(script), stop_signal="USR1")) as machine:
        machine.report("ready")
        machine.report("handed_off")
        wait_for(lambda: "up" in machine.console, "the init")
        ask_to_end(machine)
        machine.wait()
        assert "asked" in machine.console


def test_an_init_that_does_nothing_is_not_waited_for_longer_than_stated(root: Path) -> None:
    script = "sleep 1000 & trap '' TERM USR2; while :; do wait; sleep 1000; done"
    with Machine(root, handoff(shell(script))) as machine:
        machine.report("ready")
        machine.report("handed_off")
        ask_to_end(machine, grace=0.0)
        assert end_of(machine) == "shutdown"


def test_a_keeper_that_is_told_to_end_ends_the_machine(busybox: Machine) -> None:
    os.kill(keeper_of(busybox), signal.SIGTERM)
    assert end_of(busybox) == "done"
    assert "the init ends it" in busybox.console


def test_an_init_that_exits_ends_the_machine_without_a_last_report(root: Path) -> None:
    with Machine(root, handoff(shell("sleep 0.3; exit 5"))) as machine:
        machine.report("ready")
        machine.report("handed_off")
        everybody = machine.everybody()
        machine.no_more_reports()
        assert machine.wait() != 0
        wait_for(lambda: not any(map(state_of, everybody)), "all of it is gone")
