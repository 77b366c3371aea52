"""Control groups: one leaf for each process that a host starts, with all that descends from it.

A leaf is what limits hold for, what the kernel tells about, and the one thing that a whole tree
cannot escape from. All of it is cgroup v2 (Documentation/admin-guide/cgroup-v2.rst) by plain files.
Making and removing a directory there costs more than an exec, so leaves without limits are used
again once they are empty. Where the hierarchy is not there or not as expected, processes go without
it, and `agent.process.tree` looks after their trees.

    …/microguest/workload/       PID 1's, for the process that the machine is for
    …/microguest/SOME-NAME/      of one agent, locked while that agent lives
        agent/                   the agent itself
        processes/               with less memory than there is, so that the agent never waits for
            1/ 2/ 3/ …           the kernel to find some, and fewer processes; in it the leaves
        reserve/                 room for a few leaves more, once `processes` is nearly full
            4/ 5/ …
"""

import errno
import fcntl
import os
import time

from microguest.agent.process.leaf import Leaf, read_number, read_words, write, write_if_possible
from microguest.guest import bounds
from microguest.guest.errors import OperationError, operation_error
from microguest.guest.launch import share_of_processes
from microguest.guest.wire.messages import Limits

__all__ = ["REFUSALS", "Cgroups", "open_cgroups", "workload_memory"]

# Where systems mount it; the second one beside a hierarchy of version 1.
MOUNTS = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
OURS = "microguest"
WORKLOAD = "workload"  # in it, what PID 1 has started; not ours to look at
WANTED = ("memory", "cpu", "pids")
ENDED = 0o700  # mode of a leaf that only has what its ended process has left behind
MAKES = 16  # tries to have a directory before another agent removes it
CLOSE_WAIT = 0.1  # seconds, for what was killed to be gone
# What a start in a cgroup fails with when the hierarchy is read-only, removed, or used otherwise.
REFUSALS = (
    errno.EROFS,
    errno.EACCES,
    errno.ENOENT,
    errno.EBUSY,
    errno.ENODEV,
    errno.EOPNOTSUPP,
)
NEARLY = 4  # processes are nearly as many as may be where less than this part is free
LATE_LEAVES = 4  # that start then and may each fill their own part, before there is no room at all
LINGERING_LOOKS = 8  # leaves that are looked at again for each one that is taken


def open_cgroups(memory: int | None = None) -> "Cgroups | None":
    """A directory of the agent's own in the first hierarchy that it may write to, if any.

    `memory`: bytes that all processes may use together, None for as many as there are.
    """
    for mount in MOUNTS:
        try:
            return Cgroups(mount, memory)
        except OSError:
            continue
    return None


def workload_memory() -> int:
    """Bytes that the process of the machine uses now; 0 where there is none, or no telling."""
    try:
        return read_number(f"{MOUNTS[0]}/{OURS}/{WORKLOAD}/memory.current")
    except (OSError, ValueError):
        return 0


