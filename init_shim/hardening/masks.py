"""Paths that nobody can look into or write to, by mounts over them, as OCI has it.

They are in the machine's one mount tree, so they hold for processes of hosts as well. The names are
the image's own: they are resolved by openat2(2) inside the root, through no magic link.
"""

import errno
import os

from microguest.init_shim import mounts
from microguest.init_shim.confined import Opened, RootFolder
from microguest.init_shim.failure import Failure, call
from microguest.init_shim.mounts import mount

__all__ = ["hide"]

# Absent, or not to be looked at; nothing is there to be hidden then.
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
NEEDED = ("/", "/proc", "/sys", "/dev")  # what is in them may be masked


def hide(masked: tuple[str, ...], read_only: tuple[str, ...]) -> None:
    """Cover the first and write-protect the second, where they exist. Raises Failure.

    A directory is covered with an empty read-only tmpfs, anything else with /dev/null, as runc
    does. Call it in the image's root.
    """
    with RootFolder("/") as root:
        for path in sorted(read_only, reverse=True):  # inner ones first: a bind takes them along
            if place := find(root, path):
                with place:
                    write_protect(root, place, path)
        for path in sorted(masked, reverse=True):
            if place := find(root, path):
                with place:
                    cover(place, path)


def find(root: RootFolder, path: str) -> Opened | None:
    """What the path leads to, if it is there."""
    with call("openat2", path, hint="it was to be masked or made read-only"):
        try:
            return root.resolve(path)
        except OSError as error:
            if error.errno not in ABSENT:
                raise
    return None


def cover(place: Opened, path: str) -> None:
    """Nothing of it is seen any more."""
    with call("readlink", path):
        found = os.readlink(place.path)
    if found in NEEDED:
        raise Failure(f"masked: {path} is {found}, which PID 1 and the agent need", path=path)
    if place.is_directory:
        flags = mounts.READ_ONLY | mounts.NOSUID | mounts.NODEV | mounts.NOEXEC
        mount("tmpfs", place.path, "tmpfs", flags, "size=4k,mode=0755")
    else:
        mount("/dev/null", place.path, None, mounts.BIND)


def write_protect(root: RootFolder, place: Opened, path: str) -> None:
    """As it is, read-only. A bind takes no notice of flags, so it is mounted anew after."""
    mount(place.path, place.path, None, mounts.BIND | mounts.RECURSIVE)
    # By its name again, which leads to the new mount; the descriptor is of what is under it.
    with root.open(path) as bound:
        mounts.restrict(bound.path, mounts.READ_ONLY)
