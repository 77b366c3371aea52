"""The command line, `microguest`. docs/reference/cli.md describes it; exit codes are docker's.

Each command is a module that is imported when it is used. Every error a person can cause is one
line on stderr and exit code 125.
"""

import os
import signal
import sys
from typing import Any, Final

from microguest.host_client.cli.killed import Killed

__all__ = ["main"]

OURS: Final = 125  # exit code for what went wrong on our side
NOT_EXECUTABLE: Final = 126
NOT_FOUND: Final = 127
INTERRUPTED: Final = 130  # 128 + SIGINT
AGAIN: Final = 0.01  # seconds until an interrupt is raised once more


class Interrupt:
    """The handler of SIGINT: a KeyboardInterrupt until the exit code is known, then nothing."""

    def __init__(self) -> None:
        self.too_late = False

    def __call__(self, _number: int, _frame: object) -> None:
        """Python's own raises until the process is gone, which then dies of the signal."""
        if not self.too_late:
            raise KeyboardInterrupt

    def take(self) -> None:
        """Be the handler, unless who has started us ignores it."""
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGALRM, self)
            sys.unraisablehook = come_again
            signal.signal(signal.SIGINT, self)

    def leave(self) -> None:
        """From now on nothing comes, the interpreter's end included, which takes handlers away."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, signal.SIG_IGN)


def come_again(unraisable: Any) -> None:
    """An interrupt in a finaliser, of which the import of a module has many, would only be printed:
    it is raised again a moment later, where it ends what is done."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, AGAIN)
    else:
        sys.__unraisablehook__(unraisable)


interrupt: Final = Interrupt()  # made before `main`, none of whose lines is outside of its `try`


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code, with which the process has to end then.

    A SIGINT that comes before that code is known makes it INTERRUPTED; a later one changes nothing.
    """
    try:
        try:
            interrupt.take()
            return execute(sys.argv[1:] if argv is None else argv)
        finally:
            interrupt.too_late = True  # no handler runs between an exception and this
            interrupt.leave()
    except KeyboardInterrupt:
        return INTERRUPTED
    except Killed as killed:
        signal.signal(killed.number, signal.SIG_DFL)
        os.kill(os.getpid(), killed.number)
        return 128 + killed.number  # where it is blocked


def execute(argv: list[str]) -> int:
    """The same, but KeyboardInterrupt, and Killed where another signal shall end this program."""
    from microguest.host_client.descriptors import take_standard

    take_standard()
    # Who started us may ignore it; then the kernel would reap our children, and their exit codes
    # with them.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    from microguest.guest.errors import MicroguestError, StartError
    from microguest.host_client.cli.arguments import parse
    from microguest.host_client.cli.tell import complain
    from microguest.host_client.shortage import explain

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
    return code
