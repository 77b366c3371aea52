"""Everything that descends from a process, found in /proc: for guests without a writable cgroup v2.

A descendant is known by its chain of parents, its session or process group, or by a variable in its
environment. What wipes its environment, leaves the session and outlives its parent cannot be found.

A pass over /proc takes as long as there are processes in the guest, so one serves all who look for
somebody at that moment, and it is made of small steps: `agent.process.hunting` runs them.
"""

import os
import signal
import time
from collections.abc import Generator, Iterator, Sequence

__all__ = [
    "MARKER",
    "NOBODY",
    "UNMARKED",
    "Hunt",
    "between_programs",
    "marked",
    "passes",
    "pidfd_of",
    "run",
    "send",
]

MARKER = b"MICROGUEST_PROCESS="
UNMARKED = b"\0"  # no environment has an entry like that: NUL ends one
NOBODY = 0  # for a hunt by a mark alone: no process that it is known to descend from is held
ROUNDS = 256  # passes over /proc that find somebody new for one hunt, at most
LISTINGS = 4  # of /proc in one pass, until there is nobody in it who was not looked at
DYING_WAIT = 5.0  # seconds of one hunt for those who are dying, or about to get an environment
ENVIRONMENT = 256 * 1024  # bytes that are searched
LOOKS = 20  # at the environment of a process that is about to get one
LOOK_EVERY = 0.0005  # seconds
# Of proc_pid_stat(5), counted from the state: its fields 9, 20 and 51. And sched.h's flag.
FLAGS, THREADS, ENV_END = 6, 17, 48
BIRTH = 19  # and its field 22, the start time: with the pid it is one process and no other
PF_KTHREAD = 0x00200000


Member = tuple[int, bytes]  # a pid, and when it began; b"" where nobody can have got the pid since
overdue: set[Member] = set()  # whose execve takes so long that nobody waits for it any more


class Hunt:
    """A signal for the process `pid`, of which the id is not free yet, and all its descendants.

    `pid` NOBODY: for whoever has the mark, and their descendants.
    `mark`: the entry of its environment that begins with MARKER. `delivered`: there was one.
    `begun`: a pass may have gone by somebody already.

    KILL comes after STOP, so that none can start more meanwhile. A fork that has begun goes on
    after its parent was told to stop, but not after KILL: what was born in between is there when
    all the others have been killed (copy_process in the kernel's kernel/fork.c), so it is looked
    for until nobody new is found.
    """

    def __init__(self, pid: int, mark: bytes, number: int = signal.SIGKILL) -> None:
        self.pid = pid
        self.mark = mark
        self.number = number
        self.delivered = False
        self.begun = False
        self.over = False
        self._stopped: set[Member] = set()
        self._killed: set[Member] = set()
        self._rounds = 0
        self._until = 0.0  # time.monotonic(), once there is nobody new
        self.waits = False  # for the dying to die

    def found(self, members: set[Member], unclear: set[Member]) -> None:
        """What one pass has found alive of it, and who may be of it and shows nothing yet."""
        if self.number != signal.SIGKILL:
            self._send(members, self.number)
            self.over = True
            return
        new = members - self._stopped - self._killed
        for member in new:
            signal_one(member, signal.SIGSTOP)
        self._stopped |= new
        self._rounds += bool(new)
        self.waits = not new
        if new and self._rounds < ROUNDS:
            return
        self._send(self._stopped, signal.SIGKILL)
        self._killed |= self._stopped
        self._stopped = set()
        now = time.monotonic()
        self._until = self._until or now + DYING_WAIT
        if now >= self._until:
            overdue.update(unclear)
        lives = any(birth for _, birth in members)  # where /proc is covered it cannot be told
        self.over = not (lives or unclear) or now >= self._until or self._rounds >= ROUNDS

    def _send(self, members: set[Member], number: int) -> None:
        for member in members:
            self.delivered |= signal_one(member, number)


def run(hunts: Sequence[Hunt]) -> None:
    """All of them to their ends, in this thread."""
    while hunts:
        for seconds in passes(hunts):
            time.sleep(seconds)
        hunts = [hunt for hunt in hunts if not hunt.over]


def passes(hunts: Sequence[Hunt]) -> Generator[float, None, None]:
    """One pass over /proc for all of these hunts, in small steps: seconds to wait before the next.

    Most often none, and then whoever runs the steps may let others have their turn.
    """
    for hunt in hunts:
        hunt.begun = True
    sight = Sight(hunts)
    yield from sight.look()
    for hunt in hunts:
        yield 0.0
        hunt.found(sight.members_of(hunt), sight.unclear)
    if all(hunt.waits and not hunt.over for hunt in hunts):
        yield LOOK_EVERY


