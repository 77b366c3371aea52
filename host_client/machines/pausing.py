"""Machines that stand still and go on: `Machine.pause` and `resume`, whoever has started them."""

import time
from collections.abc import Callable
from typing import Final

from host_client.errors import MachineError
from host_client.machines.plan import MachineState

__all__ = ["set_paused"]

PAUSE_WAIT: Final = 10.0  # seconds for the VMM to do it


def set_paused(
    paused: bool,
    ask: Callable[[], None],
    look: Callable[[float], MachineState],
) -> None:
    """Ask for it and wait until it is so. MachineError where it cannot be.

    look: gives the state, after waiting so many seconds for a change.
    """
    state = look(0.0)
    if state.machine == "namespaces":
        raise MachineError(
            f"machine {state.name} has no processors of its own that could be paused: "
            'only machine="qemu" does'
        )
    deadline = time.monotonic() + PAUSE_WAIT
    ask()
    while state.paused is not paused:
        if state.ended:
            raise MachineError(state.describe_end())
        left = deadline - time.monotonic()
        if left <= 0:
            word = "paused" if paused else "resumed"
            raise MachineError(f"machine {state.name} was not {word} within {PAUSE_WAIT:g} s")
        state = look(left)
