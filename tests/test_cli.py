"""The command line as a person types it."""

import contextlib
import fcntl
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from functools import partial
from pathlib import Path

import machinekit
import pytest
from clikit import PROGRAM, Done, microguest
from machinekit import wait_until
from patience import PATIENCE

from microguest.host_client.cli.stream import ONCE_WITHIN

pytestmark = pytest.mark.usefixtures("machines_home")
KIND = pytest.mark.parametrize("kind", machinekit.KINDS)


def run(image: str, *command: str, options: tuple[str, ...] = (), stdin: bytes = b"") -> Done:
    return microguest(
        *("run", "--rm", "--machine", "namespaces", *options, image, *command), stdin=stdin
    )


def complaint(done: Done) -> str:
    """The one line of an error of ours."""
    text = done.stderr.decode()
    assert text.startswith(("microguest: ", "microguest run: ")), text
    assert text.count("\n") == 1, text
    return text


# ── run ──────────────────────────────────────────────────────────────────────────────────────────


@KIND
def test_exit_code_and_streams(image: str, kind: str, machines_home: Path) -> None:
    done = microguest(
        *("run", "--rm", "--machine", kind, image),
        *("sh", "-c", "echo out; echo err >&2; exit 7"),
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")
    assert os.listdir(machines_home) == []


@KIND
def test_stdin(image: str, kind: str) -> None:
    done = microguest("run", "--rm", "-i", "--machine", kind, image, "cat", stdin=b"data\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"data\n", b"")


REOPENED = "echo out >/dev/stdout; echo err >>/proc/self/fd/2; cat /dev/stdin"


@KIND
def test_streams_are_the_users(image: str, kind: str) -> None:
    """What servers without root log to, wherever they run."""
    words = ("-u", "65534", "--machine", kind, image, "sh", "-c", REOPENED)
    done = microguest("run", "--rm", "-i", *words, stdin=b"in\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"out\nin\n", b"err\n")

    name = f"owned-{kind}"
    words = ("-u", "65534", "--machine", kind, image, "sh", "-c", f"{REOPENED}; sleep 600")
    assert microguest("run", "-d", "--name", name, *words).returncode == 0
    wait_until("it has logged", lambda: microguest("logs", name).stdout == b"out\nerr\n")
    done = microguest("exec", "-i", "-u", "65534", name, "sh", "-c", REOPENED, stdin=b"in\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"out\nin\n", b"err\n")


def test_much_stdin(image: str) -> None:
    data = os.urandom(8 * 1024 * 1024)
    assert run(image, "cat", options=("-i",), stdin=data).stdout == data


def test_no_stdin_without_i(image: str) -> None:
    assert run(image, "cat", stdin=b"not seen").stdout == b""


@pytest.mark.parametrize(
    ("at_term", "code"),
    [("head -c 3000000 /dev/zero | tr '\\0' x; exit 5", 5), ("", 137)],
    ids=["that-says-goodbye", "that-is-killed"],
)
def test_command_whose_machine_is_stopped(image: str, at_term: str, code: int) -> None:
    """As in docker: the last of its output is shown, and the exit code is its own."""
    script = f"trap '{at_term}' TERM; echo up; while :; do sleep 0.05; done"
    script = script.replace("'\\0'", '"\\0"')
    words = ("run", "--rm", "--name", "goes", "--machine", "namespaces", image, "sh", "-c", script)
    with subprocess.Popen([PROGRAM, *words], stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"up\n"
        grace = str(PATIENCE) if at_term else "0.5"
        with subprocess.Popen([PROGRAM, "stop", "-t", grace, "goes"], stdout=subprocess.DEVNULL):
            rest = running.stdout.read()
    assert (running.returncode, len(rest)) == (code, 3000000 if at_term else 0)


def test_command_that_does_not_exist(image: str) -> None:
    done = run(image, "/no/such")
    assert done.returncode == 127
    assert "/no/such" in complaint(done)


def test_command_that_cannot_be_executed(image: str) -> None:
    done = run(image, "/etc/passwd")
    assert done.returncode == 126
    assert "/etc/passwd" in complaint(done)


def test_killed_by_signal(image: str) -> None:
    assert run(image, "sh", "-c", "kill -9 $$").returncode == 137


def test_options_of_the_process(image: str) -> None:
    os.environ["FROM_HERE"] = "inherited"
    done = run(
        image,
        *("sh", "-c", "pwd; id -un; echo $A $FROM_HERE; hostname"),
        options=("-e", "A=b", "-e", "FROM_HERE", "-w", "/etc", "-u", "nobody", "--name", "box"),
    )
    del os.environ["FROM_HERE"]
    assert done.stdout == b"/etc\nnobody\nb inherited\nbox\n"


def test_entrypoint(image: str) -> None:
    done = run(image, "one", "two", options=("--entrypoint", "/bin/echo"))
    assert (done.stdout, done.returncode) == (b"one two\n", 0)


def test_reader_that_leaves(image: str, machines_home: Path) -> None:
    with subprocess.Popen(
        [PROGRAM, "run", "--rm", "--machine", "namespaces", image, "yes"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"y\n"
        program.stdout.close()
        assert program.wait(PATIENCE) == -signal.SIGPIPE
    assert os.listdir(machines_home) == []


def foreground(image: str, script: str) -> "subprocess.Popen[bytes]":
    """A command in the foreground that has said something."""
    program = subprocess.Popen(
        [PROGRAM, "run", "--rm", "--machine", "namespaces", image, "sh", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert program.stdout is not None
    assert program.stdout.readline() == b"up\n"
    return program


def test_signals_are_passed_on(image: str, machines_home: Path) -> None:
    script = "trap 'echo got it; exit 3' TERM; echo up; while :; do sleep 0.1; done"
    with foreground(image, script) as program:
        program.send_signal(signal.SIGTERM)
        assert program.communicate(timeout=PATIENCE)[0] == b"got it\n"
    assert program.returncode == 3
    assert os.listdir(machines_home) == []


@pytest.mark.parametrize("size", [80_000, 4_000_000])  # less, and more, than lies on the way
@pytest.mark.parametrize("how", ["run", "exec"])
def test_a_reader_that_stands_still_keeps_nobody_from_ending(
    image: str, how: str, size: int, machines_home: Path
) -> None:
    """How the command has ended is behind output that nobody reads."""
    words: tuple[str, ...] = ("run", "--rm", "--machine", "namespaces", image)
    if how == "exec":
        run(image, "sleep", "600", options=("-d", "--name", "still"))
        words = ("exec", "still")
    reader, writer = os.pipe()
    with subprocess.Popen(
        [PROGRAM, *words, "head", "-c", str(size), "/dev/zero"],
        stdout=writer,
        stderr=subprocess.PIPE,
    ) as program:
        os.close(writer)
        capacity = fcntl.fcntl(reader, fcntl.F_GETPIPE_SZ)
        wait_until("nothing more fits", lambda: waiting_in(reader) == capacity)
        program.send_signal(signal.SIGTERM)
        assert program.wait(PATIENCE) == -signal.SIGTERM
    os.close(reader)
    if how == "exec":
        assert microguest("stop", "-t", "0", "still").returncode == 0
    wait_until("the machine has gone", lambda: os.listdir(machines_home) == [])


def waiting_in(pipe: int) -> int:
    """Bytes that nobody has read."""
    return struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0]


def test_second_interrupt_kills_the_machine(image: str, machines_home: Path) -> None:
    script = "trap '' TERM; trap 'echo heard' INT; echo up; while :; do sleep 0.1; done"
    with foreground(image, script) as program:
        program.send_signal(signal.SIGINT)
        assert program.stdout is not None
        assert program.stdout.readline() == b"heard\n"
        time.sleep(ONCE_WITHIN)  # sooner it would be the same
        assert program.poll() is None
        program.send_signal(signal.SIGINT)
        program.communicate(timeout=PATIENCE)
    assert program.returncode == 130
    assert os.listdir(machines_home) == []


STUBBORN = "trap 'echo heard' TERM; echo up; while :; do sleep 0.1; done"


def test_second_term_kills_the_machine(image: str, machines_home: Path) -> None:
    with foreground(image, STUBBORN) as program:
        program.send_signal(signal.SIGTERM)
        assert program.stdout is not None
        assert program.stdout.readline() == b"heard\n"
        time.sleep(ONCE_WITHIN)
        assert program.poll() is None
        program.send_signal(signal.SIGTERM)
        program.communicate(timeout=PATIENCE)
    assert program.returncode == -signal.SIGTERM
    assert os.listdir(machines_home) == []


def send_each(pids: set[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # a short one of the guest's
            os.kill(pid, number)


def test_second_term_ends_exec_and_its_command(image: str) -> None:
    """Also where the agent does not answer any more."""
    run(image, "sleep", "600", options=("-d", "--name", "firm"))
    monitor = machinekit.state_of("firm").monitor
    for deaf in (False, True):
        with subprocess.Popen(
            [PROGRAM, "exec", "firm", "sh", "-c", STUBBORN], stdout=subprocess.PIPE
        ) as program:
            assert program.stdout is not None
            assert program.stdout.readline() == b"up\n"
            program.send_signal(signal.SIGTERM)
            assert program.stdout.readline() == b"heard\n"
            time.sleep(ONCE_WITHIN)
            assert program.poll() is None
            guest = machinekit.family(monitor) - {monitor} if deaf else set()
            send_each(guest, signal.SIGSTOP)
            program.send_signal(signal.SIGTERM)
            try:
                program.communicate(timeout=PATIENCE)
            finally:
                send_each(guest, signal.SIGCONT)
        assert program.returncode == -signal.SIGTERM
        wait_until("it ends", lambda: b"trap" not in microguest("exec", "firm", "ps").stdout)
    assert microguest("stop", "-t", "0", "firm").returncode == 0


@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_a_signal_that_timeout_sends_twice_is_one(image: str, name: str) -> None:
    """timeout(1) sends it to its child, and then to its process group, which the child is in."""
    script = f"trap 'echo got it; sleep 0.5; exit 5' {name}; echo up; while :; do sleep 0.05; done"
    words = ("run", "--rm", "--machine", "namespaces", image, "sh", "-c", script)
    number = signal.Signals[f"SIG{name}"]
    with subprocess.Popen([PROGRAM, *words], stdout=subprocess.PIPE, process_group=0) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"up\n"
        program.send_signal(number)
        os.killpg(program.pid, number)
        said, _ = program.communicate(timeout=PATIENCE)
        assert (program.returncode, said) == (5, b"got it\n")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -15), (signal.SIGHUP, -1)]
)
def test_interrupted_boot(image: str, machines_home: Path, number: int, code: int) -> None:
    """On the slow kind of machine. The command is one that a signal ends which comes late."""
    command = ["sleep", "1000"]
    for moment in machinekit.MOMENTS:
        with subprocess.Popen(
            [PROGRAM, "run", "--rm", "--machine", "qemu", "--name", "early", image, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as program:
            machinekit.wait_until("it has come so far", partial(moment, "early"))
            pids = machinekit.family(program.pid)
            program.send_signal(number)
            program.communicate(timeout=PATIENCE)
        assert program.returncode in (code, 128 + number)
        machinekit.nothing_is_left("early", pids, within=PATIENCE)


def test_killed_cli(image: str, machines_home: Path) -> None:
    with foreground(image, "echo up; sleep 600") as program:
        (name,) = os.listdir(machines_home)
        pids = machinekit.family(machinekit.state_of(name).monitor)
        program.kill()
        machinekit.nothing_is_left(name, pids, within=PATIENCE)
        program.communicate()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run"], "required"),
        (["run", "--no-such-option", "x"], "--no-such-option"),
        (["run", "--rm", "oci:/no/such/place"], "/no/such/place"),
        (["run", "--rm", "busybox"], "oci:"),
        (["run", "--rm", "--kernel", "/no/kernel", "IMAGE"], "/no/kernel"),
        (["run", "--rm", "--memory", "x", "IMAGE"], "memory"),
        (["run", "--rm", "--name", "-no", "IMAGE"], "name"),
        (["exec", "nobody", "true"], "nobody"),
        (["logs", "nobody"], "nobody"),
        (["frobnicate"], "is no command"),
    ],
)
def test_what_goes_wrong_is_one_line_and_125(
    image: str, words: list[str], message: str, machines_home: Path
) -> None:
    done = microguest(*(image if word == "IMAGE" else word for word in words))
    assert done.returncode == 125
    text = done.stderr.decode()
    assert text.startswith("microguest")
    assert text.count("\n") == 1
    assert message in text
    assert done.stdout == b""
    assert not machines_home.exists() or os.listdir(machines_home) == []


@pytest.mark.parametrize("kind", ["namespaces", "qemu"])
def test_corrupt_layer(image: str, kind: str, tmp_path: Path, machines_home: Path) -> None:
    layout = tmp_path / "layout"
    shutil.copytree(image.split(":")[1], layout)
    layer = max((layout / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(layer.read_bytes())
    data[len(data) // 2] ^= 1
    layer.write_bytes(data)
    os.environ["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    try:
        done = microguest("run", "--rm", "--machine", kind, f"oci:{layout}:busybox", "true")
    finally:
        del os.environ["XDG_CACHE_HOME"]
    assert done.returncode == 125
    assert layer.name[:12] in complaint(done)
    assert os.listdir(machines_home) == []


# ── machines that go on ──────────────────────────────────────────────────────────────────────────


@KIND
def test_detached_machine(image: str, kind: str) -> None:
    name = f"det-{kind}"
    script = "echo hello; trap 'echo bye; exit 0' TERM; while :; do sleep 0.1; done"
    done = microguest(
        *("run", "-d", "--name", name, "--machine", kind, "-e", "A=b", image, "sh", "-c", script)
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{name}\n".encode(), b"")
    pids = machinekit.family(machinekit.state_of(name).monitor)

    listing = microguest("ls").stdout.decode().splitlines()
    assert listing[0].split() == ["NAME", "MACHINE", "STATUS", "IMAGE", "COMMAND"]
    assert listing[1].split()[:3] == [name, kind, "up"]

    entered = microguest("exec", name, "sh", "-c", "echo $A; exit 4")
    assert (entered.returncode, entered.stdout) == (4, b"b\n")
    piped = microguest("exec", "-i", name, "cat", stdin=b"through")
    assert piped.stdout == b"through"
    missing = microguest("exec", name, "no-such")
    assert missing.returncode == 127
    assert "no-such" in complaint(missing)
    wait_until("hello is logged", lambda: microguest("logs", name).stdout == b"hello\n")

    taken = microguest("run", "--name", name, "--machine", "namespaces", image, "true")
    assert taken.returncode == 125
    assert "exists already" in complaint(taken)

    with subprocess.Popen(
        [PROGRAM, "logs", "-f", name], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as follower:
        stopped = microguest("stop", "-t", "30", name)
        assert (stopped.returncode, stopped.stdout) == (0, f"{name}\n".encode())
        followed, errors = follower.communicate(timeout=PATIENCE)
    assert (followed.splitlines()[0], followed.splitlines()[-1], errors) == (b"hello", b"bye", b"")
    wait_until("its processes end", lambda: not any(map(machinekit.runs, pids)))

    assert microguest("ls", "-q").stdout == b""
    assert microguest("ls", "-a", "-q").stdout == f"{name}\n".encode()
    assert microguest("logs", name).stdout == followed
    assert microguest("stop", name).returncode == 0
    gone = microguest("exec", name, "true")
    assert gone.returncode == 125
    assert "has ended" in complaint(gone)


def test_detached_machine_with_rm_leaves_nothing(image: str, machines_home: Path) -> None:
    done = run(image, "sleep", "600", options=("-d", "--name", "brief"))
    assert done.stdout == b"brief\n"
    assert microguest("stop", "-t", "0", "brief").returncode == 0
    assert os.listdir(machines_home) == []


def test_detached_command_that_does_not_start(image: str, machines_home: Path) -> None:
    done = run(image, "/no/such", options=("-d",))
    assert done.returncode == 127
    complaint(done)
    assert os.listdir(machines_home) == []


def test_ended_machine_keeps_its_name_until_it_is_used_again(image: str) -> None:
    for code in (3, 4):
        done = microguest(
            *("run", "--name", "kept", "--machine", "namespaces", image, "sh", "-c"), f"exit {code}"
        )
        assert done.returncode == code
        assert f"exited ({code})" in microguest("ls", "-a").stdout.decode()


def agent_of(name: str) -> int:
    """The process id that a machine's agent has on this host."""
    inside = microguest("exec", name, "sh", "-c", "echo $PPID").stdout.decode().strip()
    monitor = machinekit.state_of(name).monitor
    for pid in machinekit.family(monitor) - {monitor}:
        status = Path(f"/proc/{pid}/status").read_text()
        spaces = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[1:]
        if len(spaces) > 1 and spaces[-1] == inside:
            return pid
    raise LookupError(name)


def test_exec_where_the_guest_has_run_out(image: str) -> None:
    """Of descriptors: the command cannot be started, which says of what, and what to do."""
    run(image, "sleep", "600", options=("-d", "--name", "short"))
    agent = agent_of("short")
    usual = resource.prlimit(agent, resource.RLIMIT_NOFILE)
    few = len(os.listdir(f"/proc/{agent}/fd")) + 4  # a connection, but no pipes
    resource.prlimit(agent, resource.RLIMIT_NOFILE, (few, usual[1]))
    for words in (("exec", "short"), ("exec", "-i", "short"), ("exec", "-d", "short")):
        done = microguest(*words, "true")
        assert (done.returncode, done.stdout) == (126, b"")
        assert "'true': too many open files in one process (nofile); end" in complaint(done)
    resource.prlimit(agent, resource.RLIMIT_NOFILE, usual)
    assert microguest("exec", "short", "true").returncode == 0
    assert microguest("stop", "-t", "0", "short").returncode == 0


def test_exec_signal(image: str) -> None:
    run(image, "sleep", "600", options=("-d", "--name", "sig"))
    script = "trap 'echo int; exit 9' INT; echo up; while :; do sleep 0.1; done"
    with subprocess.Popen(
        [PROGRAM, "exec", "sig", "sh", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"up\n"
        program.send_signal(signal.SIGINT)
        assert program.communicate(timeout=PATIENCE)[0] == b"int\n"
    assert program.returncode == 9
    assert microguest("stop", "-t", "0", "sig").returncode == 0


def test_doctor(image: str) -> None:
    done = microguest("doctor")
    text = done.stdout.decode()
    assert done.returncode == 0, text
    for word in ("qemu", "kvm", "vsock", "guest", "image tools", "namespaces", "state"):
        assert word in text
    os.environ["MICROGUEST_BUNDLE"] = "/no/bundle"
    try:
        done = microguest("doctor")
    finally:
        del os.environ["MICROGUEST_BUNDLE"]
    assert done.returncode == 1
    assert b"make guest" in done.stdout


def test_help_and_version() -> None:
    assert b"doctor" in microguest("--help").stdout
    assert microguest("--version").stdout.startswith(b"microguest ")


def test_only_what_is_missing_is_asked_for() -> None:
    assert complaint(microguest("run")).endswith("required: IMAGE: see microguest run --help\n")


# ── Ctrl-C, wherever this program is ─────────────────────────────────────────────────────────────

# Sends itself SIGINT at the given one of all calls and returns that Python sees from the first line
# of `main` on; at "exit", and at "end", when the interpreter has taken its handlers away.
INTERRUPTED_SOMEWHERE = """
import atexit, os, signal, sys
from microguest.host_client.cli import main

where, count = sys.argv.pop(1), 0

def strike():
    os.kill(os.getpid(), signal.SIGINT)

class Last:
    def __del__(self, strike=strike):
        strike()

def at(frame, event, argument):
    global count
    count += 1
    if str(count) == where:
        sys.setprofile(None)
        strike()

if where == "exit":
    atexit.register(strike)
elif where == "end":
    last = Last()
else:
    sys.setprofile(at)
code = main()
sys.setprofile(None)
if where == "count":
    print(count)
sys.exit(code)
"""


def interrupted(where: str, *words: str) -> Done:
    return subprocess.run(
        [sys.executable, "-c", INTERRUPTED_SOMEWHERE, where, *words],
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )


def test_interrupted_anywhere_is_130(machines_home: Path) -> None:
    """While it imports, reads its words, works, and says how it went."""
    count = int(interrupted("count", "ls").stdout.split()[-1])
    assert count > 1000
    for where in (2, 3, *range(4, count - 60, count // 20)):
        done = interrupted(str(where), "ls")
        assert (done.returncode, done.stderr) == (130, b""), where


@pytest.mark.parametrize("where", ["exit", "end"])
def test_interrupted_too_late_changes_nothing(machines_home: Path, where: str) -> None:
    done = interrupted(where, "ls")
    assert (done.returncode, done.stderr) == (0, b"")
    done = interrupted(where, "stop", "nobody")
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1
    assert interrupted(where, "--no-such-option").returncode == 125
