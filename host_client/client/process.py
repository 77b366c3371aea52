"""Processes of a guest, for callers that block.

`Process` has streams; `ProcessStream` has bare events, for who waits for several things at once.
"""

import codecs
import select
import threading
from collections.abc import Callable, Iterator
from typing import Final, Protocol, Self, TypeVar

from microguest.guest.wire.connection import Event
from microguest.guest.wire.messages import Resize, Signal
from microguest.host_client.client.backlog import Taking
from microguest.host_client.client.channel import Broken
from microguest.host_client.client.deadline import Deadline
from microguest.host_client.client.process_connection import Exchange
from microguest.host_client.client.request import signal_number
from microguest.host_client.client.result import Result
from microguest.host_client.client.steps import Steps, run, wait_for
from microguest.host_client.client.streams import MAX_OUTPUT, MAX_UNREAD, STDERR, STDOUT, Session
from microguest.host_client.errors import DeadlineExceeded
from microguest.host_client.forking import Rooted, tell_children
from microguest.host_client.values import Buffer

__all__ = ["Process", "ProcessInput", "ProcessOutput", "ProcessStream"]

CHUNK: Final = 256 * 1024  # bytes that an iteration gives at a time, at most

R = TypeVar("R")
T = TypeVar("T")


class Runner(Protocol):
    """Runs steps of the session."""

    def __call__(self, steps: Steps[R], /) -> R: ...

    def put_back(self, taking: Taking) -> None: ...


class Process(Rooted):
    """A process in a guest, started or attached to. Thread-safe; a context manager.

    Leaving the context kills it, unless it is kept or has ended. Its outputs are read one by one,
    both together by iteration, or with `communicate`. An output that nobody reads stops the process
    once 1 MiB of it has arrived and its pipe in the guest is full; where that would make a call
    here wait for ever, it raises OutputStalled.

    Every wait ends with ConnectionLost within seconds when the machine dies or freezes. In a forked
    child every call but `close` does, and the process stays the parent's.
    """

    _elsewhere = "keep it, and attach to it by its id in the other process"

    def __init__(
        self, exchange: Exchange, *, acknowledge: bool = True, max_unread: int = MAX_UNREAD
    ) -> None:
        self._session = Session(
            exchange,
            caller=threading.get_ident,
            acknowledge=acknowledge,
            max_unread=max_unread,
        )
        self._run = Turns(self._session)
        self.id = self._session.started.id
        self.pid = self._session.started.pid
        self.stdin = ProcessInput(self._run, self._session)
        self.stdout = ProcessOutput(self._run, self._session, STDOUT)
        self.stderr = ProcessOutput(self._run, self._session, STDERR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_how: object) -> None:
        self.close()

    def __repr__(self) -> str:
        exited = self._session.exited
        return f"Process({self._session.name}, {'runs' if exited is None else 'has ended'})"

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        """("stdout" or "stderr", bytes) as they arrive, until it has ended."""
        while True:
            taking = Taking()
            try:
                chunk = self._run(self._session.read_any(taking))
            except BaseException:
                self._run.put_back(taking)
                raise
            if chunk is None:
                return
            yield chunk

    @property
    def offsets(self) -> dict[str, int]:
        """By output, the number of the first byte that was not given out yet: for `attach`."""
        return self._session.offsets

    @property
    def dropped(self) -> dict[str, int]:
        """After an attach, by output: bytes that were asked for and are gone."""
        return dict(self._session.started.dropped)

    def wait(self, timeout: float | None = None) -> Result:
        """Until it has ended; its output stays to be read. DeadlineExceeded after `timeout` s."""
        return self._run(self._session.wait(timeout))

    def poll(self) -> Result | None:
        """What `wait` would return if it has ended, else None. Does not wait."""
        return self._run(self._session.poll())

    def communicate(
        self,
        input: Buffer | None = None,  # noqa: A002  the name that subprocess has for it
        *,
        timeout: float | None = None,
        max_output: int = MAX_OUTPUT,
    ) -> Result:
        """Feed `input` and end stdin (None: neither), collect both outputs, wait for the end.

        ValueError where `input` is given and stdin cannot be written to, as `stdin.write` says.
        DeadlineExceeded after `timeout` seconds, with the output so far; OutputTooLarge beyond
        `max_output` bytes of one output. The process goes on in both cases.
        """
        taking = Taking()
        try:
            result = self._run(self._session.communicate(input, timeout, max_output, taking))
        except DeadlineExceeded:
            raise  # it has what was taken
        except BaseException:
            self._run.put_back(taking)
            raise
        return result

    def signal(self, name: str | int, target: str = "group") -> None:
        """Send "TERM", "SIGTERM" or 15 to the "process", its "group" or its whole "tree".

        ValueError where there is no such signal or target. One that has ended is no error.
        """
        signal = Signal(signal=signal_number(name), target=target)
        self._run(self._session.say(signal))

    def kill(self) -> None:
        """Kill it and everything that descends from it."""
        self.signal("KILL", "tree")

    def resize(self, rows: int, columns: int) -> None:
        """Give its terminal a size. SIGWINCH is sent also where it is the same."""
        self._run(self._session.say(Resize(rows=rows, columns=columns)))

    def acknowledge(self, *, stdout: int | None = None, stderr: int | None = None) -> None:
        """Say that nothing before these offsets is needed again; None: what was given out.

        Only needed where it was opened with acknowledge=False.
        """
        self._run(self._session.say(self._session.acknowledgement(stdout, stderr)))

    def detach(self) -> None:
        """Leave a kept process to itself; `Agent.attach` finds it again by its id."""
        self._run(self._session.detach())

    def close(self) -> None:
        """Drop the connection. Kills it, unless it is kept or has ended. May be called again."""
        if self._session.foreign:
            self._session.close()
            return
        self._run.close()


