"""The connections kept to one agent: they are dialled here, greeted, used again, and ended.

Small requests share a few of them; every process has one of its own. Thread-safe, and of no event
loop.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

from microguest.guest.errors import MicroguestError, OperationError, RemoteProtocolError
from microguest.guest.record import Record
from microguest.guest.wire.connection import Request, Response
from microguest.guest.wire.messages import (
    FEATURES,
    HOST_FEATURES,
    Attach,
    Failure,
    Hello,
    Ping,
    PingResult,
    Start,
    Welcome,
)
from microguest.host_client.client import clock as renewal
from microguest.host_client.client.address import Address, NotListening
from microguest.host_client.client.channel import EXPLAIN_WITHIN, Channel, Obituary, ended
from microguest.host_client.client.deadline import Deadline
from microguest.host_client.client.steps import Steps, until
from microguest.host_client.client.steps import Wait as Pause
from microguest.host_client.errors import ConnectError, ConnectionLost, DeadlineExceeded, refusal
from microguest.host_client.forking import tell_children
from microguest.host_client.log import DEBUG, INFO, note
from microguest.host_client.values import check_seconds

__all__ = ["Pool"]

IDLE_CONNECTIONS: Final = 4  # kept for small requests
REUSED_WAIT: Final = 2.0  # seconds for an answer on a kept one, before a new one is tried
CLOCK_EVERY: Final = 10.0  # seconds between looks at the guest's clock, each with a new connection
CLIENT: Final = "microguest-host"
RETRY_EVERY: Final = 0.01  # seconds between dials of a guest whose listener is not up

# What agents knew before they named FEATURES; older ones ignore the other fields.
BASIC: Final = {
    Start: frozenset({"argv", "env", "cwd", "user", "stdin", "timeout"}),
    Attach: frozenset({"id"}),
}

R = TypeVar("R", bound=Record)


class Pool:
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

    # ── small requests ───────────────────────────────────────────────────────────────────────────

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
                                raise refusal(event.code, event.message, event.fields)
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
            yield from self.request("ping", Ping(), PingResult)
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
            yield from self.request("ping", Ping(), PingResult)
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
