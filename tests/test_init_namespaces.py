"""The launcher: what it refuses, how it ends, and that nothing of a machine is left on the host."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from init_machine import (
    PROGRAM,
    Machine,
    boot_config,
    make_root,
    require_program,
    state_of,
    wait_for,
)
from patience import PATIENCE
from rights import open_to_all

NOBODY = 65534


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_program()
    return make_root(tmp_path_factory.mktemp("image"))


@contextlib.contextmanager
def place_of_its_own() -> Iterator[int]:
    """A process in a mount namespace where nobody else mounts, and that hears of all mounts."""
    command = ["unshare", "--mount", "--propagation", "shared", "sleep", "1000"]
    with subprocess.Popen(command) as holder:
        try:
            name = Path(f"/proc/{holder.pid}/comm")
            wait_for(lambda: name.read_text() == "sleep\n", "its namespace")
            yield holder.pid
        finally:
            holder.kill()


def mounts(pid: int) -> str:
    return Path(f"/proc/{pid}/mountinfo").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_powers_off(root: Path, number: signal.Signals) -> None:
    with Machine(root, boot_config(["sleep", "1000"])) as machine:
        machine.report("ready")
        machine.report("workload_started")
        machine.process.send_signal(number)
        machine.report("workload_exited")
        assert machine.report("stopping")["status"] == "shutdown"
        assert machine.wait() == 0


def test_a_signal_at_any_moment_of_the_boot_powers_off(root: Path) -> None:
    for delay in (0.0, 0.005, 0.01, 0.02, 0.04, 0.08):
        with Machine(root, boot_config()) as machine:
            assert machine.init_pid()
            time.sleep(delay)
            machine.process.send_signal(signal.SIGTERM)
            assert machine.wait() == 0, machine.console


def test_a_workload_that_ignores_term_is_killed(root: Path) -> None:
    script = "trap '' TERM; echo ready; while :; do sleep 1; done"
    with Machine(root, boot_config(["sh", "-c", script])) as machine:
        wait_for(lambda: "ready" in machine.console, "the trap")
        machine.process.terminate()
        assert machine.wait() == 0


def test_kill_9_of_the_launcher_leaves_no_process(root: Path) -> None:
    with Machine(root, boot_config(["sh", "-c", "setsid sleep 1000 & sleep 1000"])) as machine:
        machine.report("ready")
        machine.report("workload_started")
        wait_for(lambda: len(machine.everybody()) >= 5, "all processes")
        everybody = machine.everybody()
        machine.process.kill()
        machine.wait()
        wait_for(lambda: not any(state_of(pid) for pid in everybody), "the end of all")


def test_no_mount_is_left_on_the_host(root: Path) -> None:
    with place_of_its_own() as host:
        before = mounts(host)
        there = ("nsenter", f"--mount=/proc/{host}/ns/mnt")
        with Machine(root, boot_config(["sleep", "1000"]), under=there) as machine:
            machine.report("ready")
            assert mounts(host) == before
            machine.process.terminate()
            assert machine.wait() == 0
            assert mounts(host) == before
            assert sorted(os.listdir(machine.run)) == ["boot.json", "console", "host"]


def test_ordinary_users_may_do_it_too(root: Path) -> None:
    open_to_all(root)
    with Machine(root, boot_config(["sh", "-c", "id -u; exit 7"]), user=NOBODY) as machine:
        try:
            machine.report("ready")
        except AssertionError:
            if "unshare user namespace" in machine.console:
                pytest.skip("user namespaces are forbidden to users here")
            raise
        machine.report("workload_started")
        assert machine.report("workload_exited")["code"] == 7
        assert machine.wait() == 0
        assert machine.console == "0\n"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "--root"),
        (["--root", "/"], 2, "--run"),
        (["--root", "/", "--run"], 2, "--run"),
        (["--colour", "red"], 2, "--colour"),
        (["--root", "/", "--run", "/", "--parent", "x"], 2, "--parent"),
        (["--root", "/", "--run", "/nothing"], 1, "open /nothing/boot.json: No such file"),
        (["--root", "/", "--run", "{run}", "--parent", "1"], 1, "process 1"),
        (["--root", "/nothing", "--run", "{run}"], 1, "open /nothing: No such file"),
        (["--root", "/etc/passwd", "--run", "{run}"], 1, "open /etc/passwd: Not a directory"),
        (["--root", "/", "--run", "{run}"], 1, "/host: No such file"),
    ],
)
def test_what_it_cannot_do_is_one_line(
    tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    require_program()
    (tmp_path / "boot.json").write_text("{}")
    command = [word.format(run=tmp_path) for word in arguments]
    done = subprocess.run(
        [PROGRAM, "namespaces", *command],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
