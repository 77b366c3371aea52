"""Who holds the lock of a pipe: found among the guest's processes, and killed.

Here nothing is asked of a process that could make who asks wait, but in `holds`: a process's
memory has a lock of its own (/proc/PID/cmdline, environ), and so has what execve(2) does (syscall,
stack). Every search takes its turns at all processes, so that one with very many descriptors hides
no other. By the guard's thread, while the event loop stands.
"""

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator

from microguest.agent.process import tree
from microguest.guest import bounds

__all__ = [
    "Candidate", "Found", "belongs_to", "has_open", "holds", "is_a_program", "open_in", "search",
]  # fmt: skip

TURN = 64  # descriptors or threads of one process that are looked at before others are
NAMED = 16  # pids that the console is told

# System calls that wait with a pipe's lock, by machine: which of their words are descriptors, and
# whether one of these is a pipe in any case. From the kernel's tables; splice(2), readv(2).
Descriptors = tuple[tuple[int, ...], bool]
SPLICES: tuple[Descriptors, ...] = (((0, 2), True), ((0, 1), True), ((0,), True))
OTHERS: Descriptors = ((0,), False)
CALLS: dict[str, dict[int, Descriptors]] = {
    "x86_64": {
        **dict(zip((275, 276, 278), SPLICES, strict=True)),  # splice, tee, vmsplice
        40: ((0, 1), False),  # sendfile
        **dict.fromkeys((0, 1, 19, 20, 327, 328), OTHERS),  # read, write, and those of vectors
    },
    "aarch64": {
        **dict(zip((76, 77, 75), SPLICES, strict=True)),
        71: ((0, 1), False),
        **dict.fromkeys((63, 64, 65, 66, 286, 287), OTHERS),
    },
}

# Whether a process is wanted, in turns: False after each, and True once, at its end, if it is.
Turns = Generator[bool, None, None]
Look = Callable[[int, int], Turns]


class Found:
    """Pids, as the console is told them."""

    def __init__(self) -> None:
        self.pids: list[int] = []

    def __str__(self) -> str:
        more = len(self.pids) - NAMED
        return f"{self.pids[:NAMED]}{f' and {more} more' if more > 0 else ''}"


class Candidate:
    """A process that is looked at, which is no other meanwhile: a search takes long enough."""

    def __init__(self, proc: int, pid: int, look: Look) -> None:
        """Raises ProcessLookupError where it has ended."""
        self.pid = pid
        self._held = tree.pidfd_of(pid)
        self.turns = look(proc, pid)

    def kill(self) -> bool:
        """Whether it was there to be killed."""
        return tree.send(self.pid, self._held, signal.SIGKILL)

    def close(self) -> None:
        self.turns.close()
        if self._held >= 0:
            os.close(self._held)
            self._held = -1


Deed = Callable[[Candidate], bool]


def search(proc: int, spared: set[int], look: Look, deed: Deed, found: Found) -> None:
    """Do that to whoever is wanted, for at most LOCK_SEARCH seconds. `proc`: /proc, for openat(2).

    Those of whom `deed` says that it was done are in `found`, already while a search hangs.
    """
    until = time.monotonic() + bounds.LOCK_SEARCH
    waiting: deque[Candidate] = deque()
    try:
        for pid in listed(proc):
            if time.monotonic() >= until:
                return
            if pid in spared:
                continue
            try:
                candidate = Candidate(proc, pid, look)
            except ProcessLookupError:
                continue
            waiting.append(candidate)
            if not take_turn(candidate, until, deed, found):
                waiting.pop().close()
        while waiting and time.monotonic() < until:
            waiting.rotate(-1)
            if not take_turn(waiting[-1], until, deed, found):
                waiting.pop().close()
    finally:
        for candidate in waiting:
            candidate.close()


def take_turn(candidate: Candidate, until: float, deed: Deed, found: Found) -> bool:
    """Whether it has to be looked at again."""
    wanted = next(candidate.turns, None)
    if wanted and time.monotonic() < until and deed(candidate):
        found.pids.append(candidate.pid)
    return wanted is False


def listed(proc: int) -> list[int]:
    """All processes. Raises OSError."""
    folder = open_in(proc, ".")
    try:
        return [int(name) for name in os.listdir(folder) if name.isdigit()]
    finally:
        os.close(folder)


