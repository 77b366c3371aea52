"""A process with streams that can be read one by one: bounded buffers between it and its callers.

Shared by every kind of client. Several threads or tasks may use one session at a time, each running
steps of its own, but only one may be between two waits (a lock, or an event loop, sees to that).
Each of the two directions of the socket is watched by one of them; the others wait for `version` to
change, by a `Wait` without a socket.
"""

import select
import time
import warnings
from collections.abc import Callable
from typing import Final

from microguest.guest import bounds
from microguest.guest.wire.messages import (
    FEATURES,
    STREAMS,
    Acknowledge,
    Attach,
    Exited,
    Resize,
    Signal,
    Start,
)
from microguest.host_client.client.backlog import Taking
from microguest.host_client.client.channel import CHECK_EVERY, Broken
from microguest.host_client.client.deadline import Deadline
from microguest.host_client.client.process_connection import Exchange
from microguest.host_client.client.result import Result
from microguest.host_client.client.steps import Steps, Wait
from microguest.host_client.client.unread import STDERR, STDOUT, Unread
from microguest.host_client.errors import (
    ConnectionLost,
    DeadlineExceeded,
    MicroguestError,
    OutputStalled,
)
from microguest.host_client.values import (
    Buffer,
    check_bytes,
    check_count,
    check_number,
    check_timeout,
)

__all__ = ["MAX_OUTPUT", "MAX_UNREAD", "STDERR", "STDOUT", "Session"]

ENGINE: Final = FEATURES[0]  # agents without it take no acknowledgements
MAX_OUTPUT: Final = 256 * 1024 * 1024  # bytes of each output that are held in memory unless told
MAX_UNREAD: Final = 1024 * 1024  # bytes of each output that wait for their reader, and one recv(2)
STALLED_AFTER: Final = 2.0  # seconds that a caller waits on an output that only it could read
SHARED_EVERY: Final = 0.05  # seconds of a wait that hears of only one direction
LEAVE_WITHIN: Final = 5.0  # seconds to tell the agent that we leave


