"""What the system has run out of, said so that its reader can do something about it.

For every place of the host's side that makes a sentence of an OSError. Standard library only; the
monitor imports it.
"""

import errno
import os
import resource  # here: where it is needed, no file can be opened any more
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import threading

__all__ = [
    "SHORT",
    "cannot_start",
    "explain",
    "is_short_of_threads",
    "no_thread",
    "reason",
    "start_thread",
]

# What to do, behind what the kernel calls it. {limit}: of this process's open files.
ADVICE: Final = {
    errno.EMFILE: "this program may have {limit} files open: close connections and files that are "
    "not needed, or raise the limit (ulimit -n)",
    errno.ENFILE: "all programs of this host together have as many files open as they may: end "
    "some, or raise the limit (sysctl fs.file-max)",
    errno.ENOSPC: "that file system has no room, or no more files: free some",
    errno.EDQUOT: "this user has used up its share of that file system: free some",
    errno.ENOMEM: "this host, or the cgroup of this program, has too little memory: end programs",
}
# What fork(2) and clone(2) mean by it; elsewhere it means to try again.
NO_PROCESS: Final = (
    "there are as many processes as there may be: end some, or raise the limit (ulimit -u, or "
    "pids.max of the cgroup)"
)
OF_DISKS: Final = (errno.ENOSPC, errno.EDQUOT)
SHORT: Final = frozenset(ADVICE)


def explain(error: OSError, where: str = "", *, move: str = "") -> str:
    """What happened, to what, and what to do next where something has run out.

    where: what it happened to, if the error does not name a path of its own; what the error calls
    by a relative name is in there. move: as `reason` has it.
    """
    place = place_of(error, where)
    return f"{place}: {reason(error, move=move)}" if place else reason(error, move=move)


def reason(error: OSError, *, move: str = "") -> str:
    """The same without what it happened to.

    move: the variable that says where the files of a full file system are, to be set to another
    place.
    """
    text = error.strerror or str(error)
    advice = ADVICE.get(error.errno or 0)
    if advice is None:
        return text
    if move and error.errno in OF_DISKS:
        advice += f", or set {move} to a directory on another one"
    return f"{text}: {advice.format(limit=open_files())}"


def cannot_start(program: str, error: OSError) -> str:
    """The same of a program."""
    if error.errno == errno.EAGAIN:
        return f"cannot start {program}: {error.strerror}: {NO_PROCESS}"
    return f"cannot start {program}: {reason(error)}"


def start_thread(thread: "threading.Thread") -> None:
    """Start it. OSError (EAGAIN) where there are too many; Python gives a RuntimeError for it."""
    try:
        thread.start()
    except RuntimeError as error:
        if not is_short_of_threads(error):
            raise
        raise no_thread() from error


def is_short_of_threads(error: RuntimeError) -> bool:
    """Whether it is the one that Python has for pthread_create(3), whose errno it does not say."""
    return "can't start new thread" in str(error)


def no_thread() -> OSError:
    """The same as the kernel says it."""
    return OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def place_of(error: OSError, where: str) -> str:
    """An absolute path, or `where`. A descriptor's number says nothing to anybody."""
    name = error.filename
    if isinstance(name, bytes):
        name = os.fsdecode(name)
    if not isinstance(name, str) or not name:
        return where
    return os.path.join(where, name)


def open_files() -> str:
    """How many this process may have."""
    return str(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
