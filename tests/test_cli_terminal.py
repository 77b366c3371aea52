"""The command line at a person's terminal: `exec -it`, `shell`, `run -it`."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import machinekit
import pytest
from clikit import PROGRAM, microguest
from imagefactory import require
from machinekit import wait_until
from patience import PATIENCE
from terminalkit import Person, root_of_programs

from microguest.host_client.cli.detachkeys import DetachKeys, parse
from microguest.host_client.cli.terminal import ScreenModes, Terminal

PROMPT = "/ #"
pytestmark = pytest.mark.usefixtures("module_machines_home")


@pytest.fixture(scope="module", params=machinekit.KINDS)
def any_box(image: str, request: pytest.FixtureRequest) -> Iterator[str]:
    yield from machine(f"any-{request.param}", image, request.param)


@pytest.fixture(scope="module")
def box(image: str) -> Iterator[str]:
    yield from machine("box", image)


def machine(name: str, image: str, kind: str = "namespaces") -> Iterator[str]:
    started = microguest(
        *("run", "-d", "--rm", "--name", name, "--machine", kind, image, "sleep", "100000")
    )
    assert started.returncode == 0, started.stderr
    yield name
    assert microguest("stop", "-t", "0", name).returncode == 0


def at_terminal(*words: str, rows: int = 24, columns: int = 80) -> Person:
    return Person([PROGRAM, *words], rows=rows, columns=columns)


@contextmanager
def in_shell(box: str) -> Iterator[Person]:
    """`exec -it BOX sh`, at its prompt."""
    with at_terminal("exec", "-it", box, "sh") as person:
        person.see(PROMPT)
        assert person.is_raw
        yield person


def runs_in(box: str, words: str) -> bool:
    """Whether a process with this command line runs in the machine."""
    return words in microguest("exec", box, "ps", "-o", "args").stdout.decode()


# ── a terminal ───────────────────────────────────────────────────────────────────────────────────


def test_a_shell(any_box: str) -> None:
    with in_shell(any_box) as person:
        person.type("stty size; echo term=$TERM; tty; exit 5\r")
        assert person.end() == 5
        assert person.is_as_before
        for text in ("\n24 80\n", "\nterm=xterm\n", "\n/dev/pts/"):
            assert text in person.screen


def test_size_from_start_to_end(box: str) -> None:
    script = "trap 'stty size' WINCH; echo up; while :; do sleep 0.05; done"
    with at_terminal("exec", "-it", box, "sh", "-c", script, rows=31, columns=97) as person:
        person.see("up")
        before = person.raw.count(b"31 97")
        person.send(signal.SIGWINCH)  # the same size is news as well
        person.wait_until("it tells it again", lambda: person.raw.count(b"31 97") > before)
        person.resize(40, 132)
        person.see("40 132")
        person.type("\x03")
        assert person.end() == 130


def test_output_is_the_terminals(box: str) -> None:
    with at_terminal("exec", "-it", box, "sh", "-c", "echo out; echo err >&2; exit 3") as person:
        assert person.end() == 3
    assert bytes(person.raw).startswith(b"out\r\nerr\r\n")


def test_interrupt_quit_and_suspend_are_keys(box: str) -> None:
    with in_shell(box) as person:
        person.type("sleep 1000\r")
        wait_until("it sleeps", lambda: runs_in(box, "sleep 1000"))
        person.type("\x03")
        person.type("echo int=$?\r")
        person.see("int=130")
        person.type("sleep 1001\r")
        wait_until("it sleeps", lambda: runs_in(box, "sleep 1001"))
        person.type("\x1c")
        person.type("echo quit=$?\r")
        person.see("quit=131")
        person.type("sleep 1002\r")
        wait_until("it sleeps", lambda: runs_in(box, "sleep 1002"))
        person.type("\x1a")
        person.see("Stopped")
        person.type("fg\r")
        person.see("fg\nsleep 1002")
        while last_line(person) != PROMPT:  # the shell may not have let it have the terminal yet
            person.type("\x03")
            person.look(0.5)
        person.type("cat -\r")
        wait_until("it reads", lambda: runs_in(box, "cat -"))  # and the modes are the usual ones
        person.type("abc\r")
        person.type("\x04")
        person.type("echo end=$?\r")
        person.see("end=0")
        person.type("\x04")
        assert person.end() == 0
        assert person.is_as_before


def test_much_is_typed_and_shown(box: str) -> None:
    with in_shell(box) as person:
        person.type("stty raw -echo; echo re''ady; dd bs=1 count=100000 2>/dev/null | md5sum\r")
        person.see("ready")
        person.type("0123456789" * 10000)
        person.see(md5(b"0123456789" * 10000))
        person.type("stty sane; echo us''ual\r")
        person.see("usual")
        person.wait_until("the shell is back", lambda: last_line(person) == PROMPT)
        before = len(person.raw)
        person.type("seq 1 50000; echo all; exit\n")
        person.end()
        lines = bytes(person.raw[before:]).replace(b"\r\n", b"\n").partition(b"exit\n")[2]
        assert lines == b"".join(b"%d\n" % number for number in range(1, 50001)) + b"all\n"


def md5(data: bytes) -> str:
    import hashlib

    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def test_without_i_nothing_is_typed(box: str) -> None:
    done = microguest("exec", "-t", box, "sh", "-c", "tty; stty size", stdin=b"x")
    assert done.returncode == 0
    assert done.stdout.startswith(b"/dev/pts/")
    assert done.stdout.endswith(b"\r\n24 80\r\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["exec", "-it", "box", "sh"], "not a TTY: leave out -t, or start this in a terminal"),
        (["shell", "box"], "not a TTY: use microguest exec -i box sh, or start this in"),
        (["run", "-it", "--machine", "namespaces", "IMAGE", "sh"], "not a TTY: leave out -t, or"),
    ],
)
def test_no_terminal(image: str, box: str, words: list[str], message: str) -> None:
    done = microguest(*(image if word == "IMAGE" else word for word in words))
    assert (done.returncode, done.stdout) == (125, b"")
    text = done.stderr.decode()
    assert text.startswith("microguest: ")
    assert text.count("\n") == 1
    assert message in text


def test_attach_without_a_terminal(box: str) -> None:
    process = microguest("exec", "-dt", box, "sh", "-c", "echo seen; exec sleep 1000")
    name = process.stdout.decode().strip()
    done = microguest("attach", box, name)
    assert done.returncode == 125
    assert b"not a TTY: add --no-stdin, or start this in a terminal" in done.stderr
    assert microguest("kill", box, name).returncode == 0
    assert microguest("attach", "-a", "--no-stdin", box, name).stdout == b"seen\r\n"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["exec", "-it", "box", "no-such"], 127, "no-such"),
        (["exec", "-it", "box", "/etc/passwd"], 126, "/etc/passwd"),
        (["exec", "-it", "-w", "/nowhere", "box", "sh"], 126, "/nowhere"),
        (["exec", "-it", "nobody", "sh"], 125, "nobody"),
        (["exec", "-it", "--detach-keys", "ctrl-1", "box", "sh"], 125, "ctrl-1"),
    ],
)
def test_refusals_leave_the_terminal_alone(
    box: str, words: list[str], code: int, message: str
) -> None:
    with at_terminal(*words) as person:
        assert person.end() == code
        assert person.is_as_before
        assert message in person.screen


# ── every way out ────────────────────────────────────────────────────────────────────────────────


@contextmanager
def in_editor(box: str) -> Iterator[Person]:
    """In busybox's vi, which takes the whole screen."""
    with in_shell(box) as person:
        person.type("printf '\\033[?1049h\\033[?25l'; vi /tmp/of-nobody\r")
        person.see("~")
        yield person


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_ended_by_a_signal(box: str, number: int) -> None:
    with in_editor(box) as person:
        person.send(number)
        assert person.end() == -number
        assert person.is_as_before
        assert person.raw.endswith(b"\x1b[?25h\x1b[?1049l")
    wait_until("nothing of it runs", lambda: not runs_in(box, "vi /tmp/of-nobody"))


