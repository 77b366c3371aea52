"""Everything that descends from a process, found in /proc: for guests without a writable cgroup v2.

A descendant is known by its chain of parents, its session or process group, or by a variable in its
environment. What wipes its environment, leaves the session and outlives its parent cannot be found.

A pass over /proc takes as long as there are processes in the guest, so one serves all who look for
somebody at that moment, and it is made of small steps: `agent.hunting` runs them.
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
ROUNDS = 256  # passes over /proc for one hunt, at most
ENVIRONMENT = 256 * 1024  # bytes that are searched
LOOKS = 20  # at the environment of a process that is about to get one
LOOK_EVERY = 0.0005  # seconds
# Of proc_pid_stat(5), counted from the state: its fields 9 and 51. And sched.h's flag.
FLAGS, ENV_END = 6, 48
BIRTH = 19  # and its field 22, the start time: with the pid it is one process and no other
PF_KTHREAD = 0x00200000


Member = tuple[int, bytes]  # a pid, and when it began; b"" where nobody can have got the pid since


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

    def found(self, members: set[Member]) -> None:
        """What one pass has found of it."""
        self._rounds += 1
        if self.number != signal.SIGKILL:
            self._send(members, self.number)
            self.over = True
            return
        new = members - self._stopped - self._killed
        if new:
            for member in new:
                signal_one(member, signal.SIGSTOP)
            self._stopped |= new
        if not new or self._rounds >= ROUNDS:
            self.over = not self._stopped or self._rounds >= ROUNDS
            self._send(self._stopped, signal.SIGKILL)
            self._killed |= self._stopped
            self._stopped = set()

    def _send(self, members: set[Member], number: int) -> None:
        for member in members:
            self.delivered |= signal_one(member, number)


def run(hunts: Sequence[Hunt]) -> None:
    """All of them to their ends, in this thread."""
    while hunts:
        for seconds in passes(hunts):
            time.sleep(seconds)
        hunts = [hunt for hunt in hunts if not hunt.over]


def passes(hunts: Sequence[Hunt]) -> Iterator[float]:
    """One pass over /proc for all of these hunts, in small steps: seconds to wait before the next.

    Most often none, and then whoever runs the steps may let others have their turn.
    """
    for hunt in hunts:
        hunt.begun = True
    by_pid = {hunt.pid: hunt for hunt in hunts if hunt.pid != NOBODY}
    by_mark = {hunt.mark: hunt for hunt in hunts}
    members: dict[Hunt, set[int]] = {hunt: set() for hunt in hunts}
    births: dict[int, bytes] = {}
    children: dict[int, list[int]] = {}
    own = os.getpid()
    names = listed()
    hidden = str(own) not in names  # /proc is covered, or not there any more
    for name in names:
        if int(name) in (1, own):
            continue
        yield 0.0
        fields = stat_fields(name)
        if not fields or fields[0] in (b"Z", b"X"):
            continue
        pid = int(name)
        parent, group, session = map(int, fields[1:4])
        births[pid] = fields[BIRTH]
        children.setdefault(parent, []).append(pid)
        entries = yield from environment(name)
        owners = [by_pid.get(each) for each in (pid, group, session)]
        owners += [by_mark[entry] for entry in entries if entry in by_mark]
        for owner in owners:
            if owner is not None:
                members[owner].add(pid)
    for hunt, own_members in members.items():
        yield 0.0
        # Two hunts of one process share its entries here.
        direct = own_members | members[by_pid.get(hunt.pid, hunt)]
        roots = direct if hunt.pid == NOBODY else direct | {hunt.pid}
        found = {(pid, births[pid]) for pid in direct | descendants(children, roots)}
        if hidden and hunt.pid > 1:
            found |= {(hunt.pid, b""), (-hunt.pid, b"")}  # itself and its group, as for kill(2)
        hunt.found(found)


def marked() -> set[bytes]:
    """Every entry that begins with MARKER in the environment of any process."""
    return {
        entry for name in listed() for entry in read_environment(name) if entry.startswith(MARKER)
    }


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
