"""Debian's systemd as PID 1 of a virtual machine that is ours all the same."""

import contextlib
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imagefactory
import pytest
from machinekit import demo_image, wait_until

from microguest import Agent, Limits, Machine, boot, connect

pytestmark = [pytest.mark.qemu, pytest.mark.slow, pytest.mark.timeout(400)]

PROJECT = Path(__file__).parent.parent
SYSTEMD = PROJECT / "dist" / "test-images" / "systemd"
PACKAGES = "dbus,systemd,systemd-sysv,udev"
BOOT = 150.0  # seconds for an emulated machine under load to reach multi-user
ANSWER = 60.0
GRACE = 40.0
# KiB of its own: what PID 1 may have in mode supervise, and one huge page that is hardly used
IDLE_KEEPER = (7 + 2) * 1024


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the machines keep their state."""
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def upper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The disk that both of systemd's machines write to, one after the other."""
    return tmp_path_factory.mktemp("upper") / "upper.img"


@pytest.fixture(scope="module")
def debian(state: Path, upper: Path, elf: Path) -> Iterator[Machine]:
    with started(state, upper=str(upper), upper_size="256M") as machine:
        yield machine


def started(state: Path, **options: str) -> "contextlib.AbstractContextManager[Machine]":
    """Debian with systemd."""
    image = imagefactory.debian_layout(SYSTEMD, PACKAGES, "/sbin/init")
    return handed_off(image, state, memory="1G", **options)


@contextlib.contextmanager
def handed_off(image: str, state: Path, **options: Any) -> Iterator[Machine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(state))
        with boot(image, handoff=True, timeout=BOOT, **options) as machine:
            machine.agent.ping()  # makes the connection that is kept for small requests
            yield machine


def run(agent: Agent, line: str, timeout: float = ANSWER) -> str:
    return agent.exec(["sh", "-c", line], timeout=timeout).stdout.decode().strip()


def systemd_state(agent: Agent) -> str:
    """`running` or another of systemctl(1)'s, once the boot is over (docs/design/handoff.md)."""
    page = (PROJECT / "docs" / "design" / "handoff.md").read_text()
    ask = re.search(r'ask = "(.*)"', page)
    loop = re.search(r'shell=f"(until .*)", timeout', page)
    assert ask is not None
    assert loop is not None
    return run(agent, loop[1].replace("{ask}", ask[1]), BOOT)


def processes(agent: Agent) -> dict[str, dict[str, str]]:
    """What /proc/PID/status says, and cgroup and score, by the name of the process."""
    script = r"""
        for process in /proc/[0-9]*; do
            test -e $process/exe && cd $process && cat status || continue
            read -r cgroup <cgroup && read -r score <oom_score_adj
            echo "Cgroup: ${cgroup#0::}"
            echo "Score: $score"
            echo
        done 2>/dev/null
    """
    blocks = run(agent, script).split("\n\n")
    found = (dict(re.findall(r"^(\w+):\s*(.*)$", block, re.MULTILINE)) for block in blocks)
    return {fields["Name"]: fields for fields in found if "Name" in fields}


def test_systemd_runs_and_the_agent_beside_it(debian: Machine) -> None:
    assert systemd_state(debian.agent) == "running", run(
        debian.agent, "systemctl --failed --no-pager"
    )
    there = processes(debian.agent)
    assert there["systemd"]["Pid"] == "1"
    assert there["systemd"]["Score"] == "0"
    keeper, agent = there["microguest-keep"], there["agent"]
    assert (keeper["PPid"], agent["PPid"]) == ("1", keeper["Pid"])
    assert keeper["Cgroup"] == "/microguest/keeper"
    assert re.fullmatch("/microguest/[0-9a-f]+/agent", agent["Cgroup"])
    assert (keeper["Score"], agent["Score"]) == ("-1000", "-1000")
    assert int(keeper["RssAnon"].split()[0]) <= IDLE_KEEPER
    assert run(debian.agent, f"tr '\\0' ' ' </proc/{keeper['Pid']}/cmdline") == "microguest-keeper"
    assert debian.state.handed_off


