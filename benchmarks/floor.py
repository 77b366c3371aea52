"""The C side of the benchmarks: builds the programs, runs floor.c, prepares what it sends.

Imports the protocol from `guest` only to encode requests.
"""

import subprocess
from pathlib import Path

from microguest.guest.wire.connection import Connection, Request, Role
from microguest.guest.wire.messages import Hello, Keep, Start

__all__ = ["Floor", "FloorFailed"]

SOURCES = Path(__file__).parent
FLAGS = ("-O2", "-static", "-Wall", "-Wextra", "-Werror")
DEADLINE = 120  # seconds for one run; each is bounded in count or time as well


class FloorFailed(Exception):
    """A run of the C program did not end well; the message is its own."""


class Floor:
    """`folder` gets the static programs and the prepared requests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.program = self._compile("floor")
        self.true = self._compile("true")
        self.bare = self._compile("bare", "-nostdlib")

    def run(self, *words: str | int | Path, before: tuple[str, ...] = ()) -> list[str]:
        """Run a mode to its end and give its lines. `before`: words of a wrapper. FloorFailed."""
        argv = [*before, str(self.program), *map(str, words)]
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="backslashreplace",  # the agent's own words are quoted as they came
            check=False,
            timeout=DEADLINE,
        )
        if done.returncode != 0:
            said = done.stderr.strip()[-500:]
            raise FloorFailed(f"{' '.join(argv[:8])}: {said or done.returncode}")
        return done.stdout.splitlines()

    def times(self, *words: str | int | Path, before: tuple[str, ...] = ()) -> list[int]:
        """As `run`, for modes that print nanoseconds."""
        return [int(line) for line in self.run(*words, before=before)]

    def rate(self, *words: str | int | Path) -> float:
        """As `run`, for modes that print bytes and nanoseconds: GB/s."""
        size, nanoseconds = self.times(*words)
        return size / nanoseconds

    def request(self, name: str, token: str, *argv: str, keep: Keep | None = None) -> Path:
        """A file with all that a host sends to have `argv` executed."""
        connection = Connection(Role.HOST)
        hello = connection.send(Hello(token=token, client="bench"))
        start = connection.send(Request(op="start", args=Start(argv=argv, keep=keep)))
        path = self.folder / f"{name}.request"
        path.write_bytes(hello + start)
        return path

    def _compile(self, name: str, *flags: str) -> Path:
        target = self.folder / name
        subprocess.run(["gcc", *FLAGS, *flags, "-o", target, SOURCES / f"{name}.c"], check=True)
        return target
