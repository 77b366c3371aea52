"""What a finished command left behind, and the error for one that failed."""

import signal
from dataclasses import dataclass, field
from typing import Self

from microguest.guest.errors import MicroguestError, printable
from microguest.guest.wire.messages import Exited

__all__ = ["CommandFailed", "Result"]

SHOWN = 60  # bytes of each stream in repr()
LAST_WORDS = 200  # bytes and then characters of stderr in the error of a command that failed


@dataclass(frozen=True, slots=True, repr=False)
class Result:
    """A command's end.

    argv            what was run; of an attached process its id
    returncode      its exit code, or minus the signal's number that killed it, as in subprocess
    stdout          all that it wrote there; b"" for nothing, and where it was read as it came
    stderr          the same
    duration        seconds from its start to its exit, as the guest measured them
    timed_out       the agent killed it because its time was over
    oom_killed      the kernel killed something in its cgroup for want of memory
    core_dumped     the kernel wrote a core dump
    open_streams    "stdout", "stderr": still held open by another process when they were cut
    user_seconds    processor time of it and of what it waited for
    system_seconds  the same in the kernel
    max_rss_kib     largest resident memory of one of them, KiB
    dropped         of a kept process, by stream: bytes that were lost before anybody had them
    """

    argv: tuple[str, ...]
    returncode: int
    stdout: bytes
    stderr: bytes
    duration: float = 0.0
    timed_out: bool = False
    oom_killed: bool = False
    core_dumped: bool = False
    open_streams: tuple[str, ...] = ()
    user_seconds: float = 0.0
    system_seconds: float = 0.0
    max_rss_kib: int = 0
    dropped: dict[str, int] = field(default_factory=dict, hash=False)  # a dict has none

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
            oom_killed=exited.oom_killed,
            core_dumped=exited.core_dumped,
            open_streams=exited.open_streams,
            user_seconds=exited.user_seconds,
            system_seconds=exited.system_seconds,
            max_rss_kib=exited.max_rss_kib,
            dropped=exited.dropped,
        )

    @property
    def signal(self) -> int | None:
        """The signal that killed it, or None."""
        return -self.returncode if self.returncode < 0 else None

    @property
    def shell_code(self) -> int:
        """What a shell's `$?` would say: the code, or 128 + the signal's number."""
        return self.returncode if self.returncode >= 0 else 128 - self.returncode

    def check(self) -> Self:
        """Itself where the command exited with 0; else raises CommandFailed."""
        if self.returncode != 0:
            name = self.argv[0] if self.argv else "the command"
            raise CommandFailed(f"{name} {self.describe()}{self._last_words()}", result=self)
        return self

    def describe(self) -> str:
        """How it ended, as the second half of a sentence."""
        if self.returncode >= 0:
            how = f"exited with {self.returncode}"
        else:
            how = f"was killed by signal {-self.returncode} ({_signal_name(-self.returncode)})"
        remarks = [
            text
            for text, said in (
                ("core dumped", self.core_dumped),
                ("its time was over", self.timed_out),
                ("the guest ran out of memory for it", self.oom_killed),
                (f"cut while others held it open: {', '.join(self.open_streams)}",
                 bool(self.open_streams)),
                (f"lost: {', '.join(f'{n} bytes of {s}' for s, n in self.dropped.items())}",
                 bool(self.dropped)),
            )
            if said
        ]  # fmt: skip
        return f"{how}: {'; '.join(remarks)}" if remarks else how

    def _last_words(self) -> str:
        """The last line of its stderr, behind a colon; "" where it has written none there."""
        lines = self.stderr[-LAST_WORDS:].decode("utf-8", "replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        return f": {printable(last.strip())[-LAST_WORDS:]}" if last else ""

    def __repr__(self) -> str:
        return (
            f"Result({' '.join(self.argv):.80} {self.describe()} after {self.duration:.3f} s, "
            f"stdout={_short(self.stdout)}, stderr={_short(self.stderr)})"
        )


class CommandFailed(MicroguestError):
    """A command ended with another status than 0 and `check` was set. `result` has all of it."""

    def __init__(self, message: str, *, result: Result) -> None:
        super().__init__(message)
        self.result = result


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"


def _short(data: bytes) -> str:
    if len(data) <= SHOWN:
        return repr(data)
    return f"{data[:SHOWN]!r}… ({len(data)} bytes)"
