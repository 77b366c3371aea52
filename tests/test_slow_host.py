"""Whatever is slow, agent or host or both: a command's output and its exit code arrive."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import machinekit
import pytest
from clikit import PROGRAM, microguest
from init_machine import command_of
from patience import PATIENCE
from test_machine_monitor import bundle_of

from microguest import boot
from microguest.guest import bounds
from microguest.guest.wire.messages import Keep
from microguest.host_client.machines.folder import read_state

HELLO = ("sh", "-c", "sleep 2; echo hello; exit 7")  # by when a test has stopped whom it stops
OVER_THE_GRACE = bounds.OUTPUT_GRACE + 2.0  # seconds
CPU = Path("/sys/fs/cgroup/cpu")

Run = subprocess.Popen[bytes]

pytestmark = pytest.mark.usefixtures("machines_home")


@contextmanager
def running(image: str, *command: str, prefix: tuple[str, ...] = ()) -> Iterator[Run]:
    """`microguest run` of a machine that is named `slow`."""
    words = ("run", "--rm", "--name", "slow", "--machine", "namespaces", image, *command)
    with subprocess.Popen(
        [*prefix, PROGRAM, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def result(process: Run) -> tuple[int, bytes, bytes]:
    out, err = process.communicate(timeout=90)
    return process.returncode, out, err


def vmm() -> int:
    """The launcher, as soon as there is one."""
    machinekit.wait_until("it is launched", lambda: launched() > 0, 60)
    return launched()


def launched() -> int:
    state = read_state("slow")
    return 0 if state is None else state.vmm


def agent() -> int:
    """The agent's pid, as soon as there is one."""
    parent = vmm()

    def found() -> int:
        return next((p for p in machinekit.family(parent) if command_of(p) == ["agent"]), 0)

    machinekit.wait_until("there is an agent", lambda: found() > 0, 60)
    return found()


def has_ended() -> bool:
    state = read_state("slow")
    return state is not None and state.workload_exited is not None


