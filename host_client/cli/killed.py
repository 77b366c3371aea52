"""How a command ends that a signal shall end."""

import signal

__all__ = ["Killed"]


class Killed(Exception):
    """A signal ends this program, after everything was put back in order."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
