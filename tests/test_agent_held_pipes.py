"""Programs that hold the lock of their own pipe: the agent stands, until who holds it is killed.

splice(2) keeps a pipe's mutex while it waits for its other side, and whoever else touches that pipe
waits uninterruptibly, also to ask how much is in it and to close it.
"""

import os
import pathlib
import signal
import sys
from collections.abc import Iterator

import pytest
from agentharness import AgentProcess, Host
from machinekit import wait_until

from microguest.guest.wire.messages import Keep

DRAIN = 5.0  # seconds, in which the test has to get that far
SPLICE = {"x86_64": "275", "aarch64": "76"}[os.uname().machine]

# Each says "ready", and does the rest when it gets SIGUSR1.
PRELUDE = """
import os, signal, socket, sys, time
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
idle, other = socket.socketpair()
def hold_stdout():
    os.splice(idle.fileno(), 1, 65536)
def hold_stdin():
    idle.setblocking(False)
    try:
        while True:
            idle.send(b"x")
    except BlockingIOError:
        idle.setblocking(True)
    os.write(2, b"full")
    os.splice(0, idle.fileno(), 65536)
def ready():
    os.write(1, b"ready")
    signal.sigwait([signal.SIGUSR1])
"""
# It has written something that the agent has to read.
STDOUT = PRELUDE + "ready(); os.write(1, b'more'); hold_stdout()"
STDIN = PRELUDE + "ready(); hold_stdin()"
# What it leaves behind holds the lock when it ends, or after that.
ORPHAN = """
child = os.fork()
if child == 0:
    signal.sigwait([signal.SIGUSR1])
    hold_stdout()
os.write(1, f"{child} ready".encode())
signal.sigwait([signal.SIGUSR1])
os._exit(7)
"""
KINDS = pytest.mark.parametrize("keep", [None, Keep()], ids=["plain", "kept"])


@pytest.fixture
def agent() -> Iterator[AgentProcess]:
    with AgentProcess() as agent:
        yield agent


@pytest.fixture
def bystander(agent: AgentProcess) -> Iterator[None]:
    """Somebody else's process, which must not pay for it."""
    with Host(agent) as host:
        host.start("cat", stdin=True)
        yield
        host.write(b"served", end=True)
        result = host.collect()
        assert (result.stdout, result.exited.code) == (b"served", 0)


def python(program: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-E", "-c", PRELUDE + program)


def hold(pid: int) -> None:
    """Let it go on until it waits in splice(2), and so holds the lock."""
    os.kill(pid, signal.SIGUSR1)
    call = pathlib.Path(f"/proc/{pid}/syscall")
    wait_until("the lock is held", lambda: call.read_text().split()[0] == SPLICE)


def state(pid: int) -> str:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def exists(pid: int) -> bool:
    return pathlib.Path(f"/proc/{pid}").exists()


def answers(agent: AgentProcess) -> None:
    with Host(agent) as host:
        host.ping()


@KINDS
@pytest.mark.usefixtures("bystander")
def test_who_holds_its_own_stdout_is_killed(agent: AgentProcess, keep: Keep | None) -> None:
    with Host(agent) as host:
        pid = host.start(*python("ready(); os.write(1, b'more'); hold_stdout()"), keep=keep).pid
        host.read_until(b"ready")
        os.kill(agent.pid, signal.SIGSTOP)  # so that it finds both the output and the lock
        wait_until("the agent is stopped", lambda: state(agent.pid) == "T")
        hold(pid)
        os.kill(agent.pid, signal.SIGCONT)
        result = host.collect()
        assert (result.stdout, result.exited.signal) == (b"more", signal.SIGKILL)
    answers(agent)


@pytest.mark.parametrize(
    ("keep", "how"),
    [(None, "write"), (None, "close"), (Keep(), "write")],
    ids=["plain", "closed", "kept"],
)
@pytest.mark.usefixtures("bystander")
def test_who_holds_its_own_stdin_is_killed(
    agent: AgentProcess, keep: Keep | None, how: str
) -> None:
    with Host(agent) as host:
        pid = host.start(*python("ready(); hold_stdin()"), stdin=True, keep=keep).pid
        host.read_until(b"ready")
        host.write(b"something")
        hold(pid)
        if how == "write":
            host.write(b"more")
        else:
            host.write(b"", end=True)
        assert host.collect().exited.signal == signal.SIGKILL
    answers(agent)


@KINDS
@pytest.mark.usefixtures("bystander")
def test_what_an_ended_process_left_is_killed(agent: AgentProcess, keep: Keep | None) -> None:
    with Host(agent) as host:
        pid = host.start(*python(ORPHAN), keep=keep).pid
        orphan = int(host.read_until(b"ready").split()[0])
        hold(orphan)
        os.kill(pid, signal.SIGUSR1)
        assert host.collect().exited.code == 7
    wait_until("the orphan is gone", lambda: not exists(orphan))
    answers(agent)


@pytest.mark.usefixtures("bystander")
def test_what_holds_a_pipe_until_it_is_cut_is_killed(agent: AgentProcess) -> None:
    with Host(agent) as host:
        pid = host.start(*python(ORPHAN), drain_idle=DRAIN, drain_cap=DRAIN).pid
        orphan = int(host.read_until(b"ready").split()[0])
        os.kill(pid, signal.SIGUSR1)
        wait_until("the process has ended", lambda: state(pid) == "Z")
        answers(agent)  # so it has seen that
        hold(orphan)
        exited = host.collect().exited
        assert exited.code == 7
    wait_until("the orphan is gone", lambda: not exists(orphan))
    answers(agent)


@pytest.mark.usefixtures("bystander")
def test_a_lost_connection_ends_what_holds_a_pipe(agent: AgentProcess) -> None:
    with Host(agent) as host:
        pid = host.start(*python("ready(); hold_stdout()")).pid
        host.read_until(b"ready")
        hold(pid)
    wait_until("the process is gone", lambda: not exists(pid))
    answers(agent)
