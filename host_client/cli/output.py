"""Our own stdout and stderr, written without ever blocking where the kernel lets us.

A reader of ours that stops must not keep us from passing signals on, nor from being ended. The
descriptors are shared with whoever started us, so they are not switched to non-blocking: pipes and
terminals are opened a second time instead. Files are always writable.
"""

import math
import os
import select
import signal
import stat
import time
from collections import deque
from typing import Final

from microguest.host_client.cli.killed import Killed
from microguest.host_client.errors import MachineError
from microguest.host_client.shortage import reason

__all__ = ["Outputs", "write_all"]

AGAIN: Final = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
LOOK_EVERY: Final = 1000  # ms
NAMES: Final = {1: "stdout", 2: "stderr"}


class Outputs:
    """Takes bytes of both streams in order and writes them as they can be written."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, memoryview]] = deque()  # stream, what is left of it
        self._descriptors = {stream: _opened_again(stream) for stream in (1, 2)}
        self.stuck_since = math.inf  # time.monotonic(), when bytes were taken last of what waits

    def close(self) -> None:
        """Close what was opened. What waits is dropped."""
        for stream, fd in self._descriptors.items():
            if fd != stream:
                os.close(fd)
        self._descriptors = {}

    @property
    def blocked_on(self) -> int | None:
        """The descriptor that has to become writable before more can be taken; None: go on."""
        return self._descriptors[self._waiting[0][0]] if self._waiting else None

    def put(self, stream: int, data: bytes) -> None:
        """Write it, or keep what cannot be written now. MachineError, as where a disk is full.

        Killed by SIGPIPE, as any program is, where nobody reads it any more.
        """
        self._waiting.append((stream, memoryview(data)))
        if len(self._waiting) == 1:
            self.flush()

    def flush(self) -> None:
        """Write what can be written. Raises as `put`."""
        while self._waiting:
            stream, data = self._waiting[0]
            try:
                written = os.write(self._descriptors[stream], data)
            except BlockingIOError:
                self.stuck_since = min(self.stuck_since, time.monotonic())
                return
            except OSError as error:
                raise unwritable(stream, error) from error
            self.stuck_since = math.inf
            if written == len(data):
                self._waiting.popleft()
            else:
                self._waiting[0] = (stream, data[written:])


def _opened_again(fd: int) -> int:
    """A descriptor of our own for the same pipe or terminal, or `fd` itself."""
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISFIFO(mode) or (stat.S_ISCHR(mode) and os.isatty(fd))):
        return fd
    try:
        return os.open(f"/proc/self/fd/{fd}", AGAIN)
    except OSError:  # another user's terminal, as after su; a pipe that nobody reads
        return fd


def write_all(fd: int, data: bytes) -> None:
    """Write to one of our own streams, past any buffer, also where it is non-blocking.

    Raises as `Outputs.put`.
    """
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            poll = select.poll()
            poll.register(fd, select.POLLOUT)
            poll.poll(LOOK_EVERY)
        except OSError as error:
            raise unwritable(fd, error) from error


def unwritable(stream: int, error: OSError) -> Killed | MachineError:
    """What it means for this program that one of its own streams takes nothing any more."""
    if isinstance(error, BrokenPipeError):
        return Killed(signal.SIGPIPE)
    return MachineError(f"cannot write to {NAMES[stream]}: {reason(error)}")
