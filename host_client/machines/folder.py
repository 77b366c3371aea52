"""Machines' folders on this host: who has a name, what is left of dead ones.

    ${XDG_STATE_HOME:-~/.local/state}/microguest/machines/NAME/
        state.json  token  console.log  console.times  console.mark  vmm.log  monitor.log  run/

A folder is locked (flock on the folder itself) as long as its machine's caller or monitor lives, so
the kernel frees the name of whatever dies. All of it is 0700: the token is in there. What another
user has made, or could have, is refused: these files say which processes get signals.
"""

import fcntl
import os
import re
import shutil
import stat
import time
from typing import Final

from microguest.guest.record import RecordError
from microguest.host_client.errors import MachineError
from microguest.host_client.forking import tell_children
from microguest.host_client.log import INFO, note
from microguest.host_client.machines.console import TAIL_MAX, printable_lines, read_log
from microguest.host_client.machines.plan import CONSOLE_SHOWN, STATE_MAX, MachineState, cut
from microguest.host_client.ownership import (
    Untrusted,
    not_ours,
    open_own_folder,
    own_folder_problem,
)
from microguest.host_client.shortage import SHORT, explain, reason

__all__ = [
    "STATE_VARIABLE",
    "Folder",
    "check_name",
    "claim",
    "is_alive",
    "machines_root",
    "names",
    "read_state",
    "sweep",
]

STATE_VARIABLE: Final = "XDG_STATE_HOME"  # says where the folder of all machines is
NAME: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}")
CLAIM_WAIT: Final = 0.5  # seconds; somebody may be looking whether the folder is locked
FOLDER_ONLY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
UNFINISHED: Final = ".new"  # ends the name of a file that is being written
KEPT_MACHINES: Final = 20  # ended ones whose state and console stay


def machines_root() -> str:
    """The folder of all machines of this user; a relative XDG_STATE_HOME is ignored.

    MachineError where it, or what it is in, is another user's or can be written by others.
    """
    base = os.environ.get(STATE_VARIABLE, "")
    if not os.path.isabs(base):
        base = os.path.expanduser("~/.local/state")
    path = os.path.join(base, "microguest", "machines")
    refuse(own_folder_problem(path))
    return path


def refuse(problem: str) -> None:
    """MachineError, where there is a problem."""
    if problem:
        raise refusal(problem)


def refusal(problem: str) -> MachineError:
    """The one error for it."""
    return MachineError(
        f"the folder of machines cannot be trusted: {problem}: set {STATE_VARIABLE} to a "
        "directory of your own that only you can write to"
    )


def check_name(name: str) -> str:
    """The name itself. MachineError where it cannot be one."""
    if not NAME.fullmatch(name):
        raise MachineError(
            f"{name!r:.80} cannot name a machine: use up to 63 letters, digits, and behind the "
            "first also _ . and -"
        )
    return name


class Folder:
    """One machine's folder, locked by this process until `release` or `remove`."""

    def __init__(self, name: str, path: str, fd: int) -> None:
        self.name = name
        self.path = path
        self.fd = fd
        self._status = os.fstat(fd)
        tell_children(self)

    def forked(self) -> None:
        """See `Owner.forked`: a copy in a child would keep the name taken."""
        self.release()

    @property
    def run(self) -> str:
        """What exists only while the machine runs: sockets, boot files."""
        return os.path.join(self.path, "run")

    def write(self, name: str, data: bytes) -> None:
        """Write a file that only this user can read; all of it or nothing.

        MachineError where another folder is in the place of the one that was locked.
        """
        folder = self._open()
        try:
            write_file(name, data, folder)
        finally:
            os.close(folder)

    def write_run(self, name: str, data: bytes) -> None:
        """The same in `run`."""
        folder = self._open()
        try:
            run = os.open("run", FOLDER_ONLY, dir_fd=folder)
        finally:
            os.close(folder)
        try:
            refuse(not_ours(self.run, os.fstat(run)))
            write_file(name, data, run)
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.path.join(self.run, name)) from error
        finally:
            os.close(run)

    def release(self) -> None:
        """Let go of the lock: somebody else holds the folder now."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def remove(self) -> None:
        """Delete the folder as far as that can be done, then let go.

        What another has put in its place stays.
        """
        try:
            if self.fd < 0:
                self.fd = self._open()
            remove_all(self.path, self.fd)
        except (OSError, MachineError):
            pass  # gone, or another's; or it stays for a `sweep`
        self.release()

    def _open(self) -> int:
        """A descriptor of it, also for who has let go of the lock. MachineError for another one."""
        folder = os.open(self.path, FOLDER_ONLY)
        if not os.path.samestat(os.fstat(folder), self._status):
            os.close(folder)
            raise refusal(f"{self.path} is not the folder that was made")
        return folder


def claim(name: str | None) -> Folder:
    """A new machine's folder. MachineError where the name is taken or nothing can be written."""
    wanted = check_name(name) if name is not None else f"m-{os.urandom(4).hex()}"
    path = os.path.join(machines_root(), wanted)
    try:
        fd = _lock_new(path, time.monotonic() + CLAIM_WAIT)
        if fd is None:
            raise MachineError(
                f"a machine named {wanted} exists already: choose another name, or end it with: "
                f"microguest stop {wanted}"
            )
        folder = Folder(wanted, path, fd)
        try:
            _clear(fd)  # what a dead machine of that name has left
            os.mkdir("run", 0o700, dir_fd=fd)
        except BaseException:
            folder.remove()
            raise
    except OSError as error:
        raise MachineError(f"cannot make the machine's folder {unmade(error, path)}") from error
    return folder


