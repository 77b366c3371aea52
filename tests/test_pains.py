"""What users of other guest agents report, and that it does not happen here.

The page is docs/design/pains.md.

Where it is cheap, a test first shows the defect on a naive stand-in, which does what the first
version of most agents does, with the same command: so the command is one that can tell the two
apart. What other files test already is only named in docs/design/pains.md; the last test here
checks the names.
"""

import contextlib
import itertools
import os
import re
import select
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import init_machine
import machinekit
import pytest
from agentharness import TOKEN, AgentProcess, Host, execute
from machinekit import runs, wait_until
from patience import PATIENCE, SLACK

from microguest import Keep, boot, connect
from microguest.errors import ConnectError, ConnectionLost, DeadlineExceeded
from microguest.guest import bounds
from microguest.guest.errors import StartError
from microguest.guest.wire.connection import Data, End, Request
from microguest.guest.wire.messages import Detach, Exited, Hello, Start
from microguest.host_client.machines.machine import Machine

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
GONE = PATIENCE  # seconds until what was killed has disappeared
SOON = SLACK  # seconds that nothing here may take, however busy the host is
INHERITED_SCORE = 500  # of oom_score_adj; anybody may raise it and go back to 0


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentProcess]:
    with AgentProcess() as process:
        yield process


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory, module_machines_home: Path, elf: Path) -> str:
    """A root with busybox and a user `tester`, for machines of this module's own."""
    init_machine.require_program()
    return f"dir:{init_machine.make_root(tmp_path_factory.mktemp('image') / 'root')}"


@pytest.fixture
def machine(image: str) -> Iterator[Machine]:
    with boot(image, machine="namespaces", env={"FROM_IMAGE": "yes"}) as machine:
        yield machine


