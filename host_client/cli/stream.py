"""A process's streams joined to ours: bytes as they come, signals and window sizes passed on."""

import math
import os
import select
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NoReturn

from microguest.guest.wire.connection import Data
from microguest.guest.wire.messages import Exited
from microguest.host_client.cli.detachkeys import HELD_FOR, DetachKeys
from microguest.host_client.cli.killed import Killed
from microguest.host_client.cli.output import Outputs
from microguest.host_client.cli.tell import complain
from microguest.host_client.cli.terminal import Terminal
from microguest.host_client.client.process import ProcessStream

__all__ = [
    "FORWARDED",
    "Detached",
    "Insisted",
    "Interrupted",
    "ended_in_order",
    "join",
    "passed_signals",
]

FORWARDED: Final = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
OF_TERMINALS: Final = (signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT)
# With a terminal these are for us: a shell ignores TERM, and nobody types them.
ENDING_TERMINALS: Final = (signal.SIGTERM, signal.SIGHUP)
# Seconds between two of the same that mean: give up. TERM is sent by programs, which wait a while.
TWICE_WITHIN: Final = {signal.SIGINT: 2.0, signal.SIGTERM: 10.0}
ONCE_WITHIN: Final = 0.1  # and these are one: timeout(1) sends it to us, and again to our group
STDIN_CHUNK: Final = 64 * 1024
NO_STDIN: Final = (
    "process {id} has no stdin that could be written to: what comes on ours is dropped"
)
CHECK_EVERY: Final = 1.0  # seconds between looks at whether the machine lives
# Seconds without a byte that our readers take, after a TERM, until it ends us: how the process has
# ended is behind what they do not read.
STUCK_WAIT: Final = 2.0


class Interrupted(Exception):
    """A second Ctrl-C came soon after the first: the process does not react."""


class Insisted(Killed):
    """A second SIGTERM came soon after the first: it is ours, and there is nothing to wait for."""


class Detached(Exception):
    """The detach keys were typed; the process goes on."""


@contextmanager
def passed_signals(numbers: Sequence[int] = FORWARDED) -> Iterator[socket.socket]:
    """While this is open, these signals arrive as bytes on the socket and do nothing else.

    Who started us with some of them ignored, as nohup(1) does, wants neither us nor the process to
    be ended by them: these stay ignored.
    """
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    handled = (*FORWARDED, *OF_TERMINALS)
    before = {number: signal.getsignal(number) for number in handled}
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        take_over(numbers)
        yield reader
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        reader.close()
        writer.close()


