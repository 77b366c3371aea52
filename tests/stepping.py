"""A start looked at after each of its system calls, by debugging who starts: ptrace(2).

`starts` follows one process until its next child has exec'ed. A `Stranger` tries at each stop what
it gets of a process by /proc.
"""

import ctypes
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from patience import PATIENCE

__all__ = ["Stop", "Stranger", "starts"]

SEIZE, INTERRUPT, SYSCALL, CONT, DETACH, GETEVENTMSG = 0x4206, 0x4207, 24, 7, 17, 0x4201
TRACESYSGOOD, TRACEVFORK, TRACEEXEC, EXITKILL = 0x1, 0x4, 0x10, 0x100000
VFORK_EVENT, EXEC_EVENT, STOP_EVENT = 2, 4, 128
WALL = 0x40000000

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)

# Who it is, in one capability set of all; then a line for each process that it is asked about.
STRANGER = """
import ctypes, glob, json, os, sys
uid, capabilities = map(int, sys.argv[1:])
libc = ctypes.CDLL(None, use_errno=True)
os.setgroups([])
os.setgid(uid)
os.setuid(uid)
words = [capabilities & 0xFFFFFFFF, capabilities & 0xFFFFFFFF, 0,
         capabilities >> 32, capabilities >> 32, 0]
assert not libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(*words))
print(flush=True)
def is_open(path, flags):
    try:
        fd = os.open(path, flags | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return flags != os.O_RDONLY or bool(os.read(fd, 1))
    except OSError:
        return False
    finally:
        os.close(fd)
for line in sys.stdin:
    folder = f"/proc/{int(line)}"
    wanted = [(f"{folder}/{name}", os.O_RDONLY) for name in ("maps", "auxv")]
    wanted += [(f"{folder}/mem", os.O_RDWR)]
    wanted += [(path, os.O_PATH) for path in glob.glob(f"{folder}/fd/*")]
    print(json.dumps([path.split("/", 3)[3] for path, flags in wanted if is_open(path, flags)]),
          flush=True)
"""


class Stranger:
    """A process of `uid` with these capabilities, given as a mask, and no other privilege."""

    def __init__(self, uid: int, capabilities: int = 0) -> None:
        self._command = [sys.executable, "-c", STRANGER, str(uid), str(capabilities)]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "\n"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate()

    def opens(self, pid: int) -> list[str]:
        """What of /proc/PID/{maps,auxv,mem,fd/*} it can read or open: mem for writing, too."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{pid}\n")
        self._process.stdin.flush()
        found: list[str] = json.loads(self._process.stdout.readline())
        return found


class Stop(NamedTuple):
    """Where the child stands, before or after a call. `call`: number and arguments."""

    pid: int
    call: tuple[int, ...]
    permitted: int  # capabilities, as a mask
    uid: int
    is_program: bool  # it has exec'ed


def starts(parent: int, begin: Callable[[], object]) -> Generator[Stop]:
    """The stops of the child that `parent` starts once `begin` has run; the last one is its exec.

    The caller is one thread. `begin` runs in another, and may return later than the last stop.
    """
    ptrace(SEIZE, parent, TRACEVFORK | TRACESYSGOOD | TRACEEXEC | EXITKILL)
    thread = threading.Thread(target=begin)
    thread.start()
    child = 0
    try:
        child = follow(parent)
        for call in calls(child):
            yield where(child, call)
        yield where(child, (), is_program=True)
    finally:
        if child:
            ptrace(DETACH, child, 0)  # it stands
        let_go(parent)
        thread.join(PATIENCE)


def follow(parent: int) -> int:
    """Let it run until it has a child, which stands then."""
    while True:
        _, status = os.waitpid(parent, WALL)
        assert os.WIFSTOPPED(status), status
        if status >> 16 == VFORK_EVENT:
            break
        ptrace(CONT, parent, 0 if status >> 16 else os.WSTOPSIG(status))
    message = ctypes.c_ulong()
    ptrace(GETEVENTMSG, parent, ctypes.addressof(message))
    ptrace(CONT, parent, 0)
    os.waitpid(message.value, WALL)
    return message.value


def calls(child: int) -> Iterator[tuple[int, ...]]:
    """Its system calls, each one twice, until it has exec'ed."""
    call: tuple[int, ...] = ()
    while True:
        ptrace(SYSCALL, child, 0)
        _, status = os.waitpid(child, WALL)
        assert os.WIFSTOPPED(status), status
        if status >> 16 == EXEC_EVENT:
            return
        words = Path(f"/proc/{child}/syscall").read_text().split()
        if len(words) > 7:
            call = tuple(int(word, 0) for word in words[:7])
        yield call


def where(child: int, call: tuple[int, ...], *, is_program: bool = False) -> Stop:
    lines = Path(f"/proc/{child}/status").read_text().splitlines()
    fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return Stop(child, call, int(fields["CapPrm"], 16), int(fields["Uid"].split()[0]), is_program)


def let_go(pid: int) -> None:
    """Whatever it does at the moment."""
    ptrace(INTERRUPT, pid, 0)
    while True:
        _, status = os.waitpid(pid, WALL)
        assert os.WIFSTOPPED(status), status
        if status >> 16 == STOP_EVENT:
            break
        ptrace(CONT, pid, 0 if status >> 16 else os.WSTOPSIG(status))
    ptrace(DETACH, pid, 0)


def ptrace(request: int, pid: int, data: int) -> None:
    if LIBC.ptrace(request, pid, None, data):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), f"ptrace({request:#x})")