def unmade(error: OSError, path: str) -> str:
    """The path, why it could not be made, and what to do."""
    said = f"{path}: {reason(error, move=STATE_VARIABLE)}"
    if error.errno in SHORT:
        return said
    return f"{said}: set {STATE_VARIABLE} to a directory that can be written"


def names() -> list[str]:
    """Every machine that has a folder, running or not."""
    root = machines_root()
    try:
        with os.scandir(root) as entries:  # a file that somebody put there is no machine
            found = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise MachineError(f"the folder of machines {explain(error, root)}") from error
    return sorted(name for name in found if NAME.fullmatch(name))


def is_alive(name: str) -> bool:
    """Whether somebody holds the machine's folder. MachineError where that is not ours."""
    path = os.path.join(machines_root(), check_name(name))
    try:
        fd = os.open(path, FOLDER_ONLY)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise MachineError(f"machine {name}: {explain(error, path)}") from error
    try:
        refuse(not_ours(path, os.fstat(fd)))
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(fd, fcntl.LOCK_UN)  # a child that was forked just now may have a copy
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def read_state(name: str) -> MachineState | None:
    """The machine's state as its monitor wrote it last; None where there is none to be read."""
    path = os.path.join(machines_root(), check_name(name), "state.json")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or not_ours(path, status):
                return None
            state = MachineState.from_json(file.read(STATE_MAX + 1), ignore_unknown=True)
    except (OSError, RecordError):
        return None
    return state if state.name == name else None


def sweep() -> None:
    """Put in order what dead monitors left; remove the oldest of the ended machines' folders."""
    ended: list[tuple[float, str]] = []
    for name in names():
        if is_alive(name):
            continue
        state = read_state(name)
        if state is None or not (state.ended and state.kept):
            bury(name)
            state = read_state(name)
        if state is not None:
            ended.append((state.created, name))
    for _, name in sorted(ended)[:-KEPT_MACHINES]:
        remove_dead(name)


def remove_dead(name: str) -> bool:
    """Remove the folder of a machine that nobody holds. False where somebody does."""
    folder = _take_dead(name)
    if folder is not None:
        note(INFO, "machine %s: what it left is removed", name)
        folder.remove()
    return folder is not None


def bury(name: str) -> None:
    """Do for a monitor that was killed what it does at its end, where nobody holds the folder.

    The console and the state of a machine that was to be kept stay, and say how it ended; so do
    they where the state cannot be read and there is a console.
    """
    folder = _take_dead(name)
    if folder is None:
        return
    state = read_state(name)
    console = read_log(os.path.join(folder.path, "console.log"))[-TAIL_MAX:]
    note(INFO, "machine %s: its monitor was killed: what it left is put in order", name)
    if not (state.kept if state is not None else console):
        folder.remove()
        return
    if state is None:
        state = MachineState(name=name, kept=True, created=os.fstat(folder.fd).st_mtime)
    if not state.ended:
        last = printable_lines(console.decode("utf-8", "replace"))
        state = state.replace(
            phase="ended",
            status=state.status or "crashed",
            error=state.error or ("" if state.status else "its monitor was killed"),
            console=cut(last, CONSOLE_SHOWN, tail=True),
        )
        folder.write("state.json", state.to_json().encode("ascii"))
    remove_running(folder.fd)
    folder.release()


def remove_running(folder: int) -> None:
    """What a machine has only as long as it runs; its state and its logs stay.

    folder: its descriptor, as in `write_file`.
    """
    shutil.rmtree("run", ignore_errors=True, dir_fd=folder)
    for name in os.listdir(folder):
        if name in ("token", "monitor.log") or name.endswith(UNFINISHED):
            os.unlink(name, dir_fd=folder)


def remove_all(path: str, folder: int) -> None:
    """All of a folder, as far as that can be done, and the folder where nothing is in it."""
    try:
        _clear(folder, ignore_errors=True)
        os.rmdir(path)
    except OSError:
        pass


def _take_dead(name: str) -> Folder | None:
    path = os.path.join(machines_root(), check_name(name))
    fd = _lock_existing(path)
    return None if fd is None else Folder(name, path, fd)


def write_file(name: str, data: bytes, folder: int) -> None:
    """Replace a file of the folder, 0600, so that a reader sees the old or the new one.

    folder: its descriptor, so that it is the same one whatever its path leads to by now.
    """
    temporary = f"{name}.{os.urandom(8).hex()}{UNFINISHED}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(temporary, flags, 0o600, dir_fd=folder)
        try:
            with open(fd, "wb") as file:  # with a buffer: one write(2) may take a part only
                file.write(data)
            os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            os.unlink(temporary, dir_fd=folder)
            raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, name) from error  # not the temporary's name


def _lock_new(path: str, give_up: float) -> int | None:
    """Make the folder where it is missing and lock it; None where another has it."""
    try:
        root = open_own_folder(os.path.dirname(path))
    except Untrusted as problem:
        raise refusal(str(problem)) from problem
    try:
        while True:
            try:
                os.mkdir(os.path.basename(path), 0o700, dir_fd=root)
            except FileExistsError:
                pass
            fd = _lock_existing(path)
            if fd is not None or time.monotonic() > give_up:
                return fd
            time.sleep(0.01)
    finally:
        os.close(root)


def _lock_existing(path: str) -> int | None:
    try:
        fd = os.open(path, FOLDER_ONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        refuse(not_ours(path, os.fstat(fd)))
        # Removed or replaced while we opened it: then this lock is worth nothing.
        if os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False)):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _clear(folder: int, *, ignore_errors: bool = False) -> None:
    for name in os.listdir(folder):
        try:
            if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                shutil.rmtree(name, ignore_errors, dir_fd=folder)
            else:
                os.unlink(name, dir_fd=folder)
        except OSError:
            if not ignore_errors:
                raise
