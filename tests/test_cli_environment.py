"""What the command line finds around it: closed descriptors, ignored signals, readers that leave,
other jobs of the shell; and what guests say to whoever reads it at a terminal."""

import ast
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import machinekit
import pytest
from clikit import PROGRAM, Done, microguest
from machinekit import wait_until
from patience import PATIENCE
from terminalkit import Person

from microguest.guest.errors import MicroguestError, printable
from microguest.host_client.cli import table

PROJECT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("module_machines_home")


@pytest.fixture(scope="module")
def box(image: str) -> Iterator[str]:
    words = ("run", "-d", "--rm", "--name", "box", "--machine", "namespaces")
    assert microguest(*words, image, "sleep", "100000").returncode == 0
    yield "box"
    assert microguest("stop", "-t", "0", "box").returncode == 0


def in_shell(line: str, *, shell: str = "bash") -> Done:
    """A line with `microguest` in it, as a person or a script of this host has it."""
    script = f'microguest() {{ {shlex.quote(PROGRAM)} "$@"; }}; {line}'
    return subprocess.run(
        [shell, "-c", script],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )


# ── standard descriptors ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("line", "stdout", "stderr", "code"),
    [
        ("microguest exec -i box cat <&-", b"", b"", 0),
        ("microguest exec box sh -c 'echo out; echo err >&2; exit 4' >&-", b"", b"err\n", 4),
        ("microguest exec box sh -c 'echo out; echo err >&2; exit 4' 2>&-", b"out\n", b"", 4),
        ("microguest exec -i box sh -c 'cat; exit 4' <&- >&- 2>&-", b"", b"", 4),
        ("microguest ls -q <&- >&-", b"", b"", 0),
        ("microguest ls -q <&- 2>&-", b"box\n", b"", 0),
        ("microguest --help >&- 2>&-", b"", b"", 0),
        ("microguest exec nobody true 2>&-", b"", b"", 125),
        ("microguest frobnicate <&- >&- 2>&-", b"", b"", 125),
    ],
)
def test_closed_descriptors_are_empty(
    box: str, line: str, stdout: bytes, stderr: bytes, code: int
) -> None:
    done = in_shell(line)
    assert (done.stdout, done.stderr, done.returncode) == (stdout, stderr, code)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&-", "<&- >&- 2>&-"])
def test_machine_that_is_started_with_closed_descriptors(image: str, closed: str) -> None:
    words = f"--rm --machine namespaces {shlex.quote(image)} sh -c 'echo out; exit 5'"
    done = in_shell(f"microguest run {words} {closed}")
    assert (done.returncode, done.stdout) == (5, b"" if ">&-" in closed else b"out\n")


