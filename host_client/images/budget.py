"""What one image has used of its limits: what a stranger's bytes make us do is charged here first.

One object for all layers of an image: what counts per entry or per layer can be repeated, and a
stranger repeats it.
"""

import time

from microguest.host_client.errors import ImageError
from microguest.host_client.images.limits import DEFAULT_LIMITS, Limits

_LOOKS_AT_CLOCK_EVERY = 10_000  # steps


class Exhausted(ImageError):
    """An image costs more than it may. Who catches it can add where that was."""


class Budget:
    """Counts what `Limits` bounds. Every method raises `Exhausted` when too much is asked for."""

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        self.limits = limits
        self.entries = 0
        self.text = 0
        self.paths = 0
        self.stored = 0
        self.unpacked = 0
        self.written = 0
        self.steps = 0
        self._until = time.monotonic() + limits.seconds
        self._look_at = 0

    def entry(self) -> None:
        """One more tar entry, or directory that was only implied."""
        self.entries += 1
        if self.entries > self.limits.entries:
            raise Exhausted(f"image has more than {self.limits.entries} entries")

    def step(self, count: int = 1) -> None:
        """So many things are about to be looked at."""
        self.steps += count
        if self.steps > self.limits.steps:
            raise Exhausted(f"image takes more than {self.limits.steps} steps to read")
        if self.steps >= self._look_at:
            self._look_at = self.steps + _LOOKS_AT_CLOCK_EVERY
            self.seconds_left()

    def retain(self, count: int) -> None:
        """So many bytes of names, targets, attributes or maps are about to be kept."""
        self.text += count
        if self.text > self.limits.text:
            raise Exhausted(
                f"image has more than {self.limits.text >> 10} KiB of names, link targets, "
                "extended attributes and sparse maps"
            )

    def path(self, count: int) -> None:
        """A path of so many bytes is about to be written."""
        self.paths += count
        if self.paths > self.limits.paths:
            raise Exhausted(f"paths of the image have more than {self.limits.paths >> 10} KiB")

    def store(self, count: int) -> None:
        """So many bytes of a layer, as the image has it, are about to be read."""
        self.stored += count
        if self.stored > self.limits.bytes:
            raise Exhausted(
                "image's layers have more than the image's limit of "
                f"{self.limits.bytes >> 20} MiB as they are stored, holes included"
            )
        self.seconds_left()

    def unpack(self, count: int) -> None:
        """So many bytes of a layer are about to be spooled."""
        self.unpacked += count
        if self.unpacked > self.limits.bytes:
            raise Exhausted(
                f"image unpacks to more than the image's limit of {self.limits.bytes >> 20} MiB"
            )
        self.seconds_left()

    def write(self, count: int) -> None:
        """So many bytes of the merged root are about to be written."""
        self.written += count
        if self.written > self.limits.bytes:
            raise Exhausted(
                f"image's files have more than the {self.limits.bytes >> 20} MiB they may, "
                "holes included"
            )
        self.step()

    def seconds_left(self) -> float:
        """Until the deadline of the whole."""
        left = self._until - time.monotonic()
        if left <= 0:
            raise Exhausted(f"image was not ready after {self.limits.seconds:g} s")
        return left
