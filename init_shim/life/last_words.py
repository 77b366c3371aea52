"""What the agent writes to stderr: copied to the console, and its end kept for the report.

The agent has a pipe, so that a console that takes nothing holds up neither it nor PID 1: what the
console has no room for is lost there, and not for the report.
"""

import os

from microguest.guest import bounds
from microguest.init_shim.reporter import copy_to_console

__all__ = ["LastWords"]

READ = 4096  # bytes at a time
READS_AT_ONCE = 32  # more than a pipe holds by default, but not without an end


class LastWords:
    """One agent's stderr. `writer` is for the child, and is closed once that has it."""

    def __init__(self) -> None:
        self._reader, self.writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._reader, False)
        self._tail = b""

    def fileno(self) -> int:
        """What to wait on; -1 after the last word."""
        return self._reader

    def close_writer(self) -> None:
        """The child has it."""
        os.close(self.writer)

    def read(self) -> None:
        """Take what is there. Does not block."""
        for _ in range(READS_AT_ONCE):
            if self._reader < 0:
                return
            try:
                data = os.read(self._reader, READ)
            except BlockingIOError:
                return
            if not data:
                self.close()
            copy_to_console(data)
            self._tail = (self._tail + data)[-bounds.LAST_WORDS :]

    def close(self) -> None:
        """Nobody listens any more."""
        if self._reader >= 0:
            os.close(self._reader)
            self._reader = -1

    def text(self) -> str:
        """At most LAST_WORDS characters, from the beginning of a line where there is one."""
        tail = self._tail
        if len(tail) == bounds.LAST_WORDS:
            tail = tail.partition(b"\n")[2] or tail
        return tail.decode("utf-8", "replace").strip()
