"""What a process may be and use: ids, capabilities, resource limits, cgroups.

The agent must keep answering whatever a process does within, or for want of, its limits. That is
tried in a virtual machine, because here it would be this machine's memory and processes.
"""

import os
import pathlib
import resource
import signal
import threading
import time
from collections.abc import Iterator

import machinekit
import pytest
from agentharness import AgentProcess, Host, Refused, execute
from machinekit import Pings, wait_until

from microguest import boot
from microguest.errors import DeadlineExceeded
from microguest.guest.errors import StartError
from microguest.guest.privileges import CAPABILITIES, RESOURCES
from microguest.guest.wire.messages import Failure, Limits
from microguest.host_client.machines.machine import Machine

LOAD = 8.0  # seconds that the agent is in trouble
ANSWER = LOAD / 2  # within which it answers ping meanwhile; emulated, on a busy machine
MIB = 1024 * 1024

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give privileges up")


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentProcess]:
    with AgentProcess() as process:
        yield process


def output(agent: AgentProcess, script: str, **options: object) -> list[str]:
    result = execute(agent, shell=script, **options)
    assert result.stderr == b""
    return result.stdout.decode().split()


def refusal(agent: AgentProcess, *argv: str, **options: object) -> Failure:
    with Host(agent) as host, pytest.raises(Refused) as caught:
        host.start(*argv, **options)
    return caught.value.failure


# ── who it is and what it sees ───────────────────────────────────────────────────────────────────


def test_shell_line_is_run_by_the_images_shell(agent: AgentProcess) -> None:
    assert output(agent, "echo $0 | tr a-z A-Z; exit 0") == ["/BIN/SH"]


def test_environment_can_be_replaced(agent: AgentProcess) -> None:
    lines = execute(agent, "env", env={"ONLY": "this"}, clear_env=True).stdout.split(b"\n")
    assert {line.partition(b"=")[0] for line in lines} == {b"ONLY", b"PATH", b"HOME", b""}


def test_umask_is_the_requested_one(agent: AgentProcess) -> None:
    assert output(agent, "umask", umask=0o027) == ["0027"]


@needs_root
def test_more_groups_by_name_and_number(agent: AgentProcess) -> None:
    found = output(agent, "id -G", user="1234:5678", groups=("daemon", "4321", "daemon"))
    assert found == ["5678", "1", "4321"]
    assert refusal(agent, "true", groups=("nobodys",)).code == "bad_user"


def status(agent: AgentProcess, **options: object) -> dict[str, str]:
    """What /proc/self/status says of a process that was started so."""
    lines = execute(agent, "cat", "/proc/self/status", **options).stdout.decode().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


@needs_root
def test_capabilities_are_the_only_ones_it_can_have(agent: AgentProcess) -> None:
    wanted = 1 << CAPABILITIES.index("net_admin") | 1 << CAPABILITIES.index("chown")
    found = status(agent, capabilities=("net_admin", "chown"))
    names = ("CapBnd", "CapPrm", "CapEff", "CapInh", "CapAmb")
    assert [int(found[name], 16) for name in names] == [wanted, wanted, wanted, 0, 0]
    found = status(agent, capabilities=("net_admin", "chown"), user="1234:1234")
    assert [int(found[name], 16) for name in names] == [wanted, 0, 0, 0, 0]
    found = status(agent, capabilities=())
    assert [int(found[name], 16) for name in names] == [0, 0, 0, 0, 0]


def test_capability_names_are_in_the_kernels_order() -> None:
    last = int(pathlib.Path("/proc/sys/kernel/cap_last_cap").read_text())
    assert last < len(CAPABILITIES)
    assert CAPABILITIES.index("sys_admin") == 21  # include/uapi/linux/capability.h
    assert CAPABILITIES.index("checkpoint_restore") == 40


def test_no_new_privs(agent: AgentProcess) -> None:
    assert status(agent, no_new_privs=True)["NoNewPrivs"] == "1"
    assert status(agent)["NoNewPrivs"] == "0"


def test_resource_limits_by_name(agent: AgentProcess) -> None:
    limits = Limits(rlimits={"nofile": (123, 456), "core": (0, 0), "fsize": (MIB, -1)})
    text = execute(agent, "cat", "/proc/self/limits", limits=limits).stdout.decode()
    assert "Max open files            123                  456 " in text
    assert "Max core file size        0                    0 " in text
    assert "Max file size             1048576              unlimited " in text


def test_resource_names_are_the_kernels() -> None:
    for name in ("cpu", "nofile", "as", "memlock", "rtprio"):
        assert RESOURCES.index(name) == getattr(resource, f"RLIMIT_{name.upper()}")


