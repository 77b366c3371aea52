"""A thread that ends who makes the event loop stand: by the lock of a pipe, or of a terminal.

splice(2) holds its pipe's mutex while it waits for its other side, and a page that never comes (of
userfaultfd, of a FUSE file) makes read(2) and write(2) hold it too. Whoever else touches that pipe
waits uninterruptibly: to read, write, ask how much is in it, resize or close it. No call says first
whether the lock is free. The pipes are the processes' own, so a process can do that to the agent.

The thread looks at the system call that the event loop is in, whose stream that is about, and
whether it waits there uninterruptibly: since the last look without a pause, or while somebody waits
in splice(2) on that stream. So locks that are held for a moment each count as often as a look finds
one, which is their share of the time. Who writes much, or has no processor with the lock in its
hands, does not count. Who holds the lock is looked for by `agent.process.holders`. Where nobody is
found, all who could have the pipe are killed, and in the end all.
"""

import os
import stat
import threading
import time
from collections.abc import Callable

from microguest.agent.process import holders
from microguest.agent.process.holders import Candidate, Found, Look, open_in
from microguest.agent.registry import Process
from microguest.agent.state import Agent, log
from microguest.agent.threads import run_beside
from microguest.guest import bounds

__all__ = ["Guard"]

LOOK_EVERY = 0.5  # seconds; a look is two reads in /proc
LOOK_TWICE = 0.02  # seconds; locks that are held for less are as good as none
KEEPER = b"microguest-keep\n"  # /proc/PID/comm of init_shim.life.keeper

# Something that is done against who holds a lock. Whether it was against anybody.
Measure = Callable[[], bool]


