"""For tests that start real machines: where they live, who belongs to them, what they leave."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import imagefactory
import pytest
from patience import PATIENCE

from microguest import Machine, connect
from microguest.errors import MachineError
from microguest.host_client.machines.folder import is_alive, machines_root, names, read_state
from microguest.host_client.machines.plan import MachineState
from microguest.host_client.machines.virtiofsd import virtiofsd

PROJECT = Path(__file__).parent.parent
KINDS = ["namespaces", pytest.param("qemu", marks=pytest.mark.qemu)]  # for parametrize


def demo_image() -> str:
    """The busybox image, made once per checkout."""
    return imagefactory.busybox_layout(PROJECT / "dist" / "test-images" / "busybox")


def require_shares() -> None:
    """Skip the test, saying what is missing, where no directory can be shared with a VM."""
    try:
        virtiofsd()
    except MachineError as error:
        pytest.skip(str(error))


class Pings:
    """Asks the agent all the time while a `with` block runs: it has to answer within `answer` s."""

    def __init__(self, machine: Machine, answer: float) -> None:
        self._answer = answer  # seconds
        self.longest = 0.0
        self.count = 0
        token = Path(machines_root(), machine.name, "token").read_text()
        self._agent = connect(machine.url, token=token.strip())
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ping)

    def _ping(self) -> None:
        while not self._over.wait(0.05):
            begun = time.monotonic()
            self._agent.ping()
            self.longest = max(self.longest, time.monotonic() - begun)
            self.count += 1

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_exc: object) -> None:
        self._over.set()
        self._thread.join()
        self._agent.close()
        if kind is None:
            assert self.count > 3
            assert self.longest < self._answer


def wait_until(what: str, check: Callable[[], bool], seconds: float = PATIENCE) -> float:
    """Seconds that it took until `check()`."""
    began = time.monotonic()
    while not check():
        assert time.monotonic() - began < seconds, f"not within {seconds} s: {what}"
        time.sleep(0.01)
    return time.monotonic() - began


def runs(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def family(pid: int) -> set[int]:
    """The process and all that descend from it."""
    parents = {}
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        try:
            stat = Path(f"/proc/{entry}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(entry)] = int(stat.rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def state_of(name: str) -> MachineState:
    """The state of a machine that runs."""
    state = read_state(name)
    assert state is not None
    return state


def has_folder(name: str) -> bool:
    """The first of the moments of a boot: the machine's name is taken."""
    return name in names()


def has_vmm(name: str) -> bool:
    """Its VMM runs."""
    state = read_state(name)
    return state is not None and state.vmm > 0


MOMENTS = [has_folder, has_vmm]


def end_machines() -> None:
    """Those of this state home that a failed test has left running."""
    for name in names():
        state = read_state(name)
        if state is not None and is_alive(name):
            os.kill(state.monitor, signal.SIGTERM)


def nothing_is_left(name: str, pids: set[int], *, within: float) -> None:
    """No process of the machine, no folder, no mount and no socket that names it."""
    folder = os.path.join(machines_root(), name)
    wait_until("its processes end", lambda: not any(map(runs, pids)), within)
    wait_until("its folder goes", lambda: not os.path.exists(folder), within)
    for listing in ("/proc/self/mountinfo", "/proc/net/unix"):
        wait_until(
            f"{listing} names it no more",
            lambda at=listing: folder not in Path(at).read_text(),
            within,
        )  # type: ignore[misc]


def python(program: str, *arguments: str) -> "subprocess.Popen[bytes]":
    """A program of somebody who uses the library, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