# ── what is refused ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"argv": ()}, "bad_request"),
        ({"argv": ("",)}, "bad_request"),
        ({"argv": ("true", "x\0y")}, "bad_request"),
        ({"argv": ("true", *["x" * 1024] * 3 * 1024)}, "argument_list_too_long"),
        ({"argv": ("true",), "env": {"A": "x\0y"}}, "bad_request"),
        ({"argv": ("true",), "env": {"A=B": "x"}}, "bad_request"),
        ({"argv": ("true",), "cwd": "relative"}, "bad_cwd"),
        ({"argv": ("true",), "cwd": "/etc/passwd"}, "bad_cwd"),
        ({"argv": ("true",), "user": "no-such-user"}, "bad_user"),
        ({"argv": ("true",), "groups": ("no-such-group",)}, "bad_user"),
        ({"argv": ("true",), "capabilities": ("CAP_CHOWN",)}, "bad_request"),
        ({"argv": ("true",), "capabilities": ("all",)}, "bad_request"),
        ({"argv": ("true",), "limits": Limits(rlimits={"files": (1, 1)})}, "bad_request"),
        ({"argv": ("true",), "limits": Limits(rlimits={"nofile": (2, 1)})}, "bad_request"),
        ({"argv": ("true",), "limits": Limits(rlimits={"nofile": (-2, 1)})}, "bad_request"),
        ({"argv": ("true",), "limits": Limits(rlimits={"nofile": (1, 2**60)})}, "setup_failed"),
    ],
)
def test_bad_request_is_a_typed_error_and_leaves_nothing(
    agent: AgentProcess, options: dict[str, object], code: str
) -> None:
    execute(agent, "true")
    before = agent.open_descriptors()
    failure = refusal(agent, *options.pop("argv"), **options)  # type: ignore[misc]
    assert failure.code == code
    assert failure.message
    assert agent.children() == []
    assert agent.open_descriptors() <= before + 1  # the connection may not be closed yet
    assert execute(agent, "true").exited.code == 0


# ── cgroups, in a machine ────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def emulated(module_machines_home: pathlib.Path, elf: pathlib.Path) -> Iterator[Machine]:
    with boot(machinekit.demo_image(), machine="qemu", memory="384M") as machine:
        machine.agent.ping()  # makes the connection that is kept for small requests
        machine.agent.exec(["true"])
        yield machine


@pytest.mark.qemu
def test_agent_has_its_name_and_a_cgroup_of_its_own(emulated: Machine) -> None:
    pid = emulated.agent.info().agent_pid
    assert emulated.agent.exec(["cat", f"/proc/{pid}/comm"]).stdout == b"agent\n"
    path = emulated.agent.exec(["cat", f"/proc/{pid}/cgroup"]).stdout.decode().strip()
    assert path.startswith("0::/microguest/")
    assert path.endswith("/agent")
    folder = f"/sys/fs/cgroup{path.removeprefix('0::')}"
    assert int(emulated.agent.exec(["cat", f"{folder}/memory.min"]).stdout) > 16 * MIB


@pytest.mark.qemu
def test_limits_are_set_in_the_cgroup(emulated: Machine) -> None:
    limits = Limits(memory=64 * MIB, cpu=0.5, processes=20)
    script = "cd /sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup); cat memory.max cpu.max pids.max"
    result = emulated.agent.exec(shell=script, limits=limits)
    assert result.stdout.split() == [b"67108864", b"50000", b"100000", b"20"]


@pytest.mark.qemu
def test_fork_bomb_stays_in_its_cgroup(emulated: Machine) -> None:
    bomb = "f() { f | f & }; f; sleep 60"
    with Pings(emulated, ANSWER), pytest.raises(DeadlineExceeded):
        emulated.agent.exec(
            shell=bomb, limits=Limits(processes=100, memory=64 * MIB), timeout=LOAD, grace=0.2
        )
    wait_until("the bomb is gone", lambda: count_processes(emulated) < 20)


def count_processes(machine: Machine) -> int:
    """Without kernel threads, which have no memory."""
    script = "grep -l VmSize /proc/[0-9]*/status 2>/dev/null | wc -l"
    return int(machine.agent.exec(shell=script).stdout)


@pytest.mark.qemu
def test_process_beyond_its_memory_is_killed_and_nobody_else(emulated: Machine) -> None:
    hungry = "dd if=/dev/zero of=/dev/null bs=100M count=1 2>/dev/null"
    result = emulated.agent.exec(["sh", "-c", hungry], limits=Limits(memory=24 * MIB))
    assert result.oom_killed
    assert result.shell_code == 128 + signal.SIGKILL
    enough = emulated.agent.exec(["sh", "-c", hungry], limits=Limits(memory=160 * MIB))
    assert (enough.returncode, enough.oom_killed) == (0, False)
    assert not emulated.agent.exec(["true"]).oom_killed