def test_it_is_a_machine_like_others(debian: Machine) -> None:
    assert run(debian.agent, "systemd-detect-virt") in ("qemu", "kvm")
    assert run(debian.agent, "systemctl list-jobs --no-legend --no-pager") == ""
    assert "Startup finished in" in run(debian.agent, "journalctl --boot --no-pager")
    assert run(debian.agent, "loginctl list-sessions --no-legend") == ""
    assert re.fullmatch("[0-9a-f]{32}", run(debian.agent, "cat /etc/machine-id"))
    assert (
        run(debian.agent, "systemd-run --quiet --pipe --wait echo through systemd")
        == "through systemd"
    )


def test_agent_and_kept_processes_live_through_what_systemd_does(debian: Machine) -> None:
    script = "n=0; while sleep 0.2; do n=$((n + 1)); echo $n; done"
    with connect(debian.name) as agent:
        kept = agent.start(["sh", "-c", script], keep=True)
        assert next(kept.stdout.lines()) == b"1\n"
        kept.detach()
        for line in (
            "systemctl daemon-reload",
            "systemctl daemon-reexec",
            "systemctl isolate rescue.target",
            "systemctl isolate multi-user.target",
        ):
            assert agent.exec(["sh", "-c", line], timeout=ANSWER).returncode == 0, line
        pid = processes(agent)["agent"]["Pid"]
        agent.start(["sh", "-c", f"sleep 0.2; kill -KILL {pid}"], keep=True).detach()
        wait_until("the agent's end is told", lambda: bool(debian.state.agent_exits), ANSWER)
        assert debian.state.agent_exits[-1].signal == signal.SIGKILL
    with connect(debian.name) as agent:
        limited = Limits(memory=64 << 20, processes=10, cpu=0.5)
        assert agent.exec(["true"], limits=limited, timeout=ANSWER).returncode == 0
        with agent.attach(kept.id, offsets=kept.offsets) as again:
            lines = again.stdout.lines()
            assert [int(next(lines)) for _ in range(5)] == [2, 3, 4, 5, 6]
            again.kill()
            assert again.wait(ANSWER).signal == signal.SIGKILL
        assert systemd_state(agent) == "running"


def test_a_host_ends_it_and_then_systemd_does(debian: Machine, upper: Path, state: Path) -> None:
    run(debian.agent, "echo written >/root/file")
    ended = debian.stop(GRACE)
    assert (ended.status, ended.error, ended.vmm_code) == ("shutdown", "", 0)
    assert "reboot: Power down" in ended.console
    is_clean(upper)
    with started(state, upper=str(upper)) as machine:
        assert run(machine.agent, "cat /root/file") == "written"
        systemd_state(machine.agent)
        assert machine.agent.exec(["systemctl", "poweroff"], timeout=ANSWER).returncode == 0
        ended = machine.wait(ANSWER)
    assert (ended.status, ended.error, ended.vmm_code) == ("done", "", 0)
    assert "reboot: Power down" in ended.console
    is_clean(upper)


def test_busybox_init_leaves_the_disk_clean(state: Path, tmp_path: Path) -> None:
    upper = tmp_path / "upper.img"  # which it does not know of, and has no /proc left to look for
    options = {"upper": str(upper), "upper_size": "64M", "command": ["init"]}
    with handed_off(demo_image(), state, **options) as machine:
        run(machine.agent, "echo written >/file")
        ended = machine.stop(GRACE)
    assert (ended.status, ended.error, ended.vmm_code) == ("shutdown", "", 0)
    assert "Sent SIGTERM to all processes" in ended.console
    is_clean(upper)


def test_an_init_that_exits_takes_the_kernel_with_it(state: Path) -> None:
    with handed_off(demo_image(), state, command=["sh", "-c", "sleep 0.5; exit 3"]) as machine:
        ended = machine.wait(ANSWER)
    assert ended.status == "crashed"
    assert "Attempted to kill init! exitcode=0x00000300" in ended.error


def is_clean(image: Path) -> None:
    """Unmounted as it should be: nothing to replay, nothing to repair."""
    superblock = subprocess.run(
        ["dumpe2fs", "-h", str(image)], capture_output=True, text=True, check=True
    ).stdout
    assert re.search(r"Filesystem state: +clean\n", superblock)
    assert "needs_recovery" not in superblock
    subprocess.run(["e2fsck", "-fn", str(image)], check=True, capture_output=True)
