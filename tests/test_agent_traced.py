"""Processes that a debugger keeps from their parent: ptrace(2) hides their end until it lets go."""

import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from agentharness import AgentProcess, Host, Refused
from init_machine import children_of
from machinekit import wait_until
from patience import SLACK

from microguest.guest import bounds
from microguest.guest.wire.messages import Forget, Keep

# `trace` is done by a process that neither waits for what it traces nor lets it go.
PRELUDE = """
import ctypes, os, signal, sys, threading, time
ptrace = ctypes.CDLL(None, use_errno=True).ptrace
ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
ctypes.CDLL(None).prctl(0x59616d61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER: anybody
def trace(pid, options=0):
    assert ptrace(0x4206, pid, None, options) == 0, ctypes.get_errno()
def be_traced(*pids, options=0):
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setsid()
        for pid in pids:
            trace(pid, options)
        for fd in (0, 1, 2):
            os.close(fd)
        os.write(writer, b"x")
        while True:
            signal.pause()
    os.read(reader, 1)
"""
ENDS = "be_traced(os.getpid()); os._exit(7)"
STAYS = "be_traced(os.getpid(), options=0x40); os.write(1, b'ready'); signal.pause()"  # TRACEEXIT
THREAD = """
def run():
    threads.append(threading.get_native_id())
    go.acquire()
threads, go = [], threading.Lock()
go.acquire()
thread = threading.Thread(target=run)
thread.start()
while not threads:
    time.sleep(0.001)
be_traced(*threads)
go.release()
os.write(1, b"ready")
signal.pause()
"""
KINDS = pytest.mark.parametrize("keep", [None, Keep()], ids=["plain", "kept"])


@pytest.fixture
def agent() -> Iterator[AgentProcess]:
    with AgentProcess() as agent:
        yield agent


def python(program: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-E", "-c", PRELUDE + program)


def state(pid: int) -> str:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def wait_until_gone(pid: int) -> None:
    wait_until("it is reaped", lambda: not pathlib.Path(f"/proc/{pid}").exists())


@KINDS
def test_a_traced_end_holds_up_nobody_and_is_told(agent: AgentProcess, keep: Keep | None) -> None:
    with Host(agent) as host, Host(agent) as other:
        pid = host.start(*python(ENDS), keep=keep).pid
        wait_until("it has ended", lambda: state(pid) == "Z")
        other.ping()
        assert host.collect().exited.code == 7
        wait_until_gone(pid)


@KINDS
@pytest.mark.parametrize("program", [STAYS, THREAD], ids=["ending", "thread"])
def test_a_traced_process_is_killed_all_the_same(
    agent: AgentProcess, keep: Keep | None, program: str
) -> None:
    """It stands in its end, or a thread that has ended is not reaped; its tracer is elsewhere."""
    with Host(agent) as host:
        started = host.start(*python(program), keep=keep)
        host.read_until(b"ready")
    if keep is not None:
        with Host(agent) as host:
            host.request("forget", Forget(id=started.id))
    with Host(agent) as host:
        host.ping()
    wait_until_gone(started.pid)


@KINDS
def test_who_traces_from_outside_of_the_guest_delays_no_end(
    agent: AgentProcess, keep: Keep | None
) -> None:
    """As the test is here: the agent does not kill its parent."""
    trace: dict[str, Any] = {}
    exec(PRELUDE, trace)
    program = "os.write(1, b'ready'); os.read(0, 1); os._exit(7)"
    with Host(agent) as host:
        pid = host.start(*python(program), stdin=True, keep=keep).pid
        host.read_until(b"ready")
        trace["trace"](pid)
        try:
            began = time.monotonic()
            host.write(b"x")
            wait_until("it has ended", lambda: state(pid) == "Z")
            with Host(agent) as other:
                other.ping()
            assert host.collect().exited.code == 7
            assert time.monotonic() - began < bounds.TRACED_END + SLACK
            assert state(pid) == "Z"
        finally:
            os.kill(pid, 9)  # where the test has failed
            os.waitpid(pid, 0)  # as its tracer, which lets it go
    wait_until_gone(pid)


# A thread makes the agent its tracer and ends, or the whole process stops.
THREAD_OF_OURS = """
def ask():
    assert ptrace(0, 0, None, None) == 0
thread = threading.Thread(target=ask)
thread.start()
thread.join()
os.write(1, b"ready")
"""
STOP_OF_OURS = """
assert ptrace(0, 0, None, None) == 0
os.write(1, b"ready")
os.kill(os.getpid(), signal.SIGSTOP)
os._exit(7)
"""


@KINDS
@pytest.mark.parametrize("end", ["exit", "kill"])
def test_a_thread_that_has_the_agent_trace_it_delays_no_end(
    agent: AgentProcess, keep: Keep | None, end: str
) -> None:
    """Its end is told to its tracer alone, and the process has none before."""
    last = "os._exit(7)" if end == "exit" else "signal.pause()"
    with Host(agent) as host:
        pid = host.start(*python(THREAD_OF_OURS + last), keep=keep).pid
        host.read_until(b"ready")
        if end == "kill":
            host.signal(signal.SIGKILL, "tree")
        exited = host.collect().exited
        assert (exited.code, exited.signal) == ((7, None) if end == "exit" else (None, 9))
    wait_until_gone(pid)


@KINDS
def test_who_has_the_agent_trace_it_stops_as_others_do(
    agent: AgentProcess, keep: Keep | None
) -> None:
    with Host(agent) as host:
        pid = host.start(*python(STOP_OF_OURS), keep=keep).pid
        host.read_until(b"ready")
        wait_until("it has stopped", lambda: state(pid) == "T")
        host.signal(signal.SIGCONT)
        assert host.collect().exited.code == 7


# Traces a process and what that starts, lets them go on, and is told of no end: waitid(2).
FOLLOW = """
VFORK, CONT, WALL = 0x4, 7, 0x40000000
trace(int(sys.argv[1]), VFORK)
print("traced", flush=True)
while True:
    stopped = os.waitid(os.P_ALL, 0, os.WSTOPPED | WALL)
    assert ptrace(CONT, stopped.si_pid, None, None) == 0
"""


def test_a_start_that_fails_while_it_is_traced_stops_nobody(agent: AgentProcess) -> None:
    with Host(agent) as host, Host(agent) as other:
        tracer = [*python(FOLLOW), str(agent.popen.pid)]
        with subprocess.Popen(tracer, stdout=subprocess.PIPE) as traces:
            try:
                assert traces.stdout is not None
                assert traces.stdout.readline() == b"traced\n"
                with pytest.raises(Refused) as refused:
                    host.start("/no/such/program")
                assert refused.value.failure.code == "not_found"
                other.ping()
                left = children_of(agent.popen.pid)
                assert [state(pid) for pid in left] == ["Z"]
            finally:
                traces.kill()
        for pid in left:
            wait_until_gone(pid)
        other.ping()


def test_a_debugger_that_waits_is_left_alone(agent: AgentProcess) -> None:
    program = """
target = os.fork()
if target == 0:
    os.read(0, 1)
    os._exit(5)
trace(target)
os.write(1, b"ready")
_, status = os.waitpid(target, 0)
os._exit(os.WEXITSTATUS(status))
"""
    with Host(agent) as host:
        host.start(*python(program), stdin=True)
        host.read_until(b"ready")
        host.write(b"x", end=True)
        assert host.collect().exited.code == 5
