"""The workload's own cgroup: what its limits hold for, and where its OOM kills are counted.

Version 2 only (Documentation/admin-guide/cgroup-v2.rst). The agent has its own part of the same
hierarchy; what it finds beside that and is locked, it leaves alone.
"""

import errno
import fcntl
import os
import time

from microguest.guest.boot.workload import Workload

__all__ = ["LimitsUnavailable", "Most", "WorkloadCgroup", "open_cgroup"]

HIERARCHY = "/sys/fs/cgroup"
PARENT = f"{HIERARCHY}/microguest"
PATH = f"{PARENT}/workload"
CONTROLLERS = ("memory", "cpu", "pids")
CPU_PERIOD = 100_000  # microseconds, the kernel's default
BELOW = 4096  # cgroups that it may make in it, which are PID 1's to clear away
CLEAR_WAIT = 1.0  # seconds for what an earlier start has left behind to die
CLEAR_POLL = 0.002


class LimitsUnavailable(Exception):
    """The workload's limits cannot be set; the text is a sentence."""


class Most:
    """What a workload may use in any case, where the kernel can limit it; None for any amount.

    `memory`: bytes. `processes`: threads included.
    """

    def __init__(self, memory: int | None, processes: int | None) -> None:
        self.memory = memory
        self.processes = processes


def open_cgroup(workload: Workload, most: Most) -> "WorkloadCgroup | None":
    """A new one with the workload's limits. Raises LimitsUnavailable.

    None where there is no hierarchy to write to and no limit asked for. What an earlier start has
    left running there is killed, as it would be with a container.
    """
    settings = limit_files(workload)
    if not os.path.exists(f"{HIERARCHY}/cgroup.controllers"):
        if settings:
            raise LimitsUnavailable(f"limits: the guest has no cgroup v2 at {HIERARCHY}")
        return None
    try:
        return WorkloadCgroup(settings, most)
    except OSError as error:
        if not settings:
            return None
        reason = f"{error.filename}: {error.strerror}"
        raise LimitsUnavailable(f"limits: they cannot be set in a cgroup ({reason})") from None


def limit_files(workload: Workload) -> dict[str, str]:
    """What to write into which file."""
    files = {}
    if workload.memory is not None:
        files["memory.max"] = str(workload.memory)
    if workload.cpu is not None:
        files["cpu.max"] = f"{int(workload.cpu * CPU_PERIOD)} {CPU_PERIOD}"
    if workload.processes is not None:
        files["pids.max"] = str(workload.processes)
    return files


class WorkloadCgroup:
    """`fd`: its directory, for clone3(2); locked, so that no agent takes it for abandoned.

    Raises OSError with the file's name.
    """

    def __init__(self, settings: dict[str, str], most: Most) -> None:
        make_parent()
        make_empty()
        os.stat(f"{PATH}/cgroup.procs")  # the kernel's; what a workload mounted over it has none
        self.fd = os.open(PATH, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for name, text in settings.items():
                write(f"{PATH}/{name}", text)
            for name, bound in (("memory.max", most.memory), ("pids.max", most.processes)):
                if bound is not None and int(settings.get(name, bound)) >= bound:
                    write_if_there(f"{PATH}/{name}", str(bound))
            write_if_there(f"{PATH}/cgroup.max.descendants", str(BELOW))
            if "memory.max" in settings:
                write_if_there(f"{PATH}/memory.swap.max", "0")
        except BaseException:
            self.close()
            raise

    def oom_killed(self) -> bool:
        """Whether the kernel has killed in it for want of memory."""
        try:
            events = os.open("memory.events", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.fd)
        except OSError:  # no memory controller
            return False
        try:
            lines = os.read(events, 512).split(b"\n")
        except OSError:
            return False
        finally:
            os.close(events)
        return any(line.startswith(b"oom_kill ") and line[9:] != b"0" for line in lines)

    def close(self) -> None:
        """Let go of it; what runs in it runs on."""
        os.close(self.fd)


def make_parent() -> None:
    """The folder above, with the controllers that there are. Raises OSError."""
    try:
        os.mkdir(PARENT, 0o755)
    except FileExistsError:
        pass
    for folder in (HIERARCHY, PARENT):
        enable_controllers(f"{folder}/cgroup.subtree_control")


def enable_controllers(path: str) -> None:
    """Those that there are: at once, as each write changes the whole tree, or one by one."""
    every = [f"+{name}" for name in CONTROLLERS]
    try:
        write(path, " ".join(every))
    except OSError:
        for one in every:
            write_if_there(path, one)


def make_empty() -> None:
    """A new PATH, with nothing in it. Raises OSError."""
    deadline = time.monotonic() + CLEAR_WAIT
    while True:
        try:
            return os.mkdir(PATH, 0o755)
        except FileExistsError:
            if time.monotonic() > deadline:
                raise OSError(errno.EBUSY, "processes of the last start do not die", PATH) from None
        write_if_there(f"{PATH}/cgroup.kill", "1")  # since Linux 5.14
        if not remove(PATH):
            time.sleep(CLEAR_POLL)


def remove(path: str) -> bool:
    """Remove a cgroup and those below it, as far as they are empty; whether it is gone."""
    for folder, _, _ in os.walk(path, topdown=False):
        try:
            os.rmdir(folder)
        except OSError:
            continue
    return not os.path.exists(path)


def write(path: str, text: str) -> None:
    """One value into one file, which is there. Raises OSError with its name."""
    fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), path) from None
    finally:
        os.close(fd)


def write_if_there(path: str, text: str) -> None:
    """As `write`, where the kernel has it and takes it."""
    try:
        write(path, text)
    except OSError:
        pass