def stays_late(*pids: int) -> None:
    """Those processes stand still until the workload's end is longer ago than its grace."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    machinekit.wait_until("the workload has ended", has_ended, 60)
    time.sleep(OVER_THE_GRACE)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def test_the_agent_is_late(image: str) -> None:
    with running(image, *HELLO) as process:
        stays_late(agent())
        assert result(process) == (7, b"hello\n", b"")


def test_the_host_is_late(image: str) -> None:
    with running(image, *HELLO) as process:
        vmm()
        stays_late(process.pid)
        assert result(process) == (7, b"hello\n", b"")


def test_both_are_late(image: str) -> None:
    with running(image, *HELLO) as process:
        stays_late(process.pid, agent())
        assert result(process) == (7, b"hello\n", b"")


def test_a_host_that_stands_still_while_it_reads(image: str) -> None:
    """More than the sockets hold: what is left waits with its exit code for the reader."""
    script = "echo hello; sleep 2; yes | head -c 900000; exit 7"
    with running(image, "sh", "-c", script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"hello\n"  # it is attached
        stays_late(process.pid)
        code, out, err = result(process)
    assert (code, len(out), err) == (7, 900_000, b"")


def test_the_exit_code_is_given_where_the_output_is_lost(image: str) -> None:
    with running(image, *HELLO) as process:
        vmm()
        os.kill(process.pid, signal.SIGSTOP)
        machinekit.wait_until("the workload has ended", has_ended, 60)
        assert microguest("stop", "slow").returncode == 0
        os.kill(process.pid, signal.SIGCONT)
        code, out, err = result(process)
    assert (code, out) == (7, b"")
    assert err.count(b"\n") == 1
    assert b"output" in err
    assert b"lost" in err


def test_a_reader_that_has_left_is_waited_for_no_longer_than_the_grace(image: str) -> None:
    words = ("--rm", "--name", "slow", "--machine", "namespaces", image, "sh", "-c", "exit 3")
    assert microguest("run", "-dt", *words).returncode == 0
    pids = machinekit.family(machinekit.state_of("slow").monitor)
    machinekit.nothing_is_left("slow", pids, within=bounds.OUTPUT_GRACE + PATIENCE)


def test_under_a_cpu_quota(image: str) -> None:
    group = CPU / f"microguest-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "cpu.cfs_quota_us").write_text("18000")
    except OSError as error:
        pytest.skip(f"needs a cpu cgroup (version 1) that can be made: {error}")
    try:
        into = ("sh", "-c", f'echo $$ > {group}/tasks && exec "$@"', "sh")
        with running(image, *HELLO, prefix=into) as process:
            assert result(process) == (7, b"hello\n", b"")
    finally:
        machinekit.end_machines()
        machinekit.wait_until("it is empty", lambda: not (group / "tasks").read_text(), 60)
        group.rmdir()


def test_a_result_is_retained_from_when_it_can_be_had(image: str) -> None:
    """Not from its end, where the agent that was to serve it has died meanwhile."""
    with boot(image, machine="namespaces") as machine:
        process = machine.agent.start(["sh", "-c", "echo hello; exit 7"], keep=Keep(retain=8.0))
        assert process.wait(PATIENCE).returncode == 7
        process.detach()
        parent = machine.state.vmm

        def agent() -> int:
            family = machinekit.family(parent)
            return next((p for p in family if command_of(p) == ["agent"]), 0)

        first = agent()
        os.kill(first, signal.SIGKILL)
        machinekit.wait_until("there is another", lambda: agent() not in (0, first))
        second = agent()
        os.kill(second, signal.SIGSTOP)
        time.sleep(9.0)  # longer than it is retained
        os.kill(second, signal.SIGCONT)
        with machine.agent.attach(process.id) as again:
            assert again.communicate().stdout == b"hello\n"
            assert again.wait(PATIENCE).returncode == 7


def test_the_last_state_reaches_a_caller_that_stood_still(tmp_path: Path) -> None:
    """More states than a socket holds have gone by, and nothing is on disk any more."""
    script = r"""
text = "\U0001f600" * 3000
r = dial()
ready(r)
for number in range(100):
    tell(r, "agent_exited", code=1, crashes=number, restart_in=1.0, last_words=text)
    time.sleep(0.002)
tell(r, "workload_exited", code=7)
tell(r, "stopping", status="done", boot_ms=1.0)
"""
    (tmp_path / "root").mkdir()
    bundle = bundle_of(tmp_path / "bundle", script)
    with boot(f"dir:{tmp_path}/root", machine="namespaces", bundle=bundle, timeout=60) as machine:
        folder = tmp_path / "state" / "microguest" / "machines" / machine.name
        machinekit.wait_until("nothing is left", lambda: not folder.exists(), 60)
        state = machine.wait(PATIENCE)
    assert state.ended
    assert state.status == "done"
    assert state.workload_exited is not None
    assert state.workload_exited.code == 7


def test_an_agent_that_is_late_after_the_boot(image: str) -> None:
    """Its host dials it in time, and is greeted later than any greeting takes."""
    with running(image, *HELLO) as process:
        vmm()
        os.kill(process.pid, signal.SIGSTOP)
        machinekit.wait_until(
            "the agent serves", lambda: machinekit.state_of("slow").phase == "running", 60
        )
        late = agent()
        os.kill(late, signal.SIGSTOP)
        os.kill(process.pid, signal.SIGCONT)
        ends = time.monotonic() + OVER_THE_GRACE
        while time.monotonic() < ends and process.poll() is None:
            os.kill(late, signal.SIGSTOP)  # PID 1 lets it go on, when it looks after it
            time.sleep(0.05)
        os.kill(late, signal.SIGCONT)
        assert result(process) == (7, b"hello\n", b"")