@pytest.mark.qemu
def test_agent_survives_when_all_memory_is_used(emulated: Machine) -> None:
    before = emulated.agent.info()
    hungry = "for i in 1 2 3 4 5 6; do dd if=/dev/zero of=/dev/null bs=96M count=5 & done; wait"
    with Pings(emulated, ANSWER):
        result = emulated.agent.exec(["sh", "-c", hungry], timeout=60)
    assert result.oom_killed
    after = emulated.agent.info()
    assert (after.agent_pid, after.agent_starts) == (before.agent_pid, 1)


@pytest.mark.qemu
def test_agent_answers_during_a_flood_of_starts(emulated: Machine) -> None:
    until = time.monotonic() + LOAD
    counts = [0] * 16

    def flood(number: int) -> None:
        while time.monotonic() < until:
            assert emulated.agent.exec(["true"]).returncode == 0
            counts[number] += 1

    threads = [threading.Thread(target=flood, args=(number,)) for number in range(len(counts))]
    with Pings(emulated, ANSWER):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert min(counts) > 0


@pytest.mark.qemu
def test_processor_time_is_limited(emulated: Machine) -> None:
    busy = "while :; do :; done"
    with pytest.raises(DeadlineExceeded):
        emulated.agent.exec(shell=busy, limits=Limits(cpu=0.2), timeout=1)
    script = f"timeout 2 sh -c '{busy}'; true"
    used = emulated.agent.exec(shell=script, limits=Limits(cpu=0.2))
    assert 0.05 < used.user_seconds + used.system_seconds < 1


@pytest.mark.qemu
def test_limits_that_need_more_than_there_is_are_refused(emulated: Machine) -> None:
    with pytest.raises(StartError) as caught:
        emulated.agent.exec(["true"], limits=Limits(rlimits={"nofile": (1, 2**60)}))
    assert (caught.value.code, caught.value.step) == ("setup_failed", "rlimit")


def test_limits_without_cgroups_are_refused(
    module_machines_home: pathlib.Path, elf: pathlib.Path
) -> None:
    with boot(machinekit.demo_image(), machine="namespaces") as machine:
        for limits in (Limits(memory=MIB), Limits(cpu=1), Limits(processes=10)):
            with pytest.raises(StartError) as caught:
                machine.agent.exec(["true"], limits=limits)
            assert caught.value.code == "cgroup_unavailable"
        limits = Limits(rlimits={"nofile": (64, 64)})
        assert machine.agent.exec(shell="ulimit -n", limits=limits).stdout == b"64\n"


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("taken", "given_back"),
    [
        ("mount -o remount,ro /sys/fs/cgroup", "mount -o remount,rw /sys/fs/cgroup"),
        ("mount -t tmpfs tmpfs /sys/fs/cgroup", "umount /sys/fs/cgroup"),
    ],
)
def test_processes_start_and_end_where_cgroups_were_taken_away(
    emulated: Machine, taken: str, given_back: str
) -> None:
    before = emulated.agent.start(["sleep", "4711"])
    emulated.agent.exec(shell=taken, check=True)
    try:
        assert emulated.agent.exec(["id", "-u"], user="0:0").stdout == b"0\n"
        with pytest.raises(StartError) as caught:
            emulated.agent.exec(["true"], limits=Limits(processes=10))
        assert caught.value.code == "cgroup_unavailable"
        with pytest.raises(DeadlineExceeded):
            emulated.agent.exec(shell="setsid sleep 4711 & sleep 4711", timeout=0.5, grace=0.1)
        before.close()
        seen = "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' | grep -c 'sleep [4]711'; :"
        wait_until("both trees are gone", lambda: emulated.agent.exec(shell=seen).stdout == b"0\n")
    finally:
        emulated.agent.exec(shell=given_back, check=True)
    assert emulated.agent.exec(["true"], limits=Limits(processes=10)).returncode == 0


@pytest.mark.qemu
def test_processes_start_where_their_cgroup_was_removed(emulated: Machine) -> None:
    script = "cat /proc/self/cgroup"
    used = emulated.agent.exec(shell=script).stdout.decode().strip().removeprefix("0::")
    # From beside it: the leaf that is empty and waits is removed by a process with limits.
    removed = emulated.agent.exec(
        shell=f"until rmdir /sys/fs/cgroup{used}; do :; done", limits=Limits(processes=10)
    )
    assert removed.returncode == 0
    assert emulated.agent.exec(["true"]).returncode == 0
    again = emulated.agent.exec(shell=script).stdout.decode().strip()
    assert again.startswith("0::/microguest/")