def test_killed(box: str) -> None:
    with in_shell(box) as person:
        person.send(signal.SIGKILL)
        assert person.end() == -signal.SIGKILL
        person.wait_until("the modes are back", lambda: person.is_as_before)


SHOWN = "printf '\\033[?1049h\\033[?25l'"
HIDDEN = "printf '\\033[?25h\\033[?1049l'"
BACK = b"\x1b[0m\x1b[?25h\x1b[?1049l"


@pytest.mark.parametrize(
    ("script", "back"), [(f"{SHOWN}; vi /tmp/of-nobody", True), (f"{SHOWN}; {HIDDEN}; vi", False)]
)
def test_killed_in_an_editor(box: str, script: str, back: bool) -> None:
    """By a shell's user, whose terminal stays. What the command has unset is left alone."""
    argv = ["bash", "--norc", "--noprofile", "-i"]
    with Person(argv, env={"PS1": "host$ ", "MG": PROGRAM, "HISTFILE": ""}) as person:
        person.see("host$")
        person.type(f"$MG exec -it {box} sh\r")
        person.see(PROMPT)
        person.type(f"{script}\r")
        person.see("~")
        before = len(person.raw)
        job = min(machinekit.family(person.program.pid) - {person.program.pid})
        guards = machinekit.family(job) - {job}
        os.kill(job, signal.SIGKILL)
        person.wait_until("the shell is back", lambda: b"host$" in person.raw[before:])
        person.wait_until("its guard is gone", lambda: not any(map(machinekit.runs, guards)))
        while person.look():
            pass
        assert (BACK in person.raw[before:]) == back


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_guard_that_does_not_end_holds_nobody_up(number: int) -> None:
    """Stopped by somebody, or gone already."""
    ours, theirs = os.openpty()
    try:
        children = set(children_of(os.getpid()))
        with Terminal(theirs):
            (guard,) = set(children_of(os.getpid())) - children
            os.kill(guard, number)
        assert not os.path.exists(f"/proc/{guard}")
    finally:
        os.close(ours)
        os.close(theirs)