class Session:
    """What the callers of one process share.

    `caller`: identity of the running thread or task. `acknowledge`: bytes that were handed out are
    acknowledged when their reader comes back, where this connection may do so.
    """

    def __init__(
        self,
        exchange: Exchange,
        *,
        caller: Callable[[], int],
        acknowledge: bool = True,
        max_unread: int = MAX_UNREAD,
    ) -> None:
        assert exchange.started is not None
        self.exchange = exchange
        self.started = exchange.started
        self.version = 0  # counts what others may wait for
        self.kept = isinstance(exchange.request, Attach) or exchange.request.keep is not None
        writes = isinstance(exchange.request, Start) or exchange.request.write
        able = exchange.welcome is not None and ENGINE in exchange.welcome.features
        self._acknowledges = acknowledge and self.kept and writes and able
        self.unread = Unread(max_unread)
        self._acknowledged = self.offsets
        self._caller = caller
        self._readers: dict[int, int] = {}  # who read an output last
        self._full_since = 0.0  # monotonic; 0.0: nothing is full, or something was taken since
        self._reading = False  # somebody watches for input
        self._writing = False  # somebody watches for room
        self._input_ended = False
        self._failed: Exception | None = None
        self._closed = False
        self.unread.add(exchange.early())

    # ── for callers ──────────────────────────────────────────────────────────────────────────────
    #
    # What gives bytes to its caller has a `Taking`. Where the call does not come to its return,
    # whoever runs these steps puts back what is in there.

    @property
    def exited(self) -> Exited | None:
        """The report of its end, as soon as it has arrived."""
        return self.exchange.exited

    def result(self, stdout: bytes = b"", stderr: bytes = b"") -> Result:
        """Of a process that has ended."""
        assert self.exited is not None
        request = self.exchange.request
        argv = (request.id,) if isinstance(request, Attach) else command(request)
        return Result.of(argv, self.exited, stdout, stderr)

    @property
    def offsets(self) -> dict[str, int]:
        """By output, the number of the first byte that was not handed out."""
        began = self.started.offsets
        return {
            STREAMS[each]: began.get(STREAMS[each], 0) + self.unread.taken(each)
            for each in (STDOUT, STDERR)
        }

    def read(self, stream: int, most: int, taking: Taking) -> Steps[bytes]:
        """1 to `most` bytes as soon as there are any; b"" at the end."""
        while not self.unread.size(stream) and not self.unread.over(stream):
            yield from self._turn(stream=stream)
        return self._handed(stream, self.unread.take(stream, most, taking))

    def reading(self, stream: int, most: int, taking: Taking) -> Steps[bytes]:
        """`read`, or with -1 all until the end, up to MAX_OUTPUT bytes."""
        check_number(most, "read")
        if most < 0:
            return self.read_all(stream, MAX_OUTPUT, taking)
        return self.read(stream, most, taking)

    def read_all(self, stream: int, most: int, taking: Taking) -> Steps[bytes]:
        """All until the end. OutputTooLarge beyond `most` bytes; they can still be read then."""
        self.version += 1
        with self.unread.collecting(most, taking, stream):
            while self.unread.fits(stream, most) and not self.unread.over(stream):
                yield from self._turn(stream=stream)
        return self._handed(stream, self.unread.take_all(stream, taking))

    def read_line(self, stream: int, taking: Taking) -> Steps[bytes]:
        """A line with its newline; the last one may have none. b"" at the end.

        One that is longer than the buffer comes in pieces.
        """
        while not (line := self.unread.take_line(stream, taking)):
            if self.unread.over(stream):
                break
            yield from self._turn(stream=stream)
        return self._handed(stream, line)

    def read_any(self, taking: Taking) -> Steps[tuple[str, bytes] | None]:
        """The next bytes of either output, in the order in which they arrived; None at the end."""
        while not (first := self.unread.first())[0]:
            if self.exited is not None:
                return None
            yield from self._turn(stream=0)
        stream, size = first
        data = self._handed(stream, self.unread.take(stream, size, taking))
        return STREAMS[stream], data

    def put_back(self, taking: Taking) -> None:
        """What a call has taken that did not come to its return is there for the next one."""
        self.unread.put_back(taking)
        self.version += 1

    def write(self, data: Buffer) -> Steps[None]:
        """Feed stdin; until the kernel has all of it, or the process has ended.

        ValueError where this connection cannot, whether the process has ended or not.
        """
        check_bytes(data, "stdin")
        self._check_feeds()
        view = memoryview(data).cast("B")
        exchange = self.exchange
        try:
            while not exchange.over and (view or exchange.pending):
                if view and not exchange.pending:
                    self._check_feeds()  # another caller may have closed it meanwhile
                    exchange.write(view[: bounds.DATA_PAYLOAD])
                    view = view[bounds.DATA_PAYLOAD :]
                    exchange.channel.flush()
                else:
                    yield from self._turn()
        finally:
            exchange.own_queued()

    def say(self, control: Signal | Resize | Acknowledge) -> Steps[None]:
        """Send a control; nothing after the process's end."""
        self.exchange.say(control)
        yield from self._sent()

    def end_input(self) -> Steps[None]:
        """No more stdin. May be said again, and of a process that was started without one."""
        request = self.exchange.request
        has_stdin = request.stdin if isinstance(request, Start) else self.started.stdin
        if has_stdin and not self._input_ended:
            self._check_feeds()
            self._input_ended = True
            self.exchange.end_input()
        yield from self._sent()

    def _check_feeds(self) -> None:
        """ValueError where there is no stdin that this connection may feed."""
        request = self.exchange.request
        if isinstance(request, Attach):
            if not request.write:
                raise ValueError(
                    f"{self.name} is only watched here: attach without write=False to feed its "
                    "stdin"
                )
            if not self.started.stdin:
                raise ValueError(
                    f"{self.name} takes no input: it was started without stdin=True, or its stdin "
                    "was closed by an earlier connection"
                )
        elif not request.stdin:
            raise ValueError(f"{self.name} has no stdin: start it with stdin=True")
        if self._input_ended:
            raise ValueError(f"the stdin of {self.name} was closed: nothing can follow")

    def _sent(self) -> Steps[None]:
        """Give what was queued to the kernel where it takes it now.

        What it does not take goes with the next call; all of them wait for room.
        """
        if not self.exchange.over:
            self._check_usable()
            self.exchange.flush()
            self.version += 1
        yield from ()

    def acknowledgement(self, stdout: int | None, stderr: int | None) -> Acknowledge:
        """Up to these offsets; None is up to what was handed out."""
        return Acknowledge(
            stdout=self.offsets["stdout"] if stdout is None else stdout,
            stderr=self.offsets["stderr"] if stderr is None else stderr,
        )

    def wait(self, timeout: float | None) -> Steps[Result]:
        """Until it has ended. DeadlineExceeded after `timeout` seconds."""
        check_timeout(timeout)
        deadline = Deadline(timeout)
        while self.exited is None:
            if deadline.passed:
                raise self._late(timeout)
            yield from self._turn(deadline=deadline)
        return self.result()

    def poll(self) -> Steps[Result | None]:
        """What is known without waiting."""
        if self.exited is None:
            self._check_usable()
            if not (self._reading or self.unread.full):
                try:
                    self._receive(select.POLLIN)
                except Broken as error:
                    raise (yield from self._fail(error)) from error
        return None if self.exited is None else self.result()

    def communicate(
        self, stdin: Buffer | None, timeout: float | None, max_output: int, taking: Taking
    ) -> Steps[Result]:
        """Feed all of stdin and end it, collect both outputs, wait for the end: all at once."""
        check_timeout(timeout)
        check_count(max_output, "max_output")
        if stdin is not None:
            check_bytes(stdin, "input")
            self._check_feeds()
        deadline, exchange, unread = Deadline(timeout), self.exchange, self.unread
        self.version += 1
        rest = None if stdin is None else memoryview(stdin).cast("B")
        try:
            with unread.collecting(max_output, taking, STDOUT, STDERR):
                while (
                    unread.fits(STDOUT, max_output)
                    and unread.fits(STDERR, max_output)
                    and self.exited is None
                    and not deadline.passed
                ):
                    if rest is not None and not exchange.pending:
                        rest = self._feed(rest)
                    yield from self._turn(stream=0, deadline=deadline)
        finally:
            exchange.own_queued()
        stdout = self._handed(STDOUT, unread.take_all(STDOUT, taking))
        stderr = self._handed(STDERR, unread.take_all(STDERR, taking))
        if self.exited is None:
            raise self._late(timeout, stdout, stderr)
        return self.result(stdout, stderr)

    def _feed(self, rest: memoryview) -> memoryview | None:
        """Queue the next piece of stdin; what is left of it, None after its end."""
        self._check_feeds()
        if rest:
            self.exchange.write(rest[: bounds.DATA_PAYLOAD])
            return rest[bounds.DATA_PAYLOAD :]
        self._input_ended = True
        self.exchange.end_input()
        return None

    @property
    def name(self) -> str:
        """The process in a sentence."""
        request = self.exchange.request
        what = request.id if isinstance(request, Attach) else command(request)[0]
        return f"{what!r:.60} (process {self.started.id})"

    def _late(
        self, timeout: float | None, stdout: bytes = b"", stderr: bytes = b""
    ) -> DeadlineExceeded:
        seconds = timeout or 0.0
        message = f"{self.name} still runs after {seconds:g} s"
        return DeadlineExceeded(message, seconds=seconds, stdout=stdout, stderr=stderr)

    def detach(self) -> Steps[None]:
        """Tell the agent what we have and that we leave, then close."""
        self._acknowledge()
        self.exchange.detach()
        deadline = Deadline(LEAVE_WITHIN)
        channel = self.exchange.channel
        channel.flush()
        while channel.pending and not deadline.passed:
            yield Wait(channel.sock, select.POLLOUT, deadline.within(CHECK_EVERY))
            channel.flush()
        self.close()

    def close(self) -> None:
        """Drop the connection. Who waits on it is woken with ConnectionLost."""
        if self._closed:
            return
        if not self.foreign:
            self._acknowledge()
            self.exchange.channel.flush()
        self._closed = True
        self.version += 1
        self.exchange.close()

    def dropped(self) -> None:
        """Nobody has it any more. What was not closed is; with a warning where it has not ended."""
        if self.exited is not None and not self.foreign:
            self.exchange.close()
        elif self.exchange.fileno() >= 0 and not self.foreign:
            message = (
                f"{self.name} was dropped with its connection open: use it in a with block, or "
                "close or detach it"
            )
            warnings.warn(message, ResourceWarning, stacklevel=2, source=self)
            self.exchange.close()

    @property
    def foreign(self) -> bool:
        """Whether this is a forked child's copy: the process is the parent's."""
        return self.exchange.channel.foreign

    def check_owner(self) -> None:
        """ConnectionLost in a forked child, whose copies of what was read nobody may have."""
        self.exchange.channel.check_owner()

    # ── one turn of waiting ──────────────────────────────────────────────────────────────────────

    def _turn(self, *, stream: int | None = None, deadline: Deadline | None = None) -> Steps[None]:
        """Let something happen: bytes arrive or leave, or another caller changes something.

        `stream`: the output that the caller is here to read, 0 for both. OutputStalled where
        nothing can happen because the other one is full and it is this caller who reads it.
        """
        self._check_usable()
        if stream is not None:
            self._note_reader(stream)
        self._acknowledge()
        channel = self.exchange.channel
        channel.flush()
        full = self.unread.full
        if full:
            self._check_stalled(full)
        wanted = self._unwatched(full)
        # Who watches one direction does not hear when the other one is free to be watched.
        seconds = SHARED_EVERY if wanted == select.POLLOUT else CHECK_EVERY
        if deadline is not None:
            seconds = deadline.within(seconds)
        try:
            if wanted:
                ready = yield from self._watch(wanted, seconds)
            else:
                ready = yield Wait(None, 0, seconds)
            self._check_usable()
            if ready:
                self._receive(ready)
            else:
                yield from channel.check_alive(deadline or Deadline(None))
        except Broken as error:
            raise (yield from self._fail(error)) from error
        except Exception as error:
            self._failed = error
            raise
        if ready & select.POLLOUT:
            self._full_since = 0.0

    def _receive(self, ready: int) -> None:
        """Take what has arrived. Interrupted in between, the connection is of no use any more."""
        try:
            self.exchange.receive(ready)
            self.unread.add(self.exchange.early())
        except (Broken, MicroguestError):
            raise
        except BaseException:
            self._failed = self.exchange.torn()
            raise

    def _unwatched(self, full: int) -> int:
        """What there is to watch for and nobody does: poll(2)'s bits."""
        wanted = 0
        if not (self._reading or full):
            wanted |= select.POLLIN
        if self.exchange.unsent and not self._writing:
            wanted |= select.POLLOUT
        return wanted

    def _watch(self, wanted: int, seconds: float) -> Steps[int]:
        """Watch the socket in the name of all; poll(2)'s bits."""
        reads, writes = wanted & select.POLLIN, wanted & select.POLLOUT
        try:
            if reads:
                self._reading = True
            if writes:
                self._writing = True
            return (yield Wait(self.exchange.channel.sock, wanted, seconds))
        finally:
            if reads:
                self._reading = False
            if writes:
                self._writing = False
            self.version += 1

    def _check_stalled(self, full: int) -> None:
        """Nothing can be received. Who would have to read is somebody else, or this caller."""
        now = time.monotonic()
        self._full_since = self._full_since or now
        caller = self._caller()
        if self._readers.get(full, caller) != caller or now - self._full_since < STALLED_AFTER:
            return
        name = STREAMS[full]
        raise OutputStalled(
            f"{self.name} cannot go on: {self.unread.size(full)} bytes of its {name} wait to be "
            "read. Read both outputs, or use communicate",
            stream=name,
        )

    def _handed(self, stream: int, data: bytes) -> bytes:
        """The bytes, which were taken for a caller: others may have waited for the room."""
        self._note_reader(stream)
        if data:
            self._full_since = 0.0
            self.version += 1
        return data

    def _note_reader(self, stream: int) -> None:
        for each in (stream,) if stream else (STDOUT, STDERR):
            self._readers[each] = self._caller()

    def _acknowledge(self) -> None:
        if not self._acknowledges or self._closed or self._failed is not None:
            return
        had, offsets = dict(self._acknowledged), self.offsets
        for stream in (STDOUT, STDERR):
            name = STREAMS[stream]
            # What is collected counts: the process may wait for that before it writes the rest.
            had[name] = max(had[name], offsets[name] + self.unread.collected(stream))
        if had != self._acknowledged:
            self.exchange.acknowledge(**had)
            self._acknowledged = had

    def _check_usable(self) -> None:
        if self._failed is not None:
            raise self._failed
        if self._closed:
            raise ConnectionLost(f"the connection to {self.name} was closed here")

    def _fail(self, error: Broken) -> Steps[Exception]:
        failed = yield from self.exchange.channel.explained(error)
        self._failed = failed
        self.version += 1
        return failed


def command(start: Start) -> tuple[str, ...]:
    """What was started, for messages."""
    return start.argv if start.shell is None else ("/bin/sh", "-c", start.shell)
