"""Processes of a guest for asyncio and trio. The logic is `host_client.client.streams`'s."""

import codecs
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final, Protocol, Self, TypeVar

import anyio
from anyio.abc import ByteReceiveStream, ByteSendStream
from anyio.lowlevel import checkpoint

from microguest.guest.wire.messages import Resize, Signal
from microguest.host_client.aio.waiting import wait_for
from microguest.host_client.client.backlog import Taking
from microguest.host_client.client.process_connection import Exchange
from microguest.host_client.client.request import signal_number
from microguest.host_client.client.result import Result
from microguest.host_client.client.steps import Steps
from microguest.host_client.client.streams import MAX_OUTPUT, MAX_UNREAD, STDERR, STDOUT, Session
from microguest.host_client.errors import DeadlineExceeded
from microguest.host_client.forking import Rooted
from microguest.host_client.values import Buffer

__all__ = ["Process", "ProcessInput", "ProcessOutput"]

CHUNK: Final = 256 * 1024  # bytes that an iteration gives at a time, at most

R = TypeVar("R")
T = TypeVar("T")


class Runner(Protocol):
    """Runs steps of the session."""

    async def __call__(self, steps: Steps[R], taking: Taking | None = None, /) -> R: ...


class Process(Rooted):
    """As `microguest.Process`. Any number of tasks may use it; an async context manager.

    A cancelled call loses nothing: what it would have given is given to the next one. Leaving the
    context drops the connection.
    """

    _elsewhere = "keep it, and attach to it by its id in the other process"

    def __init__(
        self, exchange: Exchange, *, acknowledge: bool = True, max_unread: int = MAX_UNREAD
    ) -> None:
        self._session = Session(
            exchange,
            caller=lambda: anyio.get_current_task().id,
            acknowledge=acknowledge,
            max_unread=max_unread,
        )
        self._changed = anyio.Event()
        self.id = self._session.started.id
        self.pid = self._session.started.pid
        self.stdin = ProcessInput(self._run, self._session)
        self.stdout = ProcessOutput(self._run, self._session, STDOUT)
        self.stderr = ProcessOutput(self._run, self._session, STDERR)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_how: object) -> None:
        self.close()

    def __repr__(self) -> str:
        exited = self._session.exited
        return f"Process({self._session.name}, {'runs' if exited is None else 'has ended'})"

    def __aiter__(self) -> AsyncIterator[tuple[str, bytes]]:
        """("stdout" or "stderr", bytes) as they arrive, until it has ended."""
        return Each(self._either)

    async def _either(self) -> tuple[str, bytes] | None:
        taking = Taking()
        return await self._run(self._session.read_any(taking), taking)

    @property
    def offsets(self) -> dict[str, int]:
        """By output, the number of the first byte that was not given out yet: for `attach`."""
        return self._session.offsets

    @property
    def dropped(self) -> dict[str, int]:
        """After an attach, by output: bytes that were asked for and are gone."""
        return dict(self._session.started.dropped)

    async def wait(self, timeout: float | None = None) -> Result:  # noqa: ASYNC109
        """Until it has ended; its output stays to be read. DeadlineExceeded after `timeout` s."""
        return await self._run(self._session.wait(timeout))

    async def poll(self) -> Result | None:
        """What `wait` would return if it has ended, else None. Does not wait."""
        return await self._run(self._session.poll())

    async def communicate(
        self,
        input: Buffer | None = None,  # noqa: A002
        *,
        timeout: float | None = None,  # noqa: ASYNC109
        max_output: int = MAX_OUTPUT,
    ) -> Result:
        """Feed `input` and end stdin (None: neither), collect both outputs, wait for the end."""
        taking = Taking()
        steps = self._session.communicate(input, timeout, max_output, taking)
        return await self._run(steps, taking)

    async def signal(self, name: str | int, target: str = "group") -> None:
        """Send "TERM", "SIGTERM" or 15 to the "process", its "group" or its whole "tree"."""
        signal = Signal(signal=signal_number(name), target=target)
        await self._run(self._session.say(signal))

    async def kill(self) -> None:
        """Kill it and everything that descends from it."""
        await self.signal("KILL", "tree")

    async def resize(self, rows: int, columns: int) -> None:
        """Give its terminal a size. SIGWINCH is sent also where it is the same."""
        await self._run(self._session.say(Resize(rows=rows, columns=columns)))

    async def acknowledge(self, *, stdout: int | None = None, stderr: int | None = None) -> None:
        """Say that nothing before these offsets is needed again; None: what was given out."""
        await self._run(self._session.say(self._session.acknowledgement(stdout, stderr)))

    async def detach(self) -> None:
        """Leave a kept process to itself; `Agent.attach` finds it again by its id."""
        await self._run(self._session.detach())

    def close(self) -> None:
        """Drop the connection. Kills it, unless it is kept or has ended. May be called again."""
        sock = self._session.exchange.channel.sock
        if sock.fileno() >= 0 and not self._session.foreign:
            anyio.notify_closing(sock)
        self._session.close()
        self._tell()

    def _tell(self) -> None:
        """Wake the tasks that wait for a change."""
        self._changed.set()
        self._changed = anyio.Event()

    async def _run(self, steps: Steps[R], taking: Taking | None = None, /) -> R:
        """Run steps of the session; between two of their waits no other task runs.

        What they return has been taken from the session, so nothing is awaited after that: no
        shield of anyio's holds against a `cancel` of asyncio's own. A signal's handler may raise
        all the same: then it is put back.
        """
        session = self._session
        session.check_owner()
        await checkpoint()
        version = session.version
        try:
            wait = next(steps)
            while True:
                if session.version != version:
                    self._tell()
                ready = 0
                if wait.sock is None:
                    with anyio.move_on_after(wait.seconds):
                        await self._changed.wait()
                else:
                    try:
                        ready = await wait_for(wait)
                    except anyio.ClosedResourceError:
                        pass  # by `close`, which the session knows of
                version = session.version
                wait = steps.send(ready)
        except StopIteration as stop:
            result: R = stop.value
        except BaseException as error:
            steps.close()
            self._put_back(taking, error)
            raise
        try:
            self._tell()
        except BaseException as error:
            self._put_back(taking, error)
            raise
        return result

    def _put_back(self, taking: Taking | None, error: BaseException) -> None:
        """What a call has taken and cannot return, as it raises, is there for the next one."""
        if taking is not None and not isinstance(error, DeadlineExceeded):  # that has it
            self._session.put_back(taking)
        self._tell()


