"""JSON as `json.loads` and compact `json.dumps` do it, without what importing `json` brings along.

`json` imports `re` for a scanner that is not used where there is the C one, and `re` imports a
quarter of what PID 1 loads altogether. This uses the C scanner and encoder directly, where they are
those of a Python that this was written for; the guest's is. Others take `json` itself.
"""

import _json
import sys

TYPE_CHECKING = False  # type checkers know this name; importing typing would cost start-up time
if TYPE_CHECKING:
    from typing import Any

__all__ = ["dumps", "loads"]

WHITESPACE = " \t\n\r"
KNOWN = sys.version_info < (3, 14)  # later scanners ask their settings for more


def loads(text: str | bytes) -> "Any":
    """The value in a document. Raises ValueError, or RecursionError for deep nesting."""
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    if not KNOWN:
        import json

        return json.loads(text)
    text = text.strip(WHITESPACE)
    try:
        value, end = _scan(text, 0)
    except StopIteration as error:
        raise ValueError(f"no value at character {error.value}") from None
    if end != len(text):
        raise ValueError(f"more than one value: character {end}")
    return value


def dumps(value: object) -> str:
    """One line of ASCII, no spaces. Raises TypeError or ValueError for what is not JSON."""
    if not KNOWN:
        import json

        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    encoder = _json.make_encoder(
        None, _refused, _json.encode_basestring_ascii, None, ":", ",", False, False, False
    )
    return "".join(encoder(value, 0))


def _refused(value: object) -> str:
    raise TypeError(f"{type(value).__name__} is not for JSON")


class _Settings:
    """What the scanner asks for (json.decoder.JSONDecoder has the same attributes)."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = float  # NaN and Infinity: the records refuse them, by field


if KNOWN:
    _scan = _json.make_scanner(_Settings())  # type: ignore[arg-type]
