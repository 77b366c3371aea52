"""What this library says of itself, to the logger "microguest" of the standard library.

A program that listens has imported `logging`; without one nothing is imported and nothing is said.
No token, no environment and no input is ever logged; of a command only its first word, at DEBUG.
"""

import sys

from guest.errors import printable

__all__ = ["DEBUG", "INFO", "WARNING", "note"]

# As in `logging`, which is not imported here.
DEBUG = 10
INFO = 20
WARNING = 30
NAME = "microguest"
SHOWN = 300  # characters of a message


def note(level: int, message: str, *values: object) -> None:
    """Log `message % values`, printable and cut, where the program listens at that level."""
    logging = sys.modules.get("logging")
    if logging is None:
        return
    logger = logging.getLogger(NAME)
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())  # else warnings without a handler go to stderr
    if logger.isEnabledFor(level):
        logger.log(level, "%s", printable(message % values)[:SHOWN], stacklevel=2)