class Sight:
    """Who is alive in one pass, and whose.

    `unclear`: those of whom it cannot be told yet. `marks`: entries that begin with MARKER.
    """

    def __init__(self, hunts: Sequence[Hunt]) -> None:
        self.unclear: set[Member] = set()
        self.marks: set[bytes] = set()
        self._by_pid = {hunt.pid: hunt for hunt in hunts if hunt.pid != NOBODY}
        self._by_mark = {hunt.mark: hunt for hunt in hunts}
        self._members: dict[Hunt, set[int]] = {hunt: set() for hunt in hunts}
        self._births: dict[int, bytes] = {}
        self._children: dict[int, list[int]] = {}
        self._hidden = True  # /proc is covered, or not there any more
        self._own = str(os.getpid())
        self._seen = {self._own, "1"}

    def look(self) -> Iterator[float]:
        """In steps. Who has gone when it is looked at may have left somebody behind who was born
        after the listing: so there is another one, until nobody new is in it."""
        for _ in range(LISTINGS):
            names = listed()
            self._hidden = self._hidden and self._own not in names
            names = [name for name in names if name not in self._seen]
            if not names:
                break
            self._seen.update(names)
            for name in names:
                yield 0.0
                yield from self._look_at(name)
        overdue.intersection_update(self._births.items())
        self.unclear -= overdue

    def _look_at(self, name: str) -> Iterator[float]:
        fields = stat_fields(name)
        if not alive(fields):
            return
        pid = int(name)
        parent, group, session = map(int, fields[1:4])
        self._births[pid] = fields[BIRTH]
        self._children.setdefault(parent, []).append(pid)
        entries = yield from environment(name)
        if entries == [b""] and between_programs(name):
            self.unclear.add((pid, fields[BIRTH]))
        self.marks.update(entry for entry in entries if entry.startswith(MARKER))
        owners = [self._by_pid.get(each) for each in (pid, group, session)]
        owners += [self._by_mark.get(entry) for entry in entries]
        for owner in owners:
            if owner is not None:
                self._members[owner].add(pid)

    def members_of(self, hunt: Hunt) -> set[Member]:
        """Those that it is for, and all that descend from them. Two hunts of one process share."""
        direct = self._members[hunt] | self._members[self._by_pid.get(hunt.pid, hunt)]
        roots = direct if hunt.pid == NOBODY else direct | {hunt.pid}
        found = {(pid, self._births[pid]) for pid in direct | descendants(self._children, roots)}
        if self._hidden and hunt.pid > 1:
            found |= {(hunt.pid, b""), (-hunt.pid, b"")}  # itself and its group, as for kill(2)
        return found


def marked() -> Generator[float, None, set[bytes]]:
    """Every entry that begins with MARKER in the environment of any process. In steps."""
    until = time.monotonic() + DYING_WAIT
    marks: set[bytes] = set()
    while True:
        sight = Sight(())
        yield from sight.look()
        marks |= sight.marks
        if not sight.unclear or time.monotonic() >= until:
            return marks
        yield LOOK_EVERY


def listed() -> list[str]:
    """The pids in /proc; none where that cannot be read."""
    try:
        return [name for name in os.listdir("/proc") if name.isdecimal()]
    except OSError:
        return []


def descendants(children: dict[int, list[int]], roots: set[int]) -> set[int]:
    """All that have one of `roots` above them; `children` by parent."""
    found: set[int] = set()
    waiting = list(roots)
    while waiting:
        for child in children.get(waiting.pop(), ()):
            if child not in found:
                found.add(child)
                waiting.append(child)
    return found


def stat_fields(pid: str) -> list[bytes]:
    """State, parent, group, session and what else is in proc_pid_stat(5); [] where it has gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            return (file.read(4096) or b"").rpartition(b")")[2].split()
    except OSError:
        return []


def alive(fields: list[bytes]) -> bool:
    """Whether it runs, or a thread of it does, of which the first has ended."""
    return bool(fields) and (fields[0] not in (b"Z", b"X") or int(fields[THREADS]) > 1)


def environment(pid: str) -> Generator[float, None, list[bytes]]:
    """Its first ENVIRONMENT bytes; [] for what is gone, or a kernel thread. In steps.

    A process inside execve(2) shows none for a moment, and must not be overlooked then.
    """
    entries = read_environment(pid)
    for _ in range(LOOKS):
        if entries != [b""]:
            break
        changing = between_programs(pid)
        if changing:
            yield LOOK_EVERY
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
    fields = stat_fields(pid)
    kernel_thread = len(fields) <= ENV_END or int(fields[FLAGS]) & PF_KTHREAD
    return not kernel_thread and fields[0] not in (b"Z", b"X") and fields[ENV_END] == b"0"


def signal_one(member: Member, number: int) -> bool:
    """Whether it was delivered, to the process that was found and to none that has its pid now."""
    pid, birth = member
    if not birth:
        return send(pid, -1, number)
    try:
        pidfd = pidfd_of(pid)
    except ProcessLookupError:
        return False
    try:
        same = stat_fields(str(pid))[BIRTH : BIRTH + 1] == [birth]
        return same and send(pid, pidfd, number)
    finally:
        if pidfd >= 0:
            os.close(pidfd)


def pidfd_of(pid: int) -> int:
    """-1 where no descriptor is to be had: a look just before has to do. Raises ProcessLookupError.

    Who kills is not stopped by a limit of descriptors.
    """
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except OSError:
        return -1


def send(pid: int, pidfd: int, number: int) -> bool:
    """By the descriptor where there is one; whether somebody got it."""
    try:
        if pidfd >= 0:
            signal.pidfd_send_signal(pidfd, number)
        else:
            os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True
