"""Processes of one test among all of the host: they sleep for a number of seconds of its own."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from patience import PATIENCE


class Sleeper:
    """A number of seconds that only this test's processes sleep, to know them by."""

    def __init__(self) -> None:
        self.argument = f"{10**6 + time.monotonic_ns() % 10**9}.5"

    def pids(self) -> list[int]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                argv = (folder / "cmdline").read_bytes().split(b"\0")
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if argv[:2] == [b"sleep", self.argument.encode()] and state != "Z":
                found.append(int(folder.name))
        return found

    def wait_for(self, count: int) -> None:
        self._until(lambda: len(self.pids()) >= count, "were not started")

    def wait_until_gone(self) -> None:
        self._until(lambda: not self.pids(), "are still there")

    def end(self) -> None:
        """Kill what a failed test has left."""
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)

    def _until(self, reached: Callable[[], bool], failure: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not reached():
            assert time.monotonic() < deadline, f"{failure}: {self.pids()}"
            time.sleep(0.01)
