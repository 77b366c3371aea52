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
    from host_client.descriptors import take_standard

    take_standard()
    # Who started us may ignore it; then the kernel would reap our children, and their exit codes
    # with them.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        return execute(sys.argv[1:] if argv is None else argv)
    except Killed as killed:
        signal.signal(killed.number, signal.SIG_DFL)
        os.kill(os.getpid(), killed.number)
        return 128 + killed.number  # where it is blocked


def execute(argv: list[str]) -> int:
    """The same, but Killed where a signal shall end this program."""
    from guest.errors import MicroguestError, StartError
    from host_client.cli.arguments import parse
    from host_client.cli.tell import complain
    from host_client.shortage import explain

    try:
        options = parse(argv)
        code: int = options.run(options)
    except StartError as error:
        complain(str(error))
        return NOT_FOUND if error.code in ("not_found", "bad_interpreter") else NOT_EXECUTABLE
    except (MicroguestError, ValueError) as error:
        complain(str(error))
        return OURS
    except OSError as error:
        complain(explain(error))
        return OURS
    except KeyboardInterrupt:
        return INTERRUPTED
    return code
