"""A debugger that keeps the workload's end from PID 1: ptrace(2).

The end of a traced process is its tracer's to wait for first, and PID 1 is told nothing of it. Who
has not waited for it in TRACER_WAIT is killed, and who traces that one. What is read of them here
asks for no lock of theirs.
"""

import os

from init_shim.mounts import open_proc
from init_shim.signals import KILL

__all__ = ["kill_tracers"]

CHAIN = 64  # processes that are looked at: a tracer may be traced too


def kill_tracers(pid: int, agent: int) -> "list[int]":
    """SIGKILL to the tracer of `pid`, and to that one's; not to the agent. Raises nothing."""
    spared = {0, 1, agent, pid}  # 0: it is outside of the guest
    killed: list[int] = []
    while len(killed) < CHAIN:
        tracer = status_number(pid, b"TracerPid:")
        pid = status_number(tracer, b"Tgid:") if tracer else 0  # any thread of it may trace
        if pid in spared:
            break
        spared.add(pid)
        killed.append(pid)
        try:
            os.kill(pid, KILL)
        except OSError:
            pass  # it has ended
    return killed


def status_number(pid: int, name: bytes) -> int:
    """Of proc_pid_status(5); 0 where it has gone."""
    try:
        with open(open_proc(f"{pid}/status"), "rb", buffering=0) as file:
            lines = (file.read(8192) or b"").splitlines()
    except OSError:
        return 0
    for line in lines:
        if line.startswith(name):
            return int(line[len(name) :])
    return 0
