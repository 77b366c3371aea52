"""Whether a folder of ours is ours alone: what is read there is obeyed, with our rights.

As ssh(1) is about ~/.ssh: a folder of another user's, or one that others can write to, is refused,
and so is one that such a folder is on the way to. Symbolic links are followed first.
"""

import grp
import os
import pwd
import stat
from typing import Final

__all__ = [
    "Untrusted",
    "not_ours",
    "open_own_folder",
    "own_folder_problem",
    "trusted_folder_problem",
]

OTHERS_WRITE: Final = 0o002
GROUP_WRITES: Final = 0o020
STEP: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Untrusted(Exception):
    """A folder that somebody else could have made, or can change; the text says which and whose."""


def open_own_folder(path: str) -> int:
    """A descriptor of a folder that is ours alone; what is missing of it is made, 0700.

    Each folder of the way is looked at after it was opened, and the next one is made and opened
    through it, so nobody can put another in between. Untrusted where one is not as it has to be.
    """
    path = os.path.realpath(path)
    parts = path.split("/")[1:] if path != "/" else []
    fd = os.open("/", STEP)
    try:
        for number, part in enumerate(parts, 1):
            here = "/" + "/".join(parts[:number])
            made = False
            try:
                new = os.open(part, STEP, dir_fd=fd)
            except FileNotFoundError:
                made = _made(part, fd)
                new = os.open(part, STEP, dir_fd=fd)
            os.close(fd)
            fd = new
            status = os.fstat(fd)
            ours = made or number == len(parts)
            problem = not_ours(here, status) if ours else _step_problem(here, status)
            if problem:
                raise Untrusted(problem)
        own = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
    finally:
        os.close(fd)
    return own


def _made(name: str, folder: int) -> bool:
    """Make a folder; False where somebody was quicker."""
    try:
        os.mkdir(name, 0o700, dir_fd=folder)
    except FileExistsError:
        return False
    return True


def own_folder_problem(path: str) -> str:
    """What is wrong with a folder that has to be ours alone, as a sentence; "" where nothing is.

    One that is not there yet is fine where what is there of its path is.
    """
    path = os.path.realpath(path)
    try:
        problem = not_ours(path, os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        problem = ""
    except OSError as error:
        return f"{path}: {error.strerror}"
    return problem or _way_problem(os.path.dirname(path))


def trusted_folder_problem(path: str) -> str:
    """The same for a folder that we only read, and that may be root's: a program in it is run."""
    return _way_problem(os.path.realpath(path))


def not_ours(path: str, status: os.stat_result) -> str:
    """The same for one file or folder, whatever is above it."""
    if status.st_uid != os.geteuid():
        return f"{path} belongs to user {_name_of(status.st_uid)}"
    return _open_to_others(path, status)


def _way_problem(path: str) -> str:
    """The folders above: those who can write there can put another folder in the place of ours."""
    while True:
        try:
            status = os.stat(path, follow_symlinks=False)
        except FileNotFoundError:
            pass
        except OSError as error:
            return f"{path}: {error.strerror}"
        else:
            problem = _step_problem(path, status)
            if problem:
                return problem
        if path == "/":
            return ""
        path = os.path.dirname(path)


def _step_problem(path: str, status: os.stat_result) -> str:
    trusted = {0, os.geteuid(), os.stat("/").st_uid}  # in a user namespace, nobody owns the root
    if status.st_uid not in trusted:
        return f"{path} belongs to user {_name_of(status.st_uid)}"
    if status.st_mode & stat.S_ISVTX:  # as /tmp: there, nobody can rename what is ours
        return ""
    return _open_to_others(path, status)


def _open_to_others(path: str, status: os.stat_result) -> str:
    mode = stat.S_IMODE(status.st_mode)
    if mode & OTHERS_WRITE or (mode & GROUP_WRITES and not _is_private_group(status.st_gid)):
        return f"{path} can be written by other users (mode {mode:04o})"
    return ""


def _is_private_group(gid: int) -> bool:
    """Whether nobody but us, or root, is in it: the group that many systems make for each user.

    Those whose primary group it is are in it as well, and in no list of its members: passwd(5).
    """
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    own = gid == 0 or (gid == user.pw_gid and group.gr_name == user.pw_name)
    if not own or not set(group.gr_mem) <= {user.pw_name, "root"}:
        return False
    return all(each.pw_uid in (0, user.pw_uid) for each in pwd.getpwall() if each.pw_gid == gid)


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
