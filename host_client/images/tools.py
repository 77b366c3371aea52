"""External commands: found, run with a deadline, and explained when they fail.

The one place of this package that starts processes.
"""

import contextlib
import math
import os
import resource
import select
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO

from microguest.host_client.errors import ImageError
from microguest.host_client.images import limits
from microguest.host_client.probe import kill_group
from microguest.host_client.shortage import cannot_start, start_thread

_TOLD_EVERY = 0.2  # seconds
_WORDS_SECONDS = 1.0  # from its end, for what it said last

_SYSTEM_DIRECTORIES = "/usr/local/sbin:/usr/sbin:/sbin"

# All that are run for images, and what each needs to be installed, as Debian calls it.
PACKAGES = {
    "mkfs.erofs": "erofs-utils",
    "mksquashfs": "squashfs-tools",
    "sync": "coreutils",
    "sqfstar": "squashfs-tools (4.5 or newer)",
    "tar": "tar",
    "zstd": "zstd",
}


def find_command(name: str) -> str | None:
    """The absolute path of a command, also from the sbin directories that users lack in PATH."""
    path = os.environ.get("PATH", os.defpath)
    return shutil.which(name, path=f"{path}:{_SYSTEM_DIRECTORIES}")


def require_command(name: str) -> str:
    """As `find_command`; raises ImageError naming the package when it is missing."""
    found = find_command(name)
    if found is None:
        package = PACKAGES.get(name, name)
        raise ImageError(f"{name} is not installed: install the package {package}")
    return found


def run_command(
    argv: Sequence[str],
    *,
    feed: Callable[[IO[bytes]], None] | None = None,
    exchange: Callable[[IO[bytes], IO[bytes]], None] | None = None,
    told: Callable[[], None] | None = None,
    writes_to: str | None = None,
    seconds: float = limits.COMMAND_SECONDS,
) -> str:
    """Run a command to its end and return the last of what it said.

    `feed` writes the command's stdin; or `exchange` does, and reads its stdout (see `filtered`).
    `told` is called a few times in a second while nothing but the end is waited for. `writes_to` is
    the directory whose disk is looked at when the command fails without saying why. Raises
    ImageError with a line to paste into a shell when the command cannot start, fails, or is not
    done after `seconds`; whatever `feed`, `exchange` or `told` raise passes through after the
    command was killed.
    """
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE if feed or exchange else subprocess.DEVNULL,
            stdout=subprocess.PIPE if exchange else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=_environment(),
            start_new_session=True,  # Ctrl-C reaches us alone, and we end it below
        )
    except OSError as error:
        raise ImageError(cannot_start(argv[0], error)) from error
    late = threading.Event()
    until = time.monotonic() + seconds + _WORDS_SECONDS  # it is killed before

    def expire() -> None:
        late.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # it is reaped at the end of this

    words = _LastWords(process.stderr)
    timer = threading.Timer(seconds, expire)
    try:
        limit_processor_time(process.pid, seconds)
        try:
            start_thread(words.thread)
            start_thread(timer)
        except OSError as error:
            raise ImageError(cannot_start(argv[0], error)) from error
        fed = not (feed or exchange)
        with contextlib.suppress(BrokenPipeError):  # its exit status says why it stopped reading
            if feed and process.stdin:
                with process.stdin:
                    feed(process.stdin)
                    fed = True
            if exchange and process.stdin and process.stdout:
                with process.stdin, process.stdout:
                    exchange(process.stdin, process.stdout)
                    fed = True
        _wait(process, told, until)
    finally:
        timer.cancel()
        try:
            if timer.ident is not None:
                timer.join()
        finally:
            kill_group(process)  # last: its number was its group's so far
        said = words.end()
    if late.is_set() or process.returncode is None:  # it does not end for being killed, either
        raise ImageError(
            f"command was not done after {seconds:g} s and was killed: {_line(argv)}: either this "
            "host is busy and may do it another time, or the image is too large for it"
        )
    if process.returncode != 0:
        raise _failure(argv, process.returncode, said, writes_to)
    if not fed:
        raise ImageError(f"command stopped reading its input too early: {_line(argv)}\n{said}")
    return said


