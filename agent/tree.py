"""Everything that descends from a process, found in /proc: for guests without a writable cgroup v2.

A descendant is known by its chain of parents, its session or process group, or by a variable in its
environment. What wipes its environment, leaves the session and outlives its parent cannot be found.
"""

import os
import signal
import time

__all__ = ["MARKER", "kill", "marked", "send"]

MARKER = b"MICROGUEST_PROCESS="
ROUNDS = 32  # of looking for more, while what was found is stopped
ENVIRONMENT = 256 * 1024  # bytes that are searched
LOOKS = 20  # at the environment of a process that is about to get one
LOOK_EVERY = 0.0005  # seconds
# Of proc_pid_stat(5), counted from the state: its fields 9 and 51. And sched.h's flag.
FLAGS, ENV_END = 6, 48
PF_KTHREAD = 0x00200000


def send(pid: int, mark: bytes, number: int) -> bool:
    """A signal to the process `pid`, of which the id is not free yet, and all its descendants.

    `mark`: the entry of its environment that begins with MARKER. Returns whether there was one.
    """
    delivered = False
    for member in find(pid, mark):
        delivered |= signal_one(member, number)
    return delivered


def kill(pid: int, mark: bytes) -> bool:
    """SIGKILL to all of them. They are stopped first, so that none can start more meanwhile.

    A fork that has begun goes on after its parent was told to stop, but not after KILL: what was
    born in between is there when all the others have been killed (copy_process in the kernel's
    kernel/fork.c), so it is looked for until nobody new is found.
    """
    delivered = False
    killed: set[int] = set()
    for _ in range(ROUNDS):
        members = stop(pid, mark, killed)
        if not members:
            break
        for member in members:
            delivered |= signal_one(member, signal.SIGKILL)
        killed |= members
    return delivered


def marked() -> dict[bytes, int]:
    """Every entry that begins with MARKER, with one process that has it in its environment."""
    found: dict[bytes, int] = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        for entry in environment(name):
            if entry.startswith(MARKER):
                found[entry] = int(name)
    return found


def stop(pid: int, mark: bytes, known: set[int]) -> set[int]:
    """SIGSTOP to all of them but the `known` ones, until nobody new is found; who they are."""
    stopped: set[int] = set()
    for _ in range(ROUNDS):
        new = find(pid, mark) - stopped - known
        if not new:
            break
        for member in new:
            signal_one(member, signal.SIGSTOP)
        stopped |= new
    return stopped


def find(pid: int, mark: bytes) -> set[int]:
    """Their pids as they are now, without those that only wait to be reaped."""
    parents: dict[int, int] = {}
    members = set()
    own = os.getpid()
    for name in os.listdir("/proc"):
        if not name.isdecimal() or int(name) in (1, own):
            continue
        fields = stat_fields(name)
        if not fields or fields[0] in (b"Z", b"X"):
            continue
        parent, group, session = map(int, fields[1:4])
        parents[int(name)] = parent
        if int(name) == pid or pid in (group, session) or is_marked(name, mark):
            members.add(int(name))
    return members | descendants(parents, members | {pid})


def descendants(parents: dict[int, int], roots: set[int]) -> set[int]:
    """Of the pids in `parents`, those that have one of `roots` above them."""
    found: set[int] = set()
    grown = True
    while grown:
        new = {child for child, parent in parents.items() if parent in roots | found} - found
        found |= new
        grown = bool(new)
    return found


def stat_fields(pid: str) -> list[bytes]:
    """State, parent, group and session, from proc_pid_stat(5); [] where it has gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            return (file.read(4096) or b"").rpartition(b")")[2].split(None, 4)[:4]
    except OSError:
        return []


def is_marked(pid: str, mark: bytes) -> bool:
    """Whether its environment has the entry."""
    return mark in environment(pid)


def environment(pid: str) -> list[bytes]:
    """Its first ENVIRONMENT bytes; [] for what is gone, or a kernel thread.

    A process inside execve(2) shows none for a moment, and must not be overlooked then.
    """
    entries = read_environment(pid)
    for _ in range(LOOKS):
        if entries != [b""]:
            break
        changing = between_programs(pid)
        if changing:
            time.sleep(LOOK_EVERY)
        entries = read_environment(pid)
        if not changing:
            break
    return entries


def read_environment(pid: str) -> list[bytes]:
    try:
        with open(f"/proc/{pid}/environ", "rb", buffering=0) as file:
            return (file.read(ENVIRONMENT) or b"").split(b"\0")
    except OSError:
        return []


def between_programs(pid: str) -> bool:
    """Whether it has new memory in which execve(2) has not put the environment yet."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            fields = (file.read(4096) or b"").rpartition(b")")[2].split()
    except OSError:
        return False
    kernel_thread = len(fields) <= ENV_END or int(fields[FLAGS]) & PF_KTHREAD
    return not kernel_thread and fields[0] not in (b"Z", b"X") and fields[ENV_END] == b"0"


def signal_one(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True
