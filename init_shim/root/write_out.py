"""File systems at the end: unmounted or made read-only, latest first, so that disks are clean.

A file system can hang (a share whose host has gone), and who asks it for anything hangs with it. So
the work is done by a child: where neither it nor a disk makes headway for STEP_WAIT, it is left
behind, and another one goes on behind that step. Disks come before everything else.
"""

import os
import select
import time

import _guestsys

from microguest.init_shim.mounts import READ_ONLY, REMOUNT, mount_table, open_proc
from microguest.init_shim.reporter import say
from microguest.init_shim.signals import fork

TYPE_CHECKING = False  # typing itself is too heavy for PID 1
if TYPE_CHECKING:
    from collections.abc import Callable

    Step = tuple[str, Callable[[], None]]  # what to say where it hangs

__all__ = ["remember", "write_out"]

NO_FOLLOW = 0x8  # umount2(2): UMOUNT_NOFOLLOW

STEP_WAIT = 1.0  # seconds for one file system, unless all of them have less

MEMINFO_SIZE = 16 * 1024  # bytes; it has 1.5 KiB
UNWRITTEN = (b"Dirty:", b"Writeback:")  # proc_meminfo(5)

KEPT = ("/proc", "/dev", "/sys")  # PID 1 itself needs the first two, and /sys has nothing to write


def remember(target: str) -> None:
    """A disk is mounted at `target` for writing, and will have no name in the image's root."""
    _remembered.append(os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))


_remembered: list[int] = []  # descriptors, in the order of mounting


def write_out(patience: float, *, root_only: bool = False) -> None:
    """Write everything to the disks, for at most `patience` seconds.

    `root_only`: somebody else looks after what is mounted in the root.
    """
    steps = [*root_steps(), ("sync", os.sync)] if root_only else plan()
    deadline = time.monotonic() + patience
    at = 0
    while at < len(steps):
        if time.monotonic() >= deadline:
            say(f"not written out after {patience:g} s: {steps[at][0]} and what was to follow")
            return
        done = run_in_child(steps[at:], deadline)
        at += done
        if at < len(steps):
            say(f"{steps[at][0]} hangs; going on without it")
            at += 1


def run_in_child(steps: "list[Step]", deadline: float) -> int:
    """How many of the steps were taken before one that hangs. The child is not waited for then."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        pid = fork()
    except OSError:
        os.close(writer)
        os.close(reader)
        return 0
    if pid == 0:
        try:
            for _, take in steps:
                try:
                    take()
                except (OSError, ValueError):
                    pass  # busy, or not there any more: the next one may be neither
                os.write(writer, b".")
        finally:
            os._exit(0)
    os.close(writer)
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    done, unwritten = 0, unwritten_memory()
    while done < len(steps):
        left = min(STEP_WAIT, deadline - time.monotonic())
        if left <= 0:
            break
        if not poll.poll(int(left * 1000) + 1):
            before, unwritten = unwritten, unwritten_memory()
            if unwritten < before:
                continue  # a disk is slow, and not hung
            break
        headway = len(os.read(reader, len(steps)))
        if not headway:
            break
        done += headway
    os.close(reader)
    return done


def unwritten_memory() -> int:
    """KiB that wait for a disk or are on their way to one; 0 where the kernel cannot be asked."""
    try:
        with open(open_proc("meminfo"), "rb", buffering=0) as file:
            lines = (file.read(MEMINFO_SIZE) or b"").split(b"\n")
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(UNWRITTEN))


def plan() -> "list[Step]":
    """Disks that have a name, the root, disks that have none any more, and then all others."""
    on_disk: list[str] = []
    others: list[str] = []
    for source, target in mounted():
        if target not in KEPT and target != "/":
            (on_disk if source.startswith("/dev/") else others).insert(0, target)
    steps: list[Step] = [(target, Unmount(target)) for target in on_disk]
    steps += root_steps()
    steps += [(target, Unmount(target)) for target in others]
    steps.append(("sync", os.sync))
    return steps


def root_steps() -> "list[Step]":
    """The root, and then the disks that it is made of."""
    steps: list[Step] = [("/", lambda: _guestsys.mount(None, "/", None, REMOUNT | READ_ONLY))]
    return steps + [("a disk of the root", Settle(fd)) for fd in reversed(_remembered)]


class Unmount:
    """Unmount it, or make its file system read-only where somebody still uses it."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __call__(self) -> None:
        try:
            _guestsys.umount2(self.target, NO_FOLLOW)
        except OSError:
            _guestsys.mount(None, self.target, None, REMOUNT | READ_ONLY)


class Settle:
    """Make the file system at a descriptor read-only, which leaves it clean on its disk."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __call__(self) -> None:
        os.fchdir(self.fd)  # an init may have unmounted /proc
        _guestsys.mount(None, ".", None, REMOUNT | READ_ONLY)


def mounted() -> list[tuple[str, str]]:
    """(source, target) of every mount that has a name in this root, in the order of mounting."""
    try:
        lines = mount_table()
    except OSError:
        return []
    found = []
    for line in lines:
        source, _, rest = line.partition(b" ")
        target = rest.partition(b" ")[0]
        if target:
            found.append((os.fsdecode(source), os.fsdecode(unescaped(target))))
    return found


def unescaped(path: bytes) -> bytes:
    """A path as /proc has it: a backslash and three octal digits for what separates (proc(5))."""
    first, *parts = path.split(b"\\")
    return first + b"".join(bytes([int(part[:3], 8)]) + part[3:] for part in parts)
