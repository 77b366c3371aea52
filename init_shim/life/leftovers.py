"""What outlives its processes: System V's objects (sysvipc(7)), POSIX shared memory
(shm_overview(7)) and message queues (mq_overview(7)).

What one life of the workload leaves is removed before the next one begins, as a container's goes
with its namespace.
"""

import os

import _guestsys

from microguest.init_shim import tracers
from microguest.init_shim.mounts import open_proc

__all__ = ["Leftovers"]

KINDS = (0, 1, 2)  # of _guestsys.ipc_objects
FOLDERS = ("/dev/shm", "/dev/mqueue")  # noqa: S108  not a temporary file
FILES = 16384  # of each folder that are looked at between two lives
PF_KTHREAD = 0x00200000
FLAGS, THREADS = 6, 17  # fields 9 and 20 of proc_pid_stat(5), counted from the state


class Leftovers:
    """Made before the workload can mount anything; `clear` them between its lives.

    Each folder is held, as what is mounted over it later may be a share of the host's, or never
    answer.
    """

    def __init__(self) -> None:
        self._folders = [fd for fd in map(open_folder, FOLDERS) if fd >= 0]

    def clear(self, agent: int) -> None:
        """Remove what nobody has. Where only the agent runs, that is everything.

        Beside processes of hosts, it is the shared memory that nobody has attached and the queues
        whose last users have ended: whose the rest is cannot be known. Raises nothing.
        """
        # All of it first: who starts while it is removed shall find nothing of its own gone.
        objects = [(each, found) for each in KINDS for found in objects_of(each)]
        files = [(folder, name) for folder in self._folders for name in files_in(folder)]
        if not (objects or files):
            return
        alone = not others_run({os.getpid(), agent})
        for each, (identity, attached, users) in objects:
            if alone or (not attached and any(users) and all(map(has_ended, users))):
                try:
                    _guestsys.ipc_remove(each, identity)
                except OSError:
                    pass  # somebody else has
        for folder, name in files if alone else ():
            try:
                os.unlink(name, dir_fd=folder)
            except OSError:
                pass  # a directory, or something is mounted on it


def objects_of(number: int) -> "list[tuple[int, int, tuple[int, int]]]":
    """System V's of one kind; see _guestsys.ipc_objects."""
    try:
        return _guestsys.ipc_objects(number)
    except OSError:
        return []  # a kernel without them


def files_in(folder: int) -> "list[str]":
    """The first FILES names in a folder, directories among them."""
    names: list[str] = []
    try:
        listed = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
        try:
            with os.scandir(listed) as entries:
                for entry in entries:
                    names.append(entry.name)
                    if len(names) == FILES:
                        break
        finally:
            os.close(listed)
    except OSError:
        pass  # those that were seen until then
    return names


def open_folder(path: str) -> int:
    """What is mounted there now; -1 where there is nothing."""
    try:
        return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return -1


def has_ended(pid: int) -> bool:
    """Also where PID 1 has not reaped it yet. 0 is nobody."""
    if not pid:
        return True
    try:
        os.kill(pid, 0)
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ProcessLookupError:
        return True
    except OSError:  # somebody else's child, or not ours to signal
        return False


def others_run(known: set[int]) -> bool:
    """Whether anybody does but these, the kernel's own, and who has ended."""
    try:
        folder = open_proc(".")
        try:
            names = os.listdir(folder)
        finally:
            os.close(folder)
    except OSError:
        return True
    return any(
        name.isdecimal() and int(name) not in known and runs(tracers.stat_fields(name))
        for name in names
    )


def runs(fields: "list[str]") -> bool:
    """By its proc_pid_stat(5); [] has gone. Who has ended may have threads that have not."""
    if not fields or int(fields[FLAGS]) & PF_KTHREAD:
        return False
    return fields[0] not in tracers.ENDED or int(fields[THREADS]) > 1
