"""The keys that leave a terminal without ending what runs in it: docker's Ctrl-P Ctrl-Q."""

from typing import Final

__all__ = ["HELD_FOR", "DetachKeys", "parse"]

KEYS_MAX: Final = 16
HELD_FOR: Final = 0.5  # seconds that the beginning of the sequence waits for the rest of it
CONTROL: Final = "@abcdefghijklmnopqrstuvwxyz[\\]^_"  # ctrl-@ is 0


def parse(text: str) -> bytes:
    """What the keys type. As docker: `a`, or `ctrl-` and one of @ a-z [ \\ ] ^ _, with commas.

    An empty text is no keys at all. ValueError for anything else, and for more than KEYS_MAX.
    """
    parts = text.split(",", KEYS_MAX) if text else []
    if len(parts) > KEYS_MAX:
        raise ValueError(f"more than {KEYS_MAX} keys to detach with")
    return bytes(map(_key, parts))


def _key(part: str) -> int:
    if len(part) == 1 and part.isascii() and part.isprintable():
        return ord(part)
    name = part.removeprefix("ctrl-").lower()
    if len(part) == len("ctrl-") + 1 and len(name) == 1 and name in CONTROL:
        return CONTROL.index(name)
    raise ValueError(
        f"{part!r:.40} is no key to detach with: write a character, or ctrl- and one of "
        "@ a-z [ \\ ] ^ _"
    )


class DetachKeys:
    """Finds the sequence in what is typed, and lets everything else pass.

    The beginning of a sequence is held back, but only for HELD_FOR seconds: Ctrl-P alone must reach
    a shell without another key. What was typed slowly still detaches, and its beginning has passed.
    """

    def __init__(self, keys: bytes) -> None:
        """`keys`: as from `parse`; empty never detaches."""
        self._keys = keys
        self._tail = b""  # the last keys that were typed, as far as they begin the sequence
        self._held = 0  # how many of those have not passed
        self.detached = False

    @property
    def holding(self) -> bool:
        """Whether something is held back, so that `release` is due after HELD_FOR seconds."""
        return self._held > 0

    def feed(self, typed: bytes) -> bytes:
        """What passes. `detached` is set where the sequence ends; what follows it is dropped."""
        if not self._keys or (not self._tail and self._keys[0] not in typed):
            return typed
        passed = bytearray()
        for key in typed:
            self._tail += bytes((key,))
            self._held += 1
            if self._tail == self._keys:
                self.detached = True
                break
            while not self._keys.startswith(self._tail):
                if self._held == len(self._tail):
                    passed.append(self._tail[0])
                    self._held -= 1
                self._tail = self._tail[1:]
        return bytes(passed)

    def release(self) -> bytes:
        """What was held back long enough."""
        held = self._tail[len(self._tail) - self._held :]
        self._held = 0
        return held
