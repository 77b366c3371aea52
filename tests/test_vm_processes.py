"""Processes in a virtual machine: whoever makes as many as can be, others still start theirs."""

import contextlib
import pathlib
from collections.abc import Iterator

import machinekit
import pytest
from machinekit import Pings, wait_until
from patience import PATIENCE, SLACK

from microguest import Machine, Process, boot
from microguest.errors import ConnectionLost, DeadlineExceeded
from microguest.guest import bounds
from microguest.guest.wire.messages import Keep, Limits, StagedFile

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(600)]

ANSWER = SLACK  # seconds for a ping beside hundreds of processes, on a host that is busy as well
USER = "1000:1000"
# Each process makes two more for as long as it can, and one stays to begin anew.
BOMB = "f() { f | f & }; while :; do f; sleep 0.2; done 2>/dev/null"
# As many as can be at once, which stay.
SLEEPERS = "while :; do (sleep 1000 &); done 2>/dev/null"
WORKLOAD = f"until [ -e /tmp/go ]; do sleep 0.1; done; {{ {BOMB}; }} & exec sleep 100000"
CGROUPS = "/sys/fs/cgroup/microguest"


@pytest.fixture
def machine(machines_home: pathlib.Path, elf: pathlib.Path) -> Iterator[Machine]:
    """One whose workload is an unprivileged user's, and a fork bomb once there is /tmp/go."""
    command = ["sh", "-c", WORKLOAD]
    with boot(machinekit.demo_image(), memory="192M", command=command, user=USER) as machine:
        machine.agent.exec(["true"], check=True)
        yield machine


def number(machine: Machine, path: str) -> int:
    """What a file of a cgroup says."""
    return int(read(machine, path))


def read(machine: Machine, path: str) -> bytes:
    """One process reads it: it starts while others fill all that there is."""
    script = f"exec cat {CGROUPS}/{path}"
    return machine.agent.exec(shell=script, user="0:0", check=True, timeout=PATIENCE).stdout


def refused(machine: Machine, group: str) -> int:
    """How many forks the limit of a cgroup, or of one above, has refused."""
    return sum(int(line.split()[1]) for line in read(machine, f"{group}/pids.events").splitlines())


def bomb(machine: Machine, user: str, script: str = BOMB) -> Process:
    """Started as `exec -d` does. Its first process makes none: a shell whose fork fails ends."""
    keep = Keep(buffer=bounds.KEEP_BUFFER_MIN, on_full="drop")
    script = f"{{ {script}; }} & exec sleep 100000"
    return machine.agent.start(["sh", "-c", script], user=user, keep=keep)


def starts(machine: Machine) -> int:
    """How many agents there were; 0 while none answers."""
    try:
        return machine.agent.info().agent_starts
    except (ConnectionLost, DeadlineExceeded):
        return 0


def bomb_workload(machine: Machine) -> None:
    machine.agent.exec(["touch", "/tmp/go"], check=True)


def everything_works(machine: Machine) -> None:
    """All that a host may want to do to a machine that it looks after."""
    agent = machine.agent
    with Pings(machine, ANSWER):
        for user in ("0:0", USER):
            script = "echo a | cat | wc -c"
            counted = agent.exec(shell=script, user=user, timeout=PATIENCE, check=True)
            assert counted.stdout == b"2\n"
        staged = StagedFile(path="/tmp/staged", data=b"it")
        read = agent.exec(["cat", "/tmp/staged"], files=[staged], user=USER, timeout=PATIENCE)
        assert (read.returncode, read.stdout) == (0, b"it")
        with agent.start(["tty"], tty=True, user="0:0") as process:
            assert process.wait(60).returncode == 0
        assert agent.renew(machine_id="random", check=True).reseeded
        with agent.start(["sleep", "1000"], user="0:0") as sleeper:
            sleeper.kill()
            assert sleeper.wait(60).shell_code == 137
        with pytest.raises(DeadlineExceeded):
            agent.exec(shell="sleep 1000 | sleep 1000", user=USER, timeout=0.5, grace=0.1)


