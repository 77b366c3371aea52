"""The command line on the processes of a machine: `exec -d`, `ps`, `kill`, `wait`, `attach`."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import machinekit
import pytest
from clikit import PROGRAM, TYPED, Done, microguest
from machinekit import wait_until
from patience import PATIENCE

from microguest.guest import bounds
from microguest.guest.wire.messages import Keep
from microguest.host_client.machines.named import find

pytestmark = pytest.mark.usefixtures("module_machines_home")


@pytest.fixture(scope="module", params=machinekit.KINDS)
def box(elf: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    name, kind = f"procs-{request.param}", request.param
    image = machinekit.demo_image()
    words = ("run", "-d", "--rm", "--name", name, "--machine", kind, image, "sleep", "100000")
    assert microguest(*words).returncode == 0
    yield name
    assert microguest("stop", "-t", "0", name).returncode == 0


def start(box: str, *words: str) -> str:
    """`exec -d`: the id that it prints."""
    done = microguest("exec", "-d", *words[:-1], box, "sh", "-c", words[-1])
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout.decode().strip()


def test_detached_from_the_start(box: str) -> None:
    waits = "until test -e /tmp/morning; do sleep 0.05; done"
    name = start(box, "--label", "night shift", f"echo out; echo err >&2; {waits}; exit 7")
    heads, *rows = microguest("ps", box).stdout.decode().splitlines()
    assert heads.split() == ["ID", "PID", "STATUS", "LABEL", "COMMAND"]
    (row,) = (row for row in rows if row.startswith(f"{name} "))
    assert "up " in row
    assert "(kept)" in row
    assert "night shift" in row
    assert microguest("exec", box, "touch", "/tmp/morning").returncode == 0
    assert microguest("wait", box, name).stdout == b"7\n"
    assert name not in microguest("ps", "-q", box).stdout.decode().split()
    assert "exited (7) after " in microguest("ps", "-a", box).stdout.decode()
    for _ in range(2):  # what it wrote can be read again
        again = microguest("attach", box, name)
        assert (again.returncode, again.stdout, again.stderr) == (7, b"out\n", b"err\n")


def test_input_of_a_detached_process(box: str) -> None:
    name = start(box, "-i", "read line; echo got $line; cat >/dev/null; exit 3")
    done = microguest("attach", box, name, stdin=b"word\n")
    assert (done.returncode, done.stdout) == (3, b"got word\n")


def test_input_that_nobody_reads_is_told_of(box: str) -> None:
    """Once, and only where there is some."""
    name = start(box, "until test -e /tmp/told; do sleep 0.05; done; echo end; exit 4")
    with subprocess.Popen(
        [PROGRAM, "attach", box, name], stdin=subprocess.PIPE, stderr=subprocess.PIPE
    ) as attached:
        assert attached.stdin is not None
        assert attached.stderr is not None
        attached.stdin.write(b"one\n")
        attached.stdin.flush()
        told = attached.stderr.readline().decode()
        attached.stdin.write(b"two\n")
        attached.stdin.close()
        assert microguest("exec", box, "touch", "/tmp/told").returncode == 0
        assert attached.stderr.read() == b""
        assert attached.wait(PATIENCE) == 4
    assert told == (
        f"microguest: process {name} has no stdin that could be written to: what comes on ours is "
        "dropped\n"
    )
    assert microguest("attach", box, name, stdin=b"").stderr == b""


def test_watching(box: str) -> None:
    name = start(box, "trap '' INT; echo seen; sleep 1000")
    with subprocess.Popen(
        [PROGRAM, "attach", "--no-stdin", box, name], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as watcher:
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == b"seen\n"
        watcher.send_signal(signal.SIGINT)
        watcher.communicate(timeout=PATIENCE)
    assert watcher.returncode == 130
    assert name in microguest("ps", "-q", box).stdout.decode().split()
    assert microguest("kill", box, name).stdout.decode() == f"{name}\n"


def test_kill(box: str) -> None:
    armed = "touch /tmp/armed; while :; do sleep 0.05; done"
    name = start(box, f"trap 'exit 5' USR1; sleep 3000 & {armed}")
    exists = ("exec", box, "test", "-e", "/tmp/armed")
    wait_until("its trap is set", lambda: microguest(*exists).returncode == 0)
    assert microguest("kill", "-s", "USR1", box, name).returncode == 0
    assert microguest("wait", box, name).stdout == b"5\n"
    late = microguest("kill", box, name)
    assert late.returncode == 1
    assert b"has ended already" in late.stderr
    name = start(box, "setsid sleep 3001 & sleep 3002")
    assert microguest("kill", box, name).returncode == 0
    assert microguest("wait", box, name).stdout == b"137\n"
    wait_until(
        "nothing of it runs",
        lambda: b"sleep 3001" not in microguest("exec", box, "ps", "-o", "args").stdout,
    )


@pytest.mark.parametrize(
    "words",
    [
        *(["stop", "nobody"], ["rm", "nobody"], ["pause", "nobody"], ["unpause", "nobody"]),
        *(["wait", "nobody"], ["wait", "nobody", "p1"], ["kill", "nobody", "p1"]),
        *(["kill", "BOX", "p999"], ["wait", "BOX", "p999"]),
    ],
)
def test_a_name_that_there_is_not_is_one_line_and_1(box: str, words: list[str]) -> None:
    """Of all commands that take several, as docker's."""
    done = microguest(*(box if word == "BOX" else word for word in words))
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"microguest: ")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["attach", "BOX", "p999"], "p999"),
        (["kill", "-s", "NOPE", "BOX", "p1"], "NOPE"),
        (["kill", "-s", "99", "BOX", "p1"], "99"),
        (["attach", "BOX"], "microguest logs"),
        (["ps", "nobody"], "nobody"),
        (["kill", "BOX"], "required"),
    ],
)
def test_what_goes_wrong_is_one_line_and_125(box: str, words: list[str], message: str) -> None:
    done = microguest(*(box if word == "BOX" else word for word in words))
    assert (done.returncode, done.stdout) == (125, b"")
    text = done.stderr.decode()
    assert text.startswith("microguest")
    assert text.count("\n") == 1
    assert message in text