def ended_group(popen: "subprocess.Popen[bytes]") -> None:
    """End a stand-in with all it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(popen.pid, signal.SIGKILL)
    with popen:
        pass


def stand_in(*argv: str, stdin: int = subprocess.DEVNULL) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        argv, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


# ── 1: output lost or cut at exit ────────────────────────────────────────────────────────────────


def test_output_is_whole_and_ends_before_the_exit(agent: AgentProcess) -> None:
    fits, does_not_fit = 60_000, 200_000  # into a pipe of 64 KiB

    naive = stand_in("head", "-c", str(fits), "/dev/zero")
    naive.wait(SOON)
    assert naive.stdout is not None
    assert len(os.read(naive.stdout.fileno(), 4096)) < fits  # one last look, then the status
    ended_group(naive)
    naive = stand_in("head", "-c", str(does_not_fit), "/dev/zero")
    with pytest.raises(subprocess.TimeoutExpired):
        naive.wait(0.5)  # each waits for the other
    ended_group(naive)

    for size in (fits, does_not_fit):
        with Host(agent) as host:
            host.start("head", "-c", str(size), "/dev/zero")
            events = []
            while not (events and isinstance(events[-1], Exited)):
                events.append(host.receive())
        assert sum(len(event.data) for event in events if isinstance(event, Data)) == size
        ends = [event.stream for event in events if isinstance(event, End)]
        assert sorted(ends) == [1, 2]


# ── 2: a grandchild holds stdout ─────────────────────────────────────────────────────────────────


def test_grandchild_on_stdout_does_not_hold_the_result(agent: AgentProcess) -> None:
    script = "sleep 60 & echo started; exit 3"

    naive = stand_in("sh", "-c", script)
    with pytest.raises(subprocess.TimeoutExpired):
        naive.communicate(timeout=bounds.STREAM_CAP_AFTER_EXIT * 2)
    ended_group(naive)

    began = time.monotonic()
    result = execute(agent, "sh", "-c", f"{script}".replace("started", "$!"))
    os.kill(int(result.stdout), signal.SIGKILL)
    assert time.monotonic() - began < SOON
    assert result.exited.code == 3
    assert result.exited.open_streams == ("stdout", "stderr")


# ── 3: one reader that stops freezes everyone ────────────────────────────────────────────────────


def relay_two(first: socket.socket, second: socket.socket) -> None:
    """The naive way: one loop passes on what two processes write, and sends as long as it takes."""
    sources = {stand_in("yes"): first, stand_in("sh", "-c", "sleep 2; echo second"): second}
    try:
        while True:
            for readable in select.select([popen.stdout for popen in sources], [], [])[0]:
                popen = next(popen for popen in sources if popen.stdout is readable)
                sources[popen].sendall(os.read(readable.fileno(), 65536))
    except OSError:
        pass  # the test has closed the other ends
    finally:
        for popen in sources:
            ended_group(popen)


def test_reader_that_stops_stops_only_its_own_process(agent: AgentProcess) -> None:
    first, second = socket.socketpair(), socket.socketpair()
    relay = threading.Thread(target=relay_two, args=(first[0], second[0]))
    relay.start()
    second[1].settimeout(4.0)
    with pytest.raises(TimeoutError):  # nobody reads the other end of `first`
        second[1].recv(100)
    for end in (*first, *second):
        end.shutdown(socket.SHUT_RDWR)
        end.close()
    relay.join()

    with Host(agent) as stalled:
        started = stalled.start("yes")
        wait_until("its pipe is full", lambda: is_asleep(started.pid))
        assert execute(agent, "echo", "second").stdout == b"second\n"


def is_asleep(pid: int) -> bool:
    """Whether it has used no processor time for a while."""

    def used() -> list[str]:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]

    before = used()
    time.sleep(0.1)
    return used() == before


# ── 4 and 6: somebody dies or falls silent ───────────────────────────────────────────────────────


def test_agent_that_falls_silent_is_an_error_and_is_found_again(agent: AgentProcess) -> None:
    """A stopped agent is what a host sees of a frozen guest: open connections and no answers."""
    with connect(f"unix://{agent.path}", token=TOKEN) as client:
        patient, client.driver.timeout = client.driver.timeout, 0.5
        os.kill(agent.pid, signal.SIGSTOP)
        try:
            with socket.socket(socket.AF_UNIX) as naive:
                naive.connect(agent.path)  # the kernel takes it
                naive.settimeout(1.0)
                with pytest.raises(TimeoutError):
                    naive.recv(1)  # and without the timeout it would be for ever
            began = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                client.ping()
            with pytest.raises(DeadlineExceeded):
                client.exec(["true"])
            assert time.monotonic() - began < SOON
        finally:
            os.kill(agent.pid, signal.SIGCONT)
        client.driver.timeout = patient
        wait_until("it answers again", lambda: answers(client.ping), SOON)
        assert client.exec(["echo", "again"]).stdout == b"again\n"


def answers(ask: object) -> bool:
    try:
        ask()  # type: ignore[operator]
    except DeadlineExceeded:
        return False
    return True


# ── 9: what was given up goes on ─────────────────────────────────────────────────────────────────

TREE = "setsid sh -c 'echo $$; exec sleep 1000' & sleep 1000 & echo $!; wait"


def test_timed_out_command_leaves_nothing(agent: AgentProcess) -> None:
    naive = stand_in("sh", "-c", TREE)
    with pytest.raises(subprocess.TimeoutExpired) as expired:
        naive.communicate(timeout=3.0)
    naive.kill()  # as subprocess.run does
    left = pids_in(expired.value.output)
    assert all(map(runs, left))
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    ended_group(naive)

    with (
        connect(f"unix://{agent.path}", token=TOKEN) as client,
        pytest.raises(DeadlineExceeded) as exceeded,
    ):
        client.exec(["sh", "-c", TREE], timeout=3.0)  # by when it has started all of it
    gone = pids_in(exceeded.value.stdout)
    wait_until("the whole tree is killed", lambda: not any(map(runs, gone)), GONE)


def test_abandoned_command_leaves_nothing(agent: AgentProcess) -> None:
    with Host(agent) as host:
        host.start("sh", "-c", TREE)
        printed = b""
        while printed.count(b"\n") < 2:
            event = host.receive()
            assert isinstance(event, Data)
            printed += event.data
    gone = pids_in(printed)
    wait_until("the whole tree is killed", lambda: not any(map(runs, gone)), GONE)


def pids_in(printed: bytes | None) -> list[int]:
    pids = [int(line) for line in (printed or b"").split()]
    assert len(pids) == 2
    return pids


# ── 10: output cannot be read again ──────────────────────────────────────────────────────────────


def test_output_is_read_again_from_where_it_was_left(machine: Machine) -> None:
    agent = machine.agent
    script = "echo one; read line; echo $line; exit 4"
    with agent.start(["sh", "-c", script], stdin=True, keep=Keep(), label="job") as process:
        assert next(iter(process.stdout)) == b"one\n"
        left_at = process.offsets
        process.detach()
    (info,) = [info for info in agent.processes() if info.label == "job"]
    with agent.attach(info.id, offsets=left_at) as again:
        again.stdin.write(b"two\n")
        assert b"".join(again.stdout) == b"two\n"
        assert again.wait(SOON).returncode == 4
    assert agent.wait(info.id, SOON).returncode == 4
    agent.forget(info.id)


def test_kept_process_starts_also_where_its_host_leaves_at_once(agent: AgentProcess) -> None:
    start = Start(argv=("sh", "-c", "echo here; exit 5"), keep=Keep(), label="left")
    with Host(agent, hello=False) as host:
        host.send(Hello(token=TOKEN), Request(op="start", args=start), Detach())
    with connect(f"unix://{agent.path}", token=TOKEN) as client:
        wait_until("it is listed", lambda: len(client.processes()) == 1)
        (info,) = client.processes()
        with client.attach(info.id) as process:
            assert process.wait(SOON).returncode == 5
            assert process.stdout.read() == b"here\n"
        client.forget(info.id)


# ── 11: the workload starves or kills the agent ──────────────────────────────────────────────────


def test_processes_do_not_inherit_how_the_agent_is_spared() -> None:
    look = ["cat", "/proc/self/oom_score_adj"]

    def spare() -> None:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write(str(INHERITED_SCORE))

    naive = subprocess.run(look, preexec_fn=spare, capture_output=True, check=True)
    assert int(naive.stdout) == INHERITED_SCORE

    with AgentProcess(prepare=spare) as agent:
        own = Path(f"/proc/{agent.pid}/oom_score_adj").read_text()
        assert int(own) == INHERITED_SCORE
        assert execute(agent, *look).stdout == b"0\n"


@pytest.mark.qemu
def test_only_init_and_agent_are_spared(image: str) -> None:
    """In a virtual machine, where nothing keeps PID 1 from lowering its own score."""
    with boot(image, machine="qemu") as machine:
        pid = machine.agent.info().agent_pid
        look = f"cat /proc/1/oom_score_adj /proc/{pid}/oom_score_adj /proc/self/oom_score_adj"
        result = machine.agent.exec(["sh", "-c", look])
    assert result.stdout.split() == [b"-1000", b"-1000", b"0"]


# ── 14: zombies, and waiters that steal statuses ─────────────────────────────────────────────────

TWO_WAITERS = """
import os, subprocess
popen = subprocess.Popen(["sh", "-c", "exit 7"])
os.waitpid(-1, 0)  # the reaper of orphans was quicker
print(popen.wait())
"""


def test_statuses_are_exact_while_orphans_are_reaped(machine: Machine) -> None:
    naive = subprocess.run([sys.executable, "-c", TWO_WAITERS], capture_output=True, check=True)
    assert naive.stdout == b"0\n"

    script = "(sh -c 'sleep 0.005 & exit' >/dev/null 2>&1 &); exit 7"
    codes = {machine.agent.exec(["sh", "-c", script]).returncode for _ in range(300)}
    assert codes == {7}
    count = "cat /proc/[0-9]*/stat | grep -c ') Z '; true"
    wait_until(
        "the last orphan is reaped",
        lambda: machine.agent.exec(["sh", "-c", count]).stdout == b"0\n",
    )


# ── 16: readiness by slow polling ────────────────────────────────────────────────────────────────


def test_guest_that_is_late_is_dialled_often(tmp_path: Path) -> None:
    """Behind a hybrid socket nobody can announce the listener: Firecracker's closes, and that's it.

    Half of the gaps are shorter than the asserted one, ten times that of the usual 100 ms.
    """
    for number in range(5):  # a busy host may be slow itself
        median = statistics.median(gaps_between_dials(tmp_path / f"device{number}"))
        if median < 0.03:
            return
    pytest.fail(f"{median} s between two dials, as in all tries before")


def gaps_between_dials(path: Path) -> list[float]:
    """Seconds, of a host that dials a guest which does not come."""
    dials: list[float] = []
    with socket.socket(socket.AF_UNIX) as device:
        device.bind(str(path))
        device.listen(16)
        device.settimeout(0.05)
        done = threading.Event()

        def refuse() -> None:
            while not done.is_set():
                with contextlib.suppress(TimeoutError), device.accept()[0] as peer:
                    dials.append(time.monotonic())
                    peer.recv(64)

        thread = threading.Thread(target=refuse)
        thread.start()
        with pytest.raises(ConnectError):
            connect(f"hybrid://{path}?port=1024", token=TOKEN, timeout=0.6)
        done.set()
        thread.join()
    return [later - earlier for earlier, later in itertools.pairwise(dials)] or [PATIENCE]


def test_first_exec_needs_no_second_try(image: str) -> None:
    """`boot` returns when the guest has said that its agent serves."""
    with boot(image, machine="namespaces") as machine:
        assert machine.agent.exec(["echo", "here"]).stdout == b"here\n"
        steps = {step.name: step for step in machine.timeline()}
        assert steps["ready"].start_ms >= steps["agent-ready"].start_ms


# ── 17: programs in the guest reach the agent ────────────────────────────────────────────────────


def test_token_is_nowhere_that_a_user_can_read(machine: Machine) -> None:
    state = Path(os.environ["XDG_STATE_HOME"], "microguest", "machines", machine.name)
    token = (state / "token").read_bytes().strip()
    assert len(token) >= bounds.TOKEN_MIN
    look = """
        cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ /proc/mounts /proc/cmdline
        for folder in /etc /run /tmp /dev/shm /microguest; do
            find $folder -type f -exec cat {} +
        done
        for pid in 1 AGENT; do
            cat /proc/$pid/mem || printf 'ref%s\n' used
            ls /proc/$pid/fd || printf 'ref%s\n' used
        done
    """.replace("AGENT", str(machine.agent.info().agent_pid))
    result = machine.agent.exec(["sh", "-c", f"({look}) 2>/dev/null"], user="tester")
    assert result.stdout.count(b"refused\n") == 4
    assert b"sh\0-c" in result.stdout  # it did see something
    assert token not in result.stdout


# ── 18: a crash of the agent is fatal or invisible ───────────────────────────────────────────────


def test_crash_of_the_agent_is_told_and_got_over(machine: Machine) -> None:
    (victim,) = (
        pid
        for pid in machinekit.family(machine.state.monitor)
        if init_machine.command_of(pid) == ["agent"]
    )

    def sleeps() -> bool:
        family = machinekit.family(machine.state.monitor)
        return any(init_machine.command_of(pid) == ["sleep", "1000"] for pid in family)

    def kill() -> None:
        wait_until("it sleeps", sleeps)
        os.kill(victim, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(ConnectionLost):
        machine.agent.exec(["sleep", "1000"])
    killer.join()
    assert machine.agent.exec(["echo", "up"]).stdout == b"up\n"
    wait_until("the next one has ended it", lambda: not sleeps())
    assert machine.agent.info().agent_starts == 2
    wait_until("the crash is told", lambda: bool(machine.state.agent_exits))
    assert machine.state.agent_exits[0].signal == signal.SIGKILL


# ── 19: unclear errors ───────────────────────────────────────────────────────────────────────────


def test_what_cannot_start_is_no_exit_code(machine: Machine) -> None:
    for missing in ("no-such-program", "exit 127"):
        naive = subprocess.run(["sh", "-c", missing], capture_output=True, check=False)
        assert naive.returncode == 127  # which of the two was it?

    assert machine.agent.exec(["sh", "-c", "exit 127"]).returncode == 127
    expected = {
        "not_found": (["no-such-program"], {}),
        "permission_denied": (["/etc/passwd"], {}),
        "bad_cwd": (["true"], {"cwd": "/no/such"}),
        "bad_user": (["true"], {"user": "nobody-here"}),
    }
    for code, (argv, options) in expected.items():
        with pytest.raises(StartError) as caught:
            machine.agent.exec(argv, **options)  # type: ignore[arg-type]
        assert caught.value.code == code


# ── 20: wrong defaults ───────────────────────────────────────────────────────────────────────────


def test_defaults_are_dockers(machine: Machine) -> None:
    script = "echo $HOME; echo $PATH; id -u; id -G; pwd; echo $FROM_IMAGE; umask; ulimit -c"
    lines = machine.agent.exec(["sh", "-c", script], user="tester").stdout.decode().splitlines()
    assert lines[:7] == [
        "/home/tester",
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        *("1000", "1000 2000", "/", "yes", "0022"),
    ]


# ── docs/design/pains.md ──────────────────────────────────────────────────────────────────────────


def test_documented_tests_exist() -> None:
    tests = Path(__file__).parent
    text = (tests.parent / "docs" / "design" / "pains.md").read_text()
    named = re.findall(r"`(test_\w+)\.py::(test_\w+)`", text)
    assert len(named) > 40
    for file, test in named:
        source = (tests / f"{file}.py").read_text()
        assert re.search(rf"^(async )?def {test}\(", source, re.MULTILINE), f"{file}.py::{test}"
    numbers = re.findall(r"^### (\d+)\. ", text, re.MULTILINE)
    assert numbers == [str(number) for number in range(1, 21)]
