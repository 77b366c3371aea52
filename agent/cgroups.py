"""Control groups: one leaf for each process that a host starts, with all that descends from it.

A leaf is what limits hold for, what the kernel tells about, and the one thing that a whole tree
cannot escape from. All of it is cgroup v2 (Documentation/admin-guide/cgroup-v2.rst) by plain files.
Making and removing a directory there costs more than an exec, so leaves without limits are used
again once they are empty. Where the hierarchy is not there or not as expected, processes go without
it, and `agent.tree` looks after their trees.

    …/microguest/workload/       PID 1's, for the process that the machine is for
    …/microguest/SOME-NAME/      of one agent, locked while that agent lives
        agent/                   the agent itself
        processes/               with less memory than there is, so that the agent never waits for
            1/ 2/ 3/ …           the kernel to find some; in it the leaves
"""

import errno
import fcntl
import os
import signal
import time

from guest import limits
from guest.errors import OperationError, operation_error
from guest.messages import Limits

__all__ = ["REFUSALS", "Cgroups", "Leaf", "open_cgroups", "workload_memory"]

# Where systems mount it; the second one beside a hierarchy of version 1.
MOUNTS = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
OURS = "microguest"
WORKLOAD = "workload"  # in it, what PID 1 has started; not ours to look at
WANTED = ("memory", "cpu", "pids")
ENDED = 0o700  # mode of a leaf that only has what its ended process has left behind
CPU_PERIOD = 100_000  # microseconds, the kernel's default
FREEZE_WAIT = 0.2  # seconds, for a kernel without cgroup.kill
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
        return int(*read_words(f"{MOUNTS[0]}/{OURS}/{WORKLOAD}/memory.current"))
    except (OSError, ValueError):
        return 0


