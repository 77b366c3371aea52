"""Paths that nobody can look into or write to, by mounts over them, as OCI has it.

They are in the machine's one mount tree, so they hold for processes of hosts as well. The names are
the image's own: they are resolved by openat2(2) inside the root, through no magic link.
"""

import errno
import os
import stat

import _guestsys

from init_shim import mounts
from init_shim.failure import Failure, call
from init_shim.mounts import mount

TYPE_CHECKING = False  # typing itself is too heavy for PID 1
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["hide"]

# linux/openat2.h
NO_MAGICLINKS = 0x02
IN_ROOT = 0x10
AT_FDCWD = -100
# Absent, or not to be looked at; nothing is there to be hidden then.
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
NEEDED = ("/", "/proc", "/sys", "/dev")  # what is in them may be masked
KEPT_FLAGS = mounts.NOSUID | mounts.NODEV | mounts.NOEXEC  # statvfs(3) has the same numbers


def hide(masked: tuple[str, ...], read_only: tuple[str, ...]) -> None:
    """Cover the first and write-protect the second, where they exist. Raises Failure.

    A directory is covered with an empty read-only tmpfs, anything else with /dev/null, as runc
    does. Call it in the image's root.
    """
    for path in sorted(
        read_only, reverse=True
    ):  # inner ones first: a bind takes along what is in it
        with_target(path, write_protect)
    for path in sorted(masked, reverse=True):
        with_target(path, cover)


def with_target(path: str, act: "Callable[[str, str], None]") -> None:
    """Call `act` with what a mount can name the path by, if it is there, and the path."""
    try:
        fd = _guestsys.openat2(AT_FDCWD, path, os.O_PATH | os.O_CLOEXEC, 0, IN_ROOT | NO_MAGICLINKS)
    except OSError as error:
        if error.errno in ABSENT:
            return
        raise Failure(
            f"openat2 {path}: {error.strerror}; it was to be masked or made read-only",
            syscall="openat2",
            path=path,
            errno=error.errno or 0,
        ) from None
    try:
        act(f"/proc/self/fd/{fd}", path)
    finally:
        os.close(fd)


def cover(target: str, path: str) -> None:
    """Nothing of it is seen any more."""
    with call("readlink", path):
        found = os.readlink(target)
    if found in NEEDED:
        raise Failure(f"masked: {path} is {found}, which PID 1 and the agent need", path=path)
    with call("stat", path):
        mode = os.stat(target).st_mode
    if stat.S_ISDIR(mode):
        flags = mounts.READ_ONLY | mounts.NOSUID | mounts.NODEV | mounts.NOEXEC
        mount("tmpfs", target, "tmpfs", flags, "size=4k,mode=0755")
    else:
        mount("/dev/null", target, None, mounts.BIND)


def write_protect(target: str, path: str) -> None:
    """As it is, read-only. A bind takes no notice of flags, so it is mounted anew after."""
    mount(target, target, None, mounts.BIND | mounts.RECURSIVE)

    def remount(bound: str, path: str) -> None:
        with call("statvfs", path):
            kept = os.statvfs(bound).f_flag & KEPT_FLAGS
        flags = mounts.REMOUNT | mounts.BIND | mounts.READ_ONLY | kept
        mount(None, bound, None, flags)

    # By its name again, which leads to the new mount; the descriptor is of what is under it.
    with_target(path, remount)
