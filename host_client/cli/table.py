"""Rows for people, in columns, and what stands in them."""

import os
from collections.abc import Sequence
from typing import Final

from microguest.guest.errors import printable
from microguest.host_client.cli.tell import say

__all__ = ["duration", "show"]

MINUTE: Final = 60
HOUR: Final = 3600
DAY: Final = 86400
GAP: Final = 2  # columns between two
NARROWEST: Final = 8  # columns that a cut cell keeps
PADDED: Final = 64  # columns that a cell is filled up to, where stdout is no terminal
CUT: Final = "…"


def show(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    cut: Sequence[str] = (),
    cut_last: Sequence[str] = (),
) -> None:
    """Print a table; the last column is as long as it likes to be.

    cut: heads of columns that may be shortened where stdout is a terminal, so that a row is a line
    of it. cut_last: those that may be where that is not enough. Widths are counted in characters.
    """
    table = [heads, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(heads))]
    width = terminal_width()
    if width is not None:
        for some in (cut, cut_last):
            shrink(widths, [heads.index(head) for head in some], width - GAP * (len(heads) - 1))
        table = [
            [shortened(cell, most) for cell, most in zip(row, widths, strict=True)] for row in table
        ]
    else:
        widths = [min(wide, PADDED) for wide in widths]  # one long cell does not swell every row
    for row in table:
        padded = [cell.ljust(wide) for cell, wide in zip(row, widths, strict=True)]
        say((" " * GAP).join(padded).rstrip())


def terminal_width() -> int | None:
    """Of stdout, in characters; None where it is no terminal."""
    try:
        return os.get_terminal_size(1).columns or None
    except OSError:
        return None


def shrink(widths: list[int], columns: Sequence[int], most: int) -> None:
    """Take from the widest of these columns until all together fit, or none can be narrower."""
    while (over := sum(widths) - most) > 0 and columns:
        widest = max(columns, key=lambda column: widths[column])
        others = [widths[column] for column in columns if column != widest]
        step = max(1, min(over, widths[widest] - max([*others, NARROWEST])))
        if widths[widest] <= NARROWEST:
            return
        widths[widest] -= step


def shortened(text: str, most: int) -> str:
    """At most so many characters, with a mark where some are missing."""
    return text if len(text) <= most else text[: most - 1] + CUT


def duration(seconds: float) -> str:
    """The largest unit that fits, as `docker ps` has it."""
    for unit, name in ((DAY, "d"), (HOUR, "h"), (MINUTE, "min")):
        if seconds >= 2 * unit:
            return f"{seconds // unit:.0f} {name}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
