"""The workload that PID 1 started, as hosts that attach to it see it."""

import os
import resource
import select
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest
from agentharness import AgentProcess, Host, Refused
from patience import PATIENCE

from microguest.guest.status import exit_fields
from microguest.guest.supervision import (
    Deposit,
    ExecStarted,
    MainCollected,
    MainExited,
    MainReader,
    MainStarted,
)
from microguest.guest.wire.connection import Data, Request
from microguest.guest.wire.messages import Attach

ASIDES = Deposit | ExecStarted | MainReader


class Workload:
    """A process with pipes, started and waited for by the test as PID 1 would."""

    def __init__(self, agent: AgentProcess, *argv: str) -> None:
        self.agent = agent
        pipe = subprocess.PIPE
        with subprocess.Popen(
            argv, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
        ) as popen:
            assert popen.stdin
            assert popen.stdout
            assert popen.stderr
            streams = [popen.stdin, popen.stdout, popen.stderr]
            self.pid = popen.pid
            agent.send(
                MainStarted(pid=popen.pid, argv=argv), [stream.fileno() for stream in streams]
            )
            for stream in streams:
                stream.close()
            popen.returncode = 0  # the test waits for it itself

    def wait(self) -> None:
        while not (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            discard_deposits(self.agent)  # they hold its stdin open
            time.sleep(0.005)
        _, status = ended
        self.agent.send(MainExited(**exit_fields(status), duration=1.25))  # type: ignore[arg-type]


def discard_deposits(agent: AgentProcess) -> None:
    while select.select([agent.pid1], [], [], 0)[0]:
        assert isinstance(agent.receive_any(), ASIDES)


def expect_collected(agent: AgentProcess) -> None:
    """What the agent says next that is not about its deposits, nor who reads."""
    message = agent.receive()
    while isinstance(message, ASIDES):
        message = agent.receive()
    assert message == MainCollected()


def limit_files(agent: AgentProcess, count: int) -> None:
    """How many the agent may have open."""
    hard = resource.prlimit(agent.pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(agent.pid, resource.RLIMIT_NOFILE, (count, hard))


@pytest.mark.parametrize("spare", range(3, 9))  # with fewer its pipes cannot even be received
def test_a_workload_that_there_is_no_room_for_ends_nobody_else(spare: int) -> None:
    """spare: descriptors that the agent may still open while it takes the workload."""
    with AgentProcess() as agent, Host(agent) as other:
        other.start("cat", stdin=True)
        other.write(b"before\n")
        other.read_until(b"before\n")
        limit_files(agent, agent.open_descriptors() + spare)
        workload = Workload(agent, "sleep", "1000")
        try:
            other.write(b"after\n")
            other.read_until(b"after\n")
        finally:
            os.kill(workload.pid, signal.SIGKILL)
            os.waitpid(workload.pid, 0)
        discard_deposits(agent)
        other.write(b"behind\n")
        other.read_until(b"behind\n")


@pytest.fixture
def agent() -> Iterator[AgentProcess]:
    with AgentProcess() as process:
        yield process


def test_output_status_and_collection(agent: AgentProcess) -> None:
    workload = Workload(agent, "sh", "-c", "echo out; echo err >&2; exit 6")
    workload.wait()
    with Host(agent) as host:
        started = host.attach()
        assert (started.id, started.pid) == ("main", workload.pid)
        result = host.collect()
    assert (result.stdout, result.stderr) == (b"out\n", b"err\n")
    assert result.exited.code == 6
    assert result.exited.duration == 1.25
    expect_collected(agent)


def test_pid_1_knows_whether_a_reader_is_there(agent: AgentProcess) -> None:
    """Until it has closed, and not only until it was sent the end."""
    workload = Workload(agent, "true")
    workload.wait()
    with Host(agent) as host:
        host.attach()
        host.collect()
        assert readers_told(agent, 1) == [MainReader(there=True)]
    assert readers_told(agent, 2) == [MainCollected(), MainReader(there=False)]


def readers_told(agent: AgentProcess, count: int) -> list[object]:
    told: list[object] = []
    while len(told) < count:
        message = agent.receive()
        if not isinstance(message, Deposit):
            told.append(message)
    return told


def test_attach_before_the_workload_exists(agent: AgentProcess) -> None:
    with Host(agent) as host:
        host.send(Request(op="attach", args=Attach()))
        time.sleep(0.1)
        workload = Workload(agent, "echo", "here")
        host.receive()
        workload.wait()
        assert host.collect().stdout == b"here\n"


def test_stdin_and_signals(agent: AgentProcess) -> None:
    workload = Workload(agent, "sh", "-c", "read line; echo got $line; exec sleep 100")
    with Host(agent) as host:
        host.attach()
        host.write(b"hello\n")
        event = host.receive()
        assert isinstance(event, Data)
        assert event.data == b"got hello\n"
        host.signal(signal.SIGTERM)
        workload.wait()
        assert host.collect().exited.signal == signal.SIGTERM


def test_losing_the_host_does_not_end_the_workload(agent: AgentProcess) -> None:
    workload = Workload(agent, "cat")
    with Host(agent) as host:
        host.attach()
        host.write(b"first\n")
        host.receive()
    deadline = time.monotonic() + PATIENCE
    while True:
        with Host(agent) as host:
            try:
                host.attach()
            except Refused:
                assert time.monotonic() < deadline  # the first may not be noticed to be gone yet
                continue
            host.write(b"second\n", end=True)
            workload.wait()
            assert host.collect().stdout == b"first\nsecond\n"
            break
    expect_collected(agent)


def test_only_one_host_may_write(agent: AgentProcess) -> None:
    workload = Workload(agent, "cat")
    with Host(agent) as first:
        first.attach()
        with Host(agent) as second:
            second.send(Request(op="attach", args=Attach()))
            refusal = second.refusal()
            assert refusal.code == "stdin_taken"
            assert "write=False" in refusal.message
        first.write(b"", end=True)
        workload.wait()
        assert first.collect().exited.code == 0


def test_attaching_again_after_the_end_gives_all_of_it_again(agent: AgentProcess) -> None:
    workload = Workload(agent, "echo", "once")
    workload.wait()
    outputs = []
    for _ in range(2):
        with Host(agent) as host:
            host.attach()
            outputs.append(host.collect().stdout)
        expect_collected(agent)
    assert outputs == [b"once\n", b"once\n"]
