"""Terminals: what a program in one sees, what its keys and its size do, and how it ends."""

import os
import pathlib
import re
import shutil
import signal
import time
from collections.abc import Iterator

import pytest
from agentharness import AgentProcess, Host, Refused, Result
from machinekit import wait_until
from patience import PATIENCE, SLACK

from microguest.guest.wire.connection import Data, End
from microguest.guest.wire.messages import Detach, Exited, Winsize

SIZE = Winsize(rows=33, columns=101)
GONE = PATIENCE  # seconds in which a killed process must have disappeared
INTERRUPT, QUIT, SUSPEND, END_OF_FILE = b"\x03", b"\x1c", b"\x1a", b"\x04"


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentProcess]:
    with AgentProcess() as process:
        yield process


def run(agent: AgentProcess, script: str, **options: object) -> Result:
    with Host(agent) as host:
        host.start("sh", "-c", script, tty=SIZE, stdin=True, **options)
        return host.collect()


# ── what the program sees ────────────────────────────────────────────────────────────────────────


def test_everything_is_stdout_and_stderr_ends_at_once(agent: AgentProcess) -> None:
    with Host(agent) as host:
        host.start("sh", "-c", "echo out; echo err >&2; sleep 0.1", tty=SIZE, stdin=True)
        assert host.receive() == End(stream=2)
        result = host.collect()
    assert result.stdout == b"out\r\nerr\r\n"
    assert result.exited.code == 0
    assert result.exited.open_streams == ()


def test_size_is_there_before_the_program(agent: AgentProcess) -> None:
    assert run(agent, "stty size").stdout == b"33 101\r\n"


def test_it_is_the_controlling_terminal_of_a_session_of_its_own(agent: AgentProcess) -> None:
    result = run(agent, "echo direct > /dev/tty; test -t 0 -a -t 1 -a -t 2 && cut -d' ' -f1,5-8 "
                        "/proc/$$/stat")  # fmt: skip
    direct, numbers = result.stdout.split(b"\r\n")[:2]
    pid, group, session, terminal, foreground = map(int, numbers.split())
    assert direct == b"direct"
    assert pid == group == session == foreground
    assert os.major(terminal) == 136  # a pseudo-terminal: admin-guide/devices.txt


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_it_belongs_to_the_user(agent: AgentProcess) -> None:
    result = run(agent, "stat -L -c '%U %a' /proc/self/fd/0; echo ok > $(tty)", user="daemon")
    assert result.stdout == b"daemon 620\r\nok\r\n"


def test_its_descriptors_are_nobody_elses(agent: AgentProcess) -> None:
    with Host(agent) as first:
        first.start("sleep", "100", tty=SIZE, stdin=True)
        assert run(agent, "ls /proc/self/fd | tr '\\n' ' '").stdout == b"0 1 2 3 "


def test_terminals_do_not_pile_up(agent: AgentProcess) -> None:
    before = agent.open_descriptors()
    for _ in range(40):
        assert run(agent, "echo x").stdout == b"x\r\n"
    deadline = time.monotonic() + GONE
    while agent.open_descriptors() > before or agent.children():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change its root")
def test_root_without_terminals_is_a_typed_error(tmp_path: pathlib.Path) -> None:
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("busybox (Debian: busybox-static) is not installed")
    for folder in ("bin", "etc", "dev"):
        (tmp_path / folder).mkdir()
    shutil.copy(busybox, tmp_path / "bin" / "busybox")
    os.mkfifo(tmp_path / "dev" / "ptmx")  # must not hold the agent
    with AgentProcess(root=str(tmp_path)) as agent:
        before = agent.open_descriptors()
        with Host(agent) as host, pytest.raises(Refused) as caught:
            host.start("busybox", "true", tty=SIZE, stdin=True)
        assert caught.value.failure.code == "setup_failed"
        assert "/dev/ptmx" in str(caught.value.failure)
        with Host(agent) as host:
            assert host.info().processes == 0
        wait_until("descriptors closed", lambda: agent.open_descriptors() <= before)


# ── size ─────────────────────────────────────────────────────────────────────────────────────────


