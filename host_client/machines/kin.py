"""All that descends from a process, and its end.

PID 1 of a machine in namespaces dies with its launcher, and everything of it with PID 1; but not
while PID 1 hangs in the kernel, for what another of its processes has. Then that one has to die.
"""

import contextlib
import os
import select
import signal
import time
from typing import Final

__all__ = ["end_descendants", "pid_of", "running_descendants"]

ROUND_EVERY: Final = 0.02  # seconds; each round finds what was made since the one before
PARENT: Final = 1  # of the fields of /proc/PID/stat behind the name


def end_descendants(ancestor: int, seconds: float) -> bool:
    """Kill what descends from a process, but not itself; again and again, for that long.

    ancestor: its pidfd. Whether none of them runs any more. What has ended and is not reaped does
    not count.
    """
    deadline = time.monotonic() + seconds
    while True:
        found = descendants(pid_of(ancestor))
        if pid_of(ancestor) < 0:
            return True  # it was reaped: the number may be another one's, and they are not its
        running = [each for each, parent in found if _signal(each, parent, signal.SIGKILL)]
        if not running:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(ROUND_EVERY)


def pid_of(pidfd: int) -> int:
    """The number of a process that is not reaped yet, or -1."""
    with open(f"/proc/self/fdinfo/{pidfd}", encoding="ascii") as file:
        (pid,) = (int(line.split()[1]) for line in file if line.startswith("Pid:"))
    return pid


def running_descendants(pid: int) -> list[int]:
    """What descends from the process, without what has ended and is not reaped."""
    return [each for each, parent in descendants(pid) if _signal(each, parent, 0)]


def descendants(pid: int) -> list[tuple[int, int]]:
    """Each with its parent, the nearest first."""
    children: dict[int, list[int]] = {}
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        parent = _parent(int(entry))
        if parent is not None:
            children.setdefault(parent, []).append(int(entry))
    found = []
    parents = [pid]
    for parent in parents:  # grows
        mine = children.pop(parent, [])
        found += [(child, parent) for child in mine]
        parents += mine
    return found


def _signal(pid: int, parent: int, number: int) -> bool:
    """Whether it ran until now. Its number may be another process's since it was found."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return os.path.exists(f"/proc/{pid}")
    try:
        if _parent(pid) == parent and not _has_ended(pidfd):
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(pidfd, number)
            return True
        return False
    finally:
        os.close(pidfd)


def _has_ended(pidfd: int) -> bool:
    """With all its threads, which the state in /proc, the first one's, does not say."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _parent(pid: int) -> int | None:
    """None where the process is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[PARENT])
    except (OSError, IndexError):
        return None
