"""How a process ended, in one shape for the wire, the reports and both ends of the guest."""

import os

from microguest.guest.record import Record, RecordError

__all__ = ["ExitStatus", "exit_fields"]


class ExitStatus(Record):
    """Exactly one of `code` (0 to 255) and `signal` (1 to 64) is set."""

    code: int | None = None
    signal: int | None = None
    core_dumped: bool = False

    def check(self) -> None:
        if (self.code is None) == (self.signal is None):
            raise RecordError("code: exactly one of code and signal must be set")
        if self.code is not None and not 0 <= self.code <= 255:
            raise RecordError(f"code: {self.code} is not an exit code")
        if self.signal is not None and not 1 <= self.signal <= 64:
            raise RecordError(f"signal: {self.signal} is not a signal")

    @property
    def shell_code(self) -> int:
        """What a shell's `$?` would say: the code, or 128 + the signal's number."""
        return self.code if self.code is not None else 128 + (self.signal or 0)


def exit_fields(wait_status: int) -> dict[str, int | bool]:
    """The fields of an ExitStatus for a status as wait(2) gives it.

    Raises ValueError for one that tells no end: who is traced by its parent has its stops told too.
    """
    if os.WIFSIGNALED(wait_status):
        return {
            "signal": os.WTERMSIG(wait_status),
            "core_dumped": os.WCOREDUMP(wait_status),
        }
    if not os.WIFEXITED(wait_status):
        raise ValueError(f"wait status {wait_status:#x} is not that of an end")
    return {"code": os.WEXITSTATUS(wait_status)}
