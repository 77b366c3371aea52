"""A running machine is paused, resumed and ended here, by whatever its holder has of its monitor.

`Machine` has a link to it; who found the machine by its name has its process.
"""

import time
from collections.abc import Callable
from typing import Final, Protocol

from microguest.guest.errors import MicroguestError
from microguest.guest.record import Record
from microguest.host_client.errors import (
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    MachineError,
)
from microguest.host_client.machines.plan import MachineState, Pause, PowerOff, Resume

__all__ = [
    "KILL_WAIT",
    "VMM_WAIT",
    "MonitorHandle",
    "end_well",
    "not_ended",
    "set_paused",
    "still_runs",
]

PAUSE_WAIT: Final = 10.0  # seconds for the VMM to do it
# Seconds beyond the grace until a stopping machine is killed: more than all waits in a guest's end
# (docs/design/boot.md) are together.
POWER_OFF_WAIT: Final = 20.0
KILL_WAIT: Final = 10.0  # seconds for the monitor to kill and clean up
VMM_WAIT: Final = 5.0  # seconds for the VMM of a monitor that does not answer to be gone


class MonitorHandle(Protocol):
    """What a machine's holder has of its monitor."""

    def send(self, command: Record) -> None:
        """Give a command; where the monitor is gone, nothing happens."""

    def listen(self, seconds: float) -> MachineState:
        """The newest state, waiting at most so long for another one than the last."""

    def wait(self, seconds: float) -> bool:
        """Whether the machine has ended within that time."""


def set_paused(monitor: MonitorHandle, paused: bool) -> None:
    """Ask for it and wait until it is so. MachineError where it cannot be."""
    state = monitor.listen(0.0)
    if state.machine == "namespaces":
        raise MachineError(
            f"machine {state.name} has no processors of its own that could be paused: "
            'only machine="qemu" does'
        )
    deadline = time.monotonic() + PAUSE_WAIT
    monitor.send(Pause() if paused else Resume())
    while state.paused is not paused:
        if state.ended:
            raise MachineError(state.describe_end())
        left = deadline - time.monotonic()
        if left <= 0:
            word = "paused" if paused else "resumed"
            raise MachineError(f"machine {state.name} was not {word} within {PAUSE_WAIT:g} s")
        state = monitor.listen(left)


def end_well(monitor: MonitorHandle, shut_down: Callable[[], None], grace: float) -> bool:
    """Whether it has ended as it was asked to: TERM to all processes, `grace` seconds, KILL.

    shut_down: asks its agent. Where it did not manage within POWER_OFF_WAIT more, it is dead or
    deaf, and there is nothing but to kill it.
    """
    try:
        if monitor.listen(0.0).paused:
            set_paused(monitor, False)
        try:
            shut_down()
        except (ConnectError, ConnectionLost, MachineError):
            monitor.send(PowerOff())  # PID 1 outlives its agent
        return monitor.wait(grace + POWER_OFF_WAIT)
    except MicroguestError:
        return False


def still_runs(name: str, timeout: float | None) -> DeadlineExceeded:
    """The machine was awaited in vain."""
    return DeadlineExceeded(
        f"machine {name} still runs after {timeout:g} s", seconds=timeout or 0.0
    )


def not_ended(name: str, pid: int) -> MachineError:
    """Its monitor was killed in vain, too."""
    return MachineError(
        f"machine {name} was killed, but its monitor, process {pid}, does not end: it is "
        "traced by another program, or in a call that the kernel does not end (look at "
        f"ps -o stat,wchan {pid})"
    )
