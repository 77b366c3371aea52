"""Rows for people, in columns."""

from collections.abc import Sequence

__all__ = ["show"]


def show(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the last column is as long as it likes to be."""
    table = [heads, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(heads) - 1)]
    for row in table:
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*padded, row[-1]]).rstrip())