def test_what_makes_room_where_no_more_are_kept(elf: Path) -> None:
    """Those that have ended, by themselves; of those that run the message says how one goes."""
    image = machinekit.demo_image()
    words = ("run", "-d", "--rm", "--name", "full", "--machine", "namespaces", image)
    assert microguest(*words, "sleep", "100000").returncode == 0
    with find("full") as machine:
        agent = machine.agent
        ended = agent.start(["true"], keep=Keep())
        ended.wait()
        ended.close()
        there = len([each for each in agent.processes() if each.kept])
        for _ in range(bounds.KEPT_PROCESSES - there):
            agent.start(["sleep", "100000"], keep=Keep()).close()
        last = start("full", "sleep 100000")
        listed = [each.id for each in agent.processes()]
        assert last in listed
        assert ended.id not in listed
    for more in (("-d",), ("-it",)):
        done = microguest_at_terminal("exec", *more, "full", "true")
        assert done.returncode == 125
        text = done.stderr.decode()
        assert "end one first: microguest ps full lists them, and microguest kill full ID" in text
        assert text.count("\n") == 1
    assert microguest("kill", "full", last).returncode == 0
    assert start("full", "true")
    assert microguest("stop", "-t", "0", "full").returncode == 0


def microguest_at_terminal(*words: str) -> Done:
    """As `microguest`, with a terminal for stdin."""
    ours, theirs = os.openpty()
    try:
        return subprocess.run(
            [PROGRAM, *words], stdin=theirs, capture_output=True, timeout=TYPED, check=False
        )
    finally:
        os.close(ours)
        os.close(theirs)


def test_wait_for_a_machine_that_ends_with_its_command(elf: Path) -> None:
    words = ("--name", "brief", "--machine", "namespaces", machinekit.demo_image())
    assert microguest("run", "-d", *words, "sh", "-c", "sleep 0.5; exit 6").returncode == 0
    assert microguest("wait", "brief").stdout == b"6\n"
    assert microguest("wait", "brief").stdout == b"6\n"  # and of one that has ended


# ── the machine's own command, on the console ────────────────────────────────────────────────────

COUNTS = """
echo life >>/lives
trap 'echo hup >>/heard' HUP
trap 'exit 9' TERM
echo ready
while :; do sleep 0.05; done
"""


@pytest.fixture(params=machinekit.KINDS)
def web(elf: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    name = f"web-{request.param}"
    words = ("run", "-d", "--name", name, "--machine", request.param)
    again = ("--restart", "on-failure:1")
    image = machinekit.demo_image()
    assert microguest(*words, *again, image, "sh", "-c", COUNTS).returncode == 0
    yield name
    microguest("stop", "-t", "0", name)


def content(machine: str, path: str) -> bytes:
    return microguest("exec", machine, "cat", path).stdout


def main_row(machine: str) -> list[str]:
    rows = microguest("ps", machine).stdout.decode().splitlines()
    return next((row.split() for row in rows if row.startswith("main ")), [])


def test_signals_of_the_machines_own_command(web: str) -> None:
    wait_until("it runs", lambda: b"ready" in microguest("logs", web).stdout, PATIENCE)
    first = main_row(web)
    assert "up" in first
    assert microguest("kill", "-s", "HUP", web, "main").stdout == b"main\n"
    wait_until("it has heard", lambda: content(web, "/heard") == b"hup\n", PATIENCE)
    reach = microguest("attach", web)
    assert b"microguest logs" in reach.stderr
    assert microguest("kill", "-s", "TERM", web, "main").returncode == 0
    wait_until("it lives again", lambda: content(web, "/lives") == b"life\n" * 2, PATIENCE)
    wait_until(
        "the list knows", lambda: main_row(web)[1:2] not in ([], first[1:2], ["0"]), PATIENCE
    )
    wait_until("its traps are set", lambda: microguest("logs", web).stdout.count(b"ready") == 2)
    assert microguest("kill", "-s", "HUP", web, "main").returncode == 0
    wait_until("it has heard again", lambda: content(web, "/heard") == b"hup\n" * 2, PATIENCE)