def test_program_with_closed_descriptors_that_boots(image: str) -> None:
    """The library takes none of them: its monitor's link is no child's stdin."""
    program = (
        "import os, sys\n"
        "for fd in (0, 1): os.close(fd)\n"
        "from microguest import boot\n"
        f"with boot({image!r}, machine='namespaces') as machine:\n"
        "    os.write(2, machine.agent.exec(['echo', 'it works']).stdout)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"it works\n")


# ── signals that are ignored ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["HUP", "INT", "TERM", "USR1"])
def test_a_signal_that_is_ignored_stays_so(box: str, name: str) -> None:
    """As nohup(1) and shells without job control start programs."""
    script = f"trap 'echo got it; exit 9' {name}; echo up; read line; echo end"
    with subprocess.Popen(
        ["bash", "-c", f"trap '' {name}; exec {PROGRAM} exec -i box sh -c \"$1\"", "sh", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    ) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        assert program.stdout.readline() == b"up\n"
        for _ in range(3):
            program.send_signal(getattr(signal, f"SIG{name}"))
        # The signals travelled before this, had they travelled.
        assert microguest("exec", box, "true").returncode == 0
        program.stdin.write(b"\n")
        assert program.stdout.read() == b"end\n"
    assert program.returncode == 0


def test_exit_codes_of_children_where_their_end_is_ignored(image: str) -> None:
    words = f"--rm --machine namespaces {shlex.quote(image)} sh -c 'exit 6'"
    done = in_shell(f"trap '' CHLD TERM; {PROGRAM} run {words}", shell="dash")
    assert (done.returncode, done.stderr) == (6, b"")


def test_machine_whose_starter_ignored_what_ends_it(image: str) -> None:
    words = f"--name deaf --rm --machine namespaces {shlex.quote(image)} sleep 1000"
    assert in_shell(f"trap '' TERM HUP INT; microguest run -d {words}").returncode == 0
    pids = machinekit.family(machinekit.state_of("deaf").monitor)
    os.kill(machinekit.state_of("deaf").monitor, signal.SIGTERM)
    machinekit.nothing_is_left("deaf", pids, within=PATIENCE)


# ── variables ────────────────────────────────────────────────────────────────────────────────────


def test_a_variable_that_is_not_set_is_left_out(box: str, image: str) -> None:
    os.environ["IS_SET"], os.environ["IS_EMPTY"] = "here", ""
    os.environ.pop("NOT_SET", None)
    try:
        given = ("-e", "NOT_SET", "-e", "IS_SET", "-e", "IS_EMPTY", "-e", "A=b=c")
        entered = microguest("exec", *given, box, "env").stdout
        words = ("run", "--rm", "--machine", "namespaces", *given, image, "env")
        started = microguest(*words).stdout
    finally:
        del os.environ["IS_SET"], os.environ["IS_EMPTY"]
    for listed in (entered.splitlines(), started.splitlines()):
        assert {b"IS_SET=here", b"IS_EMPTY=", b"A=b=c"} <= set(listed)
        assert not [line for line in listed if line.startswith(b"NOT_SET")]


def test_env_file(box: str, tmp_path: Path) -> None:
    file, second = tmp_path / "env", tmp_path / "more"
    file.write_bytes(
        b'\xef\xbb\xbf# words\n\n  A=1\nB="two words"\r\nNOT_SET\nIS_SET\nC=\nD=\xff#x'
    )
    second.write_bytes(b"A=2\nE=3\n")
    os.environ["IS_SET"] = "here"
    try:
        words = ("--env-file", str(file), "--env-file", str(second), "-e", "E=4")
        done = microguest("exec", *words, box, "env")
    finally:
        del os.environ["IS_SET"]
    listed = set(done.stdout.splitlines())
    assert {b"A=2", b'B="two words"', b"IS_SET=here", b"C=", b"D=\xff#x", b"E=4"} <= listed
    assert not [line for line in listed if line.startswith(b"NOT_SET")]


@pytest.mark.parametrize(
    ("content", "message"), [(b"OK=1\nA B=2\n", "line 2"), (b"=x\n", "line 1"), (None, "No such")]
)
def test_env_file_that_cannot_be(
    box: str, tmp_path: Path, content: bytes | None, message: str
) -> None:
    file = tmp_path / "env"
    if content is not None:
        file.write_bytes(content)
    done = microguest("exec", "--env-file", str(file), box, "env")
    assert done.returncode == 125
    assert message in done.stderr.decode()
    assert str(file) in done.stderr.decode()


# ── readers that leave, and output that is cut ───────────────────────────────────────────────────


def test_sigpipe_ends_it_like_any_program(box: str, image: str) -> None:
    run = f"run --rm --machine namespaces {shlex.quote(image)}"
    for words in ("exec box yes", f"{run} yes", "exec box sh -c 'yes >&2' 2>&1"):
        done = in_shell(f"microguest {words} | head -n 1; exit ${{PIPESTATUS[0]}}")
        assert (done.returncode, done.stdout, done.stderr) == (141, b"y\n", b""), words
    for words in ("ls", "--help", "ps box", "logs box", "frobnicate 2>&1"):  # before a first line
        done = in_shell(f"microguest {words} | true; exit ${{PIPESTATUS[0]}}")
        assert done.returncode in (141, 125 if "frob" in words else 0), words
        assert done.stderr == b"", words
    done = in_shell("{ sleep 0.3; microguest ls; echo $? >&2; } | true")
    assert done.stderr == b"141\n"


@pytest.mark.parametrize("words", ["ls", "exec box echo x", "--help", "ps box"])
def test_full_disk_is_an_error_in_one_line(box: str, words: str) -> None:
    done = in_shell(f"microguest {words} >/dev/full")
    assert done.returncode == 125
    assert done.stderr.decode().startswith("microguest: ")
    assert done.stderr.count(b"\n") == 1
    assert b"No space left" in done.stderr


HOLDS = "(trap '' HUP; sleep {}; echo late) & echo now; exit 3"


def test_output_that_is_cut_is_told_of(box: str) -> None:
    done = microguest("exec", box, "sh", "-c", HOLDS.format(30))
    assert (done.returncode, done.stdout) == (3, b"now\n")
    text = done.stderr.decode()
    assert text == (
        "microguest: stdout and stderr were cut at their ends, as another process still held them "
        "open: --drain SECONDS waits longer for them\n"
    )
    done = microguest("exec", box, "sh", "-c", "sleep 30 2>/dev/null & echo now")
    assert done.stderr.decode() == (
        "microguest: stdout was cut at its end, as another process still held it open: --drain "
        "SECONDS waits longer for it\n"
    )
    done = microguest("exec", "--drain", "60", box, "sh", "-c", HOLDS.format(0.6))
    assert (done.returncode, done.stdout, done.stderr) == (3, b"now\nlate\n", b"")


def test_output_of_a_workload_that_is_cut_is_told_of(image: str) -> None:
    holds = "sleep 1000 & echo now; exit 3"
    done = microguest("run", "--rm", "--machine", "namespaces", image, "sh", "-c", holds)
    assert (done.returncode, done.stdout) == (3, b"now\n")
    assert b"still held them open\n" in done.stderr


@pytest.mark.parametrize("kind", machinekit.KINDS)
def test_logs_are_what_the_program_wrote(image: str, kind: str) -> None:
    name = f"crlf-{kind}"
    script = r"printf 'dos\r\nunix\nbar 1\rbar 2\r\n\r\r\nend\n'; sleep 1000"
    words = ("--rm", "--name", name, "--machine", kind, image, "sh", "-c", script)
    assert microguest("run", "-d", *words).returncode == 0
    wait_until(
        "it is logged", lambda: microguest("logs", name).stdout.endswith(b"end\n"), seconds=PATIENCE
    )
    expected = b"dos\r\nunix\nbar 1\rbar 2\r\n\r\r\nend\n"
    assert microguest("logs", name).stdout == expected
    with subprocess.Popen([PROGRAM, "logs", "-f", name], stdout=subprocess.PIPE) as follower:
        assert follower.stdout is not None
        assert follower.stdout.read(len(expected)) == expected  # it follows by now
        assert microguest("stop", "-t", "0", name).returncode == 0
        follower.communicate(timeout=PATIENCE)


# ── another job has the terminal ─────────────────────────────────────────────────────────────────


def job_shell(shell: str) -> Person:
    argv = {"bash": ["bash", "--norc", "--noprofile", "-i"], "dash": ["dash", "-i"]}[shell]
    person = Person(argv, env={"PS1": "host$ ", "MG": PROGRAM, "BASH_SILENCE": "1", "HISTFILE": ""})
    person.see("host$")
    return person


@pytest.mark.parametrize("shell", ["bash", "dash"])
@pytest.mark.parametrize("words", ["exec -it box sh", "shell box"])
def test_in_the_background_it_waits_for_the_foreground(box: str, shell: str, words: str) -> None:
    with job_shell(shell) as person:
        person.type("set -o notify 2>/dev/null\r")
        person.type(f"$MG {words} &\r")
        person.type("jobs\r")
        person.wait_until(
            "it has stopped", lambda: told_again(person, "jobs\r", "Stopped"), seconds=PATIENCE
        )
        before = person.modes
        person.type("echo still $((40 + 2))\r")  # the shell's terminal is the shell's
        person.see("still 42")
        assert person.modes == before
        person.type("fg\r")
        person.see("/ #")
        person.wait_until("it is raw", lambda: person.is_raw)
        person.type("\x03")  # a key for the shell in the machine
        person.type("stty size; echo in $((50 + 1))\r")
        person.see("24 80\nin 51")
        person.type("exit 7\r")
        person.wait_until("the shell is back", lambda: last_line(person) == "host$")
        person.type("echo code=$?; stty -a | grep -c ' echo '\r")
        person.see("code=7\n1")


def last_line(person: Person) -> str:
    return person.screen.rstrip().rpartition("\n")[2]


def told_again(person: Person, ask: str, answer: str) -> bool:
    """Ask the shell once more until it says so."""
    if answer in person.screen:
        return True
    time.sleep(0.1)
    person.type(ask)
    return False


def test_a_job_that_is_sent_to_the_background_stops_there(box: str) -> None:
    with job_shell("bash") as person:
        person.type("$MG exec -it box sh\r")
        person.see("/ #")
        person.wait_until("it is raw", lambda: person.is_raw)
        pid = machinekit.family(person.program.pid) - {person.program.pid}
        job = min(pid)
        os.kill(job, signal.SIGTSTP)
        person.see("Stopped")
        person.type("bg\r")
        person.wait_until(
            "it has stopped again", lambda: told_again(person, "jobs -l\r", "(tty output)")
        )
        person.type("fg\r")
        person.wait_until("it is raw", lambda: person.is_raw)
        person.type("\recho back $((60 + 1)); exit\r")
        person.see("back 61")
        person.wait_until("the shell is back", lambda: last_line(person) == "host$")


def test_nobody_can_bring_it_to_the_foreground(box: str) -> None:
    """A background job whose shell is gone, and one that ignores the kernel's signal."""
    for line in ("trap '' TTOU; $MG exec -it box sh &\r", "(trap '' TTOU; $MG shell box) &\r"):
        with job_shell("bash") as person:
            person.type(line)
            person.see("belongs to another job")
            person.type("echo still $((40 + 2))\r")
            person.see("still 42")


# ── what guests say at terminals ─────────────────────────────────────────────────────────────────

EVIL = "\x1b]0;title\x07\x1b[2J\x9b31m\u202eevil\x7f"


def harmless(data: bytes) -> bool:
    """Whether no terminal does anything with it but show it."""
    return all(char.isprintable() or char in "\n\t" for char in data.decode())


def test_printable() -> None:
    assert printable("a\x1b[2J\x9b\x7f\r\n\u202e\udcff é") == (
        r"a\x1b[2J\x9b\x7f\r\n\u202e\udcff é"
    )
    assert printable("a\nb\tc\r", keep="\n\t") == "a\nb\tc\\r"
    assert printable(EVIL).isprintable()


def test_errors_are_harmless_also_in_tracebacks() -> None:
    error = MicroguestError(EVIL)
    assert str(error).isprintable()
    assert error.args == (EVIL,)


def test_messages_of_the_agent_are_harmless(box: str) -> None:
    for words in (["exec", box, EVIL], ["exec", "-w", f"/{EVIL}", box, "true"]):
        done = microguest(*words)
        assert done.returncode in (126, 127)
        assert b"evil" in done.stderr
        assert harmless(done.stderr)
    for words in (["exec", "-u", EVIL, box, "true"], ["kill", box, EVIL], ["wait", box, EVIL]):
        done = microguest(*words)
        assert done.returncode != 0
        assert b"evil" in done.stderr
        assert harmless(done.stderr)
    for words in (
        [EVIL],
        ["exec", f"--{EVIL}", box, "true"],
        ["stop", EVIL],
        ["run", f"oci:/{EVIL}"],
    ):
        done = microguest(*words)
        assert done.returncode in (1, 125)
        assert b"evil" in done.stderr
        assert harmless(done.stderr)


def test_listings_are_harmless_and_output_is_as_it_was(box: str, image: str) -> None:
    started = microguest("exec", "-d", "--label", EVIL, box, "sh", "-c", "sleep 1000; :", EVIL)
    assert started.returncode == 0, started.stderr
    listed = microguest("ps", box).stdout
    assert listed.count(b"evil") >= 1
    assert harmless(listed)
    assert microguest("exec", box, "printf", "%s", EVIL).stdout == EVIL.encode()
    words = ("--rm", "--name", "odd", "--machine", "namespaces", image, "sh", "-c", "sleep 1000")
    assert microguest("run", "-d", *words, EVIL, "\n").returncode == 0
    listed = microguest("ls").stdout
    assert b"evil" in listed
    assert harmless(listed)
    assert len(listed.splitlines()) == 3
    assert microguest("stop", "-t", "0", "odd").returncode == 0


MAY_WRITE = {
    "host_client/cli/output.py",  # data: what commands write
    "host_client/cli/progress.py",  # a bar, which moves the cursor itself
    "host_client/cli/terminal.py",  # what undoes a program's screen modes, made here
    "host_client/monitor/main.py",  # `note`, into monitor.log
    "host_client/vhost_vsock/__main__.py",  # not the command line's
}


def test_text_goes_to_terminals_in_one_place() -> None:
    """Everything that this host's program says passes `say` and `complain`."""
    found = set()
    for path in sorted((PROJECT / "host_client").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.unparse(node) if isinstance(node, ast.Call | ast.Attribute) else ""
            if text.startswith(("print(", "os.write(1", "os.write(2")) or text in (
                *("sys.stdout", "sys.stderr", "sys.__stdout__", "sys.__stderr__"),
            ):
                found.add(str(path.relative_to(PROJECT)))
    assert found <= MAY_WRITE


# ── tables ───────────────────────────────────────────────────────────────────────────────────────


def test_ls_fits_into_a_terminal(box: str, image: str) -> None:
    words = ("--rm", "--name", "talkative", "--machine", "namespaces", image)
    assert (
        microguest("run", "-d", *words, "sh", "-c", "sleep 1000; :", "word " * 40).returncode == 0
    )
    for columns in (80, 60):
        with Person([PROGRAM, "ls"], columns=columns) as person:
            assert person.end() == 0
        shown = bytes(person.raw).decode().splitlines()
        assert len(shown) == 3
        assert max(map(len, shown)) <= columns
        assert "talkative" in shown[2]
        assert "…" in shown[2]
    with Person([PROGRAM, "ls", "--no-trunc"]) as person:
        assert person.end() == 0
        assert "…" not in person.screen
    assert image.encode() in microguest("ls").stdout  # to a program it is whole
    assert microguest("stop", "-t", "0", "talkative").returncode == 0


def test_long_names_are_cut_at_a_terminal_only(image: str) -> None:
    name = "a-name-that-is-as-long-as-one-may-be-" + "x" * 26
    words = ("--rm", "--name", name, "--machine", "namespaces", image, "sleep", "1000")
    assert microguest("run", "-d", *words).returncode == 0
    label = ("--label", "y" * 100)
    process = microguest("exec", "-d", *label, name, "sleep", "1000").stdout.decode().strip()
    for listing in (["ls"], ["ps", name]):
        with Person([PROGRAM, *listing], columns=60) as person:
            assert person.end() == 0
        shown = bytes(person.raw).decode().splitlines()
        assert max(map(len, shown)) <= 60
        with Person([PROGRAM, *listing, "--no-trunc"], columns=60) as person:
            assert person.end() == 0
        assert max(map(len, bytes(person.raw).decode().splitlines())) > 60
    for listing in (["ls"], ["ls", "-q"], ["ls", "--format", "{{.Name}}"]):
        assert f"{name}" in microguest(*listing).stdout.decode().split()
    with Person([PROGRAM, "ls", "-q"], columns=60) as person:
        assert person.end() == 0
    assert name in bytes(person.raw).decode().split()
    assert process in microguest("ps", "-q", name).stdout.decode().split()
    assert microguest("stop", "-t", "0", name).returncode == 0


def test_what_is_cut_last() -> None:
    """The names, where the rest cannot be narrower."""
    heads, cells = ("NAME", "IMAGE"), [("n" * 30, "i" * 30)]
    program = (
        "from microguest.host_client.cli import table\n"
        f"table.show({heads}, {cells}, cut=['IMAGE'], cut_last=['NAME'])"
    )
    found = []
    for columns in (45, 30):
        with Person([sys.executable, "-c", program], columns=columns) as person:
            assert person.end() == 0
        found.append(bytes(person.raw).decode().splitlines()[1])
    assert found == [f"{'n' * 30}  {'i' * 12}…", f"{'n' * 19}…  {'i' * 7}…"]


def test_columns_shrink_from_the_widest() -> None:
    widths = [10, 50, 30]
    table.shrink(widths, [1, 2], 60)
    assert widths == [10, 25, 25]
    table.shrink(widths, [1, 2], 5)
    assert widths == [10, 8, 8]
    table.shrink(widths, [], 5)
    assert widths == [10, 8, 8]


def test_one_long_cell_does_not_swell_every_row(capfd: pytest.CaptureFixture[str]) -> None:
    table.show(("ID", "LABEL", "ARGV"), [("p1", "x" * 5000, "a"), *[("p2", "", "b")] * 100])
    shown = capfd.readouterr().out
    assert "x" * 5000 in shown
    assert len(shown) < 5000 + 102 * 3 * (table.PADDED + table.GAP)


@pytest.mark.parametrize(
    "words", [["oci:image"], ["dir:root"], ["-v", "./data:/x", "dir:/"], ["-v", ".:/x", "dir:/"]]
)
def test_a_current_directory_that_is_gone_is_named(
    words: list[str], tmp_path: Path, machines_home: Path
) -> None:
    script = 'cd "$1" && rmdir "$1" && shift && exec "$@"'
    gone = tmp_path / "gone"
    gone.mkdir()
    typed = [PROGRAM, "run", "--rm", "--machine", "namespaces", *words, "true"]
    done = subprocess.run(
        ["sh", "-c", script, "sh", str(gone), *typed], capture_output=True, check=False
    )
    assert done.returncode == 125
    assert b"the current directory, which has been removed" in done.stderr
    assert done.stderr.count(b"\n") == 1
