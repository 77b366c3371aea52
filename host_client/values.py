"""What callers pass, checked: TypeError and ValueError that name the option and say what it takes.

Imports nothing of the project but its limits.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any, Final

from microguest.guest import bounds

__all__ = [
    "ALIKE",
    "Argument",
    "Buffer",
    "absolute_path",
    "check_bytes",
    "check_count",
    "check_flag",
    "check_number",
    "check_seconds",
    "check_timeout",
    "identity",
    "kind_of",
    "listed",
    "nearest",
    "path",
    "sendable",
    "text",
    "word_of",
]

Buffer = bytes | bytearray | memoryview
Argument = str | bytes | os.PathLike[str] | os.PathLike[bytes]

# As SequenceMatcher.ratio; less makes --cpus of --publish, and dns_search of detach.
ALIKE: Final = 0.7


def nearest(name: str, known: Iterable[str]) -> str:
    """What may have been meant, or all that there is."""
    import difflib

    close = difflib.get_close_matches(name, list(known), 1, cutoff=ALIKE)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"


def check_bytes(data: object, name: str) -> None:
    """TypeError where it is not bytes, a bytearray, a memoryview or the like."""
    try:
        memoryview(data).release()  # type: ignore[arg-type]
    except (TypeError, BufferError):
        advice = ": encode it" if isinstance(data, str) else ""
        raise TypeError(f"{name}: expected bytes, got {kind_of(data)}{advice}") from None


def check_count(value: object, name: str, of: str = "bytes") -> None:
    """TypeError, ValueError where it is not a number of bytes, or of what is said."""
    if check_number(value, name, of) < 0:
        raise ValueError(f"{name}: {value} is less than 0")


def check_number(value: object, name: str, of: str = "bytes") -> int:
    """The number of bytes, or of what is said. TypeError where it is none."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number of {of}, got {kind_of(value)}")
    return value


def check_flag(value: object, name: str, instead: str = "") -> None:
    """TypeError where it is neither True nor False."""
    if not isinstance(value, bool):
        advice = f": {instead}" if instead else ""
        raise TypeError(f"{name}: expected True or False, got {kind_of(value)}{advice}")


def check_seconds(value: object, name: str, most: float = bounds.SECONDS_MAX) -> None:
    """TypeError, ValueError where it is no time to wait for: 0 to `most` seconds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected seconds, got {kind_of(value)}")
    if not 0 <= value <= most:  # nor is NaN
        raise ValueError(f"{name}: must be 0 to {most:.0f} seconds")


def check_timeout(value: object, name: str = "timeout") -> None:
    """As `check_seconds`; None is for ever."""
    if value is not None:
        check_seconds(value, name)


def identity(value: object, name: str) -> str:
    """A user or group: a name, or an id as a number. TypeError."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(int(value))
    return text(value, name, "a name or a number")


def path(value: object, name: str) -> str:
    """A path as text. TypeError."""
    if not isinstance(value, str | bytes | os.PathLike):
        raise TypeError(f"{name}: expected a path, got {kind_of(value)}")
    return sendable(os.fsdecode(value), name)


def absolute_path(path: str | os.PathLike[str]) -> str:
    """As os.path.abspath; the OSError says why there is none, of which Python's has no word."""
    try:
        return os.path.abspath(path)
    except OSError as error:
        why = "this is below the current directory, which has been removed"
        raise OSError(error.errno, why, os.fspath(path)) from None


def kind_of(value: object) -> str:
    return "None" if value is None else type(value).__name__


def text(value: object, name: str, what: str = "text") -> str:
    """A text that can be sent. TypeError, ValueError."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected {what}, got {kind_of(value)}")
    return sendable(str(value), name)


def word_of(word: object, name: str) -> str:
    if type(word) is str:
        plain = word
    elif isinstance(word, str | bytes | os.PathLike):
        raw = os.fspath(word)
        plain = raw.decode("utf-8", "surrogateescape") if isinstance(raw, bytes) else str(raw)
    else:
        number = f': write "{word}"' if isinstance(word, int | float) else ""
        raise TypeError(f"{name}: expected text, bytes or a path, got {kind_of(word)}{number}")
    return sendable(plain, name)


def sendable(value: str, name: str) -> str:
    """The text itself. ValueError for what no program can be given."""
    if "\0" in value:
        raise ValueError(f"{name} holds a NUL byte: {value!r:.100}")
    if not value.isascii():
        try:
            value.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            raise ValueError(f"{name} cannot be encoded: {value!r:.100}") from None
    return value


def listed(value: object, name: str) -> tuple[Any, ...]:
    """A list; a text would be taken for a list of its letters. TypeError."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise TypeError(f"{name}: expected a list, got {kind_of(value)}")
    return tuple(value)
