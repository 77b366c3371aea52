"""The command line, `microguest`. docs/cli.md describes it; exit codes are docker's.

Each command is a module that is imported when it is used. Every error a person can cause is one
line on stderr and exit code 125.
"""

import os
import signal
import sys
from typing import Final

__all__ = ["Killed", "main"]

OURS: Final = 125  # exit code for what went wrong on our side
NOT_EXECUTABLE: Final = 126
NOT_FOUND: Final = 127
INTERRUPTED: Final = 130  # 128 + SIGINT


class Killed(Exception):
    """A signal ends this program, after everything was put back in order."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    from guest.errors import MicroguestError, StartError
    from host_client.cli.arguments import parse

    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        code: int = options.run(options)
        sys.stdout.flush()
    except StartError as error:
        complain(str(error))
        return NOT_FOUND if error.code in ("not_found", "bad_interpreter") else NOT_EXECUTABLE
    except BrokenPipeError:
        # Whoever read our output is gone; Python would complain once more at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OURS
    except (MicroguestError, OSError, ValueError) as error:
        complain(str(error))
        return OURS
    except KeyboardInterrupt:
        return INTERRUPTED
    except Killed as killed:
        signal.signal(killed.number, signal.SIG_DFL)
        os.kill(os.getpid(), killed.number)
        return 128 + killed.number  # where it is blocked
    return code


def complain(message: str) -> None:
    """One line on stderr."""
    print(f"microguest: {' '.join(message.split())}", file=sys.stderr)