# ── who is wanted ────────────────────────────────────────────────────────────────────────────────


def has_open(name: str) -> Look:
    """Those of whom a thread has a descriptor that is called so: threads may have their own."""

    def look(proc: int, pid: int) -> Turns:
        for thread in threads(proc, pid):
            for looked, link in enumerate(links_of(proc, thread), start=1):
                if link == name:
                    yield True
                    return
                if looked % TURN == 0:
                    yield False
            yield False

    return look


def holds(name: str) -> Look:
    """Those of whom a thread waits in splice(2) on the pipe that is called so, or has hidden one.

    That is to wait in a call on a pipe that is not among its descriptors: the call goes on after
    another thread has closed the descriptor, or given its number to what no such call takes. May
    hang at a process that hangs in execve(2).
    """
    calls = CALLS.get(os.uname().machine, {})

    def look(proc: int, pid: int) -> Turns:
        for thread in threads(proc, pid):
            call = read_in(proc, f"{thread}/syscall")
            words = call.split()
            places, needs_pipe = calls.get(number_of(words), ((), False))
            links = [link_of(proc, thread, words[place + 1]) for place in places]
            splices = needs_pipe or len(places) > 1  # read(2) waits for data without the lock
            hidden = "" in links or (needs_pipe and not any(map(may_be_pipe, links)))
            if (hidden or (splices and name in links)) and (
                read_in(proc, f"{thread}/syscall") == call  # it has not gone on, or ended
            ):
                yield True
                return
            yield False

    return look


def belongs_to(uid: int) -> Look:
    """Those that this user may send signals, and so could have given the pipe: kill(2)."""

    def look(proc: int, pid: int) -> Turns:
        for line in read_in(proc, f"{pid}/status").splitlines():
            if line.startswith(b"Uid:"):
                real, _, saved, _ = map(int, line.split()[1:])
                if uid in (real, saved):
                    yield True

    return look


def is_a_program(proc: int, pid: int) -> Turns:
    """All but the kernel's own."""
    fields = read_in(proc, f"{pid}/stat").rpartition(b")")[2].split()
    if len(fields) > tree.FLAGS and not int(fields[tree.FLAGS]) & tree.PF_KTHREAD:
        yield True


# ── /proc ────────────────────────────────────────────────────────────────────────────────────────


def open_in(folder: int, path: str) -> int:
    """To read it. Raises OSError."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)


def read_in(proc: int, path: str) -> bytes:
    """Its first 8 KiB; b"" for what has ended."""
    try:
        file = open_in(proc, path)
    except OSError:
        return b""
    try:
        return os.read(file, 8192)
    except OSError:
        return b""
    finally:
        os.close(file)


def threads(proc: int, pid: int) -> Iterator[str]:
    """Folders in /proc, the first thread's first; none of what has ended."""
    try:
        folder = open_in(proc, f"{pid}/task")
    except OSError:
        return
    try:
        names = os.listdir(folder)
    except OSError:
        return
    finally:
        os.close(folder)
    for name in names:
        yield f"{pid}/task/{name}"


def links_of(proc: int, thread: str) -> Iterator[str]:
    """What its descriptors are called; nothing of what is not ours to look at."""
    try:
        folder = open_in(proc, f"{thread}/fd")
    except OSError:
        return
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    link = os.readlink(entry.name, dir_fd=folder)
                except OSError:
                    link = ""  # closed
                yield link
    except OSError:
        pass
    finally:
        os.close(folder)


def link_of(proc: int, thread: str, word: bytes) -> str:
    """What the descriptor in this word of a call is called; "" where it is closed."""
    try:
        return os.readlink(f"{thread}/fd/{int(word, 16) & 0xFFFFFFFF}", dir_fd=proc)
    except FileNotFoundError:
        return ""
    except OSError:
        return "?"  # not ours to look at


def may_be_pipe(link: str) -> bool:
    """A FIFO has the path of its file."""
    return link.startswith(("pipe:", "/", "?"))


def number_of(words: list[bytes]) -> int:
    """Of a call in proc_pid_syscall(5); -1 where it waits in none."""
    try:
        return int(words[0])
    except (IndexError, ValueError):
        return -1
