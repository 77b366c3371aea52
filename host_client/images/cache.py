"""The image cache: finished disks and directories on the host, shared by processes, bounded.

    DIRECTORY/entries/KEY/   a finished entry: its content and entry.json
    DIRECTORY/tmp/NAME/      a work area, locked by whoever works in it
    DIRECTORY/locks/KEY      locked while KEY is being made

An entry appears by rename, so a killed process leaves only a work area, which the next process
finds unlocked and removes. A user of an entry holds a shared flock on its directory; eviction
needs an exclusive one. All locks are flock(2): the kernel drops them with the process.
"""

import contextlib
import fcntl
import json
import os
import shutil
import stat
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator

from microguest.host_client.errors import ImageError
from microguest.host_client.ownership import Untrusted, open_own_folder
from microguest.host_client.shortage import SHORT, reason

DEFAULT_MAX_BYTES = 10 << 30
BUILD_WAIT_SECONDS = 1800.0
"""How long to wait for another process that is making the same entry."""

_LOCK_POLL_SECONDS = 0.05
_MAX_RECORD_BYTES = 4096


def default_directory() -> str:
    """${XDG_CACHE_HOME:-~/.cache}/microguest/images; a relative XDG_CACHE_HOME is ignored."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.expanduser("~/.cache")
    return os.path.join(base, "microguest", "images")


class Lease:
    """Keeps a cache entry from being evicted until closed, collected, or the process ends."""

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self._release = weakref.finalize(self, os.close, fd)

    def close(self) -> None:
        """Give the entry up. May be called more than once."""
        self._release()


class Cache:
    """A cache directory; several processes may use it at once. Holds nothing open itself."""

    def __init__(self, directory: str, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.directory = directory
        self.max_bytes = max_bytes
        self._entries = os.path.join(directory, "entries")
        self._tmp = os.path.join(directory, "tmp")
        self._locks = os.path.join(directory, "locks")

    def obtain(
        self,
        key: str,
        build: Callable[[str, str], None],
        waiting: Callable[[], None] = lambda: None,
    ) -> Lease:
        """A lease on the entry `key`, made by `build(work, content)` if it is not there yet.

        `build` fills the empty directory `content` and may use `work`; both are removed if it
        raises. `waiting` is called every so often while another process builds the same. Raises
        ImageError when the cache cannot be used.
        """
        self._prepare()
        lease = self._open(key)
        if lease is not None:
            return lease
        with self._building(key, waiting):
            lease = self._open(key)
            if lease is not None:
                return lease
            self._sweep()
            with self._work_area() as work:
                content = os.path.join(work, "content")
                os.mkdir(content, 0o700)
                build(work, content)
                self._record(content)
                os.rename(content, os.path.join(self._entries, key))
            lease = self._open(key)
        if lease is None:
            raise ImageError(f"image cache {self.directory}: a new entry went away: try again")
        self._evict()
        return lease

    def _prepare(self) -> None:
        """Make the directories; refuse one that another user could write to, or replace."""
        try:
            for path in (self.directory, self._entries, self._tmp, self._locks):
                os.close(open_own_folder(path))
        except Untrusted as problem:
            raise ImageError(
                f"image cache {self.directory} cannot be trusted: {problem}: set XDG_CACHE_HOME to "
                "a directory of your own that only you can write to"
            ) from problem
        except OSError as error:
            why = reason(error, move="XDG_CACHE_HOME")
            if error.errno not in SHORT:
                why += ": set XDG_CACHE_HOME to a directory that can be written"
            raise ImageError(f"image cache {self.directory} cannot be made: {why}") from error

    def _open(self, key: str) -> Lease | None:
        path = os.path.join(self._entries, key)
        fd = _lock(path, fcntl.LOCK_SH)
        if fd is None:
            return None
        os.utime(fd)  # the time of last use, for eviction
        return Lease(path, fd)

    @contextlib.contextmanager
    def _building(self, key: str, waiting: Callable[[], None]) -> Iterator[None]:
        """Be the only one who makes `key`; waits for whoever does it now."""
        path = os.path.join(self._locks, key)
        give_up = time.monotonic() + BUILD_WAIT_SECONDS
        while True:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            fd = _lock(path, fcntl.LOCK_EX)
            if fd is not None:
                break
            if time.monotonic() > give_up:
                raise ImageError(
                    f"another process has been preparing the image for {BUILD_WAIT_SECONDS:g} s "
                    f"(it holds {path}): end it or try again"
                )
            waiting()
            time.sleep(_LOCK_POLL_SECONDS)
        try:
            yield
        finally:
            os.unlink(
                path
            )  # whoever waits for it notices that the path is gone, and makes a new one
            os.close(fd)

    @contextlib.contextmanager
    def _work_area(self) -> Iterator[str]:
        while True:
            path = tempfile.mkdtemp(dir=self._tmp)
            fd = _lock(path, fcntl.LOCK_EX)
            if fd is not None:
                break  # else a sweep took it between the two calls
        try:
            yield path
        finally:
            remove_tree(path)
            os.close(fd)

    def _record(self, content: str) -> None:
        record = json.dumps({"bytes": _disk_usage(content)})
        with open(os.path.join(content, "entry.json"), "w", encoding="utf-8") as file:
            file.write(record)

    def _recorded_bytes(self, key: str) -> int:
        try:
            with open(os.path.join(self._entries, key, "entry.json"), "rb") as file:
                return int(json.loads(file.read(_MAX_RECORD_BYTES))["bytes"])
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return 0

    def _evict(self) -> None:
        """Remove the entries that were unused longest until the rest fits; skip those in use."""
        found = []
        for key in os.listdir(self._entries):
            with contextlib.suppress(FileNotFoundError):
                used = os.stat(os.path.join(self._entries, key)).st_mtime
                found.append((used, key, self._recorded_bytes(key)))
        excess = sum(size for _, _, size in found) - self.max_bytes
        for _, key, size in sorted(found):
            if excess <= 0:
                return
            if self._remove(key):
                excess -= size

    def _remove(self, key: str) -> bool:
        path = os.path.join(self._entries, key)
        fd = _lock(path, fcntl.LOCK_EX)
        if fd is None:
            return False
        try:
            with self._work_area() as work:
                os.rename(path, os.path.join(work, "evicted"))
        finally:
            os.close(fd)
        return True

    def _sweep(self) -> None:
        """Remove work areas and lock files that killed processes have left."""
        for name in os.listdir(self._tmp):
            path = os.path.join(self._tmp, name)
            fd = _lock(path, fcntl.LOCK_EX)
            if fd is not None:
                remove_tree(path)
                os.close(fd)
        for name in os.listdir(self._locks):
            path = os.path.join(self._locks, name)
            fd = _lock(path, fcntl.LOCK_EX)
            if fd is not None:
                os.unlink(path)
                os.close(fd)


def _lock(path: str, operation: int) -> int | None:
    """Open and lock without waiting. None: someone else has it, or the path is gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, operation | fcntl.LOCK_NB)
        # Renamed or replaced while we opened it: then this lock is worth nothing.
        if os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False)):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _disk_usage(top: str) -> int:
    """Bytes that the tree occupies; each inode counted once. Its paths may be too long to open."""
    seen: set[int] = set()
    total = 0
    for _, directories, files, fd in os.fwalk(top):
        for name in (*directories, *files):
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            if status.st_ino not in seen:
                seen.add(status.st_ino)
                total += status.st_blocks * 512
    return total


def remove_tree(path: str) -> None:
    """Remove a tree that is ours, also where its directories forbid it to their owner."""
    if os.geteuid() != 0:
        for _, directories, _, fd in os.fwalk(path):
            for name in directories:
                if stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
                    os.chmod(name, 0o700, dir_fd=fd)
    shutil.rmtree(path)
