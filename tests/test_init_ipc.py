"""What outlives its makers, between the lives of a workload: gone unless it is somebody else's."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from init_machine import (
    TOKEN,
    Config,
    Machine,
    boot_config,
    make_root,
    require_program,
    shell,
    wait_for,
)
from patience import PATIENCE
from plainpython import needs_guestsys

from microguest.host_client.client.address import UnixAddress
from microguest.host_client.client.agent import Agent

SOURCE = Path(__file__).parent / "data" / "ipc.c"
# How many there are of each of System V's, and what is in the folders of POSIX's.
COUNT = """
for kind in shm msg sem; do printf "%s=%s " $kind $(($(wc -l < /proc/sysvipc/$kind) - 1)); done
echo "posix=$(echo $(ls /dev/shm /dev/mqueue))"
""".strip()
NOTHING = "shm=0 msg=0 sem=0 posix=/dev/mqueue: /dev/shm:"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_program()
    if shutil.which("gcc") is None:
        pytest.skip("needs a C compiler: apt install gcc")
    root = make_root(tmp_path_factory.mktemp("image"))
    subprocess.run(["gcc", "-static", "-o", str(root / "bin" / "ipc"), str(SOURCE)], check=True)
    return root


def twice(first: str, second: str) -> Config:
    """A workload with two lives."""
    script = f"if [ -e /lived ]; then {second}; else touch /lived; {first}; exit 1; fi"
    return boot_config(shell(script), restart={"policy": "on-failure", "delay": 0.01})


def test_a_life_begins_without_what_the_last_one_left(root: Path) -> None:
    left = "ipc leave a >/dev/null && ipc unused"
    with Machine(root, twice(f"{left}; {COUNT}", COUNT)) as machine:
        assert machine.wait() == 0
        first, second = machine.console.splitlines()
    assert first == "shm=1 msg=2 sem=2 posix=/dev/mqueue: a /dev/shm: a"
    assert second == NOTHING


def test_what_is_not_the_machines_own_stays(root: Path) -> None:
    """A file that is mounted in the folder, directories, and a volume over it."""
    config = twice("mkdir /dev/shm/folder; touch /dev/shm/file", "ls /dev/shm; cat /dev/shm/own")
    own = {"kind": "directory", "path": "/microguest/host/own", "target": "/dev/shm/own"}
    config["volumes"] = [own]
    with Machine(root, config, prepare=lambda host: (host / "own").write_text("own\n")) as machine:
        assert machine.wait() == 0
        assert machine.console.splitlines() == ["folder", "own", "own"]
    config = twice("touch /dev/shm/file", "ls /dev/shm")
    config["volumes"] = [{"kind": "tmpfs", "target": "/dev/shm", "size": "1m"}]
    with Machine(root, config) as machine:
        assert machine.wait() == 0
        assert machine.console.splitlines() == ["file"]


def test_what_a_hosts_process_has_stays(root: Path) -> None:
    """And whatever might be its; not what others have left that have ended."""
    wait = "until [ -e /go ]; do sleep 0.05; done"
    config = twice(f"{wait}; ipc leave a >/dev/null", f"{COUNT}; sleep 1000")
    with Machine(root, config) as machine:
        machine.report("ready")
        with (
            Agent(UnixAddress(str(machine.host / "agent.sock")), TOKEN) as agent,
            agent.start(["ipc", "hold", "b"]) as process,
        ):
            assert process.stdout.read(5) == b"made\n"
            agent.exec(["ipc", "leave", "c"], check=True)
            agent.exec(["ipc", "unused"], check=True)
            agent.exec(["touch", "/go"], check=True)
            wait_for(lambda: "posix" in machine.console, "the second life")
            process.kill()
        (line,) = machine.console.splitlines()
    # Its own, and a queue that nobody has used yet, which may be somebody's.
    assert line == "shm=1 msg=2 sem=4 posix=/dev/mqueue: a b c /dev/shm: a b c"


@needs_guestsys
def test_objects_are_told_and_removed(root: Path) -> None:
    program = """
import subprocess, sys, _guestsys
_guestsys.unshare(0x08000000)  # CLONE_NEWIPC
subprocess.run([sys.argv[1], "leave", sys.argv[2]], check=True, stdout=subprocess.DEVNULL)
for kind in range(3):
    ((identity, attached, users),) = _guestsys.ipc_objects(kind)
    print(attached, *map(bool, users))
    _guestsys.ipc_remove(kind, identity)
    assert _guestsys.ipc_objects(kind) == []
    try:
        _guestsys.ipc_remove(kind, identity)
    except OSError as error:
        print(error.strerror)
try:
    _guestsys.ipc_objects(3)
except OSError as error:
    print(error.strerror)
"""
    name = f"microguest-test-{os.getpid()}"
    try:
        done = subprocess.run(
            [sys.executable, "-c", program, str(root / "bin" / "ipc"), name],
            check=False, capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip
    finally:
        Path("/dev/shm", name).unlink(missing_ok=True)
    no = "Invalid argument"
    assert (done.stdout.splitlines(), done.stderr) == (
        ["0 True True", no, "0 True False", no, "0 False False", no, no],
        "",
    )
