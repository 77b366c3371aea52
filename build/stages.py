"""The build's cache: finished stages, kept under a name that holds the hash of their inputs.

A stage is a folder that is complete or absent: it is made under a temporary name, flushed to the
disk and then renamed. One lock serialises builds that share a cache. Nothing here knows what is
built. Imports the standard library, and `host_client.ownership` once there is a cache to open.
"""

import contextlib
import fcntl
import glob
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

# For people who wait: the slowest stages are CPython's.
SLOWEST = "two minutes"
# A build step that takes longer than this hangs: the slowest takes one minute on two cores.
COMMAND_TIMEOUT = 1800.0
# What a failed command's log may contribute to the error message.
LOG_TAIL = 4000
# How programs say that a disk is full: it is that, whatever else they say.
NO_ROOM = (b"No space left on device", b"Disk quota exceeded")
_PARTIAL = ".partial-"


class BuildError(Exception):
    """The build cannot go on; the message says what failed and what to do about it."""


@dataclass(frozen=True, kw_only=True)
class Cache:
    """The cache folder, held under its lock by this process."""

    root: str

    def stage(self, name: str, key: str, make: Callable[[str], None]) -> str:
        """The folder of the stage `name` with input hash `key`, made by `make(folder)` if absent.

        `make` gets an empty folder that is thrown away when it raises.
        """
        final = os.path.join(self.root, f"{name}-{key[:16]}")
        if os.path.isdir(final):
            return final
        say(f"{name}: building, which takes up to {SLOWEST} on two idle cores")
        started = time.monotonic()
        partial = tempfile.mkdtemp(prefix=f"partial-{name}-", dir=self.root)
        try:
            os.chmod(partial, 0o755)  # noqa: S103 - mkdtemp's 0700 would stay; nothing here is secret
            make(partial)
            # Else a power cut may leave the name with empty files, which would never be made again.
            run(["sync", "-f", partial])
            os.rename(partial, final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        say(f"{name}: done in {time.monotonic() - started:.1f} s")
        return final

    def forget(self, name: str) -> None:
        """Remove all results of a stage, so that it is made again."""
        self.keep_newest(name, 0)

    def keep_newest(self, name: str, count: int) -> None:
        """Remove all but the newest `count` results of a stage that every edit makes anew."""
        prefix = os.path.join(self.root, f"{name}-")
        stages = [path for path in glob.glob(prefix + "*") if len(path) == len(prefix) + 16]
        for path in sorted(stages, key=os.path.getmtime, reverse=True)[count:]:
            shutil.rmtree(path)

    def folder(self, name: str) -> str:
        """A folder that outlives builds and is not a stage (the compiler's own cache)."""
        path = os.path.join(self.root, name)
        os.makedirs(path, exist_ok=True)
        return path


@contextlib.contextmanager
def open_cache() -> Iterator[Cache]:
    """Lock the cache for this process; another build waits here for its turn.

    Until it is closed, temporary files are in it too: what an interrupted build left half-made is
    removed. Raises BuildError where the folder cannot be made, or others could write to it: the
    compiler is run from there.
    """
    # Packages.py has no use for it.
    from microguest.host_client.ownership import Untrusted, open_own_folder

    root = cache_root()
    try:
        os.close(open_own_folder(root))
        lock = os.open(os.path.join(root, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except (OSError, Untrusted) as error:
        raise BuildError(
            f"cannot use the cache {root}: {error}; set MICROGUEST_CACHE to a directory that only "
            "you can write to"
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another build that uses {root}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for entry in os.listdir(root):
            if entry.startswith("partial-"):
                shutil.rmtree(os.path.join(root, entry), ignore_errors=True)
        with _scratch(root):
            yield Cache(root=root)
    finally:
        os.close(lock)


@contextlib.contextmanager
def _scratch(root: str) -> Iterator[None]:
    """Where `tempfile` makes its files meanwhile; not in /tmp, where no other build sweeps."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="partial-scratch-", dir=root) as work:
        tempfile.tempdir = work
        try:
            yield
        finally:
            tempfile.tempdir = before


def cache_root() -> str:
    """`$MICROGUEST_CACHE/build`, or `microguest/build` in the XDG cache folder."""
    base = os.environ.get("MICROGUEST_CACHE")
    if not base:
        xdg = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        base = os.path.join(xdg, "microguest")
    return os.path.join(os.path.abspath(base), "build")


def run(
    argv: Sequence[str],
    *,
    cwd: str | None = None,
    env: Mapping[str, str] | None = None,
    log: str | None = None,
) -> str:
    """Run a build command and return its standard output.

    `env` replaces the environment; `log` names a file that gets both streams (then "" is returned).
    Raises BuildError with a line that can be pasted into a shell and the end of what it said.
    """
    new = os.O_WRONLY | os.O_CREAT | os.O_TRUNC  # the end of an earlier command's log misleads
    sink = subprocess.PIPE if log is None else os.open(log, new, 0o644)
    try:
        done = subprocess.run(
            argv,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.PIPE if log is None else subprocess.STDOUT,
            timeout=COMMAND_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{shell_line(argv, cwd)}: {error}") from error
    finally:
        if log is not None:
            os.close(sink)
    if done.returncode == 0:
        return done.stdout.decode(errors="replace") if log is None else ""
    said = done.stderr if log is None else read_bytes(log)
    tail = said[-LOG_TAIL:].decode(errors="replace")
    if any(words in said for words in NO_ROOM):
        raise BuildError(
            f"no space left on the device: free some, or set MICROGUEST_CACHE to a directory on "
            f"another one ({cache_root()} is where builds are kept): {shell_line(argv, cwd)}"
        )
    raise BuildError(f"exit {done.returncode} from: {shell_line(argv, cwd)}\n{tail}")


def shell_line(argv: Sequence[str], cwd: str | None) -> str:
    """The command as one line for a shell."""
    line = shlex.join(argv)
    return f"cd {shlex.quote(cwd)} && {line}" if cwd else line


def read_bytes(path: str) -> bytes:
    """The whole file."""
    with open(path, "rb") as file:
        return file.read()


def write_atomically(path: str, content: bytes, mode: int = 0o644) -> None:
    """Replace `path` by a file with `content`: readers see the old or the new one, never a part."""
    descriptor, partial = tempfile.mkstemp(dir=os.path.dirname(path), prefix=_PARTIAL)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        os.chmod(partial, mode)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def remove_partial(folder: str) -> None:
    """Remove what a killed `write_atomically` has left in `folder`; no other may be at work."""
    for name in os.listdir(folder):
        if name.startswith(_PARTIAL):
            os.unlink(os.path.join(folder, name))


def file_sha256(path: str) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_sha256(folder: str, suffixes: tuple[str, ...]) -> str:
    """One SHA-256 over names and contents of the files below `folder` that end in `suffixes`."""
    total = hashlib.sha256()
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(files):
            if name.endswith(suffixes):
                path = os.path.join(where, name)
                total.update(f"{os.path.relpath(path, folder)}\0{file_sha256(path)}\n".encode())
    return total.hexdigest()


def say(text: str) -> None:
    """One line of progress, on standard error: standard output is for results."""
    print(f"build: {text}", file=sys.stderr, flush=True)
