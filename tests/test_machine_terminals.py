"""Terminals of a machine whose users have taken all that they can get: hosts get theirs."""

import pathlib
import shutil
import subprocess
from collections.abc import Iterator

import machinekit
import pytest
from machinekit import wait_until

from microguest import Machine, boot
from microguest.errors import StartError
from microguest.guest import bounds
from microguest.guest.wire.messages import StagedFile

HOLDUPS = pathlib.Path(__file__).parent / "data" / "holdups.c"
USER = "1000:1000"
TAKEN = 3
LOOK = 'tty; stty size; stat -c %u "$(tty)"; echo typed > "$(tty)"; echo "ends $?"'


@pytest.fixture
def machine(machines_home: pathlib.Path, elf: pathlib.Path) -> Iterator[Machine]:
    command = ["sleep", "100000"]
    with boot(machinekit.demo_image(), machine="namespaces", command=command) as machine:
        yield machine


def look(machine: Machine, user: str) -> list[str]:
    """What a program of a host's sees of its terminal."""
    with machine.agent.start(["sh", "-c", LOOK], user=user, tty=(11, 22)) as process:
        return process.communicate(timeout=60).stdout.decode().split("\r\n")


def test_hosts_get_a_terminal_where_all_are_taken(machine: Machine) -> None:
    """Its name leads to it, as ttyname(3) needs it, and it is its user's."""
    agent = machine.agent
    limited = ["mount", "-o", f"remount,mode=0620,ptmxmode=0666,max={TAKEN}", "/dev/pts"]
    agent.exec(limited, user="0:0", check=True)
    held = [agent.start(["sleep", "1000"], user=USER, tty=(24, 80)) for _ in range(TAKEN)]
    try:
        for user, uid in (("0:0", "0"), (USER, "1000")):
            seen = look(machine, user)
            assert seen == ["/dev/microguest-pts/0", "11 22", uid, "typed", "ends 0", ""]
        agent.exec(["test", "!", "-r", "/dev/microguest-pts/ptmx"], user=USER, check=True)
        wait_until("one is free", lambda: free_one(held[0]))
        wait_until("it is used", lambda: look(machine, USER)[0].startswith("/dev/pts/"))
    finally:
        for process in held:
            process.close()


def free_one(process: object) -> bool:
    process.close()  # type: ignore[attr-defined]
    return True


def test_a_guest_without_any_terminal_says_which_limit_it_was(machine: Machine) -> None:
    agent = machine.agent
    script = """
        mount -o remount,mode=0620,ptmxmode=0666,max=1 /dev/pts &&
        mkdir /dev/microguest-pts &&
        mount -t devpts -o max=1 own /dev/microguest-pts
    """
    agent.exec(["sh", "-c", script], user="0:0", check=True)
    with (
        agent.start(["sleep", "1000"], tty=True),
        agent.start(["sleep", "1000"], tty=True),
        pytest.raises(StartError, match=r"terminal is taken.*kernel\.pty\.max"),
    ):
        agent.start(["true"], tty=True)


def test_a_machine_in_namespaces_has_so_many(machine: Machine) -> None:
    mounts = machine.agent.exec(["cat", "/proc/mounts"], check=True).stdout.decode()
    (options,) = [line.split()[3] for line in mounts.splitlines() if " /dev/pts " in line]
    assert f"max={bounds.TERMINALS}" in options.split(",")


@pytest.mark.qemu
@pytest.mark.timeout(240)
def test_a_user_who_takes_all_leaves_some_to_hosts(
    machines_home: pathlib.Path, elf: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Also one who first takes all that namespaces of one's own can have."""
    if shutil.which("gcc") is None:
        pytest.skip("needs a C compiler: apt install gcc")
    program = tmp_path / "holdups"
    subprocess.run(["gcc", "-static", "-Os", "-s", "-o", program, HOLDUPS, "-pthread"], check=True)
    with boot(machinekit.demo_image(), machine="qemu", command=["sleep", "100000"]) as machine:
        agent = machine.agent
        taker = StagedFile(path="/tmp/holdups", data=program.read_bytes(), mode=0o755)
        with agent.start(["/tmp/holdups", "terminals", "/tmp/held"], files=[taker]) as process:
            wait_until("all are taken", lambda: has(machine, "/tmp/held"))
            taken = agent.exec(["cat", "/proc/sys/kernel/pty/nr"], check=True).stdout
            assert int(taken) >= 4096  # the namespaces' and the machine's
            assert look(machine, USER)[0] == "/dev/microguest-pts/0"
            process.kill()


def has(machine: Machine, path: str) -> bool:
    return machine.agent.exec(["test", "-e", path]).returncode == 0
