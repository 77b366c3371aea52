"""Files that a host wants in place before its process starts.

All of them are written under temporary names first and renamed then, so that a request that cannot
be fulfilled changes nothing that was there. Paths are the process's: they cannot lead out of its
root, a symlink in the last place is replaced, not followed, and whatever they lead to is written
with the rights of its user. The work is done in a thread, because a file system of the image may
hang.
"""

import contextlib
import errno
import os
from collections.abc import Iterator

import _guestsys
import trio

from microguest.agent.files.rights import acting_as
from microguest.agent.state import log
from microguest.agent.threads import in_thread
from microguest.guest import bounds
from microguest.guest.errors import OperationError, operation_error
from microguest.guest.users import Identity
from microguest.guest.wire.messages import StagedFile

__all__ = ["Staged", "stage"]

RESOLVE_IN_ROOT = 0x10  # openat2(2)
PREFIX = ".microguest-"


async def stage(
    files: tuple[StagedFile, ...], cwd: bytes, owner: Identity, capabilities: int = -1
) -> "Staged":
    """Put them in place, as `agent.files.rights.acting_as` says. Raises OperationError bad_file, or
    resource_limit where there is no thread to be had.

    Then nothing has changed, as far as a rename that failed after another one allows.
    """
    staged = Staged(owner, capabilities)
    await in_thread(lambda: staged.write_all(files, cwd))
    return staged


class Staged:
    """What was written: `keep` it once the process runs, or `take_back`."""

    def __init__(self, owner: Identity, capabilities: int) -> None:
        self._owner = owner
        self._capabilities = capabilities
        self._written: list[Written] = []

    def write_all(self, files: tuple[StagedFile, ...], cwd: bytes) -> None:
        """Every file under its temporary name, then every rename. Raises OperationError."""
        try:
            with acting_as(self._owner, self._capabilities):
                self._write_all(files, cwd)
        except OSError as error:
            raise bad_rights(self._owner, error) from None

    def _write_all(self, files: tuple[StagedFile, ...], cwd: bytes) -> None:
        try:
            for file in files:
                with told(file, self._owner):
                    self._written.append(Written(os.path.join(cwd, path_of(file)), self._owner))
                    self._written[-1].fill(file)
            for file, written in zip(files, self._written, strict=True):
                with told(file, self._owner):
                    written.put_in_place()
        except BaseException:
            self._remove()
            raise

    def keep(self) -> None:
        """They stay."""
        for written in self._written:
            written.close()
        self._written.clear()

    async def take_back(self) -> None:
        """Remove what is new; what took an older file's place cannot be undone and stays."""
        with trio.CancelScope(shield=True):
            try:
                await in_thread(self._take_back)
            except OperationError as error:  # the thread that wrote them is another's by now
                log(f"files of a process that did not start stay: {error.message}")

    def _take_back(self) -> None:
        with acting_as(self._owner, self._capabilities):
            self._remove()

    def _remove(self) -> None:
        for written in reversed(self._written):
            written.remove()
            written.close()
        self._written.clear()


class Written:
    """One file on its way: made by `path`'s directory's descriptor, whatever happens to names."""

    def __init__(self, path: bytes, owner: Identity) -> None:
        folder, self._name = os.path.split(path)
        self._owner = owner
        self._temporary = os.fsencode(PREFIX + os.urandom(8).hex())
        self._present: bytes | None = None  # the name that it has now
        if self._name in (b"", b".", b".."):
            raise IsADirectoryError(21, "names a directory", path)
        root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            flags = os.O_PATH | os.O_DIRECTORY
            self._folder = _guestsys.openat2(
                root, os.fsdecode(folder or b"/"), flags, 0, RESOLVE_IN_ROOT
            )
        finally:
            os.close(root)

    def fill(self, file: StagedFile) -> None:
        """Content, owner and mode, in this order: nobody sees more than he may. OSError."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self._temporary, flags, 0o600, dir_fd=self._folder)
        self._present = self._temporary
        try:
            rest = memoryview(file.data)
            while rest:
                rest = rest[os.write(fd, rest) :]
            status = os.fstat(fd)  # its folder may pass on a group
            if (status.st_uid, status.st_gid) != (self._owner.uid, self._owner.gid):
                os.fchown(fd, self._owner.uid, self._owner.gid)
            os.fchmod(fd, file.mode)
        finally:
            os.close(fd)

    def put_in_place(self) -> None:
        """Give it its name, in place of whatever file has it. Raises OSError."""
        try:
            os.lstat(self._name, dir_fd=self._folder)
            replaces = True
        except FileNotFoundError:
            replaces = False
        os.rename(self._temporary, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        self._present = None if replaces else self._name

    def remove(self) -> None:
        """Unless it has taken another file's place."""
        if self._present is not None:
            try:
                os.unlink(self._present, dir_fd=self._folder)
            except OSError:
                pass  # somebody else has removed it
            self._present = None

    def close(self) -> None:
        """Let go of the directory."""
        os.close(self._folder)


def path_of(file: StagedFile) -> bytes:
    """The path's bytes. Raises OperationError bad_file where they cannot be one."""
    try:
        path = file.path.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        path = b""
    if not path or b"\0" in path:
        raise operation_error(
            "bad_file", f"files: {file.path!r:.200} is not a path", {"path": cut(file.path)}
        )
    return path


@contextlib.contextmanager
def told(file: StagedFile, owner: Identity) -> Iterator[None]:
    """What fails is an error for the host, OperationError bad_file."""
    try:
        yield
    except OSError as error:
        why = error.strerror
        if error.errno in (errno.EACCES, errno.EPERM):
            why = f"user {owner.uid}, whose process it is for, may not: {why}"
        raise operation_error(
            "bad_file",
            f"{file.path!r:.200}: cannot be written: {why}",
            {"step": "files", "errno": error.errno, "path": cut(file.path)},
        ) from None


def bad_rights(owner: Identity, error: OSError) -> OperationError:
    """As the start would say itself."""
    return operation_error(
        "bad_user",
        f"files: nobody can be {owner.uid}:{owner.gid} in this guest: {error.strerror}",
        {"step": "setuid", "errno": error.errno},
    )


def cut(path: str) -> str:
    return path[: bounds.ERROR_MESSAGE]