class Cgroups:
    """The agent's own part of the hierarchy at `mount`. Raises OSError where it cannot have one.

    `controllers`: those of WANTED that its leaves have.
    """

    def __init__(self, mount: str, memory: int | None) -> None:
        if not os.path.isfile(f"{mount}/cgroup.controllers"):  # of version 2 only
            raise FileNotFoundError(errno.ENOENT, "no cgroup v2", mount)
        self.mount = mount
        parent = f"{mount}/{OURS}"
        make_directory(parent)
        abandoned = remove_abandoned(parent)
        self.path, self._lock = make_locked(parent)
        for folder in (mount, parent, self.path):
            enable_controllers(folder)
        self._leaves = self._make_group("processes", memory)
        self._reserve = self._make_group("reserve", memory)
        self.controllers = frozenset(read_words(f"{self._leaves}/cgroup.subtree_control"))
        self._counter = -1  # pids.current of `_leaves`, where that may become full
        self._full_at = 0  # with how many processes it nearly is
        self._limit_processes(abandoned)
        self._count = 0
        self._warm: Leaf | None = None  # the empty leaf that was given back last, still open
        self._idle: list[str] = []  # names of other empty leaves without limits
        self._lingering: list[str] = []  # names of leaves with processes that outlived their own

    def take(self, wanted: Limits | None = None) -> Leaf | None:
        """A leaf with nothing in it; None where none can be made and there are no limits for it.

        Raises OperationError cgroup_unavailable for limits that cannot be kept.
        """
        missing = needed_controllers(wanted) - self.controllers
        if missing:
            raise unavailable(
                f"the guest's cgroups have no {', '.join(sorted(missing))} controller"
            )
        asked = bool(needed_controllers(wanted))
        late = self._nearly_full()
        if late:
            wanted = limited_to(bounds.LATE_PROCESSES // LATE_LEAVES, wanted)
        limited = asked or late
        if not limited and self._warm is not None:
            warm, self._warm = self._warm, None
            return warm.taken_again()
        if not limited and not self._idle:
            self._look_at_lingering()
        try:
            if self._idle and not limited:
                leaf = self._take_idle()
            else:
                leaf = self._make(self._reserve if late else self._leaves, limited=limited)
        except OSError as error:
            if not asked:
                return None
            raise unavailable(f"a cgroup cannot be made: {error.strerror}") from None
        if wanted is not None and limited:
            try:
                leaf.limit(wanted)
            except OSError as error:
                self.give_back(leaf)
                raise unavailable(f"the limits cannot be set: {error}") from None
        return leaf

    def give_back(self, leaf: Leaf) -> None:
        """See `Owner.give_back`."""
        empty, again = not leaf.populated(), not (leaf.limited or leaf.spent or leaf.divided())
        if empty and again and self._warm is None:
            self._warm = leaf
            return
        leaf.close()
        if not empty:
            self._lingering.append(leaf.name)
            mark_ended(leaf.path)
        elif again and len(self._idle) < bounds.IDLE_CGROUPS:
            self._idle.append(leaf.name)
        elif not remove(leaf.path):
            self._lingering.append(leaf.name)

    def shelter(self) -> None:
        """A cgroup for this process, with memory that stays its own however short it is elsewhere.

        `close` moves it to the hierarchy's root.
        """
        try:
            os.mkdir(f"{self.path}/agent", 0o755)
            write(f"{self.path}/agent/cgroup.procs", "0")
        except OSError:
            return  # it stays where it is
        for folder in (os.path.dirname(self.path), self.path, f"{self.path}/agent"):
            write_if_possible(f"{folder}/memory.min", str(bounds.AGENT_MEMORY))
        write_if_possible(f"{self.path}/agent/cpu.weight", "10000")

    def adopt(self, name: str) -> Leaf:
        """The leaf of a process that an earlier agent started. Raises OSError where it is gone."""
        return Leaf(self, name, limited=True)

    def left_by(self, path: str) -> list[Leaf]:
        """The leaves of an earlier agent's directory whose own process has not ended by itself."""
        leaves = []
        for leaf in (*folders_in(f"{path}/processes"), *folders_in(f"{path}/reserve")):
            try:
                if os.stat(leaf).st_mode & 0o777 != ENDED:
                    leaves.append(self.adopt(os.path.relpath(leaf, self.mount)))
            except OSError:  # removed
                continue
        return leaves

    def close(self) -> None:
        """Remove all that is empty; what is not stays for the next agent to clear away."""
        if self._warm is not None:
            self._warm.close()
            self._warm = None
        write_if_possible(f"{self.mount}/cgroup.procs", "0")
        deadline = time.monotonic() + CLOSE_WAIT
        while not remove(self.path) and time.monotonic() < deadline:
            time.sleep(0.002)
        for fd in (self._lock, self._counter):
            if fd >= 0:
                os.close(fd)

    def _make_group(self, name: str, memory: int | None) -> str:
        """A cgroup for leaves; its path. Raises OSError."""
        path = f"{self.path}/{name}"
        os.mkdir(path, 0o755)
        enable_controllers(path)
        if memory is not None:
            write_if_possible(f"{path}/memory.max", str(memory))
        return path

    def _limit_processes(self, abandoned: list[str]) -> None:
        """Leave the kernel, PID 1 and the agent enough of what all can have together."""
        most = processes_for_hosts(os.path.dirname(self.path))
        for path in abandoned:
            most = halve_for(path, most)
        if most is None or "pids" not in self.controllers:
            return
        try:
            write(f"{self._leaves}/pids.max", str(most))
            write(f"{self._reserve}/pids.max", str(bounds.LATE_PROCESSES))
            self._counter = os.open(f"{self._leaves}/pids.current", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return
        self._full_at = most - most // NEARLY

    def _nearly_full(self) -> bool:
        """Whether what starts now had better not depend on what `_leaves` has left.

        Whoever fills it dies and is born again all the time, so that a little is always free.
        """
        if self._counter < 0:
            return False
        try:
            return int(os.pread(self._counter, 32, 0)) >= self._full_at
        except (OSError, ValueError):
            return False  # removed from outside

    def _take_idle(self) -> Leaf:
        return Leaf(self, self._idle.pop(), limited=False)

    def _make(self, group: str, *, limited: bool) -> Leaf:
        self._count += 1
        path = f"{group}/{self._count}"
        os.mkdir(path, 0o755)
        return Leaf(self, os.path.relpath(path, self.mount), limited=limited)

    def _look_at_lingering(self) -> None:
        """Remove some of those that are empty by now, oldest first."""
        for name in self._lingering[:LINGERING_LOOKS]:
            self._lingering.remove(name)
            if not remove(f"{self.mount}/{name}"):
                self._lingering.append(name)


def mark_ended(path: str) -> None:
    """For a later agent: what is in this leaf was left behind on purpose."""
    try:
        os.chmod(path, ENDED)
    except OSError:
        pass  # removed from outside


def needed_controllers(wanted: Limits | None) -> frozenset[str]:
    """Which controllers these limits are for."""
    if wanted is None:
        return frozenset()
    given = {"memory": wanted.memory, "cpu": wanted.cpu, "pids": wanted.processes}
    return frozenset(name for name, value in given.items() if value is not None)


def unavailable(reason: str) -> OperationError:
    """The error for limits that cannot be kept."""
    return operation_error("cgroup_unavailable", f"limits: {reason}", {"step": "cgroup"})


def make_locked(parent: str) -> tuple[str, int]:
    """A new cgroup in it, and what holds its lock. Raises OSError.

    Until it is locked, another agent may take it for abandoned and remove it: then there is another
    one, at most MAKES of them.
    """
    for _ in range(MAKES):
        path = f"{parent}/{os.urandom(6).hex()}"
        os.mkdir(path, 0o755)
        try:
            return path, lock(path)
        except BlockingIOError:  # it is being removed
            continue
        except OSError:
            if os.path.isdir(path):  # and no cgroup: what is mounted over the hierarchy makes none
                os.rmdir(path)
                raise
    raise BlockingIOError(errno.EAGAIN, "other agents remove each new cgroup", parent)


def lock(path: str) -> int:
    """The descriptor that keeps a new cgroup from being removed. OSError where it is gone already,
    or is none."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.stat(f"{path}/cgroup.procs")  # now: it may have been removed before it was locked
    except BaseException:
        os.close(fd)
        raise
    return fd


def make_directory(path: str) -> None:
    """Unless it is there. Raises OSError."""
    try:
        os.mkdir(path, 0o755)
    except FileExistsError:
        pass


def enable_controllers(folder: str) -> None:
    """Those that there are, one by one; a cgroup with processes in it refuses."""
    for name in WANTED:
        write_if_possible(f"{folder}/cgroup.subtree_control", f"+{name}")


def processes_for_hosts(parent: str) -> int | None:
    """How many processes and threads those of hosts may be; None for any number."""
    try:
        threads_max = read_number("/proc/sys/kernel/threads-max")
        pid_max = read_number("/proc/sys/kernel/pid_max")
        all_there_are = int(read_words("/proc/loadavg")[3].partition("/")[2])
        return share_of_processes(
            threads_max, pid_max, all_there_are - read_number(f"{parent}/pids.current")
        )
    except (OSError, ValueError, IndexError):
        return None


def halve_for(path: str, most: int | None) -> int | None:
    """What of `most` is left beside the processes of an agent that died: half, or what they leave.

    They get no more than the other half from now on, whatever they could have before.
    """
    if most is None:
        return None
    try:
        theirs = max(most // 2, read_number(f"{path}/processes/pids.current"))
        write(f"{path}/processes/pids.max", str(theirs))
    except (OSError, ValueError):
        return most
    return max(most - theirs, bounds.LATE_PROCESSES)


def limited_to(processes: int, wanted: Limits | None) -> Limits:
    """The same limits, with at most so many processes."""
    if wanted is None:
        return Limits(processes=processes)
    if wanted.processes is None or wanted.processes > processes:
        return wanted.replace(processes=processes)
    return wanted


def folders_in(path: str) -> list[str]:
    """Paths of the cgroups in one; [] where it is not there."""
    try:
        return [entry.path for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []


def remove_abandoned(parent: str) -> list[str]:
    """Clear away what agents left that do not live any more; returns the paths of what is not
    empty."""
    left = []
    for name in os.listdir(parent):
        if name == WORKLOAD:
            continue
        path = f"{parent}/{name}"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:  # one of the files, or removed by another agent
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not remove(path):
                left.append(path)
        except OSError:
            pass  # its agent lives
        finally:
            os.close(fd)
    return left


def remove(path: str) -> bool:
    """Remove a cgroup and those below it, as far as they are empty; whether that was all."""
    for folder, _, _ in os.walk(path, topdown=False):
        try:
            os.rmdir(folder)
        except OSError:
            continue
    return not os.path.exists(path)
