"""Takes the place of ctypes in the frozen guest: a static binary cannot load libraries.

trio imports it to name its threads and does without where no library is found.
"""


class CDLL:
    """Refuses, as ctypes does for a library that does not exist."""

    def __init__(self, name: str | None, *_options: object, **_more: object) -> None:
        raise OSError(f"cannot load {name}: the frozen guest is a static binary")


def __getattr__(name: str) -> object:
    raise AttributeError(f"ctypes.{name}: the frozen guest is a static binary")
