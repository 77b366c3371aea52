"""The bytes between one process and one host's connection, from start to the last frame.

One coroutine serves everything that a process has: its two outputs, its input, its end, its
timeout and the socket. They are in an epoll set of their own and trio waits for that set, because a
task for each would cost more than the whole exec. Nothing here blocks, and nothing is buffered
beyond one read of each stream: while the host does not read, the pipes are not read, and the
process waits.
"""

import fcntl
import math
import os
import select
import signal
import termios

import trio

from agent.channel import BUFFER, Channel, ConnectionLost
from agent.state import Process
from guest import limits
from guest.connection import Data, End, Event
from guest.messages import STREAMS, Signal

__all__ = ["Exchange"]

IN = select.EPOLLIN
OUT = select.EPOLLOUT
CLOSED = select.EPOLLRDHUP  # the host shut its side, perhaps behind data that waits to be read
ROUNDS = 16  # of work before other connections get their turn
READY = 5  # descriptors in the set
# The kernel closes a process's outputs some microseconds before it reports its end. To wait for
# that here, at most twice in a process's life, saves two turns of the event loop.
ENDING = 0.001  # seconds, epoll_wait(2)'s unit
SHORT = 0.001  # seconds in which a short command has done something


class Exchange:
    """`run` once. `timeout`: seconds until the process group is ended, None for never."""

    def __init__(self, channel: Channel, process: Process, timeout: float | None) -> None:
        self._channel = channel
        self._process = process
        self._epoll = select.epoll(READY)
        self._socket_fd = channel.sock.fileno()
        self._socket_mask = 0
        self._blocked = False  # the host does not read; the outputs are not watched
        self._input = b""  # read from the host, not yet taken by the process: one read at most
        self._input_ended = False
        self._input_watched = False
        self._deadline = math.inf if timeout is None else trio.current_time() + timeout
        self._timed_out = False
        self._exited_at = math.inf
        self._owed: dict[int, int] = {}  # bytes that were in a pipe when the process ended
        self._last_data: dict[int, float] = {}
        self._cut: list[str] = []
        self._flush_due = False  # output was queued, or the host reads again

    async def run(self, early: list[Event], *, alone: bool = False) -> None:
        """Until `exited` is written. `early`: what arrived together with the request.

        `alone`: no other process is served, so that a millisecond may be spent on waiting for a
        short one right here; then its whole story is one write.

        Raises ConnectionLost and RemoteProtocolError; the process may still run then.
        """
        try:
            self._watch_everything()
            self._take(early)
            if alone:
                self._work(SHORT)
            while not self._over():
                self._flush()
                await self._wait()
                self._work()
                self._check_clock()
        finally:
            self._epoll.close()
        status = self._process.status()
        if self._timed_out or self._cut:
            status = status.replace(timed_out=self._timed_out, open_streams=tuple(self._cut))
        self._channel.queue(status)
        await self._channel.flush()

    def _over(self) -> bool:
        return self._exited_at < math.inf and not self._process.outputs

    # ── waiting ──────────────────────────────────────────────────────────────────────────────────

    def _watch_everything(self) -> None:
        self._update_socket_mask()
        self._epoll.register(self._process.exit_fd, IN)
        for stream in (1, 2):
            if stream in self._process.outputs:
                self._epoll.register(self._process.outputs[stream], IN)
            else:
                self._channel.queue(End(stream=stream))  # an earlier host saw its end

    async def _wait(self) -> None:
        deadline = self._next_deadline()
        if deadline == math.inf:
            await trio.lowlevel.wait_readable(self._epoll)
        else:
            with trio.CancelScope(deadline=deadline):
                await trio.lowlevel.wait_readable(self._epoll)

    def _next_deadline(self) -> float:
        if self._exited_at == math.inf:
            return self._deadline
        if self._blocked:
            return math.inf
        return min(self._cut_at(stream) for stream in self._process.outputs)

    def _work(self, patience: float = 0.0) -> None:
        """Handle what is ready, and what becomes ready meanwhile, but not without an end.

        `patience`: seconds to wait for the first of it while nothing else is served.
        """
        for _ in range(ROUNDS):
            ready = self._epoll.poll(patience, READY)
            if not ready:
                return
            streams, exited = len(self._process.outputs), False
            for fd, events in ready:
                if fd == self._socket_fd:
                    self._serve_socket(events)
                elif fd == self._process.exit_fd:
                    exited = True
                elif fd == self._process.stdin:
                    self._write_input()
                else:
                    self._read_output(fd)
            if exited:
                self._note_exit()
            if self._over():
                return
            if self._flush_due:
                self._flush_due = False
                self._flush()
            patience = ENDING if len(self._process.outputs) < streams else 0.0

    def _serve_socket(self, events: int) -> None:
        if events & OUT:
            self._flush_due = True
        if events & IN:
            self._take(self._channel.receive_now() or [])
        elif events & ~OUT:
            raise ConnectionLost

    def _flush(self) -> None:
        """Write what can be written; stop reading outputs while something is left."""
        blocked = not self._channel.flush_now()
        if blocked == self._blocked:
            return
        self._blocked = blocked
        self._update_socket_mask()
        for stream, fd in self._process.outputs.items():
            if blocked:
                self._epoll.unregister(fd)  # not an empty mask: a hang-up would still wake us
            else:
                self._epoll.register(fd, IN)
                self._last_data[stream] = trio.current_time()

    def _update_socket_mask(self) -> None:
        mask = CLOSED | (0 if self._input else IN) | (OUT if self._blocked else 0)
        if self._socket_mask == 0:
            self._epoll.register(self._channel.sock, mask)
        elif mask != self._socket_mask:
            self._epoll.modify(self._channel.sock, mask)
        self._socket_mask = mask

    # ── from the process ─────────────────────────────────────────────────────────────────────────

    def _read_output(self, fd: int) -> None:
        stream = next(s for s, candidate in self._process.outputs.items() if candidate == fd)
        if self._blocked:
            return  # found ready together with what filled the socket
        try:
            count = os.readv(fd, (BUFFER,))
        except BlockingIOError:
            return  # somebody opened the pipe through /proc and was faster
        if not count:
            self._end_output(stream)
            return
        self._channel.queue_data(stream, bytes(BUFFER[:count]))
        self._flush_due = True
        if self._exited_at < math.inf:
            self._last_data[stream] = trio.current_time()
            self._owed[stream] = self._owed.get(stream, 0) - count

    def _end_output(self, stream: int) -> None:
        fd = self._process.outputs.pop(stream)
        if not self._blocked:
            self._epoll.unregister(fd)
        os.close(fd)
        self._channel.queue(End(stream=stream))

    def _note_exit(self) -> None:
        """The process itself has ended; what it wrote may still be in the pipes."""
        self._epoll.unregister(self._process.exit_fd)
        self._exited_at = trio.current_time()
        if self._timed_out:
            self._process.signal(signal.SIGKILL, "group")  # the rest had its grace, too
        for stream, fd in self._process.outputs.items():
            count = fcntl.ioctl(fd, termios.FIONREAD, bytes(4))
            self._owed[stream] = int.from_bytes(count, "little")
            self._last_data[stream] = self._exited_at

    # ── to the process ───────────────────────────────────────────────────────────────────────────

    def _take(self, events: list[Event]) -> None:
        """What the host sent: input, its end, signals."""
        for event in events:
            match event:
                case Data():
                    self._input += event.data
                case End():
                    self._input_ended = True
                case Signal():
                    self._process.signal(event.signal, event.target)
                case _:
                    raise AssertionError(f"{event!r} must have been refused")
        if events:
            self._write_input()

    def _write_input(self) -> None:
        """Give the process what its pipe takes, and come back when it takes more."""
        if self._input and self._process.stdin >= 0:
            try:
                self._input = self._input[os.write(self._process.stdin, self._input) :]
            except BlockingIOError:
                pass
            except OSError:
                self._close_input()  # nobody reads it any more, which is the process's own affair
        if self._process.stdin < 0:
            self._input = b""
        elif self._input_ended and not self._input:
            self._close_input()
        if bool(self._input) != self._input_watched:
            self._input_watched = not self._input_watched
            if self._input_watched:
                self._epoll.register(self._process.stdin, OUT)
            elif self._process.stdin >= 0:
                self._epoll.unregister(self._process.stdin)
        self._update_socket_mask()

    def _close_input(self) -> None:
        if self._input_watched:
            self._epoll.unregister(self._process.stdin)
            self._input_watched = False
        os.close(self._process.stdin)
        self._process.stdin = -1
        self._input = b""

    # ── time ─────────────────────────────────────────────────────────────────────────────────────

    def _check_clock(self) -> None:
        now = trio.current_time()
        if self._exited_at < math.inf:
            self._cut_outputs(now)
        elif now >= self._deadline:
            if self._timed_out:
                self._process.signal(signal.SIGKILL, "group")
                self._deadline = math.inf
            else:
                self._timed_out = True
                self._process.signal(signal.SIGTERM, "group")
                self._deadline = now + limits.TIMEOUT_GRACE

    def _cut_outputs(self, now: float) -> None:
        """End the outputs that another process holds open, once there is no use in waiting."""
        if self._blocked:
            return
        for stream in list(self._process.outputs):
            if now >= self._cut_at(stream):
                self._cut.append(STREAMS[stream])
                self._end_output(stream)

    def _cut_at(self, stream: int) -> float:
        """Idle for long enough; or too late, but not before everything from before the exit."""
        idle = self._last_data[stream] + limits.STREAM_IDLE_AFTER_EXIT
        if self._owed[stream] > 0:
            return idle
        return min(idle, self._exited_at + limits.STREAM_CAP_AFTER_EXIT)
