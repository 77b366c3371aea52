"""What this library says of itself, to the logger "microguest" of the standard library.

A program that listens has imported `logging`; without one nothing is imported and nothing is said.
No token, no environment and no input is ever logged; of a command only its first word, at DEBUG.
"""

import sys

from microguest.guest.errors import printable

TYPE_CHECKING = False  # as typing.TYPE_CHECKING, which costs an import
if TYPE_CHECKING:
    from logging import Logger

__all__ = ["DEBUG", "INFO", "WARNING", "note"]

# As in `logging`, which is not imported here.
DEBUG = 10
INFO = 20
WARNING = 30
NAME = "microguest"
SHOWN = 300  # characters of a message

_found: "list[Logger]" = []  # the one, once it was looked up


def note(level: int, message: str, *values: object) -> None:
    """Log `message % values`, printable and cut, where the program listens at that level."""
    logger = _found[0] if _found else _find()
    if logger is not None and logger.isEnabledFor(level):
        logger.log(level, "%s", printable(message % values)[:SHOWN], stacklevel=2)


def _find() -> "Logger | None":
    """The logger, asked for once: `getLogger` takes a lock of the whole program's.

    An interrupt that is raised in the moment between that lock's taking and its `try` leaves it
    taken, and every other thread that asks for a logger waits for ever.
    """
    logging = sys.modules.get("logging")
    if logging is None:
        return None
    logger: Logger = logging.getLogger(NAME)
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())  # else warnings without a handler go to stderr
    _found.append(logger)
    return logger
