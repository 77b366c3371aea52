"""What a machine needs after a pause or a restore: the operations `clock` and `renew`. Records.

A machine that stood still has a clock that is behind. A machine that was restored from a saved one
shares its random numbers, its identity and its addresses with every other copy. Times here are
nanoseconds: CLOCK_REALTIME since the epoch, CLOCK_BOOTTIME since the guest's kernel started, which
no step of the clock changes. A pair of both says what time it was at a moment of the guest.
"""

from microguest.guest import bounds
from microguest.guest.boot.network import Interface
from microguest.guest.record import Record, RecordError

__all__ = ["Clock", "ClockResult", "Renew", "Renewed", "check_reading"]

HEXADECIMAL = frozenset("0123456789abcdef")


class Clock(Record):
    """What time is it in the guest? With `realtime` and `boottime`, set it first.

    CLOCK_REALTIME becomes what it has to be so that it was `realtime` when CLOCK_BOOTTIME was
    `boottime`. So it does not matter how long the request took, nor whether it is made twice.
    """

    realtime: int | None = None  # nanoseconds
    boottime: int | None = None  # nanoseconds

    def check(self) -> None:
        check_pair(self.realtime, self.boottime)


class ClockResult(Record):
    """The guest's clocks, read at one moment, after the step if one was asked for."""

    realtime: int  # nanoseconds
    boottime: int  # nanoseconds
    stepped: float = 0.0  # seconds that were added by this request
    rtc: int | None = None  # seconds since the epoch by the machine's real-time clock, if any
    # Pauses that the agent has found out and mended by itself, and the seconds of the last one.
    pauses: int = 0
    last_pause: float = 0.0

    def check(self) -> None:
        check_reading(self.realtime, self.boottime)


class Renew(Record):
    """Make good what a pause or a restore left behind; what is not said is left alone.

    In this order: clock, random numbers, identity, network. A part that fails leaves the others.
    """

    realtime: int | None = None  # with boottime, as in Clock
    boottime: int | None = None
    seed: bytes = b""  # fresh random bytes of the host, for the kernel's random numbers
    hostname: str | None = None
    machine_id: str | None = None  # 32 hexadecimal digits in lower case, or "random"
    interfaces: tuple[Interface, ...] = ()  # each gets these addresses and routes and no others

    def check(self) -> None:
        check_pair(self.realtime, self.boottime)
        if len(self.seed) > bounds.SEED:
            raise RecordError(f"seed: at most {bounds.SEED} bytes")
        if self.hostname is not None and not _is_hostname(self.hostname):
            raise RecordError("hostname: must be 1 to 64 letters, digits, '-' and '.'")
        if self.machine_id not in (None, "random") and not _is_machine_id(self.machine_id or ""):
            raise RecordError("machine_id: must be 32 hexadecimal digits in lower case, or random")
        if len(self.interfaces) > bounds.INTERFACES:
            raise RecordError(f"interfaces: at most {bounds.INTERFACES}")
        if any(interface.dhcp for interface in self.interfaces):
            raise RecordError("interfaces: dhcp is for the boot; give addresses")


class Renewed(Record):
    """What was done.

    stepped     seconds that were added to CLOCK_REALTIME; None: it was not asked for
    seeded      RNDADDENTROPY: the seed is in the kernel's pool
    reseeded    RNDRESEEDCRNG: what it gives from now on depends on that
    hostname    the new one; None: as it was
    machine_id  the new one; None: as it was
    interfaces  names of those that have their new addresses
    failed      by clock, random, hostname, machine_id, network: a sentence for each part that was
                asked for and not done
    """

    stepped: float | None = None
    seeded: bool = False
    reseeded: bool = False
    hostname: str | None = None
    machine_id: str | None = None
    interfaces: tuple[str, ...] = ()
    failed: dict[str, str] = {}  # noqa: RUF012


def check_pair(realtime: int | None, boottime: int | None) -> None:
    """RecordError unless both or neither are given, within what clock_settime(2) takes."""
    if (realtime is None) != (boottime is None):
        raise RecordError("realtime, boottime: each needs the other")
    for name, value in (("realtime", realtime), ("boottime", boottime)):
        if value is not None and not 0 <= value < bounds.NANOSECONDS_MAX:
            raise RecordError(f"{name}: must be 0 to {bounds.NANOSECONDS_MAX} nanoseconds")


def check_reading(realtime: int, boottime: int) -> None:
    """RecordError for clocks that no guest has, however wrong they are.

    Linux's CLOCK_REALTIME is never before 1970. The boottime is what a host sends back in `Clock`.
    """
    if realtime < 0:
        raise RecordError("realtime: must not be negative")
    if not 0 <= boottime < bounds.NANOSECONDS_MAX:
        raise RecordError(f"boottime: must be 0 to {bounds.NANOSECONDS_MAX - 1} nanoseconds")


def _is_hostname(name: str) -> bool:
    """As Linux and RFC 1123 take it."""
    letters = name.replace("-", "").replace(".", "")
    return name.isascii() and letters.isalnum() and len(name) <= 64 and name[0] not in "-."


def _is_machine_id(text: str) -> bool:
    """As machine-id(5) says; all zeros is none."""
    return len(text) == 32 and HEXADECIMAL.issuperset(text) and text != "0" * 32
