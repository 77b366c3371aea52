"""One stream of a process each: `OutputPump` to a host's connection, `InputPump` from it.

A pump moves what is there and never waits. It knows which descriptor to wait for, and keeps its own
registration in the epoll set of whoever owns it. What it holds is bounded; the kernel's pipe is the
buffer.
"""

import contextlib
import errno
import fcntl
import os
import select

from microguest.agent.channel import BUFFER, Channel, readable_bytes
from microguest.agent.process import terminals
from microguest.agent.registry import Process
from microguest.guest import bounds

__all__ = ["InputPump", "OutputPump"]

# An output that filled a read of OUTPUT_READ is large from then on, and moved without a copy where
# that is possible. From one page on that is by splice: less costs less when it is read.
SPLICED = 4 * 1024
BULKY = 32 * 1024  # found in a pipe that others keep filling; the default pipe holds 64 KiB
PROOFS = 4  # finds of that kind before a stream gets a larger pipe


class OutputPump:
    """`fd`: of the process's output, taken out of `process.outputs` at its end and closed then.

    `last_data`: when the last bytes came, for the owner. `owed`: bytes that were in the pipe when
    the process ended and are not moved yet.
    """

    def __init__(self, process: Process, stream: int, epoll: select.epoll) -> None:
        self.stream = stream
        self.fd = process.outputs[stream]
        self.last_data = 0.0
        self.owed = 0
        self._process = process
        self._epoll = epoll
        self._large = False
        self._proofs = 0
        self._watched = False
        self.watch()

    def watch(self) -> None:
        """Have the owner woken by data."""
        if not self._watched:
            self._epoll.register(self.fd, select.EPOLLIN)
            self._watched = True

    def unwatch(self) -> None:
        """Not by an empty mask: a hang-up would still wake the owner."""
        if self._watched:
            self._epoll.unregister(self.fd)
            self._watched = False

    def move(self, channel: Channel) -> int | None:
        """Queue what is there, at most one frame: how many bytes. 0: nothing. None: the end."""
        if self._large and channel.splices:
            count = min(readable_bytes(self.fd), bounds.DATA_PAYLOAD)
            if count >= SPLICED and (count := channel.queue_pipe(self.stream, self.fd, count)):
                return self._moved(count, channel)
        room = channel.bulk_read() if self._large else bounds.OUTPUT_READ
        count = self._read(BUFFER[:room])
        if count == 0:
            return None
        if count < 0:
            return 0
        if count > bounds.OUTPUT_READ:
            channel.queue_buffer(self.stream, count)
        else:
            channel.queue_data(self.stream, bytes(BUFFER[:count]))
        if count == room and not self._process.tty:
            self._large = True
        return self._moved(count, channel)

    def _moved(self, count: int, channel: Channel) -> int:
        self.owed -= count
        if count >= BULKY:
            self._note_bulk(channel)
        return count

    def still_owed(self) -> bool:
        """Whether the pipe may have bytes from before the end.

        They are its first ones, so it has no more of them than of all. Who the process has left can
        take them out itself, and write others: they would be waited for for ever.
        """
        if self.owed > 0:
            self.owed = min(self.owed, readable_bytes(self.fd))
        return self.owed > 0

    def close(self) -> None:
        """Its end, or the decision to wait no longer."""
        if self._process.tty:  # whose descriptor is not the only one of that description: epoll(7)
            self.unwatch()
        del self._process.outputs[self.stream]
        self._process.let_go(self.fd)

    def _read(self, buffer: memoryview) -> int:
        """0 at the end, -1 where nothing is there."""
        try:
            return os.readv(self.fd, (buffer,))
        except BlockingIOError:
            return -1  # somebody opened the pipe through /proc and was faster
        except OSError as error:
            if error.errno == errno.EIO and self._process.tty:
                return 0  # how a terminal says that the last slave was closed
            raise

    def _note_bulk(self, channel: Channel) -> None:
        """Fewer and larger turns for a stream that was full again and again."""
        self._proofs += 1
        if self._proofs == PROOFS:
            enlarge(self.fd)
            channel.enlarge()


class InputPump:
    """To the process's stdin, which it closes at its end. For a terminal, END types the end.

    `held` bytes wait in it, for which the window of the connection is a bound: `agent.channel`.
    """

    def __init__(self, process: Process, epoll: select.epoll) -> None:
        self._process = process
        self._epoll = epoll
        self._pending = bytearray()
        self._ended = False
        self._watched = False
        self._enlarged = False
        self._line_open = False  # something was typed after the last newline

    @property
    def held(self) -> int:
        """Bytes that the process has not taken yet."""
        return len(self._pending)

    @property
    def open(self) -> bool:
        """Whether anything can still be fed."""
        return self._process.stdin >= 0 and not self._ended

    def feed(self, data: bytes) -> None:
        """Behind what waits already. Dropped where nobody can read it any more."""
        if not self.open:
            return
        if self._process.tty:
            self._line_open = not data.endswith(b"\n")
        if self._pending:
            self._pending += data
            return
        written = self._write(data)
        if written < len(data) and self._process.stdin >= 0:
            self._pending += memoryview(data)[written:]
            self._wait_for_room()

    def end(self) -> None:
        """Nothing follows."""
        if self._process.tty and self._process.stdin >= 0:
            typed = terminals.end_of_file(self._process.stdin, unfinished=self._line_open)
            self.feed(typed)
            self._ended = True
        else:
            self._ended = True
            self.resume()

    def resume(self) -> None:
        """Go on: the process may take more, or there is nothing more to take."""
        if self._pending:
            del self._pending[: self._write(self._pending)]
        if not self._pending:
            self.unwatch()
            if self._ended:
                self._close()

    def unwatch(self) -> None:
        """Do not wake the owner for it any more."""
        if self._watched:
            self._epoll.unregister(self._process.stdin)
            self._watched = False

    def _write(self, data: bytes | bytearray) -> int:
        try:
            return os.write(self._process.stdin, data)
        except BlockingIOError:
            return 0
        except OSError:  # nobody reads it any more, which is the process's own affair
            self._pending.clear()
            self._close()
            return 0

    def _wait_for_room(self) -> None:
        self._epoll.register(self._process.stdin, select.EPOLLOUT)
        self._watched = True
        if not self._enlarged and not self._process.tty:
            self._enlarged = True  # so that one whole data frame does not hold up what is behind it
            enlarge(self._process.stdin)

    def _close(self) -> None:
        """A terminal's descriptor stays: it is also for its size and its hang-up."""
        self.unwatch()
        self._ended = True
        if not self._process.tty and self._process.stdin >= 0:
            stdin, self._process.stdin = self._process.stdin, -1
            self._process.let_go(stdin)


def enlarge(pipe: int) -> None:
    """Let a pipe hold one whole data frame, as far as the user's share goes: pipe(7)."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, bounds.DATA_PAYLOAD)