class ProcessInput(ByteSendStream):
    """A process's stdin."""

    def __init__(self, run: Runner, session: Session) -> None:
        self._run = run
        self._session = session

    async def send(self, item: bytes) -> None:
        """Send all of it, waiting while the process does not read.

        What a process that has ended cannot read any more is dropped. Where it is cancelled, part
        of it may have been sent. ValueError where there is no stdin to write to, as in the
        blocking client.
        """
        await self._run(self._session.write(item))

    async def aclose(self) -> None:
        """No more input: the process reads the end of its stdin. May be called again."""
        await self._run(self._session.end_input())


class ProcessOutput(ByteReceiveStream):
    """A process's stdout or stderr. Iteration gives bytes as they arrive."""

    def __init__(self, run: Runner, session: Session, stream: int) -> None:
        self._run = run
        self._session = session
        self._stream = stream

    async def receive(self, max_bytes: int = CHUNK) -> bytes:
        """1 to `max_bytes` bytes as soon as there are any. anyio.EndOfStream at the end."""
        piece = await self.read(max_bytes)
        if not piece:
            raise anyio.EndOfStream
        return piece

    async def read(self, most: int = -1) -> bytes:
        """As `receive`, with b"" at the end; -1 is everything until the end, up to 256 MiB."""
        taking = Taking()
        return await self._run(self._session.reading(self._stream, most, taking), taking)

    def lines(self) -> AsyncIterator[bytes]:
        """Lines with their newlines as they arrive; one over 1 MiB comes in pieces."""
        return Each(self._line)

    async def _line(self) -> bytes:
        taking = Taking()
        return await self._run(self._session.read_line(self._stream, taking), taking)

    def text(self, encoding: str = "utf-8", errors: str = "replace") -> AsyncIterator[str]:
        """Lines as text, without their newlines. One that cannot be decoded stays to be read."""
        return Each(lambda: self._text(encoding, errors))

    async def _text(self, encoding: str, errors: str) -> str | None:
        taking = Taking()
        decoded = as_text(self._session.read_line(self._stream, taking), encoding, errors)
        return await self._run(decoded, taking)

    async def aclose(self) -> None:
        """Nothing: what it would still give stays with the process."""


def as_text(line: Steps[bytes], encoding: str, errors: str) -> Steps[str | None]:
    """The line decoded, None at the end."""
    data = yield from line
    return codecs.decode(data, encoding, errors).removesuffix("\n") if data else None


class Each(AsyncIterator[T]):
    """What a call gives each time, until that is None or empty bytes.

    Not an async generator: one that is left in the middle needs an event loop to be tidied up.
    """

    def __init__(self, ask: Callable[[], Awaitable[T | None]]) -> None:
        self._ask = ask

    async def __anext__(self) -> T:
        item = await self._ask()
        if item is None or item == b"":
            raise StopAsyncIteration
        return item
