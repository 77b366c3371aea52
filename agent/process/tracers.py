"""Debuggers that keep a process from being reaped: ptrace(2).

While a process is traced its end is told to its tracer alone, and its parent gets nothing from
wait4(2) although the pidfd is readable. A thread that is traced keeps its process from ending. So a
tracer has TRACER_WAIT to do its part, and is killed then: every user can have one that never does.
Nothing here waits in the kernel for a child.

Any thread of a child of ours may make us its tracer (PTRACE_TRACEME). Then our part is done here.
"""

import contextlib
import os
import signal
import time
from collections.abc import Generator

import _guestsys
import trio

from microguest.agent.process import tree
from microguest.agent.process.hunting import in_slices
from microguest.agent.state import log
from microguest.guest import bounds

__all__ = [
    "began",
    "ended",
    "has_ended",
    "kill_tracers",
    "reap_later",
    "until_reapable",
    "wait_status",
]

LOOK_EVERY = 0.05  # seconds
PART_EVERY = 1.0  # seconds between looks whether we trace somebody, while there are children
REAP_EVERY = 1.0  # seconds, for those who are still kept when their end was told
CHAIN = 64  # processes that are looked at for one: a tracer may be traced too
THREADS = 256  # that are looked at of each
EXIT_CODE = 49  # field 52 of proc_pid_stat(5), counted from the state

WALL = 0x40000000  # __WALL of wait(2): threads as well

ours: set[int] = set()  # children that are not reaped; each leads a process group
looking = False  # `do_our_part` runs
left: list[int] = []  # children whose end was told, and which could not be reaped


def began(pid: int) -> None:
    """It is a child of ours from now on, until `ended`."""
    global looking  # noqa: PLW0603  of the one event loop
    ours.add(pid)
    if not looking:
        looking = True
        trio.lowlevel.spawn_system_task(do_our_part)


def ended(pid: int) -> None:
    """It is reaped, or as good as."""
    ours.discard(pid)


def has_ended(pid: int) -> os.waitid_result | None:
    """How a child of ours ended, which is not reaped by this; None where that cannot be had yet."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)


async def until_reapable(pid: int) -> None:
    """Until an ended child of ours is, for at most TRACED_END seconds: see `wait_status`."""
    began = time.monotonic()
    while not has_ended(pid):
        since = time.monotonic() - began
        if since >= bounds.TRACED_END:
            log(f"process {pid} has ended, and what traces it cannot be killed from here")
            return
        if since >= bounds.TRACER_WAIT:
            await kill_tracers(pid)
        await trio.sleep(LOOK_EVERY)


def wait_status(pid: int) -> int:
    """How an ended process did, as wait(2) would say; as if killed where /proc does not tell."""
    fields = tree.stat_fields(str(pid))
    if len(fields) > EXIT_CODE and fields[0] in (b"Z", b"X"):
        return int(fields[EXIT_CODE])
    return signal.SIGKILL


async def kill_tracers(pid: int) -> None:
    """SIGKILL to those of each of its threads, and to theirs. Raises nothing."""
    killed = await in_slices(kill(pid))
    if killed:
        log(f"process {pid} was kept from its end by who traces it: {killed} are killed")


def reap_later(pid: int) -> None:
    """Once its tracer has let it go. Its id is used by nobody any more."""
    left.append(pid)
    if len(left) == 1:
        trio.lowlevel.spawn_system_task(reap_left)


async def reap_left() -> None:
    while left:
        await trio.sleep(REAP_EVERY)
        left[:] = [pid for pid in left if not reaped(pid)]


def reaped(pid: int) -> bool:
    return os.waitpid(pid, os.WNOHANG)[0] != 0


def kill(pid: int) -> Generator[float, None, list[int]]:
    """In steps, as `agent.process.tree` makes them."""
    seen = {0, 1, os.getpid(), os.getppid(), pid}  # 0: it is outside of the guest
    waiting, killed = [pid], list[int]()
    while waiting and len(seen) < CHAIN:
        for thread in threads(waiting.pop())[:THREADS]:
            yield 0.0
            tracer = tracer_of(thread)
            if tracer in seen:
                continue
            seen.add(tracer)
            waiting.append(tracer)
            if kill_tracer(thread, tracer):
                killed.append(tracer)
    return killed


def kill_tracer(thread: str, tracer: int) -> bool:
    """If it is still the one: its id may be another's since it was read."""
    try:
        pidfd = tree.pidfd_of(tracer)
    except ProcessLookupError:
        return False
    try:
        return tracer_of(thread) == tracer and tree.send(tracer, pidfd, signal.SIGKILL)
    finally:
        if pidfd >= 0:
            os.close(pidfd)


def threads(pid: int) -> list[str]:
    """Folders in /proc; [] where it has gone."""
    try:
        return [f"/proc/{pid}/task/{thread}" for thread in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return []


def tracer_of(thread: str) -> int:
    """The process that traces it, of which any thread may; 0 for none."""
    tracer = status_number(thread, b"TracerPid:")
    return status_number(f"/proc/{tracer}", b"Tgid:") if tracer else 0


def status_number(folder: str, name: bytes) -> int:
    """Of proc_pid_status(5); 0 where it has gone."""
    try:
        with open(f"{folder}/status", "rb", buffering=0) as file:
            lines = (file.read(8192) or b"").splitlines()
    except OSError:
        return 0
    return next((int(line[len(name) :]) for line in lines if line.startswith(name)), 0)


# ── where we are the tracer ──────────────────────────────────────────────────────────────────────


async def do_our_part() -> None:
    """While there are children: let go of who has stopped, and reap threads that have ended."""
    global looking  # noqa: PLW0603
    while ours:
        await trio.sleep(PART_EVERY)
        await in_slices(let_go_and_reap(tuple(ours)))
    looking = False


def let_go_and_reap(pids: tuple[int, ...]) -> Generator[float, None, None]:
    """In steps, as `agent.tree` makes them. Of each, at most THREADS."""
    with contextlib.suppress(ChildProcessError):
        for _ in range(THREADS):
            stop = os.waitid(os.P_ALL, 0, os.WSTOPPED | os.WNOHANG | WALL)
            if stop is None:
                break
            _guestsys.let_go(stop.si_pid, stop.si_status)
            yield 0.0
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            for _ in range(THREADS):
                if pid not in ours or not reap_thread(pid):
                    break
                yield 0.0


def reap_thread(pid: int) -> bool:
    """One of this process that has ended before its last: whether there was one.

    By its group, which costs one call where there is none, and needs no /proc. The process itself
    is not reaped.
    """
    end = os.waitid(os.P_PGID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT | WALL)
    if end is None or end.si_pid in ours:
        return False
    os.waitid(os.P_PID, end.si_pid, os.WEXITED | os.WNOHANG | WALL)
    return True