def children_of(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return [int(word) for word in file.read().split()]


def test_window_closed(box: str) -> None:
    with in_shell(box) as person:
        person.type("sleep 2000\r")
        wait_until("it sleeps", lambda: runs_in(box, "sleep 2000"))
        person.hang_up()
        assert person.program.wait(PATIENCE) == -signal.SIGHUP
    wait_until("nothing of it runs", lambda: not runs_in(box, "sleep 2000"))


def test_ended_while_nobody_reads_the_screen(box: str) -> None:
    with at_terminal("exec", "-it", box, "yes", "screenful") as person:
        person.see("screenful")
        time.sleep(0.5)  # the terminal is full
        person.send(signal.SIGTERM)
        assert person.program.wait(PATIENCE) == -signal.SIGTERM
        assert person.is_as_before
    wait_until("nothing of it runs", lambda: not runs_in(box, "yes screenful"))


def test_machine_that_dies(image: str) -> None:
    for name in machine("mortal", image):
        with in_editor(name) as person:
            os.kill(machinekit.state_of(name).monitor, signal.SIGKILL)
            assert person.end() == 125
            assert person.is_as_before
            assert b"\x1b[?1049l" in person.raw
            assert "microguest: " in person.screen
        break


def test_interrupt_while_the_agent_does_not_answer(image: str) -> None:
    boxes = machine("deaf", image)
    name = next(boxes)
    monitor = machinekit.state_of(name).monitor
    deaf = machinekit.family(monitor) - {monitor}
    try:
        for pid in deaf:
            os.kill(pid, signal.SIGSTOP)
        with at_terminal("exec", "-it", name, "sh") as person:
            person.look(0.5)
            assert person.program.poll() is None
            person.type("\x03")
            assert person.end() == 130
            assert person.is_as_before
    finally:
        for pid in deaf:
            os.kill(pid, signal.SIGCONT)
    assert next(boxes, None) is None


def test_stopped_and_continued(box: str) -> None:
    with in_shell(box) as person:
        person.send(signal.SIGTSTP)
        person.wait_until("it has stopped", lambda: state_of(person.program.pid) == "T")
        assert person.is_as_before
        person.send(signal.SIGCONT)
        person.wait_until("it goes on", lambda: person.is_raw)
        person.type("echo back; exit 4\r")
        assert person.end() == 4
        assert "\nback\n" in person.screen
        assert person.is_as_before


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_signal_while_a_pipe_is_full(box: str) -> None:
    with subprocess.Popen(
        [PROGRAM, "exec", box, "yes", "pipeful"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as program:
        assert program.stdout is not None
        assert program.stdout.read(8) == b"pipeful\n"
        time.sleep(0.3)
        program.send_signal(signal.SIGINT)
        wait_until("it ends in the guest", lambda: not runs_in(box, "yes pipeful"))
        program.communicate(timeout=PATIENCE)
    assert program.returncode == 130


# ── detach and attach ────────────────────────────────────────────────────────────────────────────


def test_detach_and_attach(any_box: str) -> None:
    with in_shell(any_box) as person:
        person.type("kept=yes; printf '\\033[?2004h'; echo do''ne\r")
        person.see("done")
        person.type("\x10\x11")
        assert person.end() == 0
        assert person.is_as_before
        assert b"\x1b[?2004l" in person.raw
        command = person.screen.rpartition("microguest attach ")[2].split()
    assert command[0] == any_box
    wait_until("it is left alone", lambda: "(terminal, kept)" in row_of(*command))
    with at_terminal("attach", *command, rows=33, columns=90) as person:
        person.wait_until("it is attached", lambda: person.is_raw)
        person.type("\recho $kept; stty size\r")
        person.see("yes\n33 90")
        second = microguest("attach", *command)
        assert second.returncode == 125
        person.type("\x10")  # alone, it reaches the shell: the last command again
        person.wait_until("it does", lambda: last_line(person).endswith("echo $kept; stty size"))
        person.type("\x10\x11")
        assert person.end() == 0
        assert person.is_as_before
    with at_terminal("attach", *command) as person:
        person.wait_until("it is attached", lambda: person.is_raw)
        person.type("\x03exit 9\r")
        assert person.end() == 9
        assert person.is_as_before


def row_of(box: str, process_id: str) -> str:
    """What `ps` says of it; "" for nothing."""
    rows = microguest("ps", box).stdout.decode().splitlines()
    return next((row for row in rows if row.startswith(f"{process_id} ")), "")


def test_attach_that_is_killed_ends_nothing(box: str) -> None:
    with in_shell(box) as person:
        person.type("\x10\x11")
        person.end()
        command = person.screen.rpartition("microguest attach ")[2].split()
    for number in (signal.SIGTERM, signal.SIGKILL):
        with at_terminal("attach", *command) as person:
            person.wait_until("it is attached", lambda: person.is_raw)
            person.send(number)
            assert person.end() == -number
            person.wait_until("the modes are back", lambda: person.is_as_before)
    assert command[1] in microguest("ps", "-q", box).stdout.decode().split()
    assert microguest("kill", *command).returncode == 0


def test_other_detach_keys_and_none(box: str) -> None:
    with at_terminal("exec", "-it", "--detach-keys", "ctrl-a,d", box, "sh") as person:
        person.see(PROMPT)
        person.type("echo \x10\x11x\r")
        person.type("\x01d")
        assert person.end() == 0
        command = person.screen.rpartition("microguest attach ")[2].split()
    assert microguest("kill", *command).returncode == 0
    with at_terminal(
        "exec", "-it", "--detach-keys", "", box, "sh", "-c", "read x; exit 4"
    ) as person:
        person.wait_until("it is raw", lambda: person.is_raw)
        assert "(terminal, attached)" in microguest("ps", box).stdout.decode()
        person.type("\x10\x11\r")
        assert person.end() == 4


def test_nothing_is_retained_of_what_has_ended(box: str) -> None:
    before = all_of(box)
    with at_terminal("exec", "-it", box, "true") as person:
        assert person.end() == 0
    wait_until("nothing new is listed", lambda: all_of(box) <= before)


def all_of(box: str) -> set[bytes]:
    """The ids of what runs and of what is retained."""
    return set(microguest("ps", "-a", "-q", box).stdout.split())


# ── shell, run ───────────────────────────────────────────────────────────────────────────────────


def test_shell(box: str) -> None:
    with at_terminal("shell", box, "-w", "/etc", "-e", "A=b") as person:
        person.see("/etc #")
        person.type("echo $A $SHELL; exit 6\r")
        assert person.end() == 6
        assert "\nb /bin/sh\n" in person.screen
        assert person.is_as_before


@pytest.mark.parametrize("kind", machinekit.KINDS)
def test_run_in_a_terminal(image: str, kind: str) -> None:
    with at_terminal(
        *("run", "-it", "--rm", "--name", "term", "--machine", kind, "-e", "A=b", image, "sh")
    ) as person:
        person.see(PROMPT)
        pids = machinekit.family(machinekit.state_of("term").monitor)
        person.type("echo $A $(hostname); stty size; exit 8\r")
        assert person.end() == 8
        assert person.is_as_before
        assert "\nb term\n24 80\n" in person.screen
    machinekit.nothing_is_left("term", pids, within=PATIENCE)


def test_run_in_a_terminal_that_is_ended(image: str) -> None:
    with at_terminal(
        *("run", "-it", "--rm", "--name", "ended", "--machine", "namespaces", image, "sh")
    ) as person:
        person.see(PROMPT)
        pids = machinekit.family(machinekit.state_of("ended").monitor)
        person.send(signal.SIGTERM)
        assert person.end() == -signal.SIGTERM
        assert person.is_as_before
    machinekit.nothing_is_left("ended", pids, within=PATIENCE)


def test_leave_a_machine_and_come_back(image: str) -> None:
    words = ("--name", "left", "--machine", "namespaces", image, "sh")
    with at_terminal("run", "-it", "--rm", *words) as person:
        person.see(PROMPT)
        person.type("kept=yes\r")
        person.type("\x10\x11")
        assert person.end() == 0
        assert person.is_as_before
        assert "microguest attach left main" in person.screen.replace("\n", " ")
    pids = machinekit.family(machinekit.state_of("left").monitor)
    with at_terminal("attach", "left", rows=33, columns=90) as person:
        person.wait_until("it is attached", lambda: person.is_raw)
        person.type("\recho $kept; stty size\r")
        person.see("yes\n33 90")
        person.type("exit 9\r")
        assert person.end() == 9
    machinekit.nothing_is_left("left", pids, within=PATIENCE)


def test_run_detached_with_a_terminal(image: str) -> None:
    words = ("--name", "apart", "--machine", "namespaces", image, "sh")
    assert microguest("run", "-dt", "--rm", *words).stdout == b"apart\n"
    pids = machinekit.family(machinekit.state_of("apart").monitor)
    assert b"(terminal, kept)" in microguest("ps", "apart").stdout
    with at_terminal("attach", "-a", "apart") as person:
        person.see(PROMPT)
        person.type("exit 4\r")
        assert person.end() == 4
    machinekit.nothing_is_left("apart", pids, within=PATIENCE)


def test_a_terminal_without_a_reader_holds_nobody_up(image: str) -> None:
    """Neither one that nobody has seen for OUTPUT_GRACE, nor one that was left."""
    flood = f"yes {'flood' * 14} | head -c 3000000; touch /done; sleep 1000"
    for name, script in (("unseen", flood), ("seen", f"read go; sleep 0.5; {flood}")):
        words = ("--name", name, "--machine", "namespaces", image, "sh", "-c", script)
        microguest("run", "-dt", "--rm", *words)
    with at_terminal("attach", "seen") as person:
        person.wait_until("it is attached", lambda: person.is_raw)
        person.type("\r\x10\x11")
        assert person.end() == 0
    for name in ("seen", "unseen"):
        done = ("exec", name, "test", "-e", "/done")
        wait_until(f"{name} goes on", lambda d=done: microguest(*d).returncode == 0)
        logs = microguest("logs", name)
        assert b"a terminal" in logs.stderr
        assert f"microguest attach -a {name}".encode() in logs.stderr
        with at_terminal("attach", "-a", name) as person:
            person.see("floodflood")
            person.type("\x10\x11")
            assert person.end() == 0
        microguest("stop", "-t", "0", name)


def test_run_in_a_terminal_what_is_not_there(image: str) -> None:
    with at_terminal(
        *("run", "-it", "--rm", "--name", "none", "--machine", "namespaces", image, "/no/such")
    ) as person:
        assert person.end() == 127
        assert person.is_as_before
        assert "/no/such" in person.screen


# ── programs that people use ─────────────────────────────────────────────────────────────────────


def test_vi(box: str) -> None:
    with in_shell(box) as person:
        person.type("vi /tmp/letter\r")
        person.see("~")
        person.type("iHello, world")
        person.see("Hello, world")
        person.type("\x1b")
        person.see("- /tmp/letter [Modified]")
        person.type(":wq\r")
        person.wait_until("the shell is back", lambda: last_line(person) == PROMPT)
        person.type("exit\r")
        assert person.end() == 0
    assert microguest("exec", box, "cat", "/tmp/letter").stdout == b"Hello, world\n"


@pytest.fixture(scope="module")
def workbench(tmp_path_factory: pytest.TempPathFactory, elf: Path) -> Iterator[str]:
    """A machine that has this host's own programs."""
    require("vim", "less", "top", "tmux", "bash", "busybox", "ldd")
    root = tmp_path_factory.mktemp("root")
    root_of_programs(root, "vim", "less", "top", "tmux", "bash", "sleep")
    yield from machine("bench", f"dir:{root}")
    shutil.rmtree(root)


Story = Callable[[Person], None]


def vim(person: Person) -> None:
    person.type("vim -u NONE -c 'set showmode' letter\r")
    person.see('"letter" [New')
    person.type("iHello")
    person.see("-- INSERT --")
    person.type("\x1b")  # alone: editors wait whether a longer sequence follows
    person.wait_until("it is over", lambda: "-- INSERT --" not in person.screen)
    person.type(":r !stty size </dev/tty\r")
    person.see("24 80")
    person.resize(30, 60)
    person.wait_until(
        "vim has 30 lines", lambda: "24 80" in person.screen and "~" in person.line(27)
    )
    person.type(":wq\r")


def less(person: Person) -> None:
    person.type("seq 1 1000 | less\r")
    person.see("\n23\n:")
    person.type("G")
    person.see("1000\n(END)")
    person.type("/500\r")
    person.type("g")
    person.see("\n23\n:")
    person.type("\x03")
    time.sleep(0.2)
    person.type("q")


def top(person: Person) -> None:
    person.type("top -d 0.2\r")
    person.see("PID USER")
    person.see("bash")
    person.type("q")


def tmux(person: Person) -> None:
    person.type("tmux -f /dev/null new 'echo inside; exec bash --norc'\r")
    person.see("[0] 0:")
    person.see("inside")
    person.type('\x02"')
    person.see("──────")
    person.type("stty size\r")
    person.see("11 80")
    person.type("\x02d")
    person.see("[detached")
    person.type("tmux kill-server\r")


@pytest.mark.parametrize("story", [vim, less, top, tmux])
def test_program_of_this_host(workbench: str, story: Story) -> None:
    with at_terminal("shell", workbench, "-e", "LANG=C.UTF-8") as person:
        person.see("#")
        person.type("cd /root; PS1='ready> '\r")
        person.see("\nready>")
        story(person)
        person.type("\r")
        person.wait_until("the shell is back", lambda: last_line(person).startswith("ready>"))
        person.type("exit 7\r")
        assert person.end() == 7
        assert person.is_as_before


def last_line(person: Person) -> str:
    return person.screen.rstrip().rpartition("\n")[2]


# ── parts ────────────────────────────────────────────────────────────────────────────────────────


def test_detach_keys_as_text() -> None:
    assert parse("ctrl-p,ctrl-q") == b"\x10\x11"
    assert parse("ctrl-@,a,ctrl-[,Z,ctrl-_") == b"\x00a\x1bZ\x1f"
    assert parse("") == b""
    assert parse(",".join("abcdefghijklmnop")) == b"abcdefghijklmnop"
    with pytest.raises(ValueError, match="more than 16 keys"):
        parse(",".join("abcdefghijklmnopq"))
    for wrong in ("ctrl-1", "ctrl-", "ab", "ctrl-p,", "é", "ctrl-pp"):
        with pytest.raises(ValueError, match="no key to detach with"):
            parse(wrong)


@pytest.mark.parametrize(
    ("keys", "typed", "passed", "detached"),
    [
        (b"\x10\x11", [b"abc"], b"abc", False),
        (b"\x10\x11", [b"ab\x10\x11cd"], b"ab", True),
        (b"\x10\x11", [b"\x10", b"\x11"], b"", True),
        (b"\x10\x11", [b"\x10x"], b"\x10x", False),
        (b"\x10\x11", [b"\x10\x10\x11"], b"\x10", True),
        (b"\x10\x11", [b"\x11\x10"], b"\x11", False),
        (b"aab", [b"aaab"], b"a", True),
        (b"aab", [b"aa", b"c", b"aab"], b"aac", True),
        (b"aba", [b"abba", b"ba"], b"abb", True),
        (b"", [b"\x10\x11"], b"\x10\x11", False),
    ],
)
def test_detach_keys(keys: bytes, typed: list[bytes], passed: bytes, detached: bool) -> None:
    scanner = DetachKeys(keys)
    assert b"".join(scanner.feed(piece) for piece in typed) == passed
    assert scanner.detached == detached


def test_detach_keys_that_were_typed_slowly() -> None:
    scanner = DetachKeys(b"\x10\x11")
    assert scanner.feed(b"\x10") == b""
    assert scanner.holding
    assert scanner.release() == b"\x10"
    assert not scanner.holding
    assert scanner.feed(b"x\x10") == b"x"
    assert scanner.release() == b"\x10"
    assert scanner.feed(b"\x11") == b""
    assert scanner.detached


def test_screen_modes() -> None:
    modes = ScreenModes()
    modes.feed(b"\x1b[?1049h\x1b[?1006;1000h\x1b[?25l\x1b[?2004h\x1b[?2026h text")
    modes.feed(b"\x1b[?20")
    modes.feed(b"04l\x1b[?10")
    modes.feed(b"00l")
    assert modes.undo() == b"\x1b[0m\x1b[?25h\x1b[?1006l\x1b[?1049l"
    assert modes.undo() == b""
