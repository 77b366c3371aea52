"""What a program says of itself, when it is asked in the right way.

Whoever starts a program here and elsewhere in this package ends it with `kill_group`.
"""

import contextlib
import os
import resource
import select
import signal
import subprocess
from collections.abc import Sequence
from typing import Final, NamedTuple

__all__ = ["Said", "kill_group", "probe"]

PROBE_SECONDS: Final = 20.0  # a probe that takes longer counts as a no, also on a slow host
KILLED_WAIT: Final = 5.0  # seconds for a killed program to be gone; a traced one, say, never is
SAID_MAX: Final = 1 << 20  # bytes on stdout and on stderr each; a help text has some thousand


class Said(NamedTuple):
    """By a program that has ended."""

    returncode: int
    stdout: bytes
    stderr: bytes


def probe(argv: Sequence[str], *, given: bytes = b"", seconds: float = PROBE_SECONDS) -> Said:
    """Run it to its end, with `given` on its stdin.

    Its output goes to files, not to pipes: whoever it starts may have those for as long as they
    like. OSError where it does not start, TimeoutExpired where it does not end within `seconds`.
    """
    with contextlib.ExitStack() as files:
        stdin, stdout, stderr = (
            files.enter_context(open(os.memfd_create("probe"), "r+b", buffering=0))
            for _ in range(3)
        )
        stdin.write(given)
        stdin.seek(0)
        process = subprocess.Popen(
            argv, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True
        )
        try:
            with contextlib.suppress(OSError, ValueError):  # it has ended
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (SAID_MAX, SAID_MAX))
            if not ends_within(process, seconds):
                raise subprocess.TimeoutExpired(argv, seconds)
        finally:
            kill_group(process)
        said = []
        for file in (stdout, stderr):
            file.seek(0)
            said.append(file.read(SAID_MAX) or b"")
        return Said(process.returncode, *said)


def ends_within(process: "subprocess.Popen[bytes]", seconds: float) -> bool:
    """Whether it does; it is not reaped, so that its number stays its group's."""
    pidfd = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    finally:
        os.close(pidfd)


def kill_group(process: "subprocess.Popen[bytes]") -> None:
    """It is not reaped yet: kill it with all that it has started, as a wrapper does, and reap it.

    One that does not end for all that is left to itself.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(KILLED_WAIT)
