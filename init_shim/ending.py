"""The end of a child that is known to have ended, or to be about to, and that is not reaped yet.

Most often it is reaped in the same turn, and nothing of this is needed. Where a debugger keeps it
back, who does is killed; one that is out of reach delays what PID 1 makes of the end, and no more.
"""

import time

from microguest.guest import bounds
from microguest.init_shim.reporter import say

__all__ = ["Ending"]


class Ending:
    """Of the child `pid`, which is called `what`.

    `look_at`: time.monotonic() of the next look; None until it has begun.
    """

    def __init__(self, pid: int, what: str) -> None:
        self.pid = pid
        self.look_at: float | None = None
        self._what = what
        self._untold_until = 0.0  # time.monotonic()

    def begin(self) -> None:
        """It has ended, or it was killed. Again and again is as good as once."""
        if self.look_at is None:
            now = time.monotonic()
            self.look_at = now + bounds.TRACER_WAIT
            self._untold_until = now + bounds.TRACED_END

    def look(self, agent: int) -> int | None:
        """When it is time to: kill who keeps it from PID 1, but the agent.

        Its wait status where it has ended, and who traces it did not in TRACED_END. It is to be
        reaped all the same, later.
        """
        from microguest.init_shim.tracers import kill_tracers, wait_status

        now = time.monotonic()
        self.look_at = now + bounds.TRACER_WAIT
        if now >= self._untold_until:
            status = wait_status(self.pid)
            if status is not None:
                say(f"{self._what} has ended, and what traces it cannot be killed from here")
                return status
        killed = kill_tracers(self.pid, agent)
        if killed:
            say(f"{self._what} was kept from its end by who traces it: {killed} are killed")
        return None
