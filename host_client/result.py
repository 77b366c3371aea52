"""What a finished command left behind."""

from dataclasses import dataclass

from guest.messages import Exited

__all__ = ["Result"]

SHOWN = 60  # bytes of each stream in repr()


@dataclass(frozen=True, slots=True, repr=False)
class Result:
    """A command's end.

    returncode    its exit code, or minus the signal's number that killed it, as in subprocess
    stdout        all that it wrote there; b"" for nothing
    stderr        the same
    duration      seconds from its start to its exit, as the guest measured them
    timed_out     the agent killed it because its time was over
    core_dumped   the kernel wrote a core dump
    open_streams  "stdout", "stderr": still held open by another process when they were cut
    """

    argv: tuple[str, ...]
    returncode: int
    stdout: bytes
    stderr: bytes
    duration: float = 0.0
    timed_out: bool = False
    core_dumped: bool = False
    open_streams: tuple[str, ...] = ()

    @classmethod
    def of(cls, argv: tuple[str, ...], exited: Exited, stdout: bytes, stderr: bytes) -> "Result":
        """The result that the last frame of a process connection completes."""
        return cls(
            argv=argv,
            returncode=exited.code if exited.code is not None else -(exited.signal or 0),
            stdout=stdout,
            stderr=stderr,
            duration=exited.duration,
            timed_out=exited.timed_out,
            core_dumped=exited.core_dumped,
            open_streams=exited.open_streams,
        )

    @property
    def signal(self) -> int | None:
        """The signal that killed it, or None."""
        return -self.returncode if self.returncode < 0 else None

    @property
    def shell_code(self) -> int:
        """What a shell's `$?` would say: the code, or 128 + the signal's number."""
        return self.returncode if self.returncode >= 0 else 128 - self.returncode

    def describe(self) -> str:
        """How it ended, as the second half of a sentence."""
        if self.returncode >= 0:
            return f"exited with {self.returncode}"
        return f"was killed by signal {-self.returncode}" + " (core dumped)" * self.core_dumped

    def __repr__(self) -> str:
        return (
            f"Result({' '.join(self.argv):.80} {self.describe()} after {self.duration:.3f} s, "
            f"stdout={_short(self.stdout)}, stderr={_short(self.stderr)})"
        )


def _short(data: bytes) -> str:
    if len(data) <= SHOWN:
        return repr(data)
    return f"{data[:SHOWN]!r}… ({len(data)} bytes)"