def test_every_resize_is_a_signal_also_to_the_same_size(agent: AgentProcess) -> None:
    script = "trap 'stty size' WINCH; echo up; while :; do sleep 0.02; done"
    with Host(agent) as host:
        host.start("sh", "-c", script, tty=SIZE, stdin=True)
        host.read_until(b"up\r\n")
        for rows, columns in ((50, 132), (50, 132), (1, 65535)):
            host.resize(rows, columns)
            assert host.read_until(b"\r\n") == b"%d %d\r\n" % (rows, columns)


def test_resize_without_a_terminal_is_ignored(agent: AgentProcess) -> None:
    with Host(agent) as host:
        host.start("cat", stdin=True)
        host.resize(10, 10)
        host.write(b"on", end=True)
        assert host.collect().stdout == b"on"


def test_resize_of_an_ended_terminal_is_ignored(
    agent: AgentProcess, tmp_path: pathlib.Path
) -> None:
    with Host(agent) as host:
        waits = f"until test -e {tmp_path}/resized; do sleep 0.05; done"
        script = f"exec 0<&- 1<&- 2<&-; {waits}; exit 3"
        host.start("sh", "-c", script, tty=SIZE, stdin=True)
        assert [host.receive(), host.receive()] == [End(stream=2), End(stream=1)]
        host.resize(10, 10)
        (tmp_path / "resized").touch()
        assert host.collect().exited.code == 3


# ── keys ─────────────────────────────────────────────────────────────────────────────────────────


