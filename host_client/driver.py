"""Everything that can be asked of an agent, as steps: the one logic behind every kind of client.

Every command has a connection of its own; small requests share a few kept ones. Thread-safe, and of
no event loop.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

from guest import limits
from guest.connection import Data, Request, Response
from guest.errors import (
    MicroguestError,
    OperationError,
    RemoteProtocolError,
    operation_error,
)
from guest.messages import (
    FEATURES,
    HOST_FEATURES,
    Acknowledge,
    Attach,
    Exited,
    Failure,
    Forget,
    ForgetResult,
    Hello,
    Info,
    InfoResult,
    ListProcesses,
    Ping,
    PingResult,
    ProcessInfo,
    ProcessList,
    Shutdown,
    ShutdownResult,
    SignalProcess,
    SignalResult,
    Start,
    Wait,
    Welcome,
)
from guest.record import Record, RecordError
from host_client import renewal
from host_client.address import Address, NotListening
from host_client.channel import EXPLAIN_WITHIN, Channel, Obituary, ended
from host_client.deadline import LAST_LOOK, Deadline
from host_client.errors import ConnectError, ConnectionLost, DeadlineExceeded
from host_client.exchange import Exchange, Output
from host_client.forking import tell_children
from host_client.log import DEBUG, INFO, note
from host_client.renewal import GuestClock
from host_client.request import signal_number
from host_client.result import Result
from host_client.session import command
from host_client.steps import Steps, until
from host_client.steps import Wait as Pause
from host_client.values import Buffer, check_seconds, text

__all__ = ["CLIENT", "Driver"]

IDLE_CONNECTIONS: Final = 4  # kept for small requests
REUSED_WAIT: Final = 2.0  # seconds for an answer on a kept one, before a new one is tried
RETRY_EVERY: Final = 0.01  # seconds between dials of a guest whose listener is not up
KILL_ALLOWANCE: Final = 5.0  # seconds a timed-out command gets to be killed and reported
WAIT_SLICE: Final = 2.0  # seconds that the agent is asked to wait at a time
CLOCK_EVERY: Final = 10.0  # seconds between looks at the guest's clock, each with a new connection
CLIENT: Final = "microguest-host"

# What agents knew before they named FEATURES; older ones ignore the other fields.
BASIC: Final = {
    Start: frozenset({"argv", "env", "cwd", "user", "stdin", "timeout"}),
    Attach: frozenset({"id"}),
}

E = TypeVar("E", bound=Exchange)
R = TypeVar("R", bound=Record)


class Driver:
    """One agent: where it is, what is known of it, the connections kept to it."""

    def __init__(
        self,
        address: Address,
        token: str,
        *,
        timeout: float = 10.0,
        obituary: Obituary | None = None,
    ) -> None:
        check_seconds(timeout, "timeout")
        self.address = address
        self.timeout = timeout
        self.keeps_clock = True  # a guest's clock that is out is set without being asked
        self.first_exec_at: float | None = None  # monotonic clock, when the first result was here
        self._hello = Hello(token=token, client=CLIENT, features=HOST_FEATURES)
        self._obituary = obituary
        self._features: tuple[str, ...] | None = None  # of the agent, once it has said them
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._idle: list[Channel] = []
        self._busy: set[Channel] = set()  # what `end` ends
        self._ends = 0  # how often it did
        self._closed = False
        self._clock_looked_at = -CLOCK_EVERY  # monotonic clock
        self._asks_for_clock = False  # in a hello that no welcome has answered yet
        self._clock_is_out = False
        tell_children(self)

    def forked(self) -> None:
        """See `Owner.forked`: this process begins without connections and makes its own."""
        self._owner = os.getpid()
        self._lock = threading.Lock()
        for channel in self._idle:
            channel.close()
        self._idle = []
        self._busy = set()

    def end(self) -> None:
        """Close the kept connections, and end what is being asked or run: ConnectionLost there."""
        self.close()
        with self._lock:
            self._ends += 1
            for channel in self._busy:
                channel.fail(self._ended_here())

    def _ended_here(self) -> ConnectionLost:
        return ConnectionLost(f"the connection to {self.address} was closed here, by Agent.close")

    @contextmanager
    def _ending(self, channel: Channel, ends: int) -> Iterator[None]:
        """What runs in this on the channel is ended by `end`. `ends`: how often when it began."""
        with self._lock:
            if self._ends != ends:
                raise self._ended_here()
            self._busy.add(channel)
        try:
            yield
        finally:
            with self._lock:
                self._busy.discard(channel)

    def close(self) -> None:
        """Close the kept connections."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for channel in idle:
            channel.close()

    # ── processes ────────────────────────────────────────────────────────────────────────────────

    def exec(self, start: Start, stdin: Buffer | None, max_output: int) -> Steps[Result]:
        """Run to the end and collect. Raises as `Agent.exec` says."""
        seconds = None
        if start.timeout is not None:
            seconds = start.timeout + start.grace + self.timeout + KILL_ALLOWANCE
        deadline, ends = Deadline(seconds), self._ends
        output = Output(max_output)
        exchange = yield from until(deadline, self.open(start, Exchange))
        if exchange is None:
            raise _timed_out(start, output, "and the agent did not report its start")
        try:
            with self._ending(exchange.channel, ends):
                if stdin is not None:
                    exchange.write(memoryview(stdin).cast("B"))
                    exchange.end_input()
                exited = yield from _collected(exchange, output, deadline)
        except DeadlineExceeded:
            raise _timed_out(start, output, "and the agent did not report its end") from None
        finally:
            exchange.close()
        if self.first_exec_at is None:
            self.first_exec_at = time.monotonic()
        if exited.timed_out:
            raise _timed_out(start, output, "and was killed")
        return Result.of(command(start), exited, output.stdout, output.stderr)

    def open(
        self,
        args: Start | Attach,
        kind: type[E],
        opened: list[E] | None = None,
        *,
        acknowledge: bool = False,
    ) -> Steps[E]:
        """Start or attach, and keep the connection. `acknowledge`: begin to, with what we have.

        `opened`: gets it as well, for a caller who may be interrupted before it has the result.
        """
        ends = self._ends
        yield from self._require(args)
        if acknowledge and self._features is None:
            yield from self.ping()  # only newer agents take acknowledgements
        what = args.id if isinstance(args, Attach) else command(args)[0]
        note(DEBUG, "%s: %s %.60r", self.address, type(args).__name__.lower(), what)
        channel = yield from self._dial(Deadline(self.timeout), lasting=True)
        began = time.monotonic_ns()
        try:
            exchange = kind(channel, self._greeting(), args)
        except BaseException:
            channel.close()
            raise
        try:
            if acknowledge and FEATURES[0] in (self._features or ()):
                channel.queue(_first_acknowledgement(args))
            with self._ending(channel, ends):
                yield from exchange.answer(
                    Deadline(self.timeout), Deadline(self.timeout + limits.ROOT_WAIT)
                )
            if exchange.welcome is not None:
                self._welcomed(exchange.welcome, began)
            yield from self._correct_clock()
            if opened is not None:
                opened.append(exchange)
        except BaseException:
            exchange.abandon()
            raise
        return exchange

    def processes(self) -> Steps[list[ProcessInfo]]:
        """What runs and what is kept."""
        found = yield from self.request("processes", ListProcesses(), ProcessList)
        return list(found.processes)

    def wait(self, process: str, timeout: float | None) -> Steps[Result]:
        """Until the process has ended. DeadlineExceeded after `timeout` seconds."""
        text(process, "process")
        check_seconds(timeout, "timeout")
        # The agent says "not yet" at the end of `timeout`, which takes a moment to come here.
        bound = Deadline(None if timeout is None else max(0.0, timeout) + LAST_LOOK)
        result = yield from until(bound, self._wait(process, Deadline(timeout)))
        if result is None:
            raise DeadlineExceeded(
                f"{self.address} did not say within {timeout or 0.0:g} s whether process {process}"
                " has ended",
                seconds=timeout or 0.0,
            )
        return result

    def _wait(self, process: str, deadline: Deadline) -> Steps[Result]:
        """By requests of WAIT_SLICE seconds at most."""
        ends = self._ends
        while True:
            if self._ends != ends:
                raise self._ended_here()
            seconds = deadline.within(WAIT_SLICE)
            args, asked = Wait(id=process, timeout=seconds), Deadline(seconds)
            try:
                exited = yield from self.request("wait", args, Exited, allowance=seconds)
            except OperationError as error:
                if error.code != "still_running":
                    raise
            else:
                return Result.of((process,), exited, b"", b"")
            if not asked.passed:  # it answers before it should
                yield Pause(None, 0, deadline.within(RETRY_EVERY))
            if deadline.passed:
                seconds = deadline.seconds or 0.0
                message = f"process {process} still runs after {seconds:g} s"
                raise DeadlineExceeded(message, seconds=seconds)

    def signal(self, process: str, name: str | int, target: str) -> Steps[bool]:
        """Whether somebody was there to receive it."""
        args = SignalProcess(id=text(process, "process"), signal=signal_number(name), target=target)
        answer = yield from self.request("signal", args, SignalResult, repeatable=False)
        return answer.delivered

    def forget(self, process: str) -> Steps[None]:
        """Drop what is kept of it."""
        yield from self.request(
            "forget", Forget(id=text(process, "process")), ForgetResult, repeatable=False
        )

    # ── small requests ───────────────────────────────────────────────────────────────────────────

    def ping(self) -> Steps[PingResult]:
        """Is it alive?"""
        return (yield from self.request("ping", Ping(), PingResult))

    def info(self) -> Steps[InfoResult]:
        """What is it?"""
        return (yield from self.request("info", Info(), InfoResult))

    def shutdown(self, grace: float, *, reboot: bool = False) -> Steps[None]:
        """Ask for the machine's end."""
        try:
            request = Shutdown(grace=grace, reboot=reboot)
        except RecordError as error:
            raise ValueError(str(error)) from None
        yield from self.request("shutdown", request, ShutdownResult)

    def request(
        self,
        op: str,
        args: Record,
        kind: type[R],
        *,
        allowance: float = 0.0,
        repeatable: bool = True,
    ) -> Steps[R]:
        """One small request. `allowance`: seconds that its answer may take beside the usual.

        `repeatable`: asking twice does no harm, so that a kept connection may be tried, which can
        turn out to be stale, as after a guest's reboot or restore.
        """
        request, ends = Request(op=op, args=args), self._ends
        channel = self._take_idle() if repeatable else None
        if channel is not None:
            deadline = Deadline(min(REUSED_WAIT, self.timeout) + allowance)
            try:
                return (yield from self._ask(channel, request, kind, deadline, ends))
            except (ConnectionLost, DeadlineExceeded):
                if self._ends != ends:
                    raise
        deadline = Deadline(self.timeout + allowance)
        channel = yield from self._dial(deadline)
        channel.queue(self._greeting())
        answer = yield from self._ask(channel, request, kind, deadline, ends)
        yield from self._correct_clock()
        return answer

    def _ask(
        self, channel: Channel, request: Request, kind: type[R], deadline: Deadline, ends: int
    ) -> Steps[R]:
        """Send one request and wait for its answer; keep the connection where it stays usable."""
        began = time.monotonic_ns()
        try:
            with self._ending(channel, ends):
                channel.queue(request)
                while True:
                    for event in (yield from channel.step(deadline)):
                        match event:
                            case Welcome():
                                self._welcomed(event, began)
                            case Failure():
                                raise operation_error(event.code, event.message, event.fields)
                            case Response(result=result) if isinstance(result, kind):
                                return result
                            case _:
                                name = type(event).__name__
                                raise RemoteProtocolError(f"{name} in answer to {request.op}")
        finally:
            if not (channel.ready and self._keep_idle(channel)):
                channel.close()

    def _require(self, args: Start | Attach) -> Steps[None]:
        """OperationError where the agent is too old to understand all of the request."""
        beyond = vars(args).keys() - BASIC[type(args)]
        if not beyond:
            return
        if self._features is None:
            yield from self.ping()
        known = self._features or ()  # a field with a feature of its own is named like it
        if FEATURES[0] in known:
            beyond &= {name for name in FEATURES[1:] if name not in known}
        if beyond:
            names = ", ".join(sorted(beyond))
            raise OperationError(
                "unknown_operation",
                f"the agent at {self.address} is older than this program and would ignore: {names}",
                {"field": names},
            )

    # ── the clock ────────────────────────────────────────────────────────────────────────────────

    def clock(self) -> Steps[GuestClock]:
        """What time is it there?"""
        return (yield from renewal.measure(self))

    def step_clock(self, beyond: float) -> Steps[GuestClock]:
        """Set it by ours."""
        check_seconds(beyond, "beyond")
        return (yield from renewal.step(self, beyond))

    def _greeting(self) -> Hello:
        """The hello, which asks for the time now and then: a guest may have stood still."""
        due = time.monotonic() - self._clock_looked_at >= CLOCK_EVERY
        if not (due and self.keeps_clock):
            return self._hello
        self._asks_for_clock = True
        return self._hello.replace(clock=True)

    def _welcomed(self, welcome: Welcome, began: int) -> None:
        self._features = welcome.features
        out = renewal.is_out(welcome, began) if welcome.clock else False
        if self._asks_for_clock and out is not None:
            self._asks_for_clock = False
            self._clock_looked_at = time.monotonic()
            self._clock_is_out = out

    def _correct_clock(self) -> Steps[None]:
        """Set the guest's clock where its welcome showed that it is out; best effort."""
        if self._clock_is_out:
            self._clock_is_out = False
            step = renewal.step(self, renewal.STEP_BEYOND)
            try:
                clock = yield from until(Deadline(self.timeout), step)
                if clock is None:
                    self._clock_looked_at = -CLOCK_EVERY  # with the next connection, then
                else:
                    note(INFO, "%s: its clock was set by %+.3f s", self.address, clock.stepped)
            except MicroguestError:
                pass  # nobody asked for it; `step_clock` says what is wrong

    # ── connections ──────────────────────────────────────────────────────────────────────────────

    def _dial(self, deadline: Deadline, *, lasting: bool = False) -> Steps[Channel]:
        """A new connection. A guest whose listener is not up yet is dialled again until then.

        `lasting`: it may be silent for ever, so that the guest is asked for signs of life.
        """
        refusal: NotListening | None = None
        while True:
            try:
                sock = yield from self.address.dial(deadline)
            except ConnectError as error:
                if refusal is not None and deadline.passed:
                    raise refusal from None  # it says more than that the time was over
                patience = Deadline(0.0 if isinstance(error, NotListening) else EXPLAIN_WITHIN)
                if how := (yield from ended(self._obituary, patience)):
                    raise ConnectionLost(how) from error
                if not isinstance(error, NotListening) or deadline.passed:
                    raise
                if refusal is None:
                    note(DEBUG, "%s: nobody listens yet, it is dialled again", self.address)
                refusal = error
                yield Pause(None, 0, RETRY_EVERY)
            else:
                note(DEBUG, "%s: connected", self.address)
                probe = self._probe if lasting else None
                return Channel(sock, self.address.__str__, self._obituary, probe)

    def _probe(self) -> Steps[None]:
        ends = self._ends
        try:
            yield from self.ping()
        except ConnectionLost:
            if self._ends == ends:  # else it is this question that was ended, and is asked again
                raise

    def _take_idle(self) -> Channel | None:
        if os.getpid() != self._owner:
            self.forked()  # not by Python
        while True:
            with self._lock:
                if not self._idle:
                    return None
                channel = self._idle.pop()
            if channel.usable:
                return channel
            channel.close()

    def _keep_idle(self, channel: Channel) -> bool:
        with self._lock:
            if self._closed or channel.foreign or len(self._idle) >= IDLE_CONNECTIONS:
                return False
            self._idle.append(channel)
            return True


def _collected(exchange: Exchange, output: Output, deadline: Deadline) -> Steps[Exited]:
    """Everything until the end."""
    while True:
        yield from exchange.gather(deadline)
        for event in exchange.early():
            if isinstance(event, Data):
                output.add(event.stream, event.data)
        if exchange.exited is not None:
            return exchange.exited


def _first_acknowledgement(args: Start | Attach) -> Acknowledge:
    """What the caller has before the first byte: nothing, or what it attaches behind."""
    offsets = (args.offsets or {}) if isinstance(args, Attach) else {}
    return Acknowledge(**{stream: max(0, offset) for stream, offset in offsets.items()})


def _timed_out(start: Start, output: Output, how: str) -> DeadlineExceeded:
    seconds = start.timeout or 0.0
    return DeadlineExceeded(
        f"{command(start)[0]} ran longer than {seconds:g} s {how}",
        seconds=seconds,
        stdout=output.stdout,
        stderr=output.stderr,
    )
