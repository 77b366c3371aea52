"""A process's streams joined to ours: bytes as they come, signals passed on."""

import os
import select
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from guest.connection import Data
from guest.messages import Exited
from host_client.process import ProcessStream

__all__ = ["Interrupted", "join", "terminal_signals"]

FORWARDED: Final = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
TWICE_WITHIN: Final = 2.0  # seconds between two Ctrl-C that mean: give up
STDIN_CHUNK: Final = 64 * 1024
CHECK_EVERY: Final = 1.0  # seconds between looks at whether the machine lives


class Interrupted(Exception):
    """A second Ctrl-C came soon after the first: the process does not react."""


@contextmanager
def terminal_signals() -> Iterator[socket.socket]:
    """While this is open, signals arrive as bytes on the socket and do nothing else."""
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    before = {number: signal.getsignal(number) for number in FORWARDED}
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        for number in FORWARDED:
            signal.signal(number, lambda _number, _frame: None)
        yield reader
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        reader.close()
        writer.close()


def join(process: ProcessStream, signals: socket.socket, *, stdin: bool) -> Exited:
    """Until the process has ended and all it wrote is written here. `stdin`: pass ours on.

    ConnectionLost where its machine dies; Interrupted; BrokenPipeError where stdout is gone.
    """
    return _Joint(process, signals, stdin=stdin).run()


class _Joint:
    def __init__(self, process: ProcessStream, signals: socket.socket, *, stdin: bool) -> None:
        self._process = process
        self._signals = signals
        self._stdin = stdin  # more may come
        self._interrupted_at = float("-inf")

    def run(self) -> Exited:
        """Move bytes until the end."""
        self._take()
        while self._process.exited is None:
            ready = self._wait()
            if not ready:
                self._process.check_alive()
            if self._signals.fileno() in ready:
                self._pass_signals()
            if 0 in ready:
                self._read_stdin()
            self._take()
        return self._process.exited

    def _wait(self) -> set[int]:
        poll = select.poll()
        pending = self._process.pending
        poll.register(self._process, select.POLLIN | (select.POLLOUT if pending else 0))
        poll.register(self._signals, select.POLLIN)
        if self._stdin and not pending:
            poll.register(0, select.POLLIN)
        return {fd for fd, _ in poll.poll(CHECK_EVERY * 1000)}

    def _take(self) -> None:
        for event in self._process.take():
            if isinstance(event, Data):
                write_all(event.stream, event.data)

    def _read_stdin(self) -> None:
        data = os.read(0, STDIN_CHUNK)
        if data:
            self._process.write(data)
        else:
            self._stdin = False
            self._process.end_input()

    def _pass_signals(self) -> None:
        for number in self._signals.recv(64):
            if number == signal.SIGINT:
                if time.monotonic() - self._interrupted_at < TWICE_WITHIN:
                    raise Interrupted
                self._interrupted_at = time.monotonic()
            if number in FORWARDED:
                self._process.signal(number)


def write_all(fd: int, data: bytes) -> None:
    """Write to one of our own streams, past any buffer, also where it is non-blocking."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            poll = select.poll()
            poll.register(fd, select.POLLOUT)
            poll.poll(CHECK_EVERY * 1000)
