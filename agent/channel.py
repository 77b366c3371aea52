"""One host's connection: a non-blocking socket and the protocol's state machine.

Output is queued as pieces and written with as few calls as possible. Bulk is not copied into the
queue: the kernel moves it from a pipe, or it is written out of the buffer that it was read into.
Nobody queues more than one read of each stream before it is written, so the queue is bounded by its
users, and what all connections hold of bulk together by `bounds.HELD_BULK`. What a host may send of
a process's input has a window, which is wider while the process keeps up.
"""

import contextlib
import fcntl
import os
import socket
import termios

import trio

from microguest.guest import bounds
from microguest.guest.wire.connection import Connection, Event, Role
from microguest.guest.wire.messages import Credit

__all__ = ["BUFFER", "Channel", "ConnectionLost", "readable_bytes"]

# Where every read goes, from sockets and pipes alike. One is enough, as nobody waits while it holds
# anything, and a fresh one for each read would be mapped and unmapped each time.
BUFFER = memoryview(bytearray(bounds.BULK_READ))

SO_SNDBUFFORCE = 32  # asm-generic/socket.h; Python has no name for it


class ConnectionLost(Exception):
    """The host closed the connection or is gone."""


class Channel:
    """The connection is closed by whoever accepted it, not here."""

    held = 0  # bytes that could not be written yet, of all channels
    piped = 0  # bytes in their pipes, of all channels
    widened = 0  # bytes of their windows above INPUT_WINDOW, of all channels

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.connection = Connection(Role.AGENT)
        self.outgoing: list[bytes | memoryview] = []
        # Measured in a guest with Linux 6.12: splice(2) to a vsock socket moves 0.12 GB/s, where
        # read and send move 0.29; natively, to a Unix socket, 4.2 against 2.9.
        self.splices = sock.family == socket.AF_UNIX
        self.urgent = False  # something queued has to be followed by `flush_now` at once
        self._held = 0
        self._window = bounds.INPUT_WINDOW
        self._pipe: tuple[int, int] | None = None  # for `queue_pipe`, once it is needed
        self._pipe_bytes = 0  # of the last data frame, after all of `outgoing`; in our pipe

    @classmethod
    def bulk_read(cls) -> int:
        """How much may be read for `queue_buffer`, so that little is held where nobody reads."""
        return len(BUFFER) if cls.held + len(BUFFER) <= bounds.HELD_BULK else bounds.OUTPUT_READ

    def enlarge(self) -> None:
        """Let the socket take more at a time, for a stream that has much to send: socket(7)."""
        for option in (SO_SNDBUFFORCE, socket.SO_SNDBUF):
            try:
                self.sock.setsockopt(socket.SOL_SOCKET, option, bounds.DATA_PAYLOAD)
            except OSError:
                continue  # beyond net.core.wmem_max only with CAP_NET_ADMIN
            return

    def queue(self, event: Event) -> None:
        """Put an event behind what is to be written; dropped where the host has detached already.

        Raises LocalProtocolError.
        """
        if self.connection.detached:
            return
        assert not self._pipe_bytes  # it would get between a header and its payload
        self.outgoing.append(self.connection.send(event))

    def queue_data(self, stream: int, data: bytes | memoryview) -> None:
        """As `queue`, for a piece of a stream, without copying it."""
        assert not self._pipe_bytes
        self.outgoing.append(self.connection.send_data_header(stream, len(data)))
        self.outgoing.append(data)

    def queue_buffer(self, stream: int, count: int) -> None:
        """As `queue_data`, for the first bytes of BUFFER. `urgent` is set."""
        self.queue_data(stream, BUFFER[:count])
        self.urgent = True

    def queue_pipe(self, stream: int, pipe: int, most: int) -> int:
        """As `queue_data`, for what a pipe holds now, at most `most` bytes: how many that are.

        They are moved into a pipe of our own, without a copy. Others may have opened theirs through
        /proc: a frame is announced only once nobody can take it away. 0 where it is to be read
        instead: nothing is there any more, or there is no room here.

        `urgent` is set, and until all of them are written nothing else may be queued.
        """
        assert not self._pipe_bytes
        if Channel.piped + most > bounds.HELD_PIPES:
            return 0
        try:
            if self._pipe is None:
                self._pipe = own_pipe()
            count = os.splice(pipe, self._pipe[1], most, flags=os.SPLICE_F_NONBLOCK)
        except OSError:  # somebody was faster, or there are no more descriptors
            return 0
        if count:
            self.outgoing.append(self.connection.send_data_header(stream, count))
            self._pipe_bytes = count
            Channel.piped += count
            self.urgent = True
        return count

    def input_room(self, held: int) -> int:
        """How much may be read, where `held` bytes of input wait for the process.

        Always something, unless the host is one that knows of no window.
        """
        if self.connection.windowed:
            return bounds.STREAM_READ
        return max(0, bounds.INPUT_WINDOW - held)

    def grant_input(self, held: int) -> None:
        """Queue credit for what the window has room for beside `held` bytes of input.

        Half a window at a time; not where there is none, and not inside a frame.
        """
        credit = self.connection.input_credit
        if credit is None or self._pipe_bytes:
            return
        taken = self.connection.input_arrived - held
        if taken + self._window // 2 < credit:
            return
        if not held and credit:
            self._widen()
        self.queue(Credit(stdin=taken + self._window))

    def _widen(self) -> None:
        """The process takes its input as fast as it comes: twice as much, as far as there is."""
        more = min(self._window, bounds.BULK_INPUT_WINDOW - self._window)
        if Channel.widened + more <= bounds.BULK_INPUT:
            Channel.widened += more
            self._window += more

    def flush_now(self) -> bool:
        """Write what the socket takes without waiting; whether that was all.

        Raises ConnectionLost.
        """
        self.urgent = False
        try:
            if self.outgoing:
                self._send_queue()
            while self._pipe_bytes and not self.outgoing:
                self._splice()
        except BlockingIOError:
            pass
        except OSError:
            raise ConnectionLost from None
        if self.outgoing or self._held:
            self._hold()
        return not self.outgoing and not self._pipe_bytes

    def _send_queue(self) -> None:
        sent = self.sock.sendmsg(self.outgoing)
        while self.outgoing and sent >= len(self.outgoing[0]):
            sent -= len(self.outgoing.pop(0))
        if sent:
            self.outgoing[0] = self.outgoing[0][sent:]

    def _hold(self) -> None:
        """What was not written has to wait; BUFFER is others' from now on."""
        self.outgoing = [bytes(piece) for piece in self.outgoing]
        held = sum(map(len, self.outgoing))
        Channel.held += held - self._held
        self._held = held

    def drop(self) -> None:
        """Forget what was not written: the connection is over."""
        self.outgoing.clear()
        Channel.piped -= self._pipe_bytes
        self._pipe_bytes = 0
        for fd in self._pipe or ():
            os.close(fd)
        self._pipe = None
        Channel.widened -= self._window - bounds.INPUT_WINDOW
        self._window = bounds.INPUT_WINDOW
        self._hold()

    def _splice(self) -> None:
        """BlockingIOError where the socket takes no more."""
        assert self._pipe is not None
        moved = os.splice(
            self._pipe[0], self.sock.fileno(), self._pipe_bytes, flags=os.SPLICE_F_NONBLOCK
        )
        self._pipe_bytes -= moved
        Channel.piped -= moved

    async def flush(self) -> None:
        """Write everything, waiting for the host to read. Raises ConnectionLost."""
        while not self.flush_now():
            await trio.lowlevel.wait_writable(self.sock)

    def receive_now(self, most: int = bounds.STREAM_READ) -> list[Event] | None:
        """The events in what has arrived, perhaps none yet; None where nothing has arrived.

        `most`: bytes to read, at least 1. Raises ConnectionLost at the end of the connection, and
        RemoteProtocolError.
        """
        try:
            count = self.sock.recv_into(BUFFER, min(most, bounds.STREAM_READ))
        except BlockingIOError:
            return None
        except OSError:
            raise ConnectionLost from None
        if not count:
            raise ConnectionLost
        return self.connection.receive(BUFFER[:count])

    async def receive(self) -> list[Event]:
        """Wait for at least one event. Raises as `receive_now`."""
        while not (events := self.receive_now()):
            await trio.lowlevel.wait_readable(self.sock)
        return events


def own_pipe() -> tuple[int, int]:
    """One that holds a whole data frame, as far as there is memory for it. Raises OSError."""
    pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    with contextlib.suppress(OSError):
        fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, bounds.DATA_PAYLOAD)
    return pipe


def readable_bytes(fd: int) -> int:
    """How much a pipe or terminal holds: FIONREAD of ioctl_tty(2) and pipe(7)."""
    return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), "little")
