"""The guest's clock: the operation `clock`, and the watch that notices when it stood still.

Nothing in a guest notices a pause: CLOCK_MONOTONIC and CLOCK_BOOTTIME stop with its processors and
CLOCK_REALTIME with them. Only the VMM's real-time clock goes on. `watch` compares, and trusts it
for nothing but how long the pause was: it may be in local time or set to anything. A kernel with a
driver for VM generation ids tells of a restore at once.

A guest without a kernel of its own (`transport` "unix") shares the clock with its host, and nothing
here touches it.
"""

import os
import socket
import time

import trio

from microguest.agent.channel import Channel
from microguest.agent.state import Agent, log
from microguest.agent.system import generation
from microguest.agent.system.entropy import reseed, seed_from_hardware
from microguest.agent.threads import in_thread
from microguest.guest.errors import OperationError
from microguest.guest.record import Record
from microguest.guest.wire.connection import Event
from microguest.guest.wire.renewal import Clock, ClockResult

__all__ = ["Pauses", "clock", "clocks", "has_own_kernel", "step", "watch"]

RTC = "/sys/class/rtc/rtc0/since_epoch"
WATCH_EVERY = 10.0  # seconds; a look costs 0.8 ms of an emulated processor
PAUSE_MIN = 2.0  # seconds; the real-time clock knows whole ones only
SECOND = 10**9  # nanoseconds


class Pauses:
    """How often the machine stood still, as far as `watch` has seen, and how long the last time."""

    def __init__(self) -> None:
        self.count = 0
        self.last = 0.0  # seconds


async def clock(
    pauses: Pauses, agent: Agent, _channel: Channel, args: Record, _early: list[Event]
) -> Record:
    """The operation. Raises OperationError kernel_shared, not_permitted."""
    assert isinstance(args, Clock)
    stepped = 0.0
    if args.realtime is not None and args.boottime is not None:
        stepped = step(agent, args.realtime, args.boottime)
    realtime, boottime = clocks()
    return ClockResult(
        realtime=realtime,
        boottime=boottime,
        stepped=stepped,
        rtc=read_rtc(),
        pauses=pauses.count,
        last_pause=pauses.last,
    )


def clocks() -> tuple[int, int]:
    """CLOCK_REALTIME and CLOCK_BOOTTIME at one moment, nanoseconds."""
    before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    realtime = time.clock_gettime_ns(time.CLOCK_REALTIME)
    return realtime, (before + time.clock_gettime_ns(time.CLOCK_BOOTTIME)) // 2


def step(agent: Agent, realtime: int, boottime: int) -> float:
    """Let CLOCK_REALTIME have been `realtime` when CLOCK_BOOTTIME was `boottime`.

    Returns the seconds that were added. Raises OperationError kernel_shared, not_permitted.
    """
    if not has_own_kernel(agent):
        raise OperationError(
            "kernel_shared", "this guest has its host's kernel, and with it the host's clock"
        )
    now, boottime_now = clocks()
    wanted = realtime + boottime_now - boottime
    try:
        time.clock_settime_ns(time.CLOCK_REALTIME, wanted)
    except OSError as error:
        raise OperationError(
            "not_permitted",
            f"the clock cannot be set to {wanted} ns: {error.strerror}",
            {"errno": error.errno},
        ) from None
    return (wanted - now) / SECOND


def has_own_kernel(agent: Agent) -> bool:
    """Whether what is changed in the kernel is changed for this guest only.

    A Unix socket cannot leave a kernel: who is reached over one shares it.
    """
    return agent.configure.transport == "vsock"


async def watch(agent: Agent, pauses: Pauses) -> None:
    """Mend what a pause or a restore leaves that nobody tells us of. For ever."""
    if not has_own_kernel(agent):
        return
    await agent.root_ready.wait()  # until then /sys may be on its way there
    news = generation.listen()
    before = Look.now()
    while before is not None or news is not None:
        is_copy = await is_new_copy(news)
        now = Look.now()
        lost = now.lost(before) if now is not None and before is not None else 0.0
        if now is not None and before is not None and lost >= PAUSE_MIN:
            await mend(agent, pauses, lost, agrees=now.agrees, others=now.ahead(before))
            now = Look.now()
        elif is_copy and await renewed_random_numbers():
            log("the machine was restored: reseeded the random numbers")
        before = now


async def is_new_copy(news: socket.socket | None) -> bool:
    """Wait WATCH_EVERY; at once True where the kernel has news of a restore."""
    with trio.move_on_after(WATCH_EVERY):
        if news is None:
            await trio.sleep_forever()
        else:
            await generation.until_new(news)
            return True
    return False


class Look:
    """All clocks at one moment."""

    __slots__ = ("boottime", "realtime", "rtc")

    def __init__(self, rtc: int) -> None:
        self.rtc = rtc  # seconds
        self.realtime, self.boottime = clocks()

    @classmethod
    def now(cls) -> "Look | None":
        """None where the machine has no real-time clock that can be read."""
        rtc = read_rtc()
        return None if rtc is None else cls(rtc)

    @property
    def agrees(self) -> bool:
        """Whether the system's clock and the real-time clock say the same."""
        return abs(self.rtc - self.realtime / SECOND) < PAUSE_MIN

    def lost(self, before: "Look") -> float:
        """Seconds by which the real-time clock went on more than the system since."""
        return self.rtc - before.rtc - (self.boottime - before.boottime) / SECOND

    def ahead(self, before: "Look") -> float:
        """Seconds by which somebody has set the system's clock since."""
        return (self.realtime - before.realtime - self.boottime + before.boottime) / SECOND


async def mend(agent: Agent, pauses: Pauses, lost: float, *, agrees: bool, others: float) -> None:
    """The real-time clock went on by `lost` seconds more than the system did.

    `agrees`: with the system's clock, by now. `others`: seconds by which somebody has set that one,
    as a host does that has resumed us.
    """
    if agrees and abs(others) < PAUSE_MIN:
        return  # no pause: the real-time clock was wrong, and somebody has set it
    pauses.count += 1
    pauses.last = lost
    done = []
    rest = lost - max(0.0, others)
    if rest >= PAUSE_MIN:
        realtime, boottime = clocks()
        try:
            step(agent, realtime + int(rest * SECOND), boottime)
            done.append(f"added {rest:.0f} s to the clock")
        except OperationError as error:
            log(error.message)
    if await renewed_random_numbers():
        done.append("reseeded the random numbers")
    log(f"the machine stood still for {lost:.0f} s: {' and '.join(done) or 'nothing was done'}")


async def renewed_random_numbers() -> bool:
    """Also where the pause was a restore: a copy must not share them with its original.

    Without a thread only what cannot wait for the machine's own source.
    """
    try:
        return await in_thread(renew_random_numbers, abandon_on_cancel=True)
    except OperationError as error:
        log(f"random numbers get none of the machine's source: {error.message}")
        return reseeded()


def renew_random_numbers() -> bool:
    """May block. Whether the kernel took it."""
    seed_from_hardware()
    return reseeded()


def reseeded() -> bool:
    """Whether the kernel has made itself a new key."""
    try:
        reseed()
    except OSError as error:
        log(f"random numbers cannot be reseeded: {error}")
        return False
    return True


def read_rtc() -> int | None:
    """Seconds since the epoch by the machine's real-time clock; None where it has none."""
    try:
        fd = os.open(RTC, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return int(os.read(fd, 32))
    except (OSError, ValueError):
        return None
    finally:
        os.close(fd)
