"""Everything that can be asked of an agent, as steps: the one logic behind every kind of client."""

import time
from typing import Final, TypeVar

from microguest.guest import bounds
from microguest.guest.errors import OperationError
from microguest.guest.wire.connection import Data
from microguest.guest.wire.messages import (
    FEATURES,
    Acknowledge,
    Attach,
    Exited,
    Forget,
    ForgetResult,
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
)
from microguest.host_client.client import clock
from microguest.host_client.client.clock import GuestClock
from microguest.host_client.client.deadline import LAST_LOOK, Deadline
from microguest.host_client.client.pool import Pool
from microguest.host_client.client.process_connection import Exchange, Output
from microguest.host_client.client.request import signal_number
from microguest.host_client.client.result import Result
from microguest.host_client.client.steps import Steps, until
from microguest.host_client.client.steps import Wait as Pause
from microguest.host_client.client.streams import command
from microguest.host_client.errors import DeadlineExceeded
from microguest.host_client.log import DEBUG, note
from microguest.host_client.values import Buffer, check_flag, check_seconds, check_timeout, text

__all__ = ["Driver"]

KILL_ALLOWANCE: Final = 5.0  # seconds a timed-out command gets to be killed and reported
ASK_AGAIN: Final = 0.01  # seconds, where the agent says "not yet" before it should
WAIT_SLICE: Final = 2.0  # seconds that the agent is asked to wait at a time

E = TypeVar("E", bound=Exchange)


class Driver(Pool):
    """What can be asked, of the agent that this is the pool of."""

    first_exec_at: float | None = None  # monotonic clock, when the first result was here

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
                    Deadline(self.timeout), Deadline(self.timeout + bounds.ROOT_WAIT)
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
        check_timeout(timeout)
        # The agent says "not yet" at the end of `timeout`, which takes a moment to come here.
        bound = Deadline(None if timeout is None else timeout + LAST_LOOK)
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
                yield Pause(None, 0, deadline.within(ASK_AGAIN))
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
        check_seconds(grace, "grace", bounds.STOP_GRACE_MAX)
        check_flag(reboot, "reboot")
        yield from self.request("shutdown", Shutdown(grace=grace, reboot=reboot), ShutdownResult)

    # ── the clock ────────────────────────────────────────────────────────────────────────────────

    def clock(self) -> Steps[GuestClock]:
        """What time is it there?"""
        return (yield from clock.measure(self))

    def step_clock(self, beyond: float) -> Steps[GuestClock]:
        """Set it by ours."""
        check_seconds(beyond, "beyond")
        return (yield from clock.step(self, beyond))


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
