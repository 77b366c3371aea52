"""A thread that ends who makes the event loop stand: by the lock of a pipe, or of a terminal.

splice(2) holds its pipe's mutex while it waits for its other side, and a page that never comes (of
userfaultfd, of a FUSE file) makes read(2) and write(2) hold it too. Whoever else touches that pipe
waits uninterruptibly: to read, write, ask how much is in it, resize or close it. No call says first
whether the lock is free. The pipes are the processes' own, so a process can do that to the agent.

The thread looks at the system call that the event loop is in, whose stream that is about, and
whether it waits there uninterruptibly without a pause. It looks for who has a pipe open without
what could make it stand as well: a process's memory has a lock of its own (/proc/PID/cmdline,
environ), and so has what execve(2) does (syscall, stack).
"""

import os
import signal
import threading
import time

from agent import tree
from agent.registry import Process
from agent.state import Agent, log
from agent.threads import run_beside
from guest import limits

__all__ = ["Guard"]

LOOK_EVERY = 0.5  # seconds; a look is two reads in /proc


class Guard:
    """Of the thread that makes it. `start` once."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._parent = os.getppid()  # has the streams of kept processes as well
        self._proc = self._call = self._status = -1
        self._before = b""
        self._stood: dict[Process, float] = {}  # seconds in this LOCK_MINUTE
        self._forget_at = 0.0  # time.monotonic()
        self._measures = 0  # that were taken while it stands

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
        stands = state == self._before != b""
        self._before = state
        if about is None or not stands:
            self._measures = 0
            return
        if now >= self._forget_at:
            self._stood.clear()
            self._forget_at = now + limits.LOCK_MINUTE
        process, inode = about
        self._stood[process] = stood = self._stood.get(process, 0.0) + seconds
        if stood >= limits.LOCK_HELD + self._measures * limits.LOCK_KILL_WAIT:
            self._measures += 1
            self._end(process, inode)

    def _about(self, call: bytes) -> tuple[Process, int] | None:
        """Whose stream the event loop is at, and the inode of that."""
        words = call.split()
        if len(words) < 2 or words[0] == b"-1":  # it runs, or waits for a page
            return None
        fd = int(words[1], 16)  # the first of every call that can stand
        if Process.letting_go is not None:
            process, parting, inode = Process.letting_go
            return (process, inode) if fd == parting else None
        for process in tuple(self._agent.processes.values()):
            if fd == process.stdin or fd in tuple(process.outputs.values()):
                try:
                    return process, os.fstat(fd).st_ino
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

    def _end(self, process: Process, inode: int) -> None:
        """The pipe is the process's, which has let its lock be held: first its tree has to end,
        then who got the pipe from it otherwise, and, as nobody is served meanwhile, all."""
        if self._measures == 1:
            log(
                f"process {process.id} is killed with all that it started: for"
                f" {limits.LOCK_HELD:.0f} s the lock of one of its streams was held"
            )
            process.put_down()
        elif self._measures == 2:
            killed = self._kill_openers(inode)
            log(f"killed as they have a stream of process {process.id} open: {killed}")
        else:
            log("all processes of hosts are killed: the lock of a stream is still held")
            for each in tuple(self._agent.processes.values()):
                each.put_down()

    def _kill_openers(self, inode: int) -> list[int]:
        """Who has the pipe open, but for PID 1, the agent and who keeps its pipes: which these are.

        Each is held while it is looked at: a search is long enough for ids to be others'.
        """
        name = f"pipe:[{inode}]"
        killed: list[int] = []
        until = time.monotonic() + limits.LOCK_SEARCH
        folder = open_in(self._proc, ".")
        try:
            for pid in map(int, filter(str.isdigit, os.listdir(folder))):
                if pid in (1, self._parent, os.getpid()):
                    continue
                try:
                    held = tree.pidfd_of(pid)
                except ProcessLookupError:
                    continue
                try:
                    if has_open(folder, pid, name, until) and tree.send(pid, held, signal.SIGKILL):
                        killed.append(pid)
                finally:
                    if held >= 0:
                        os.close(held)
        finally:
            os.close(folder)
        return killed


def open_in(folder: int, path: str) -> int:
    """To read it. Raises OSError."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)


def has_open(proc: int, pid: int, name: str, until: float) -> bool:
    """Whether one of its descriptors is called that; looked for until then: time.monotonic()."""
    try:
        folder = open_in(proc, f"{pid}/fd")
    except OSError:
        return False  # it has ended, or is not ours to look at
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if time.monotonic() >= until:
                    return False
                try:
                    if os.readlink(entry.name, dir_fd=folder) == name:
                        return True
                except OSError:
                    continue
    except OSError:
        pass
    finally:
        os.close(folder)
    return False
