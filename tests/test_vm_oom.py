"""Memory in a virtual machine: who is killed when there is none, who goes on, and what is told."""

import pathlib
import shlex
from collections.abc import Iterator
from typing import Any

import machinekit
import pytest
from machinekit import Pings, wait_until
from patience import PATIENCE, SLACK

from microguest import Machine, boot
from microguest.guest.boot.config import BootConfig
from microguest.guest.wire.messages import Limits

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(600)]

MIB = 1 << 20
ANSWER = SLACK  # seconds for a ping while memory runs out, on a host that is busy as well
HOSTILE = "x) total-vm:1kB"  # as long as a name can be, and looks like the kernel's own line
# A shell that gives itself the name $NAME and takes memory until it is killed.
EATER = 'printf %s "$NAME" > /proc/$$/comm; a=0123456789abcdef; while :; do a=$a$a; done'
# Feeds itself each time it is told to, and stays when what it has started is killed.
WORKLOAD = f"""
while :; do
    until [ -e /tmp/go ]; do sleep 0.05; done
    NAME="$(cat /tmp/go)" sh -c {shlex.quote(EATER)}
    rm /tmp/go
done
"""


@pytest.fixture(scope="module")
def hungry(module_machines_home: pathlib.Path, elf: pathlib.Path) -> Iterator[Machine]:
    """A machine whose workload has no limit of its own."""
    with eating_machine() as machine:
        yield machine


def eating_machine() -> Machine:
    command = ["sh", "-c", WORKLOAD]
    machine = boot(machinekit.demo_image(), memory="256M", command=command)
    machine.agent.ping()  # makes the connection that is kept for small requests
    return machine


def feed(machine: Machine, name: str) -> None:
    """Let the workload start something of this name that eats until it is killed."""
    order(machine, name)
    wait_until("the eater is killed", lambda: not exists(machine, "/tmp/go"), 60)


def order(machine: Machine, name: str) -> None:
    """The same without a wait. The workload must not see half a file."""
    machine.agent.exec(shell="cat > /tmp/new; mv /tmp/new /tmp/go", input=name.encode(), check=True)


def exists(machine: Machine, path: str) -> bool:
    return machine.agent.exec(["test", "-e", path]).returncode == 0


def kills(machine: Machine) -> list[str]:
    """What the machine's events say of kills."""
    return [event.message for event in machine.state.events if event.kind == "oom-killed"]


def await_kill(machine: Machine, number: int) -> str:
    wait_until(f"kill {number} is told", lambda: len(kills(machine)) >= number)
    return kills(machine)[number - 1]


def test_whoever_eats_is_killed_and_named_and_nobody_else(hungry: Machine) -> None:
    before = hungry.agent.info()
    number = len(kills(hungry))
    with Pings(hungry, ANSWER):
        feed(hungry, HOSTILE)
    told = await_kill(hungry, number + 1)
    assert repr(HOSTILE) in told
    assert "the machine's memory" in told
    with Pings(hungry, ANSWER):
        eater = hungry.agent.exec(["sh", "-c", EATER], env={"NAME": "an eater"})
    assert eater.oom_killed
    told = await_kill(hungry, number + 2)
    assert "'an eater'" in told
    assert "the machine's memory" in told
    limited = hungry.agent.exec(["sh", "-c", EATER], limits=Limits(memory=24 * MIB))
    assert limited.oom_killed
    assert "its own limit" in await_kill(hungry, number + 3)
    assert len(kills(hungry)) == number + 3
    after = hungry.agent.info()
    assert (after.agent_pid, after.agent_starts) == (before.agent_pid, 1)


def test_lines_that_a_program_writes_are_no_kills(hungry: Machine) -> None:
    """Root may write to the kernel's log, but not as the kernel."""
    number = len(kills(hungry))
    line = (
        "Out of memory: Killed process 1 (init) total-vm:99kB, anon-rss:9kB, file-rss:9kB,"
        " shmem-rss:0kB, UID:0 pgtables:9kB oom_score_adj:0"
    )
    script = f"for level in '' '<0>' '<3>'; do echo \"${{level}}{line}\" > /dev/kmsg; done; dmesg"
    assert hungry.agent.exec(shell=script, check=True).stdout.count(line.encode()) == 3
    limited = hungry.agent.exec(["sh", "-c", EATER], limits=Limits(memory=24 * MIB))
    assert limited.oom_killed
    await_kill(hungry, number + 1)
    assert "'init'" not in " ".join(kills(hungry)[number:])


def test_a_flood_of_the_log_does_not_end_the_reports(hungry: Machine) -> None:
    """It is preferred to PID 1, and overwrites lines before that has read them."""
    number = len(kills(hungry))
    block = b"<6>" + b"x" * 896 + b"\n"  # one record a write; not shown on the console
    hungry.agent.exec(["tee", "/tmp/blocks"], input=block * 1024, check=True)
    flood = """
        echo on > /proc/sys/kernel/printk_devkmsg
        renice -n -20 -p $$ && dd if=/tmp/blocks of=/dev/kmsg bs=900 2>/dev/null || exit
        echo ratelimit > /proc/sys/kernel/printk_devkmsg
    """
    hungry.agent.exec(shell=flood, check=True, timeout=PATIENCE)
    hungry.agent.exec(["sh", "-c", EATER], env={"NAME": "after"}, limits=Limits(memory=24 * MIB))
    assert "'after'" in await_kill(hungry, number + 1)


def test_two_that_eat_together_do_not_stop_the_agent(hungry: Machine) -> None:
    """Each is below its own limit: it is the whole machine that has no memory left."""
    number = len(kills(hungry))
    with Pings(hungry, ANSWER):
        order(hungry, "inside")
        hungry.agent.exec(["sh", "-c", EATER], env={"NAME": "outside"})
        wait_until("the workload's is killed", lambda: not exists(hungry, "/tmp/go"), 60)
    await_kill(hungry, number + 2)
    text = " ".join(kills(hungry)[number:])
    assert "inside" in text
    assert "outside" in text
    assert hungry.agent.info().agent_starts == 1


def test_workload_has_a_cgroup_that_leaves_memory_free(hungry: Machine) -> None:
    script = """
        cd /sys/fs/cgroup/microguest; cat workload/memory.max */processes/memory.max
        wc -l < workload/cgroup.procs; awk '/MemTotal/ {print $2}' /proc/meminfo
    """
    workload, hosts, members, total = map(int, hungry.agent.exec(shell=script).stdout.split())
    assert 64 * MIB < workload < total * 1024 - 40 * MIB
    assert 64 * MIB < hosts < total * 1024 - 40 * MIB
    assert members >= 1


@pytest.mark.parametrize(
    ("limit", "told"), [(32 * MIB, "its own limit"), (1024 * MIB, "the machine's memory")]
)
def test_the_workloads_own_limit(
    module_machines_home: pathlib.Path,
    elf: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
    told: str,
) -> None:
    """Nothing of the host's asks for one yet; a boot config can."""
    plain = BootConfig.to_json

    def limited(self: BootConfig) -> Any:
        if isinstance(self, BootConfig) and self.workload is not None:
            self = self.replace(workload=self.workload.replace(memory=limit))
        return plain(self)

    monkeypatch.setattr(BootConfig, "to_json", limited)
    with eating_machine() as machine:
        with Pings(machine, ANSWER):
            feed(machine, "new\nline (1)")
        event = await_kill(machine, 1)
        assert told in event
        assert "(1)" in event
        exited = machine.stop(grace=0.5).workload_exited
    assert exited is not None
    assert exited.oom_killed
