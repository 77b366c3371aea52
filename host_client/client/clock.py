"""A guest's clock against ours, and what a restored guest has to be given: as steps.

The offset is found as NTP does it: the guest's clock is taken to have been read in the middle
between question and answer, so it is known to half the time between them; the quickest of a few
questions counts. The step does not depend on how long its request takes: see `guest.wire.renewal`.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from microguest.guest.boot.network import Interface
from microguest.guest.errors import OperationError
from microguest.guest.record import Record
from microguest.guest.wire.messages import Welcome
from microguest.guest.wire.renewal import Clock, ClockResult, Renew, Renewed
from microguest.host_client.client.steps import Steps
from microguest.host_client.values import check_flag

__all__ = ["STEP_BEYOND", "Asker", "GuestClock", "is_out", "measure", "renew", "step"]

STEP_BEYOND: Final = 0.1  # seconds that a guest's clock may be wrong before it is set unasked
SAMPLES: Final = 5
SEED_BYTES: Final = 64  # twice what the kernel's generator has as its key
SECOND: Final = 10**9  # nanoseconds

R = TypeVar("R", bound=Record)


class Asker(Protocol):
    """Whoever an agent is asked through."""

    def request(self, op: str, args: Record, kind: type[R], *, repeatable: bool = True) -> Steps[R]:
        """The answer. `repeatable`: asking twice does no harm."""


@dataclass(frozen=True, slots=True)
class GuestClock:
    """What time it was in the guest.

    offset      seconds by which its clock was ahead of ours; negative: it was behind
    error       how much more or less that can have been, seconds
    stepped     seconds that were added to its clock by this call; 0.0: it was left alone
    realtime    our clock at that moment, nanoseconds since the epoch
    boottime    the guest's CLOCK_BOOTTIME at that moment, nanoseconds
    pauses      how often the guest has noticed by itself that it stood still
    last_pause  for how many seconds, the last time
    """

    offset: float
    error: float
    stepped: float
    realtime: int
    boottime: int
    pauses: int
    last_pause: float


def measure(asker: Asker) -> Steps[GuestClock]:
    """What time it is in the guest. Raises what any request does."""
    best: GuestClock | None = None
    for _ in range(SAMPLES):
        began = time.monotonic_ns()
        answer = yield from asker.request("clock", Clock(), ClockResult)
        took = time.monotonic_ns() - began
        reading = compared(answer, time.time_ns() - took // 2, took)
        if best is None or reading.error < best.error:
            best = reading
    assert best is not None
    return best


def step(asker: Asker, beyond: float) -> Steps[GuestClock]:
    """Set the guest's clock by ours where it is more than `beyond` seconds out."""
    found = yield from measure(asker)
    if abs(found.offset) <= beyond:
        return found
    args = Clock(realtime=found.realtime, boottime=found.boottime)
    answer = yield from asker.request("clock", args, ClockResult)
    return GuestClock(
        offset=found.offset,
        error=found.error,
        stepped=answer.stepped,
        realtime=found.realtime,
        boottime=found.boottime,
        pauses=answer.pauses,
        last_pause=answer.last_pause,
    )


def renew(
    asker: Asker,
    *,
    clock: bool,
    random: bool,
    hostname: str | None,
    machine_id: str | None,
    interfaces: Sequence[Interface],
) -> Steps[Renewed]:
    """As `Agent.renew` says."""
    check_flag(clock, "clock")
    check_flag(random, "random")
    found = (yield from measure(asker)) if clock else None
    asked = Renew(
        realtime=found.realtime if found else None,
        boottime=found.boottime if found else None,
        seed=os.urandom(SEED_BYTES) if random else b"",
        hostname=hostname,
        machine_id=machine_id,
        interfaces=tuple(interfaces),
    )
    return (yield from asker.request("renew", asked, Renewed, repeatable=False))


def checked(renewed: Renewed) -> Renewed:
    """OperationError not_renewed where a part of it has failed."""
    if renewed.failed:
        why = "; ".join(f"{part}: {reason}" for part, reason in renewed.failed.items())
        raise OperationError("not_renewed", f"not everything was renewed: {why}")
    return renewed


def is_out(welcome: Welcome, began: int) -> bool | None:
    """Whether the guest's clock is certainly more than STEP_BEYOND out; None where that is open.

    `began`: on our monotonic clock, nanoseconds, before the hello was sent.
    """
    took = time.monotonic_ns() - began
    if len(welcome.clock) != 2:
        return None
    offset = abs(welcome.clock[0] - time.time_ns() + took // 2) / SECOND
    error = took / 2 / SECOND
    if offset - error > STEP_BEYOND:
        return True
    return False if offset + error < STEP_BEYOND else None


def compared(answer: ClockResult, realtime: int, took: int) -> GuestClock:
    """The guest's answer against our clock in the middle of the question, nanoseconds."""
    return GuestClock(
        offset=(answer.realtime - realtime) / SECOND,
        error=took / 2 / SECOND,
        stepped=0.0,
        realtime=realtime,
        boottime=answer.boottime,
        pauses=answer.pauses,
        last_pause=answer.last_pause,
    )
