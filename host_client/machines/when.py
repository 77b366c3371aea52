"""Moments as people write them, docker's forms, and as logs show them.

See GetTimestamp in moby's api/types/time, and Go's time.ParseDuration.
"""

import datetime as dt
import re
import time
from typing import Final

from microguest.host_client.values import kind_of

__all__ = ["Moment", "moment", "stamp"]

Moment = str | float | dt.datetime

EPOCH: Final = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
SECOND: Final = 1_000_000_000  # in nanoseconds
UNITS: Final = {
    "ns": 1,
    "us": 1_000,
    "µs": 1_000,
    "μs": 1_000,
    "ms": 1_000_000,
    "s": SECOND,
    "m": 60 * SECOND,
    "h": 3600 * SECOND,
}
# Units are tried in this order: m must not hide ms.
PART: Final = re.compile(r"([0-9]{1,12})(?:\.([0-9]{0,12}))?(ns|us|µs|μs|ms|s|m|h)")
DURATION: Final = re.compile(rf"([-+]?)((?:{PART.pattern})+)")
UNIX: Final = re.compile(r"([0-9]{1,12})(?:\.([0-9]{1,9}))?")
DATE: Final = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})"
    r"(?:T([0-9]{2})(?::([0-9]{2})(?::([0-9]{2})(?:\.([0-9]{1,9}))?)?)?)?"
    r"(Z|z|[-+][0-9]{2}:[0-9]{2})?"
)
FORMS: Final = (
    "10m or 1h30m for so long ago, 2026-01-31, 2026-01-31T12:00:00Z, or seconds since 1970"
)


def moment(value: Moment | None, name: str) -> int | None:
    """Nanoseconds since the epoch; None for None and for "". TypeError, ValueError.

    A text is a duration before now, seconds since the epoch, or a date of RFC 3339, whose time may
    end early; without a zone it is of the local one. A number is seconds since the epoch.
    """
    if value is None or value == "":
        return None
    if isinstance(value, str):
        try:
            found = _of_text(value)
        except (ValueError, OverflowError):
            found = None
        if found is None:
            raise ValueError(f"{name}: {value!r:.60} is no time: write {FORMS}")
        return found
    if isinstance(value, dt.datetime):
        return _of_date(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a text, seconds or a datetime, got {kind_of(value)}")
    if not abs(value) < 1e12:  # nor is NaN
        raise ValueError(f"{name}: {value} is no time: write seconds since 1970")
    return round(value * SECOND)


def _of_text(text: str) -> int | None:
    if found := DURATION.fullmatch(text):
        length = sum(_scaled(*part) for part in PART.findall(found[2]))
        return time.time_ns() + (length if found[1] == "-" else -length)
    if found := UNIX.fullmatch(text):
        return int(found[1]) * SECOND + _nanoseconds(found[2])
    if found := DATE.fullmatch(text):
        day, hour, minute, second, fraction, zone = found.groups()
        clock = f"{hour or '00'}:{minute or '00'}:{second or '00'}"
        zone = "+00:00" if zone in ("Z", "z") else zone or ""
        return _of_date(dt.datetime.fromisoformat(f"{day}T{clock}{zone}")) + _nanoseconds(fraction)
    return None


def _scaled(whole: str, fraction: str, unit: str) -> int:
    """In integers: nanoseconds of a float's would be rounded."""
    scale: int = 10 ** len(fraction)
    return int(f"{whole}{fraction}") * UNITS[unit] // scale


def _nanoseconds(fraction: str | None) -> int:
    return int((fraction or "0").ljust(9, "0"))


def _of_date(date: dt.datetime) -> int:
    microseconds: int = (date.astimezone(dt.UTC) - EPOCH) // dt.timedelta(microseconds=1)
    return microseconds * 1_000


def stamp(when: int) -> bytes:
    """As docker's `logs -t`: RFC 3339 in UTC, always with nine digits."""
    seconds, rest = divmod(when, SECOND)
    return time.strftime(f"%Y-%m-%dT%H:%M:%S.{rest:09d}Z", time.gmtime(seconds)).encode("ascii")
