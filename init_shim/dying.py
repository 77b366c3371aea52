"""An agent that was killed and does not end: the kernel closes its pipes, of which one is locked.

Who holds the lock (docs/security.md, "Locked pipes") is among the processes that end with the agent
anyway, so they are killed before it is reaped instead of by the next agent. What is read of them
here asks for no lock of theirs.
"""

import os

from init_shim.mounts import open_proc
from init_shim.signals import KILL

__all__ = ["kill_others"]

HIERARCHY = "/sys/fs/cgroup"


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
    try:
        with open(open_proc(f"{name}/stat"), "rb", buffering=0) as file:
            return int((file.read(4096) or b"").rpartition(b")")[2].split(None, 2)[1])
    except (OSError, ValueError, IndexError):
        return 0


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
