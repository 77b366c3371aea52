"""What somebody who waits for an image is told."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Step = Literal["waiting", "unpacking", "making"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an image is on its way to a disk or directory.

    step: "waiting" while another process makes the same, "unpacking" while layers are read,
    "making" while the disk or directory is written.  image: as it was named.  done, total: bytes of
    this step; a total of 0 is one that is not known.
    """

    step: Step
    image: str
    done: int
    total: int


OnProgress = Callable[[Progress], None]
"""Called in the thread that prepares the image, for each mebibyte or a few times in a second."""