@contextmanager
def ended_in_order() -> Iterator[None]:
    """While this is open, TERM and HUP raise Killed, so that what was begun is taken back.

    Ignored ones stay ignored. Inside of `passed_signals` they are passed on as ever.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        for number, handler in before.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, _killed)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _killed(number: int, _frame: object) -> NoReturn:
    raise Killed(number)


def take_over(numbers: Sequence[int]) -> None:
    """Let each of them do no more than wake us, but where it is ignored."""
    for number in numbers:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _nothing)


def _nothing(_number: int, _frame: object) -> None:
    """The byte on the wake-up descriptor is all that a signal does."""


def join(
    process: ProcessStream,
    signals: socket.socket,
    *,
    stdin: bool,
    terminal: Terminal | None = None,
    keys: bytes = b"",
) -> Exited:
    """Until the process has ended and all it wrote is written here. `stdin`: pass ours on.

    `terminal`: ours, which is raw and belongs to the process; `keys` detach from it then.
    ConnectionLost where the machine dies; Interrupted, Insisted, Detached; Killed where a
    signal ends us and not the process, as SIGPIPE does where nobody reads our output.
    """
    joint = _Joint(process, signals, stdin=stdin, terminal=terminal, keys=keys)
    try:
        return joint.run()
    finally:
        joint.outputs.close()


class _Joint:
    def __init__(
        self,
        process: ProcessStream,
        signals: socket.socket,
        *,
        stdin: bool,
        terminal: Terminal | None,
        keys: bytes,
    ) -> None:
        self.outputs = Outputs()
        self._process = process
        self._signals = signals
        self._stdin = stdin  # more may come
        assert process.started is not None
        self._started = process.started
        self._terminal = terminal
        self._keys = DetachKeys(keys)
        self._release_at = math.inf  # when keys that are held back have waited long enough
        self._came_at: dict[int, float] = {}  # when a signal was passed on last
        self._asked_to_end_at = math.inf  # by a TERM, which was passed on

    def run(self) -> Exited:
        """Move bytes until the end."""
        if self._terminal is not None:
            take_over(OF_TERMINALS)
            self._resize()  # also where it has changed since the start
        self._take()
        while self._process.exited is None or self.outputs.blocked_on is not None:
            ready = self._wait()
            if not ready:
                self._process.check_alive()
            if time.monotonic() >= self._release_at:
                self._release_at = math.inf
                self._type(self._keys.release())
            if self._signals.fileno() in ready:
                self._pass_signals()
            if 0 in ready:
                self._read_stdin()
            self._move(ready)
            stuck = max(self.outputs.stuck_since, self._asked_to_end_at)
            if time.monotonic() - stuck >= STUCK_WAIT:
                raise Killed(signal.SIGTERM)
        return self._process.exited

    def _wait(self) -> set[int]:
        """Descriptors that are ready; none after a while."""
        poll = select.poll()
        pending, blocked_on = self._process.pending, self.outputs.blocked_on
        wanted = (select.POLLOUT if self._process.unsent else 0) | (
            select.POLLIN if blocked_on is None else 0
        )
        if wanted and self._process.exited is None:
            poll.register(self._process, wanted)
        if blocked_on is not None:
            poll.register(blocked_on, select.POLLOUT)
        poll.register(self._signals, select.POLLIN)
        if self._stdin and not pending:
            poll.register(0, select.POLLIN)
        seconds = max(0.0, min(CHECK_EVERY, self._release_at - time.monotonic()))
        return {fd for fd, _ in poll.poll(math.ceil(seconds * 1000))}

    def _move(self, ready: set[int]) -> None:
        """Write what waits for our readers; take more of the process only without that."""
        if self.outputs.blocked_on is None:
            self._take()
            return
        self.outputs.flush()
        if self._process.fileno() in ready:
            self._process.flush()

    def _take(self) -> None:
        for event in self._process.take():
            if isinstance(event, Data):
                self.outputs.put(event.stream, event.data)
                if self._terminal is not None:
                    self._terminal.watch_screen(event.data)

    # ── to the process ───────────────────────────────────────────────────────────────────────────

    def _read_stdin(self) -> None:
        try:
            data = os.read(0, STDIN_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            if self._terminal is None:
                raise
            data = b""  # EIO: it hung up
        if data and not self._started.stdin:
            complain(NO_STDIN.format(id=self._started.id))
            self._stdin = False
        elif data:
            self._type(self._keys.feed(data))
            self._release_at = time.monotonic() + HELD_FOR if self._keys.holding else math.inf
        elif self._terminal is not None:
            raise Killed(signal.SIGHUP)
        else:
            self._stdin = False
            self._process.end_input()

    def _type(self, data: bytes) -> None:
        if data:
            self._process.write(data)
        if self._keys.detached:
            raise Detached

    def _pass_signals(self) -> None:
        for number in self._signals.recv(64):
            if self._terminal is not None:
                self._with_terminal(self._terminal, number)
            elif number in FORWARDED:
                self._forward(number)

    def _forward(self, number: int) -> None:
        if self._process.exited is not None:  # it is for us, who wait for a reader of ours only
            raise Interrupted if number == signal.SIGINT else Killed(number)
        if number in TWICE_WITHIN:
            now = time.monotonic()
            since = now - self._came_at.get(number, -math.inf)
            if since < ONCE_WITHIN:
                return
            if since < TWICE_WITHIN[signal.Signals(number)]:
                raise Interrupted if number == signal.SIGINT else Insisted(number)
            self._came_at[number] = now
        if number == signal.SIGTERM:
            self._asked_to_end_at = min(self._asked_to_end_at, time.monotonic())
        self._process.signal(number)

    def _with_terminal(self, terminal: Terminal, number: int) -> None:
        """A signal while the keyboard belongs to the process: somebody has sent it."""
        if number in ENDING_TERMINALS:
            raise Killed(number)
        if number == signal.SIGTSTP:
            terminal.suspend()
            os.kill(os.getpid(), signal.SIGSTOP)  # goes on in the next line after a SIGCONT
        elif number == signal.SIGCONT:
            terminal.resume()
            self._resize()
        elif number == signal.SIGWINCH:
            self._resize()
        else:
            self._forward(number)

    def _resize(self) -> None:
        assert self._terminal is not None
        size = self._terminal.size
        self._process.resize(size.rows, size.columns)
