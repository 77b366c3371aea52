"""Paths of the image, opened and made so that no symbolic link leads out of its root.

What a path leads to is handed on as a descriptor, never as a path again: mount(2) takes it through
/proc/self/fd, which follows nothing that an image could have put there. openat2(2) does the
resolving: `..` and absolute links stay inside, /proc's magic links are refused.
"""

import errno
import os
import stat

import _guestsys

from microguest.init_shim.failure import Failure, call

TYPE_CHECKING = False  # typing itself is too heavy for PID 1
if TYPE_CHECKING:
    from typing import Self

__all__ = ["LinkOfUser", "Opened", "RootFolder"]

# linux/openat2.h
NO_MAGICLINKS = 0x02
NO_SYMLINKS = 0x04
BENEATH = 0x08
IN_ROOT = 0x10

LINKS = 40  # as path_resolution(7)


class LinkOfUser(OSError):
    """A symbolic link that is not root's, where only root's are followed. `uid`: its owner."""

    def __init__(self, uid: int, path: str) -> None:
        super().__init__(errno.ELOOP, "a symbolic link that is not root's", path)
        self.uid = uid


class Opened:
    """`with Opened(fd) as it:` closes the descriptor in the end."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def close(self) -> None:
        """As leaving the with-block."""
        os.close(self.fd)

    @property
    def path(self) -> str:
        """Leads to exactly what was opened, also when it is no longer reachable by a name."""
        return f"/proc/self/fd/{self.fd}"

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(os.fstat(self.fd).st_mode)

    @property
    def flags(self) -> int:
        """ST_ flags of its mount and file system together, as statvfs(3)."""
        return os.fstatvfs(self.fd).f_flag

    def is_same(self, other: "Opened") -> bool:
        """Whether both are one file (of one file system)."""
        mine, others = os.fstat(self.fd), os.fstat(other.fd)
        return (mine.st_dev, mine.st_ino) == (others.st_dev, others.st_ino)


class RootFolder(Opened):
    """The directory that paths are resolved in, as if it were `/`."""

    def __init__(self, path: str) -> None:
        with call("open", path):
            super().__init__(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))

    def open(self, path: str) -> Opened:
        """What `path` leads to, as an O_PATH descriptor. Raises Failure."""
        with call("openat2", path, hint=hint_for(path)):
            return self.resolve(path)

    def read(self, path: str, most: int) -> bytes:
        """The content of the regular file that `path` leads to. Raises OSError, and never waits.

        EFBIG: it is larger than `most`. EINVAL: it is something else, of which nothing was opened.
        A file of /proc, which is the kernel's log perhaps, reads as empty: it has no size.
        """
        with self.resolve(path) as found:
            status = os.fstat(found.fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", path)
            if status.st_size > most:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
            with Opened(os.open(found.path, flags)) as file:
                return os.read(file.fd, status.st_size)

    def open_target(self, path: str, *, directory: bool, create: bool) -> Opened:
        """Where something is to be mounted: `path`, made where it is missing and `create` says so.

        A missing one is made as a directory, or as an empty file. What is there must be of the kind
        that is asked for. Links that are not root's are no way to it: see `open_trusted`. Raises
        Failure.
        """
        self._refuse_users_links(path)
        try:
            found = self.resolve(path)
        except OSError as error:
            if error.errno != errno.ENOENT or not create:
                hint = "" if error.errno != errno.ENOENT else "it is missing and not to be made"
                with call("openat2", path, hint=hint or hint_for(path)):
                    raise
            found = self.make(path, directory=directory)
        if found.is_directory != directory:
            os.close(found.fd)
            is_there, wanted = ("file", "directory") if directory else ("directory", "file")
            raise Failure(
                f"{path} is a {is_there} and a {wanted} is to be mounted there",
                syscall="openat2",
                path=path,
                errno=errno.ENOTDIR if directory else errno.EISDIR,
            )
        return found

    def make(self, path: str, *, directory: bool) -> Opened:
        """Make what is missing of `path`, one name after the other.

        Each is made in the directory that the names before it lead to, where a link that dangles
        counts as there: nothing is ever made through one.
        """
        names = [name for name in path.split("/") if name]
        parent: Opened = self.resolve("/")
        for count, name in enumerate(names, start=1):
            so_far = "/" + "/".join(names[:count])
            with parent:
                try:
                    found = self.resolve(so_far)
                except FileNotFoundError:
                    found = make_entry(parent, name, so_far, directory or count < len(names))
            parent = found
        return parent

    def open_trusted(self, path: str, *, make: str = "") -> Opened:
        """As `resolve`, where only root's links are followed. Raises OSError.

        A user's own may lead where that user may do nothing, and root would do it there. ELOOP:
        there is one (LinkOfUser), or one has changed meanwhile, or there are too many. What is
        missing is made, the last as `make` says: "directory", "file", or "" for nothing at all.
        """
        ahead = names_of(path)
        behind: list[str] = []  # names that are no links
        links = 0
        while ahead:
            name = ahead.pop()
            if name == "..":
                del behind[-1:]
                continue
            with self._open_really(behind, os.O_DIRECTORY) as parent:
                place = find_or_make(parent.fd, name, make and ("directory" if ahead else make))
            behind.append(name)
            with place:
                status = os.fstat(place.fd)
                if not stat.S_ISLNK(status.st_mode):
                    continue
                links += 1
                if status.st_uid != 0:
                    raise LinkOfUser(status.st_uid, "/" + "/".join(behind))
                if links > LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
                target = os.readlink("", dir_fd=place.fd)
            if target.startswith("/"):
                behind.clear()
            del behind[-1:]
            ahead += names_of(target)
        return self._open_really(behind)

    def _refuse_users_links(self, path: str) -> None:
        """On the way to where something is to be mounted, before anything of the image runs."""
        try:
            self.open_trusted(path).close()
        except LinkOfUser as error:
            raise Failure(
                f"{path} leads through {error.filename}, a symbolic link of user {error.uid}; what "
                "is done there for root has to be where root says: give the path that it leads to",
                syscall="openat2",
                path=path,
                errno=errno.ELOOP,
            ) from None
        except OSError:
            pass  # to be found, or made, by who has the words for it

    def _open_really(self, names: list[str], flags: int = 0) -> Opened:
        """What is there, if none of its names is a link by now. Raises OSError."""
        flags |= os.O_PATH | os.O_CLOEXEC
        path = "/" + "/".join(names)
        return Opened(_guestsys.openat2(self.fd, path, flags, 0, IN_ROOT | NO_SYMLINKS))

    def resolve(self, path: str) -> Opened:
        """As `open`, with a bare OSError."""
        flags = os.O_PATH | os.O_CLOEXEC
        return Opened(_guestsys.openat2(self.fd, path, flags, 0, IN_ROOT | NO_MAGICLINKS))


def names_of(path: str) -> list[str]:
    """The parts of a path that lead somewhere, last one first."""
    return [name for name in reversed(path.split("/")) if name not in ("", ".")]


def find_or_make(folder: int, name: str, make: str) -> Opened:
    """What `name` is in a folder, a link itself and not what it leads to. Raises OSError."""
    flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return Opened(os.open(name, flags, dir_fd=folder))
    except FileNotFoundError:
        if not make:
            raise
    make_new(folder, name, directory=make == "directory")
    return Opened(os.open(name, flags, dir_fd=folder))


def make_new(folder: int, name: str, *, directory: bool) -> None:
    """Make a directory or an empty file, unless something of that name is there. OSError."""
    try:
        if directory:
            os.mkdir(name, 0o755, dir_fd=folder)
        else:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            os.close(os.open(name, flags, 0o644, dir_fd=folder))
    except FileExistsError:
        pass


def make_entry(parent: Opened, name: str, path: str, directory: bool) -> Opened:
    """Make `name`, which `path` stands for in messages, in `parent` and open it."""
    with call("mkdir" if directory else "open", path):
        try:
            if directory:
                os.mkdir(name, 0o755, dir_fd=parent.fd)
            else:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                os.close(os.open(name, flags, 0o644, dir_fd=parent.fd))
        except FileExistsError:
            raise Failure(
                f"{path} is a symbolic link that leads nowhere; nothing is made through a link",
                syscall="openat2",
                path=path,
                errno=errno.ENOENT,
            ) from None
    with call("openat2", path):
        flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
        return Opened(_guestsys.openat2(parent.fd, name, flags, 0, BENEATH | NO_SYMLINKS))


def hint_for(path: str) -> str:
    return f"{path} is a path of the image; its links stay in the image"