def filtered(
    chunks: Iterator[bytes],
    stdin: IO[bytes],
    stdout: IO[bytes],
    seconds: float = limits.COMMAND_SECONDS,
) -> Iterator[bytes]:
    """What a command writes to `stdout` for the `chunks` that it is given; closes `stdin` in time.

    BrokenPipeError, behind all that it wrote, where it did not take everything, and after `seconds`
    whatever it does: it may be dead, and a process that has left its group hold its pipes. Both are
    served at once: a filter reads no more while nobody takes what it has written.
    """
    until = time.monotonic() + seconds
    os.set_blocking(stdin.fileno(), False)
    poll = select.poll()
    poll.register(stdout, select.POLLIN)
    poll.register(stdin, select.POLLOUT)
    rest: memoryview | None = memoryview(b"")  # None: it is closed
    broken = False
    while True:
        left = until - time.monotonic()
        if left <= 0:
            raise BrokenPipeError
        ready = {fd for fd, _ in poll.poll(left * 1000)}
        if stdout.fileno() in ready:
            written = os.read(stdout.fileno(), limits.CHUNK_BYTES)
            if not written:
                break
            yield written
        if rest is None or stdin.fileno() not in ready:
            continue
        rest = rest or memoryview(next(chunks, b""))
        try:
            rest = rest[os.write(stdin.fileno(), rest) :] if rest else None
        except BrokenPipeError:
            rest, broken = None, True
        if rest is None:
            poll.unregister(stdin)
            stdin.close()
    if broken or rest is not None:
        raise BrokenPipeError


def limit_processor_time(pid: int, seconds: float) -> None:
    """The deadline that holds where we are killed: the command may use no more of the processors.

    It may have ended already, and who may not limit it does without.
    """
    most = math.ceil(seconds) * (os.cpu_count() or 1)
    with contextlib.suppress(OSError, ValueError):
        resource.prlimit(pid, resource.RLIMIT_CPU, (most, most))


def _wait(
    process: "subprocess.Popen[bytes]", told: Callable[[], None] | None, until: float
) -> None:
    """Until it has ended, or is not to be waited for any longer, though it was killed.

    It is not reaped, so that its number stays its group's.
    """
    pidfd = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        while not poll.poll(_TOLD_EVERY * 1000) and time.monotonic() < until:
            if told:
                told()
    finally:
        os.close(pidfd)


# How tar and the makers of file systems say that there is no room.
_FULL = ("No space left on device", "Disk quota exceeded", "Wrote only")


def _failure(argv: Sequence[str], status: int, said: str, writes_to: str | None) -> ImageError:
    if any(words in said for words in _FULL) or (writes_to and _is_full(writes_to)):
        return no_space(argv[0])
    how = f"status {status}" if status > 0 else f"signal {-status}"
    return ImageError(f"command ended with {how}: {_line(argv)}\n{said.strip()}".rstrip())


def _is_full(directory: str) -> bool:
    room = os.statvfs(directory)
    return room.f_bavail * room.f_frsize < limits.CHUNK_BYTES


def no_space(what: str) -> ImageError:
    """The one error for a full disk, whoever met it."""
    return ImageError(
        f"no space left on the device while preparing the image ({what}): free some, or put the "
        "image cache on another disk with XDG_CACHE_HOME"
    )


def _line(argv: Sequence[str]) -> str:
    return shlex.join(argv)


def _environment() -> dict[str, str]:
    """Ours, with messages in English and without the options that tools take from there."""
    dropped = ("SOURCE_DATE_EPOCH", "TAR_OPTIONS", "ZSTD_CLEVEL", "ZSTD_NBTHREADS")
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    return {**kept, "LC_ALL": "C"}


class _LastWords:
    """Reads a pipe to its end in a thread and keeps the last part."""

    def __init__(self, pipe: IO[bytes] | None) -> None:
        assert pipe is not None
        self._pipe = pipe
        self._tail = b""
        self.thread = threading.Thread(target=self._read, daemon=True)
        self._until = math.inf  # time.monotonic()

    def _read(self) -> None:
        poll = select.poll()
        poll.register(self._pipe, select.POLLIN)
        while time.monotonic() < self._until:
            if poll.poll(_TOLD_EVERY * 1000):
                chunk = os.read(self._pipe.fileno(), 4096)
                if not chunk:
                    return
                self._tail = (self._tail + chunk)[-limits.COMMAND_OUTPUT_BYTES :]

    def end(self) -> str:
        """After the command's end. A process that has left its group may hold the pipe on."""
        self._until = time.monotonic() + _WORDS_SECONDS
        if self.thread.ident is not None:
            self.thread.join()
        self._pipe.close()
        text = self._tail.decode("utf-8", "replace")
        # It may quote file names of the image: no terminal codes from there.
        return "".join(char if char.isprintable() or char in "\n\t" else "?" for char in text)
