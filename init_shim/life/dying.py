"""An agent that was killed and does not end: the kernel closes its pipes, of which one is locked.

Who holds the lock (docs/design/security.md, "Locked pipes") is among the processes that end with
the agent anyway, so they are killed before it is reaped instead of by the next agent. Where that
does not help, it is somebody else, who has opened the pipe as the same user, or was given it: then
all of these users are killed, and then all. What is read of them here asks for no lock of theirs.
"""

import os

from microguest.init_shim.mounts import open_proc
from microguest.init_shim.signals import KILL

__all__ = ["kill_who_keeps"]

HIERARCHY = "/sys/fs/cgroup"
ROOT = 0


def kill_who_keeps(agent: int, cgroups: str, kept: "set[int]", measures: int) -> str:
    """From its end: whom this agent has, then who may have got a pipe from them, then all.

    `measures`: how many it has had already. `cgroups`, `kept`: as for `kill_others`, and who are
    spared at first. Says who was killed. Raises nothing.

    Only for a lock: who traces the agent, from outside of the guest even, is `init_shim.tracers`'.
    """
    if measures == 0 or not stands(agent):
        return f"{kill_others(agent, cgroups, kept)} of its processes"
    if measures == 1 and (killed := kill_users(agent)):
        return f"{killed} processes of the users that it had processes of"
    try:
        os.kill(-1, KILL)  # but for PID 1 and this process: kill(2)
    except OSError:
        pass  # there is nobody else
    return "all processes"


def stands(agent: int) -> bool:
    """Whether a thread of it waits uninterruptibly: its last one closes what all of them had."""
    try:
        folder = open_proc(f"{agent}/task")
    except OSError:
        return False
    try:
        threads = os.listdir(folder)
    except OSError:
        return False
    finally:
        os.close(folder)
    return any(state_of(f"{agent}/task/{thread}") == b"D" for thread in threads)


def kill_users(agent: int) -> int:
    """SIGKILL to all of the users that its children have, but root: how many."""
    names = [name for name in listed() if name.isdigit()]
    users: set[int] = set()
    for name in names:
        if parent_of(name) == agent:
            users |= users_of(name)
    users.discard(ROOT)
    killed = 0
    for name in names:
        if int(name) not in (1, os.getpid(), agent) and users & users_of(name):
            try:
                os.kill(int(name), KILL)
                killed += 1
            except OSError:
                pass  # it has ended
    return killed


def kill_others(agent: int, cgroups: str, spared: "set[int]") -> int:
    """SIGKILL to the children of this agent but `spared`, with all in their cgroups: how many.

    `cgroups`: path of the agent's own directory of cgroups, "" where it has none. Raises nothing.
    """
    killed = 0
    for name in listed():
        if name.isdigit() and parent_of(name) == agent and int(name) not in spared:
            killed += 1
            kill_cgroup(name, cgroups)
            try:
                os.kill(int(name), KILL)
            except OSError:
                pass  # it has ended
    return killed


def listed() -> list[str]:
    try:
        folder = open_proc(".")
    except OSError:
        return []
    try:
        return os.listdir(folder)
    finally:
        os.close(folder)


def parent_of(name: str) -> int:
    fields = stat_of(name)
    return int(fields[1]) if len(fields) > 1 else 0


def state_of(name: str) -> bytes:
    return b"".join(stat_of(name)[:1])


def stat_of(name: str) -> "list[bytes]":
    """State, parent and the rest of proc_pid_stat(5); [] where it has ended."""
    try:
        with open(open_proc(f"{name}/stat"), "rb", buffering=0) as file:
            return (file.read(4096) or b"").rpartition(b")")[2].split(None, 2)
    except OSError:
        return []


def users_of(name: str) -> "set[int]":
    """Who may send it signals: kill(2)."""
    try:
        with open(open_proc(f"{name}/status"), "rb", buffering=0) as file:
            lines = (file.read(8192) or b"").splitlines()
    except OSError:
        return set()
    for line in lines:
        if line.startswith(b"Uid:"):
            real, _, saved, _ = line.split()[1:]
            return {int(real), int(saved)}
    return set()


def kill_cgroup(name: str, cgroups: str) -> None:
    """Of the process, if it is one of the agent's own; also of one that waits to be reaped."""
    try:
        with open(open_proc(f"{name}/cgroup"), "rb", buffering=0) as file:
            lines = (file.read(4096) or b"").splitlines()
        for line in lines:
            path = HIERARCHY + os.fsdecode(line.removeprefix(b"0::"))
            if line.startswith(b"0::") and cgroups and path.startswith(f"{cgroups}/"):
                fd = os.open(f"{path}/cgroup.kill", os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                try:
                    os.write(fd, b"1")
                finally:
                    os.close(fd)
    except OSError:
        pass  # it has ended, or the kernel is older than 5.14
