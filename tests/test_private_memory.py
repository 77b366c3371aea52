"""Nobody in the guest gets at the memory and the descriptors of PID 1 and the agent by /proc.

A new process has the agent's memory until its exec, and is its user's before that.
"""

import base64
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agentharness import AgentProcess, execute
from init_machine import (
    Machine,
    boot_config,
    children,
    make_root,
    require_program,
    wait_for,
)
from stepping import Stop, Stranger, starts

from microguest.host_client.seccomp.numbers import NUMBERS
from microguest.seccomp import deny

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be without privileges")

PRCTL = NUMBERS["prctl"][os.uname().machine == "aarch64"]
PR_SET_DUMPABLE = 4
WITHOUT_PTRACE = ("setpriv", "--bounding-set", "-sys_ptrace")  # as root of a container
NO_MKDIR = deny(["mkdir"], arch=os.uname().machine)
FEW = ("chown", "kill")


@pytest.fixture
def agent() -> Iterator[AgentProcess]:
    with AgentProcess() as agent:
        yield agent


def look(parent: int, begin: Any, uid: int) -> list[Stop]:
    """All stops of a start. At none of them somebody of the same user gets anything of it.

    The program is everybody's again who could have started it.
    """
    with Stranger(uid) as stranger, contextlib.closing(starts(parent, begin)) as stops:
        seen = []
        for stop in stops:
            seen.append(stop)
            opened = stranger.opens(stop.pid)
            if not stop.is_program:
                assert (stop, opened) == (stop, [])
    assert seen[-1].is_program
    assert seen[-1].uid == uid
    assert {"maps", "mem", "fd/0"} <= set(opened)
    return seen


@pytest.mark.parametrize("filtered", [False, True], ids=["shared", "copied"])
@pytest.mark.parametrize("user", ["0", "1234"])
def test_a_start_of_a_host_is_nobodys_before_its_exec(
    agent: AgentProcess, user: str, filtered: bool
) -> None:
    """`copied`: with a filter of system calls the new process has a copy of the memory."""
    options: dict[str, Any] = {"seccomp": NO_MKDIR} if filtered else {}

    def begin() -> None:
        execute(agent, "true", user=f"{user}:{user}", capabilities=(), **options)

    stops = look(agent.pid, begin, int(user))
    assert any(stop.uid == int(user) and not stop.permitted for stop in stops[:-1])


@pytest.mark.parametrize("capabilities", [None, (), FEW], ids=["kernel's", "none", "few"])
@pytest.mark.parametrize("user", ["0", "1234"])
def test_a_start_keeps_its_capabilities_until_its_memory_is_closed(
    agent: AgentProcess, user: str, capabilities: tuple[str, ...] | None
) -> None:
    """With fs.suid_dumpable=1 each change of the user opens it: see proc_pid_mem(5)."""

    def begin() -> None:
        execute(agent, "true", user=f"{user}:{user}", capabilities=capabilities)

    with contextlib.closing(starts(agent.pid, begin)) as stops:
        seen = []
        for stop in stops:
            seen.append(stop)
            if (stop.uid, stop.permitted) != (seen[0].uid, seen[0].permitted):
                assert set(os.listdir(f"/proc/{stop.pid}/fd")) == {"0", "1", "2"}
    assert closed_first(seen[:-1], int(user))


def closed_first(stops: list[Stop], uid: int) -> bool:
    """Its memory is closed as the user that it will be, with all capabilities of its start."""
    closed = [stop for stop in stops if stop.call[:3] == (PRCTL, PR_SET_DUMPABLE, 0)]
    assert closed
    before = stops[: stops.index(closed[-1])]
    return closed[0].uid == uid and {stop.permitted for stop in before} == {stops[0].permitted}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_program()
    return make_root(tmp_path_factory.mktemp("image"))


@pytest.mark.parametrize("filtered", [False, True], ids=["shared", "copied"])
@pytest.mark.parametrize("user", ["", "tester"])
def test_a_restart_of_the_workload_is_nobodys_before_its_exec(
    root: Path, user: str, filtered: bool
) -> None:
    workload: dict[str, Any] = {"user": user, "capabilities": {}}
    if filtered:
        workload["seccomp"] = base64.b64encode(NO_MKDIR).decode()
    config = boot_config(["sleep", "4711"], restart={"policy": "always", "delay": 0.5}, **workload)
    uid = 1000 if user else 0
    with Machine(root, config) as machine:
        machine.report("ready")
        machine.report("workload_started")
        init = machine.init_pid()
        stops = look(init, lambda: os.kill(child(init, "sleep"), signal.SIGKILL), uid)
        assert any(stop.uid == uid and not stop.permitted for stop in stops[:-1])
        assert closed_first([stop for stop in stops if not stop.is_program], uid)
        assert machine.report("workload_exited")["signal"] == signal.SIGKILL
        assert machine.report("workload_started")["starts"] == 2


def child(parent: int, name: str) -> int:
    """The one of that name, as the host numbers it."""

    def named() -> int:
        return next(
            (
                pid
                for pid in children(parent)
                if Path(f"/proc/{pid}/comm").read_text() == f"{name}\n"
            ),
            0,
        )

    return wait_for(named, name)


def permitted(pid: int) -> int:
    """Its capabilities, as a mask."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1], 16) for line in lines if line.startswith("CapPrm"))


def opened_by_an_equal(pid: int) -> set[str]:
    """What a process of its user gets of it that has as many capabilities.

    Not the list of its memory, which CAP_SYS_ADMIN may see since Linux 6.13.
    """
    with Stranger(0, permitted(pid)) as stranger:
        return set(stranger.opens(pid)) - {"maps", "auxv"}


@pytest.mark.parametrize("mode", ["supervise", "handoff"])
def test_what_is_ours_is_nobodys_however_few_privileges_it_has(root: Path, mode: str) -> None:
    """A machine of a container's root, whose workload has all capabilities that PID 1 has."""
    config = {**boot_config(["sleep", "4712"]), "mode": mode}
    with Machine(root, config, under=WITHOUT_PTRACE) as machine:
        machine.report("ready")
        init = machine.init_pid()
        if mode == "supervise":
            workload = child(init, "sleep")
            ours = [init, child(init, "agent")]
        else:
            workload = init
            keeper = child(init, "microguest-keep")
            ours = [keeper, child(keeper, "agent")]
        assert {"mem", "fd/0"} <= opened_by_an_equal(workload)
        assert [opened_by_an_equal(pid) for pid in ours] == [set(), set()]