class Leaf:
    """One process's cgroup. `fd`: its directory, for clone3(2). `limited`: it has limits.

    `name`: its path below the mount, by which a later agent can `adopt` it.
    """

    def __init__(self, owner: "Cgroups", name: str, *, limited: bool) -> None:
        self._owner = owner
        self.name = name
        self.path = path = f"{owner.mount}/{name}"
        self.limited = limited
        self.spent = False  # not used again
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._events = self._open("cgroup.events")
        self._memory = self._open("memory.events") if "memory" in owner.controllers else -1
        self._oom_before = self._oom_kills()

    def kill(self) -> bool:
        """SIGKILL to everything in it and below; nothing of it can start anything any more.

        Linux 6.18 also kills what is cloned into it at any later time, so it is not used again.
        False where the hierarchy was taken away from outside, and something may live on.
        """
        self.spent = True
        try:
            self._write("cgroup.kill", "1")
        except FileNotFoundError:  # before Linux 5.14, or removed from outside
            self.kill_each()
        except OSError:
            return False
        return True

    def kill_each(self) -> None:
        """As `kill`, process by process, while none of them can run."""
        try:
            self._write("cgroup.freeze", "1")
            deadline = time.monotonic() + FREEZE_WAIT
            while not self._says(b"frozen 1") and time.monotonic() < deadline:
                time.sleep(0.001)
            self.signal(signal.SIGKILL)  # which also ends what is frozen
            self._write("cgroup.freeze", "0")
        except OSError:
            self.signal(signal.SIGKILL)

    def signal(self, number: int) -> bool:
        """To each process in it and below; whether there was one."""
        delivered = False
        for pid in self.members():
            try:
                os.kill(pid, number)
                delivered = True
            except (ProcessLookupError, PermissionError):
                continue
        return delivered

    def members(self) -> list[int]:
        """The processes in it and below, those that wait to be reaped left out."""
        found: list[int] = []
        for _, _, _, folder in os.fwalk(".", dir_fd=self.fd):  # whatever is mounted over its path
            try:
                procs = os.open("cgroup.procs", os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
                with open(procs, "rb") as file:
                    found += map(int, file.read().split())
            except (OSError, ValueError):  # removed meanwhile; threaded ones list no processes
                continue
        return found

    def populated(self) -> bool:
        """Whether anything in it or below still runs."""
        return not self._says(b"populated 0")

    def divided(self) -> bool:
        """Whether it was given cgroups below it, so that it cannot be used again."""
        return os.fstat(self.fd).st_nlink > 2

    def oom_killed(self) -> bool:
        """Whether the kernel has killed in it for want of memory since it was taken."""
        return self._oom_kills() > self._oom_before

    def give_back(self) -> None:
        """The process has ended; what it left behind may live on in the leaf."""
        self._owner.give_back(self)

    def close(self) -> None:
        """Let go of the descriptors, not of the cgroup."""
        for fd in (self.fd, self._events, self._memory):
            if fd >= 0:
                os.close(fd)

    def taken_again(self) -> "Leaf":
        """It is for another process from now on."""
        self._oom_before = self._oom_kills()
        return self

    def limit(self, wanted: Limits) -> None:
        """Set what is limited. Raises OSError."""
        if wanted.memory is not None:
            self._write("memory.max", str(wanted.memory))
            try:
                self._write("memory.swap.max", "0")
            except FileNotFoundError:
                pass  # a kernel without swap
        if wanted.cpu is not None:
            self._write("cpu.max", f"{int(wanted.cpu * CPU_PERIOD)} {CPU_PERIOD}")
        if wanted.processes is not None:
            self._write("pids.max", str(wanted.processes))

    def _oom_kills(self) -> int:
        if self._memory < 0:
            return 0
        for line in read_lines(self._memory):
            name, _, count = line.partition(b" ")
            if name == b"oom_kill":
                return int(count)
        return 0

    def _says(self, line: bytes) -> bool:
        lines = read_lines(self._events)
        return line in lines or not lines

    def _open(self, file: str) -> int:
        try:
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
            return os.open(file, flags, dir_fd=self.fd)
        except OSError:
            return -1

    def _write(self, file: str, text: str) -> None:
        write(file, text, dir_fd=self.fd)


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
        remove_abandoned(parent)
        self.path = f"{parent}/{os.urandom(6).hex()}"
        os.mkdir(self.path, 0o755)
        try:
            os.stat(f"{self.path}/cgroup.procs")  # the kernel's; what is mounted over it has none
        except OSError:
            os.rmdir(self.path)
            raise
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._leaves = f"{self.path}/processes"
        for folder in (mount, parent, self.path):
            enable_controllers(folder)
        os.mkdir(self._leaves, 0o755)
        enable_controllers(self._leaves)
        if memory is not None:
            write_if_possible(f"{self._leaves}/memory.max", str(memory))
        self.controllers = frozenset(read_words(f"{self._leaves}/cgroup.subtree_control"))
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
        limited = bool(needed_controllers(wanted))
        if not limited and self._warm is not None:
            warm, self._warm = self._warm, None
            return warm.taken_again()
        if not limited and not self._idle:
            self._look_at_lingering()
        try:
            leaf = self._take_idle() if self._idle and not limited else self._make(limited=limited)
        except OSError as error:
            if not limited:
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
        """See `Leaf.give_back`."""
        empty, again = not leaf.populated(), not (leaf.limited or leaf.spent or leaf.divided())
        if empty and again and self._warm is None:
            self._warm = leaf
            return
        leaf.close()
        if not empty:
            self._lingering.append(leaf.name)
            mark_ended(leaf.path)
        elif again and len(self._idle) < limits.IDLE_CGROUPS:
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
            write_if_possible(f"{folder}/memory.min", str(limits.AGENT_MEMORY))
        write_if_possible(f"{self.path}/agent/cpu.weight", "10000")

    def adopt(self, name: str) -> Leaf:
        """The leaf of a process that an earlier agent started. Raises OSError where it is gone."""
        return Leaf(self, name, limited=True)

    def left_by(self, path: str) -> list[Leaf]:
        """The leaves of an earlier agent's directory whose own process has not ended by itself."""
        leaves = []
        try:
            names = os.listdir(f"{path}/processes")
        except OSError:
            return []
        for name in names:
            leaf = f"{path}/processes/{name}"
            try:
                if os.path.isdir(leaf) and os.stat(leaf).st_mode & 0o777 != ENDED:
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
        os.close(self._lock)

    def _take_idle(self) -> Leaf:
        return Leaf(self, self._idle.pop(), limited=False)

    def _make(self, *, limited: bool) -> Leaf:
        self._count += 1
        path = f"{self._leaves}/{self._count}"
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


def read_lines(fd: int) -> list[bytes]:
    """A short file of a cgroup as it is now; [] where that was removed."""
    try:
        return os.pread(fd, 512, 0).split(b"\n")
    except OSError as error:
        if error.errno not in (errno.ENODEV, errno.EBADF):
            raise
        return []


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


def remove_abandoned(parent: str) -> None:
    """Clear away what agents left that do not live any more, as far as it is empty."""
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
            remove(path)
        except OSError:
            pass  # its agent lives
        finally:
            os.close(fd)


def remove(path: str) -> bool:
    """Remove a cgroup and those below it, as far as they are empty; whether that was all."""
    for folder, _, _ in os.walk(path, topdown=False):
        try:
            os.rmdir(folder)
        except OSError:
            continue
    return not os.path.exists(path)


def read_words(path: str) -> list[str]:
    """The words of a short file. Raises OSError."""
    with open(path, encoding="ascii") as file:
        return file.read(4096).split()


def write(path: str, text: str, *, dir_fd: int | None = None) -> None:
    """One value into one file; one write, as the kernel wants it. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def write_if_possible(path: str, text: str) -> None:
    """As `write`; without it things work as well, only less protected."""
    try:
        write(path, text)
    except OSError:
        pass