def job_in_foreground(shell: int) -> str:
    """The name of the program that has the shell's terminal; fields 5 and 8 of proc_pid_stat(5)."""
    fields = pathlib.Path(f"/proc/{shell}/stat").read_text().rpartition(")")[2].split()
    if fields[5] == fields[2]:
        return ""
    try:
        return pathlib.Path(f"/proc/{fields[5]}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_keys_signal_jobs_of_an_interactive_shell(agent: AgentProcess) -> None:
    with Host(agent) as host:
        environment = {"PS1": "ready> ", "ENV": ""}
        shell = host.start("sh", "-i", tty=SIZE, stdin=True, env=environment).pid
        host.read_until(b"ready> ")
        for key, status in ((INTERRUPT, 130), (QUIT, 131)):
            host.write(b"sleep 1000\n")
            wait_until("it sleeps", lambda: job_in_foreground(shell) == "sleep")
            host.write(key)
            host.read_until(b"ready> ")
            host.write(b"echo status=$?\n")
            host.read_until(b"status=%d" % status)
        host.write(b"sleep 1000\n")
        wait_until("it sleeps", lambda: job_in_foreground(shell) == "sleep")
        host.write(SUSPEND)
        host.read_until(b"ready> ")
        host.write(b"jobs\n")
        host.read_until(b"Stopped")
        host.write(b"kill %1; fg; exit 5\n")
        assert host.collect().exited.code == 5


def test_end_types_the_end_of_file(agent: AgentProcess) -> None:
    with Host(agent) as host:
        host.start("sh", "-c", "cat; echo over; sleep 0.2; echo still", tty=SIZE, stdin=True)
        host.write(b"a line\n", end=True)
        assert host.collect().stdout == b"a line\r\na line\r\nover\r\nstill\r\n"


def test_end_behind_an_unfinished_line_is_the_end_too(agent: AgentProcess) -> None:
    with Host(agent) as host:
        host.start("sh", "-c", "stty -echo; echo up; cat; echo :over", tty=SIZE, stdin=True)
        host.read_until(b"up\r\n")
        host.write(b"no newline", end=True)
        assert host.collect().stdout == b"no newline:over\r\n"


def test_end_in_raw_mode_is_a_byte(agent: AgentProcess) -> None:
    script = "stty raw -echo; echo up; head -c 1 | od -An -tx1"
    with Host(agent) as host:
        host.start("sh", "-c", script, tty=SIZE, stdin=True)
        host.read_until(b"up")
        host.write(b"", end=True)
        assert b"04" in host.collect().stdout


def test_more_than_the_terminal_takes_is_typed_in_time(agent: AgentProcess) -> None:
    script = "stty raw -echo; echo up; sleep 0.3; head -c 300000 | md5sum"
    with Host(agent) as host:
        host.start("sh", "-c", script, tty=SIZE, stdin=True)
        host.read_until(b"up")
        host.write(b"0123456789" * 30000)
        assert b"b9c683230a9e20ee0a15acf7f070f508" in host.collect().stdout


# ── endings ──────────────────────────────────────────────────────────────────────────────────────


def test_every_byte_arrives_before_the_end(agent: AgentProcess) -> None:
    expected = b"".join(b"%d\r\n" % number for number in range(1, 20001))
    for _ in range(5):
        with Host(agent) as host:
            host.start("seq", "1", "20000", tty=SIZE, stdin=True)
            time.sleep(0.1)  # the terminal is full, and its only process wants to leave
            assert host.collect().stdout == expected
    for _ in range(50):
        assert run(agent, "seq 1 500; exit 7").stdout == expected[:2392]


def test_process_that_stays_on_the_terminal_does_not_hold_the_result(agent: AgentProcess) -> None:
    started = time.monotonic()
    result = run(agent, "trap '' HUP; setsid sleep 30 & echo $!; exit 4")
    assert time.monotonic() - started < 1.5 + SLACK
    assert result.exited.code == 4
    assert re.fullmatch(rb"\d+\r\n", result.stdout)


@pytest.mark.parametrize("leave", ["close", "detach"])
def test_leaving_hangs_up(agent: AgentProcess, leave: str, tmp_path: pathlib.Path) -> None:
    script = f"trap '' HUP; sleep 100 & echo $! $$ > {tmp_path}/pids; echo up; wait"
    with Host(agent) as host:
        host.start("sh", "-c", script, tty=SIZE, stdin=True)
        host.read_until(b"up")
        if leave == "detach":
            host.send(Detach())
            assert host.sock.recv(1) == b""
    deadline = time.monotonic() + GONE
    for pid in (tmp_path / "pids").read_text().split():
        while os.path.exists(f"/proc/{pid}"):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_reader_that_stops_stops_the_terminal(agent: AgentProcess) -> None:
    resident = agent.resident_kib()
    with Host(agent) as host:
        host.start("sh", "-c", "while :; do echo $(seq 1 2000); done", tty=SIZE, stdin=True)
        time.sleep(1)
        assert agent.resident_kib() - resident < 512
        host.write(INTERRUPT)  # is read although output waits
        status = host.collect().exited
    assert status.signal == signal.SIGINT or status.code == 130


# ── programs ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def busybox() -> str:
    path = shutil.which("busybox")
    if path is None:
        pytest.skip("busybox (Debian: busybox-static) is not installed")
    return path


def test_editor(agent: AgentProcess, busybox: str, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "text"
    file.write_text("first\n")
    with Host(agent) as host:
        host.start(busybox, "vi", "text", cwd=str(tmp_path), tty=SIZE, stdin=True)
        screen = host.read_until(b"first")
        assert b"\x1b[" in screen
        host.write(b"Osecond\x1b")
        host.read_until(b"- text [Modified]")  # not inserting any more
        host.resize(10, 40)
        host.read_until(b"\x1b[10;1H")
        host.write(b":wq\r")
        assert host.collect().exited.code == 0
    assert file.read_text() == "second\nfirst\n"


def test_pager(agent: AgentProcess, busybox: str, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "text"
    file.write_text("".join(f"line {number}\n" for number in range(1, 201)))
    with Host(agent) as host:
        host.start(busybox, "less", str(file), tty=SIZE, stdin=True)
        assert b"line 33" not in host.read_until(b"line 32")  # the last row is the prompt's
        host.write(b" ")
        host.read_until(b"line 64")
        host.write(b"q")
        assert host.collect().exited.code == 0


def test_monitor(agent: AgentProcess, busybox: str) -> None:
    with Host(agent) as host:
        host.start(busybox, "top", "-d", "1", tty=SIZE, stdin=True)
        host.read_until(b"COMMAND")
        host.read_until(b"COMMAND")  # a second screen
        host.write(b"q")
        exited = host.collect().exited
    assert exited.replace(duration=0.0, user_seconds=0.0, system_seconds=0.0, max_rss_kib=0) == (
        Exited(code=0)
    )


def test_data_is_one_stream_of_a_terminal(agent: AgentProcess) -> None:
    with Host(agent) as host:
        host.start("sh", "-c", "echo a >&2; echo b", tty=SIZE, stdin=True)
        streams = set()
        while not isinstance(event := host.receive(), Exited):
            if isinstance(event, Data):
                streams.add(event.stream)
    assert streams == {1}