class Guard:
    """Of the thread that makes it. `start` once."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._parent = os.getppid()  # has the streams of kept processes as well
        self._proc = self._call = self._status = -1
        self._before = b""
        # Of this LOCK_MINUTE: seconds by the user whose streams they are; and measures that were
        # taken, and the seconds at which the next one is due.
        self._stood: dict[int, float] = {}
        self._measured: dict[Process, tuple[int, float]] = {}
        self._forget_at = 0.0  # time.monotonic()
        self._hangs = threading.Lock()  # held by the thread of a search that may hang

    def start(self) -> None:
        """Begin to look. Where the guest has no thread left for it, it says so and does nothing."""
        thread = f"self/task/{threading.get_native_id()}"
        try:
            # Now, as the image's root may mount over it later what never answers.
            self._proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            self._call = open_in(self._proc, f"{thread}/syscall")
            self._status = open_in(self._proc, f"{thread}/status")
        except OSError as error:
            log(f"nobody looks after pipes that processes lock: {error}")
            return
        if not run_beside(self._run, "guard"):
            log("nobody looks after pipes that processes lock: the guest has no thread left")

    def _run(self) -> None:
        before = time.monotonic()
        while True:
            time.sleep(LOOK_EVERY)
            now = time.monotonic()
            try:
                # A guest that was slow itself has seen nobody stand for longer than one look.
                self._look(now, min(now - before, 2 * LOOK_EVERY))
            except Exception as error:  # noqa: BLE001  it goes on, whatever it was
                log(f"guard: {type(error).__name__}: {error}")
            before = now

    def _look(self, now: float, seconds: float) -> None:
        call = os.pread(self._call, 256, 0)
        about = self._about(call)
        state = call + waits if about and (waits := self._waits()) else b""
        stands = state == self._before
        self._before = state
        if about is None or not state:
            return
        process, stream = about
        if not (stands or self._is_held(state, stream)):
            return
        if now >= self._forget_at:
            self._stood.clear()
            self._measured.clear()
            self._forget_at = now + bounds.LOCK_MINUTE
        stood = self._stood[stream.st_uid] = self._stood.get(stream.st_uid, 0.0) + seconds
        taken, due = self._measured.get(process, (0, bounds.LOCK_HELD))
        if stood >= due:
            taken = self._act(process, stream, taken)
            self._measured[process] = taken, stood + bounds.LOCK_KILL_WAIT

    def _is_held(self, state: bytes, stream: os.stat_result) -> bool:
        """Whether it waits a little longer, and somebody in splice(2) on the same stream."""
        time.sleep(LOOK_TWICE)
        if os.pread(self._call, 256, 0) + self._waits() != state:
            return False
        return bool(self._beside(holders.holds(pipe_name(stream)), lambda _: True).pids)

    def _about(self, call: bytes) -> tuple[Process, os.stat_result] | None:
        """Whose stream the event loop is at, and which."""
        words = call.split()
        if len(words) < 2 or words[0] == b"-1":  # it runs, or waits for a page
            return None
        fd = int(words[1], 16)  # the first of every call that can stand
        if Process.letting_go is not None:
            process, parting, stream = Process.letting_go
            return (process, stream) if fd == parting else None
        for process in tuple(self._agent.processes.values()):
            if fd == process.stdin or fd in tuple(process.outputs.values()):
                try:
                    return process, os.fstat(fd)
                except OSError:
                    return None  # it has gone on
        return None

    def _waits(self) -> bytes:
        """How often it has given up its processor, where it waits as for a lock; else b"".

        As often as before, if it stood all the time: whoever is only slow, or stopped, does not.
        """
        lines = os.pread(self._status, 8192, 0).splitlines()
        if not any(line.startswith(b"State:\tD") for line in lines):
            return b""
        return b"".join(line for line in lines if b"ctxt_switches:" in line)

    def _act(self, process: Process, stream: os.stat_result, taken: int) -> int:
        """The next measure, and at once the one behind it where that was against nobody. How many
        were taken then."""
        measures = self._measures(process, stream)
        for number in range(taken, taken + len(measures)):
            if measures[number % len(measures)]():
                return number + 1
        return taken

    def _measures(self, process: Process, stream: os.stat_result) -> list[Measure]:
        """The pipe is the process's, which has let its lock be held: first its tree has to end,
        then who has got the pipe from it, then all of the user whose pipe it is, and, as nobody is
        served meanwhile, all. Root's own could be anybody's.

        An agent that is not in a guest has no right to others' processes
        (docs/developing/building.md).
        """
        name = pipe_name(stream)
        stream_of = f"a stream of process {process.id}"

        def end_tree() -> bool:
            log(
                f"process {process.id} is killed with all that it started: for"
                f" {bounds.LOCK_HELD:.0f} s the lock of one of its streams was held"
            )
            process.put_down()
            return True

        def end_openers() -> bool:
            return self._kill(holders.has_open(name), f"they have {stream_of} open")

        def end_hidden() -> bool:
            killed = self._beside(holders.holds(name), Candidate.kill)
            return tell(killed, f"one of them may hold {stream_of}")

        def end_owners() -> bool:
            why = f"user {stream.st_uid} holds {stream_of}"
            return self._kill(holders.belongs_to(stream.st_uid), why)

        def end_hosts() -> bool:
            log("all processes of hosts are killed: the lock of a stream is still held")
            until = time.monotonic() + bounds.LOCK_SEARCH
            for each in tuple(self._agent.processes.values()):
                if time.monotonic() < until:
                    each.put_down()
            return True

        def end_all() -> bool:
            return self._kill(holders.is_a_program, f"{stream_of} is still held")

        if not self._in_a_guest():
            return [end_tree, end_openers, end_hosts]
        of_pipes = [end_openers, end_hidden] if stat.S_ISFIFO(stream.st_mode) else []
        of_users = [end_owners] if of_pipes and stream.st_uid != 0 else []
        return [end_tree, *of_pipes, *of_users, end_hosts, end_all]

    def _in_a_guest(self) -> bool:
        return self._parent == 1 or holders.read_in(self._proc, f"{self._parent}/comm") == KEEPER

    def _kill(self, look: Look, why: str) -> bool:
        killed = Found()
        self._search(look, Candidate.kill, killed)
        return tell(killed, why)

    def _beside(self, look: Look, deed: Callable[[Candidate], bool]) -> Found:
        """In another thread: the search may hang, and is not waited for then."""
        found, done = Found(), threading.Event()

        def search() -> None:
            with self._hangs:
                self._search(look, deed, found)
            done.set()

        if not self._hangs.locked() and run_beside(search, "search"):
            done.wait(bounds.LOCK_SEARCH)
        return found

    def _search(self, look: Look, deed: Callable[[Candidate], bool], found: Found) -> None:
        """Among all but PID 1, the agent and who keeps its pipes: which these are."""
        holders.search(self._proc, {1, self._parent, os.getpid()}, look, deed, found)


def pipe_name(stream: os.stat_result) -> str:
    """As readlink(2) of its descriptors has it."""
    return f"pipe:[{stream.st_ino}]"


def tell(killed: Found, why: str) -> bool:
    """The console, if there are any."""
    if killed.pids:
        log(f"killed as {why}: {killed}")
    return bool(killed.pids)
