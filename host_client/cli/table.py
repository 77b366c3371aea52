"""Rows for people, in columns, and what stands in them."""

from collections.abc import Sequence
from typing import Final

__all__ = ["duration", "show"]

MINUTE: Final = 60
HOUR: Final = 3600
DAY: Final = 86400


def show(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the last column is as long as it likes to be."""
    table = [heads, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(heads) - 1)]
    for row in table:
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*padded, row[-1]]).rstrip())


def duration(seconds: float) -> str:
    """The largest unit that fits, as `docker ps` has it."""
    for unit, name in ((DAY, "d"), (HOUR, "h"), (MINUTE, "min")):
        if seconds >= 2 * unit:
            return f"{seconds // unit:.0f} {name}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