class Turns:
    """Runs the steps of a session for many threads. Whoever has a process or a stream has this."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._lock = threading.RLock()
        self._sleepers: list[threading.Lock] = []
        tell_children(self)

    def forked(self) -> None:
        """See `Owner.forked`: whatever thread had the lock is not here."""
        self._lock = threading.RLock()
        self._sleepers = []

    def __del__(self) -> None:
        """Nothing else that refers to the session refers to this, so it goes before that."""
        self._session.dropped()

    def close(self) -> None:
        """Close the session, and wake who waits."""
        with self._lock:
            self._session.close()
            self._wake()

    def __call__(self, steps: Steps[R], /) -> R:
        """Run steps of the session: alone between two waits, which others use for theirs.

        No threading.Condition: an interrupt (Ctrl-C, an exception for this thread) between two
        lines of that leaves its lock taken, or is hidden by the complaint that it is not. A `with`
        of a lock alone is one step, before or after which an interrupt comes.
        """
        session = self._session
        session.check_owner()
        ready: int | None = None  # as `next` sends it
        try:
            while True:
                with self._lock:
                    version = session.version
                    try:
                        wait = steps.send(ready)  # type: ignore[arg-type]
                    finally:
                        if session.version != version:
                            self._wake()
                    bell = self._bell() if wait.sock is None else None
                if bell is None:
                    ready = wait_for(wait)
                else:
                    bell.acquire(timeout=wait.seconds)
                    ready = 0
                    with self._lock:
                        if bell in self._sleepers:
                            self._sleepers.remove(bell)
        except StopIteration as stop:
            result: R = stop.value
            return result  # with no call in between, at which an interrupt could take it away
        except BaseException:
            with self._lock:
                steps.close()
                self._wake()
            raise

    def put_back(self, taking: Taking) -> None:
        """What a call has taken and could not return is there for the next one.

        For every frame between that call and its caller: behind each call in it comes a moment at
        which an interrupt can take what was returned away.
        """
        with self._lock:
            self._session.put_back(taking)
            self._wake()

    def _bell(self) -> threading.Lock:
        """What the next `_wake` lets be taken."""
        bell = threading.Lock()
        bell.acquire()
        self._sleepers.append(bell)
        return bell

    def _wake(self) -> None:
        """Let those go on who wait for a change."""
        while self._sleepers:
            self._sleepers.pop().release()


class ProcessInput:
    """A process's stdin."""

    def __init__(self, run: Runner, session: Session) -> None:
        self._run = run
        self._session = session

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_how: object) -> None:
        self.close()

    def write(self, data: Buffer) -> None:
        """Send all of it, waiting while the process does not read.

        What a process that has ended cannot read any more is dropped, as its end tells enough.
        ValueError where it was started without stdin, or is only watched, or stdin was closed.
        """
        self._run(self._session.write(data))

    def close(self) -> None:
        """No more input: the process reads the end of its stdin. May be called again."""
        self._run(self._session.end_input())


