"""One process's cgroup, and the plain files that every cgroup has.

Which leaf a process gets, and what becomes of it, is `agent.process.cgroups`' affair.
"""

import errno
import os
import signal
from typing import Protocol

from microguest.agent.process.tree import pidfd_of, send
from microguest.guest.wire.messages import Limits

__all__ = ["Leaf", "Owner", "read_number", "read_words", "write", "write_if_possible"]

CPU_PERIOD = 100_000  # microseconds, the kernel's default
KILL_ROUNDS = 64  # looks at who is there, for a kernel without cgroup.kill
SENT_AT_ONCE = 256  # processes that are held by a descriptor while they are signalled


class Owner(Protocol):
    """Who leaves are of. `mount`: of their hierarchy; `controllers`: those that they have."""

    mount: str
    controllers: frozenset[str]

    def give_back(self, leaf: "Leaf") -> None:
        """The leaf's process has ended."""


class Leaf:
    """One process's cgroup. `fd`: its directory, for clone3(2). `limited`: it has limits.

    `name`: its path below the mount, by which a later agent can `adopt` it.
    """

    def __init__(self, owner: Owner, name: str, *, limited: bool) -> None:
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
        """As `kill`, process by process, while none of them can run. Waits for nothing.

        They stay frozen, which does not keep them from dying: so what a fork that had begun makes
        after the last look never runs.
        """
        try:
            self._write("cgroup.freeze", "1")
        except OSError:
            pass  # before Linux 5.2
        killed: set[int] = set()
        for _ in range(KILL_ROUNDS):
            new = [pid for pid in self.members() if pid not in killed]
            if not new:
                return
            self._send(new, signal.SIGKILL)
            killed.update(new)

    def signal(self, number: int) -> bool:
        """To each process in it and below; whether there was one."""
        return self._send(self.members(), number)

    def _send(self, pids: list[int], number: int) -> bool:
        """To those that are still in it: a pid may be another's since it was read."""
        delivered = False
        for begin in range(0, len(pids), SENT_AT_ONCE):
            held = {}
            try:
                for pid in pids[begin : begin + SENT_AT_ONCE]:
                    try:
                        held[pid] = pidfd_of(pid)
                    except ProcessLookupError:
                        continue
                for pid in held.keys() & set(self.members()):
                    delivered |= send(pid, held[pid], number)
            finally:
                for pidfd in held.values():
                    if pidfd >= 0:
                        os.close(pidfd)
        return delivered

    def members(self) -> list[int]:
        """The processes in it and below, those that wait to be reaped left out."""
        found: list[int] = []
        for _, _, _, folder in os.fwalk(".", dir_fd=self.fd):  # whatever is mounted over its path
            try:
                procs = os.open("cgroup.procs", os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
                with open(procs, "rb") as file:
                    # 0 is one that was moved here from outside of our namespace of processes: to
                    # kill(2) it means its caller's own group.
                    found += filter(None, map(int, file.read().split()))
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


def read_lines(fd: int) -> list[bytes]:
    """A short file of a cgroup as it is now; [] where that was removed."""
    try:
        return os.pread(fd, 512, 0).split(b"\n")
    except OSError as error:
        if error.errno not in (errno.ENODEV, errno.EBADF):
            raise
        return []


def read_words(path: str) -> list[str]:
    """The words of a short file. Raises OSError, or ValueError for what is no ASCII.

    Never waits: what stands there may be a FIFO of the image's root.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return os.read(fd, 4096).decode("ascii").split()
    finally:
        os.close(fd)


def read_number(path: str) -> int:
    """A file that holds one number. Raises OSError, and ValueError where it is none."""
    return int(" ".join(read_words(path)))


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
