"""Whether a folder of ours is ours alone: what is read there is obeyed, with our rights.

As ssh(1) is about ~/.ssh: a folder of another user's, or one that others can write to, is refused,
and so is one that such a folder is on the way to. Symbolic links are followed first.
"""

import grp
import os
import pwd
import stat
from typing import Final

__all__ = ["not_ours", "own_folder_problem", "trusted_folder_problem"]

OTHERS_WRITE: Final = 0o002
GROUP_WRITES: Final = 0o020


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
    trusted = {0, os.geteuid(), os.stat("/").st_uid}  # in a user namespace, nobody owns the root
    while True:
        try:
            status = os.stat(path, follow_symlinks=False)
        except FileNotFoundError:
            pass
        except OSError as error:
            return f"{path}: {error.strerror}"
        else:
            if status.st_uid not in trusted:
                return f"{path} belongs to user {_name_of(status.st_uid)}"
            if not status.st_mode & stat.S_ISVTX:  # as /tmp: there, nobody can rename what is ours
                problem = _open_to_others(path, status)
                if problem:
                    return problem
        if path == "/":
            return ""
        path = os.path.dirname(path)


def _open_to_others(path: str, status: os.stat_result) -> str:
    mode = stat.S_IMODE(status.st_mode)
    if mode & OTHERS_WRITE or (mode & GROUP_WRITES and not _is_private_group(status.st_gid)):
        return f"{path} can be written by other users (mode {mode:04o})"
    return ""


def _is_private_group(gid: int) -> bool:
    """Whether nobody but us, or root, is in it: the group that many systems make for each user."""
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    own = gid == 0 or (gid == user.pw_gid and group.gr_name == user.pw_name)
    return own and set(group.gr_mem) <= {user.pw_name, "root"}


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