class ProcessOutput:
    """A process's stdout or stderr. Iteration gives bytes as they arrive."""

    def __init__(self, run: Runner, session: Session, stream: int) -> None:
        self._run = run
        self._session = session
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        return self._each(lambda taking: self._session.read(self._stream, CHUNK, taking), _as_is)

    def read(self, most: int = -1) -> bytes:
        """At least 1 and at most `most` bytes, as soon as there are any; b"" at the end.

        -1 is everything until the end, of which there may be 256 MiB (OutputTooLarge).
        """
        taking = Taking()
        try:
            piece = self._run(self._session.reading(self._stream, most, taking))
        except BaseException:
            self._run.put_back(taking)
            raise
        return piece

    def lines(self) -> Iterator[bytes]:
        """Lines with their newlines as they arrive; one over 1 MiB comes in pieces."""
        return self._each(lambda taking: self._session.read_line(self._stream, taking), _as_is)

    def text(self, encoding: str = "utf-8", errors: str = "replace") -> Iterator[str]:
        """Lines as text, without their newlines. One that cannot be decoded stays to be read."""

        def decoded(line: bytes) -> str:
            return codecs.decode(line, encoding, errors).removesuffix("\n")

        return self._each(lambda taking: self._session.read_line(self._stream, taking), decoded)

    def _each(
        self, take: Callable[[Taking], Steps[bytes]], made: Callable[[bytes], T]
    ) -> Iterator[T]:
        while True:
            taking = Taking()
            try:
                piece = self._run(take(taking))
                item = made(piece)
            except BaseException:
                self._run.put_back(taking)
                raise
            if not piece:
                return
            yield item


def _as_is(piece: bytes) -> bytes:
    return piece


class ProcessStream(Exchange):
    """A process as bare events, for select(2): what a terminal is joined to.

    Nothing is buffered here, and nothing acknowledged by itself. Not thread-safe.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_how: object) -> None:
        self.close()

    def step(self, deadline: Deadline) -> list[Event]:
        """The next events; an empty list when only stdin moved. Empty for ever after Exited."""
        run(self.gather(deadline))
        events, self._early = self._early, []
        return events  # with no call in between, at which an interrupt could take them away

    def take(self) -> list[Event]:
        """What is there, without waiting."""
        if not self._early and self.exited is None:
            self.channel.flush()
            try:
                self.receive(select.POLLIN)
            except Broken as error:
                raise run(self.channel.explained(error)) from error
        events, self._early = self._early, []
        return events

    def check_alive(self) -> None:
        """ConnectionLost where the machine has died, or answers nobody any more."""
        run(self.channel.check_alive(Deadline(None)))

    def events(self, deadline: Deadline) -> Iterator[Event]:
        """All events until and including Exited."""
        while self._early or self.exited is None:
            run(self.gather(deadline))
            while self._early:
                event = self._early[0]
                del self._early[0]
                yield event

    def __iter__(self) -> Iterator[Event]:
        return self.events(Deadline(None))
