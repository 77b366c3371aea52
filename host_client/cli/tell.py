"""What this program says of its own: the one place where text goes to a terminal, pipe or log.

Much of it comes from guests, images and other programs: what could drive a terminal is shown as an
escape, whoever said it. What commands write is data and does not pass here: `output`, `stream`.
"""

from typing import Final

from microguest.guest.errors import printable
from microguest.host_client.cli.output import write_all
from microguest.host_client.errors import MachineError

__all__ = ["complain", "say"]

STDOUT: Final = 1
STDERR: Final = 2


def say(text: str) -> None:
    """One line on stdout; tabs stay. Killed where nobody reads it any more."""
    _tell(STDOUT, printable(text, keep="\t"))


def complain(message: str, program: str = "microguest") -> None:
    """One line on stderr, unless that takes nothing. Killed as `say`."""
    try:
        _tell(STDERR, printable(f"{program}: {' '.join(message.split())}"))
    except MachineError:
        pass  # there is nowhere else to say it; the exit code tells


def _tell(fd: int, text: str) -> None:
    write_all(fd, f"{text}\n".encode())
