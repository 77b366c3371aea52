"""The image's own /run, copied into the tmpfs that covers it: directories with owners, above all.

Images keep there what their programs need at the start (`/run/sshd`, `/run/postgresql`), and docker
shows it. The copy is bounded, as an image may hold anything; what is left out is said. Imported
where the image has something in /run.
"""

import os
import stat

from microguest.guest import bounds
from microguest.init_shim.confined import Opened
from microguest.init_shim.failure import call
from microguest.init_shim.reporter import leave_out

__all__ = ["copy"]

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def copy(source: str, target: str) -> None:
    """Copy what is in `source`, and its own owner and mode, to the directory `target`.

    At most RUN_ENTRIES of them, RUN_BYTES together, RUN_DEPTH deep. Devices, extended attributes
    and what cannot be read are left out. Nothing in it is followed. Raises Failure.
    """
    with (
        call("open", source),
        Opened(os.open(source, FOLDER)) as there,
        Opened(os.open(target, FOLDER)) as here,
    ):
        room = Room()
        copy_entries(there.fd, here.fd, room, bounds.RUN_DEPTH)
        give(here.fd, os.fstat(there.fd))
    if room.left_out:
        leave_out(
            f"{room.left_out} entries of the image's /run are not there, {room.first} among them"
        )


class Room:
    """What may still be copied, and what was not."""

    def __init__(self) -> None:
        self.entries = bounds.RUN_ENTRIES
        self.bytes = bounds.RUN_BYTES
        self.left_out = 0
        self.first = ""

    def leave_out(self, name: str) -> None:
        self.left_out += 1
        self.first = self.first or f"{name!a:.100}"


def copy_entries(source: int, target: int, room: Room, depth: int) -> None:
    """All in one directory; what fails is left out."""
    with os.scandir(source) as entries:
        for entry in entries:
            if not room.entries:
                room.leave_out(entry.name)
                return  # the rest is not even counted
            room.entries -= 1
            try:
                copy_entry(source, target, entry.name, room, depth)
            except (OSError, ValueError):
                room.leave_out(entry.name)


def copy_entry(source: int, target: int, name: str, room: Room, depth: int) -> None:
    """One of any kind. Raises OSError, or ValueError for what is not copied."""
    info = os.stat(name, dir_fd=source, follow_symlinks=False)
    if stat.S_ISDIR(info.st_mode):
        if not depth:
            raise ValueError(name)
        os.mkdir(name, 0o700, dir_fd=target)
        with (
            Opened(os.open(name, FOLDER, dir_fd=source)) as there,
            Opened(os.open(name, FOLDER, dir_fd=target)) as here,
        ):
            copy_entries(there.fd, here.fd, room, depth - 1)
            give(here.fd, info)
    elif stat.S_ISLNK(info.st_mode):
        os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
        try:
            os.chown(name, info.st_uid, info.st_gid, dir_fd=target, follow_symlinks=False)
        except OSError:
            pass  # as in `give`
    elif stat.S_ISREG(info.st_mode):
        copy_file(source, target, name, room)
    elif stat.S_ISFIFO(info.st_mode):
        os.mkfifo(name, 0o600, dir_fd=target)
        with Opened(os.open(name, READ, dir_fd=target)) as here:
            give(here.fd, info)
    else:
        raise ValueError(name)


def copy_file(source: int, target: int, name: str, room: Room) -> None:
    with Opened(os.open(name, READ, dir_fd=source)) as there:
        info = os.fstat(there.fd)
        if not stat.S_ISREG(info.st_mode) or info.st_size > room.bytes:
            raise ValueError(name)
        data = os.read(there.fd, room.bytes)
    room.bytes -= len(data)
    with Opened(os.open(name, WRITE, 0o600, dir_fd=target)) as here:
        while data:
            data = data[os.write(here.fd, data) :]
        give(here.fd, info)


def give(fd: int, info: os.stat_result) -> None:
    """Owner, mode and times. Raises OSError for the latter two only.

    An ordinary user's namespace has no number for most owners: there it stays root's.
    """
    try:
        os.fchown(fd, info.st_uid, info.st_gid)
    except OSError:
        pass
    os.fchmod(fd, stat.S_IMODE(info.st_mode))
    os.utime(fd, ns=(info.st_atime_ns, info.st_mtime_ns))
