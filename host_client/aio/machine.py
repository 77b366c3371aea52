"""Machines for asyncio and trio: blocking calls of `host_client.machines`, in worker threads."""

import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from types import TracebackType
from typing import Final, Generic, Self, TypeVar, Unpack

import anyio
import anyio.to_thread

from microguest.guest import bounds
from microguest.guest.report import Step
from microguest.host_client.aio.agent import Agent
from microguest.host_client.aio.process import Each
from microguest.host_client.client.clock import GuestClock
from microguest.host_client.errors import DeadlineExceeded, MachineError
from microguest.host_client.forking import Rooted
from microguest.host_client.images import OnProgress
from microguest.host_client.machines import boot as blocking
from microguest.host_client.machines import machine as blocking_machine
from microguest.host_client.machines import named
from microguest.host_client.machines.logs import console_looks
from microguest.host_client.machines.named import MachineInfo
from microguest.host_client.machines.plan import MachineState
from microguest.host_client.machines.settings import MachineOptions
from microguest.host_client.machines.when import Moment
from microguest.host_client.shortage import cannot_start, is_short_of_threads, no_thread
from microguest.host_client.values import check_seconds, check_timeout

__all__ = ["Machine", "NamedMachine", "boot", "find", "list_machines"]

R = TypeVar("R")
M = TypeVar("M", blocking_machine.Machine, named.NamedMachine)

SLICE: Final = 0.5  # seconds that a thread waits before a cancellation is looked at
GIVEN_UP_WAIT: Final = 15.0  # seconds for a machine that was given up to be gone


async def boot(
    image: str,
    *,
    bundle: str | os.PathLike[str] | None = None,
    progress: OnProgress | None = None,
    **options: Unpack[MachineOptions],
) -> "Machine":
    """As `microguest.boot`. Cancelled, it ends the machine before it returns.

    `progress` is called in a worker thread.
    """
    abandoned = threading.Event()
    over = threading.Event()
    begin = threading.Lock()  # is taken by who comes first: the start, or the cancellation
    made: list[blocking_machine.Machine] = []

    def start() -> None:
        if not begin.acquire(blocking=False):
            return
        try:
            made.append(
                blocking.boot(
                    image, bundle=bundle, progress=progress, abandoned=abandoned, **options
                )
            )
        finally:
            over.set()

    try:
        await in_thread(start, abandon_on_cancel=True)
    except BaseException:
        abandoned.set()
        if not begin.acquire(blocking=False):  # else no thread was free for it yet
            with anyio.CancelScope(shield=True):
                await in_thread(
                    partial(give_up, over, made),
                    abandon_on_cancel=True,
                    limiter=anyio.CapacityLimiter(1),  # not behind what has all the others
                )
        raise
    return Machine(made[0])


def give_up(over: threading.Event, made: list[blocking_machine.Machine]) -> None:
    """Until the boot has noticed it; where it was done already, nobody has its machine."""
    over.wait(GIVEN_UP_WAIT)
    for machine in made:
        machine.kill()


async def in_thread(
    call: Callable[..., R],
    *arguments: object,
    abandon_on_cancel: bool = False,
    limiter: anyio.CapacityLimiter | None = None,
) -> R:
    """What a blocking call gives. MachineError where no thread can be started for it."""
    try:
        return await anyio.to_thread.run_sync(
            call, *arguments, abandon_on_cancel=abandon_on_cancel, limiter=limiter
        )
    except RuntimeError as error:
        if not is_short_of_threads(error):
            raise
        raise MachineError(cannot_start("a worker thread", no_thread())) from error


class Held(Rooted, Generic[M]):
    """What can be done with a machine, whoever has started it. `_machine` is the blocking one."""

    _machine: M

    async def __aenter__(self) -> Self:
        return self

    def __repr__(self) -> str:
        return f"aio.{self._machine!r}"

    @property
    def state(self) -> MachineState:
        """All that is known of it now."""
        return self._machine.state

    async def pause(self) -> None:
        """Let it stand still. Only for "qemu"; else MachineError."""
        await in_thread(self._machine.pause)

    async def resume(self) -> GuestClock:
        """Let it go on, and set its clock by ours."""
        return await in_thread(self._machine.resume)

    async def wait(self, timeout: float | None = None) -> MachineState:  # noqa: ASYNC109
        """Until it has ended by itself. DeadlineExceeded after `timeout` seconds."""
        return await sliced(self._machine.wait, timeout)

    async def stop(self, grace: float = bounds.STOP_GRACE) -> MachineState:
        """End it as `microguest.Machine.stop` does; once begun, also where it is cancelled."""
        check_seconds(grace, "grace", bounds.STOP_GRACE_MAX)
        return await in_thread(self._machine.stop, grace)

    async def kill(self) -> MachineState:
        """End it at once, without a word to what runs in it. Returns the last state."""
        return await in_thread(self._machine.kill)