@pytest.mark.parametrize("script", [BOMB, SLEEPERS], ids=["forks", "sleeps"])
@pytest.mark.parametrize("user", [USER, "0:0"])
def test_a_process_that_is_a_fork_bomb_keeps_nobody_from_starting_others(
    machine: Machine, user: str, script: str
) -> None:
    before = machine.agent.info()
    with bomb(machine, user, script) as process:
        wait_until("it is refused more", lambda: refused(machine, "*/processes/*") > 0)
        everything_works(machine)
        process.signal("KILL", "tree")
        wait_until("it is reaped", lambda: number(machine, "*/processes/pids.current") < 10, 180)
    script = "cat /proc/self/cgroup"
    assert b"/processes/" in machine.agent.exec(shell=script).stdout
    after = machine.agent.info()
    assert (after.agent_pid, after.agent_starts) == (before.agent_pid, 1)


def test_the_workload_and_processes_that_are_bombs_together(machine: Machine) -> None:
    bomb_workload(machine)
    wait_until("it is refused more", lambda: refused(machine, "workload") > 0)
    everything_works(machine)
    with bomb(machine, USER), bomb(machine, "0:0"):
        wait_until("they are refused more", lambda: refused(machine, "*/processes/*") > 0)
        with bomb(machine, USER) as late:  # in the little that is left for such a case
            wait_until("it is refused more", lambda: refused(machine, "*/reserve/*") > 0)
            everything_works(machine)
            late.signal("KILL", "tree")
        everything_works(machine)


def test_a_bomb_that_outlives_the_agent(machine: Machine) -> None:
    with bomb(machine, USER, SLEEPERS):
        wait_until("it is refused more", lambda: refused(machine, "*/processes/*") > 0)
        first = machine.agent.info().agent_pid
        with contextlib.suppress(ConnectionLost):  # which goes with the agent
            machine.agent.exec(["kill", "-9", str(first)], user="0:0", timeout=PATIENCE)
    wait_until("another serves", lambda: starts(machine) == 2)
    everything_works(machine)
    bomb_workload(machine)
    wait_until("it is refused more", lambda: refused(machine, "workload") > 0)
    with bomb(machine, USER):
        wait_until("it is refused more", lambda: refused(machine, "*/processes/*") > 1)
        everything_works(machine)


def test_what_all_may_have_is_less_than_there_can_be(machine: Machine) -> None:
    most = number(machine, "../../../../proc/sys/kernel/threads-max")
    shares = [number(machine, f"{name}/pids.max") for name in ("workload", "*/processes")]
    assert abs(shares[0] - shares[1]) < 64
    assert most / 2 < sum(shares) <= most - bounds.PIDS_RESERVE
    assert number(machine, "*/reserve/pids.max") == bounds.LATE_PROCESSES


@pytest.mark.parametrize("own", [30, 10**6])
def test_a_limit_of_its_own_does_not_lift_what_all_may_have(machine: Machine, own: int) -> None:
    share = number(machine, "*/processes/pids.max")
    count = "n=0; while [ $n -lt 3000 ]; do sleep 1000 & n=$((n+1)); echo $n; done 2>/dev/null"
    result = machine.agent.exec(
        shell=count, user=USER, limits=Limits(processes=own), timeout=120, drain_cap=0.1
    )
    assert result.returncode != 0  # the shell ends where it cannot fork
    made = len(result.stdout.splitlines())
    assert min(own, share) - 3 <= made < min(own, share)


@pytest.mark.parametrize(("own", "is_share"), [(30, False), (10**6, True)])
def test_a_workloads_limit_of_its_own(
    machines_home: pathlib.Path, elf: pathlib.Path, own: int, *, is_share: bool
) -> None:
    command = ["sleep", "1000"]
    with boot(machinekit.demo_image(), memory="256M", command=command, processes=own) as machine:
        share = number(machine, "*/processes/pids.max")
        found = number(machine, "workload/pids.max")
        assert (abs(found - share) < 64) if is_share else (found == own)
