"""What a person sees while an image that is new on this host becomes a disk or a directory.

One line on stderr, as soon as it takes longer than a moment; on a terminal a bar below it, which is
gone when the image is ready. Nothing for an image that is there.
"""

import os
import time
from typing import Final, Self

from microguest.host_client.images import Progress

__all__ = ["Display"]

MOMENT: Final = 0.5  # seconds
REDRAWN_EVERY: Final = 0.1  # seconds
NARROWEST: Final = 40  # columns for a bar
MEGABYTE: Final = 1_000_000
WORDS: Final = {"waiting": "waiting", "unpacking": "unpacking", "making": "writing"}


class Display:
    """A callable for `progress` of `boot`. Leave its `with` block before anything else is shown."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._since: float | None = None
        self._said = False
        self._drawn_at = 0.0
        self._drawn = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_how: object) -> None:
        if self._drawn:
            _put("\r\x1b[K")

    def __call__(self, progress: Progress) -> None:
        """Show how far it is."""
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        if self._quiet or now - self._since < MOMENT:
            return
        if not self._said:
            self._said = True
            _put(f"microguest: {_sentence(progress)}\n")
        if now - self._drawn_at >= REDRAWN_EVERY and _is_ours():
            self._drawn_at = now
            self._drawn = True
            _put(f"\r{_bar(progress, os.get_terminal_size(2).columns)}\x1b[K")


def _sentence(progress: Progress) -> str:
    if progress.step == "waiting":
        return f"waiting for another process that is preparing {progress.image}..."
    size = f" ({_megabytes(progress.total)} MB)" if progress.total else ""
    return f"preparing {progress.image}{size}, which is new here..."


def _bar(progress: Progress, columns: int) -> str:
    word = WORDS[progress.step]
    if not progress.total:
        return f"{word}..."[: columns - 1]
    part = min(1.0, progress.done / progress.total)
    if columns < NARROWEST:
        return f"{part:4.0%}"[: columns - 1]
    done, total = _megabytes(progress.done), _megabytes(progress.total)
    head, tail = f"{word:9} [", f"] {done:>{len(total)}}/{total} MB"
    width = columns - 1 - len(head) - len(tail)
    return f"{head}{'#' * int(width * part):{width}}{tail}"


def _megabytes(count: int) -> str:
    return f"{count / MEGABYTE:.0f}" if count >= MEGABYTE else f"{count / MEGABYTE:.1f}"


def _is_ours() -> bool:
    """Whether stderr is a terminal with a cursor, and we are in its foreground."""
    try:
        return (
            os.isatty(2)
            and os.environ.get("TERM", "dumb") != "dumb"
            and os.tcgetpgrp(2) == os.getpgrp()
            and os.get_terminal_size(2).columns > 1
        )
    except OSError:
        return False


def _put(text: str) -> None:
    """Nobody's reading is needed for the image."""
    try:
        os.write(2, text.encode("utf-8", "backslashreplace"))
    except OSError:
        pass