class Machine(Held[blocking_machine.Machine]):
    """As `microguest.Machine`; an async context manager. Its waits can be cancelled."""

    def __init__(self, machine: blocking_machine.Machine) -> None:
        self._machine = machine
        self.agent = Agent.of(machine.agent)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if not self._machine.held:
            return
        with anyio.CancelScope(shield=True):
            await (self.stop() if kind is None or issubclass(kind, Exception) else self.kill())

    @property
    def name(self) -> str:
        """Its name; also what `connect` and the command line take."""
        return self._machine.name

    @property
    def url(self) -> str:
        """Where its agent is."""
        return self._machine.url

    def timeline(self) -> list[Step]:
        """As `microguest.Machine.timeline`."""
        return self._machine.timeline()

    def console(self) -> str:
        """As `microguest.Machine.console`."""
        return self._machine.console()

    def detach(self) -> None:
        """Let it outlive this program and its `async with` block; see `Machine.detach`."""
        self._machine.detach()


async def list_machines(*, all: bool = False) -> list[MachineInfo]:  # noqa: A002
    """As `microguest.list_machines`."""
    return await in_thread(partial(named.list_machines, all=all))


async def find(name: str) -> "NamedMachine":
    """As `microguest.find`."""
    return NamedMachine(await in_thread(named.find, name))


class NamedMachine(Held[named.NamedMachine]):
    """As `microguest.NamedMachine`; an async context manager."""

    def __init__(self, machine: named.NamedMachine) -> None:
        self._machine = machine
        self.name = machine.name

    async def __aexit__(self, *_how: object) -> None:
        self.close()

    def close(self) -> None:
        """Close what is kept open to its agent. May be called again."""
        self._machine.close()

    @property
    def agent(self) -> Agent:
        """Its agent, not dialled yet. MachineError where the machine does not run."""
        return Agent.of(self._machine.agent)

    @property
    def info(self) -> MachineInfo:
        """As in `list_machines`."""
        return self._machine.info

    def logs(
        self,
        *,
        follow: bool = False,
        tail: int | None = None,
        since: Moment | None = None,
        until: Moment | None = None,
        timestamps: bool = False,
    ) -> AsyncIterator[bytes]:
        """As `microguest.NamedMachine.logs`: `async for line in machine.logs(follow=True)`."""
        looks = console_looks(
            self.name, follow=follow, tail=tail, since=since, until=until, timestamps=timestamps
        )
        return Each(Lines(looks).next)


class Lines:
    """Lines that worker threads find. What one has found stays, should its waiter be cancelled."""

    def __init__(self, looks: Iterator[list[bytes]]) -> None:
        self._looks = looks
        self._lock = threading.Lock()  # a thread may look on after its waiter has gone
        self._found: deque[bytes] = deque()

    async def next(self) -> bytes | None:
        """The next line, None at the end."""
        while not self._found and await in_thread(self._look):
            pass
        return self._found.popleft() if self._found else None

    def _look(self) -> bool:
        """Whether there may be more."""
        with self._lock:
            found = next(self._looks, None)
            self._found.extend(found or ())
            return found is not None


async def sliced(wait: Callable[[float], R], timeout: float | None) -> R:  # noqa: ASYNC109
    """What a blocking wait gives, in pieces, between which a cancellation is seen."""
    check_timeout(timeout)
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        left = SLICE if deadline is None else min(SLICE, max(0.0, deadline - time.monotonic()))
        try:
            return await in_thread(wait, left)
        except DeadlineExceeded as error:
            if deadline is not None and time.monotonic() >= deadline:
                message = str(error).rpartition(" after ")[0]
                seconds = timeout or 0.0
                raise DeadlineExceeded(f"{message} after {seconds:g} s", seconds=seconds) from None
