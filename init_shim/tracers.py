"""A debugger that keeps a child's end from PID 1: ptrace(2).

The end of a traced process is its tracer's to wait for first, and PID 1 is told nothing of it; so
is the end of each thread. Who has not waited for it in TRACER_WAIT is killed, and who traces that
one. What is read of them here asks for no lock of theirs.
"""

import os
import select
import time

from microguest.guest import bounds
from microguest.init_shim.mounts import open_proc
from microguest.init_shim.signals import KILL

__all__ = ["await_end", "kill_tracers", "wait_status"]

CHAIN = 64  # processes that are looked at for one: a tracer may be traced too
THREADS = 256  # that are looked at of each
ENDED = "ZX"  # states of proc_pid_stat(5)
EXIT_CODE = 49  # field 52 there, counted from the state
REAP_EVERY = 0.05  # seconds between looks whether what has ended can be reaped


def kill_tracers(pid: int, agent: int) -> "list[int]":
    """SIGKILL to those of each thread of `pid`, and to theirs; not to the agent. Raises nothing."""
    seen = {0, 1, os.getpid(), agent, pid}  # 0: it is outside of the guest
    waiting = [pid]
    killed: list[int] = []
    while waiting and len(killed) < CHAIN:
        traced = waiting.pop()
        for thread in threads(traced):
            tracer = status_number(f"{traced}/task/{thread}", b"TracerPid:")
            tracer = status_number(str(tracer), b"Tgid:") if tracer else 0  # any thread may trace
            if tracer in seen:
                continue
            seen.add(tracer)
            waiting.append(tracer)
            killed.append(tracer)
            try:
                os.kill(tracer, KILL)
            except OSError:
                pass  # it has ended
    return killed


def wait_status(pid: int) -> "int | None":
    """How a child that is not reaped has ended, as wait(2) says; None while a thread of it runs."""
    own: list[str] = []
    for thread in threads(pid):
        fields = stat_fields(f"{pid}/task/{thread}")
        if not fields or fields[0] not in ENDED:
            return None
        if thread == str(pid):
            own = fields
    return int(own[EXIT_CODE]) if len(own) > EXIT_CODE else None


def await_end(pid: int) -> "int | None":
    """Wait for a child's end, and reap it: its wait status. Not for PID 1, which waits otherwise.

    None where who traces it has not let it go in TRACED_END; then it is to be reaped later.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:  # no room for one: as long as it takes, then, whoever traces it
        return os.waitpid(pid, 0)[1]
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.poll()
    finally:
        os.close(pidfd)
    deadline = time.monotonic() + bounds.TRACED_END
    while True:
        reaped, status = os.waitpid(pid, os.WNOHANG)
        if reaped:
            return status
        if time.monotonic() >= deadline:
            return None
        time.sleep(REAP_EVERY)


def threads(pid: int) -> "list[str]":
    """At most THREADS; [] where it has gone."""
    try:
        folder = open_proc(f"{pid}/task")
    except OSError:
        return []
    try:
        return os.listdir(folder)[:THREADS]
    except OSError:
        return []
    finally:
        os.close(folder)


def stat_fields(folder: str) -> "list[str]":
    """Of proc_pid_stat(5), from the state on; [] where it has gone."""
    try:
        with open(open_proc(f"{folder}/stat"), encoding="ascii", errors="replace") as file:
            return file.read(4096).rpartition(")")[2].split()
    except OSError:
        return []


def status_number(folder: str, name: bytes) -> int:
    """Of proc_pid_status(5); 0 where it has gone."""
    try:
        with open(open_proc(f"{folder}/status"), "rb", buffering=0) as file:
            lines = (file.read(8192) or b"").splitlines()
    except OSError:
        return 0
    for line in lines:
        if line.startswith(name):
            return int(line[len(name) :])
    return 0
