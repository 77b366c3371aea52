"""Processes that PID 1 waits for: the workload, and what an earlier agent had started.

PID 1 reaps them and says how they ended. Until it has said so, their ids cannot be others'.
"""

import contextlib
import os
import time

import trio

from microguest.agent.process import tracers
from microguest.agent.process.child import REAPING, ChildProcess, Ends
from microguest.agent.process.leaf import Leaf
from microguest.agent.process.tree import UNMARKED
from microguest.agent.state import log
from microguest.guest import bounds
from microguest.guest.status import exit_fields
from microguest.guest.supervision import KeptStatus, MainExited
from microguest.guest.wire.messages import Exited

__all__ = ["Adopted"]


class Adopted(ChildProcess):
    """`reaped` is set once it is known how it ended: PID 1 has said so, or cannot."""

    def __init__(
        self,
        process_id: str,
        pid: int,
        pidfd: int,
        streams: Ends,
        *,
        leaf: Leaf | None = None,
        mark: bytes = b"",
        started: float = 0.0,
    ) -> None:
        super().__init__(process_id, pid, pidfd, streams, leaf=leaf, mark=mark or UNMARKED)
        self.started = started
        self.reaped = trio.Event()
        self._status: Exited | None = None

    def ended(self, message: KeptStatus | MainExited) -> None:
        """PID 1's word."""
        with REAPING:
            self._reaped = True
        status = Exited(code=message.code, signal=message.signal, core_dumped=message.core_dumped)
        if isinstance(message, MainExited):
            self._status = status.replace(duration=message.duration, oom_killed=message.oom_killed)
        else:
            ago = time.clock_gettime(time.CLOCK_BOOTTIME) - message.ended_ms / 1000
            self._status = status.replace(
                duration=max(0.0, time.monotonic() - max(0.0, ago) - self.started),
                user_seconds=message.user_seconds,
                system_seconds=message.system_seconds,
                max_rss_kib=message.max_rss_kib,
            )
        self.reaped.set()

    async def settled(self) -> None:
        """See `Process.settled`. Until PID 1 has its end, which a tracer keeps from it as well."""
        began = time.monotonic()
        while not self.reaped.is_set():
            with trio.move_on_after(bounds.TRACER_WAIT):
                await self.reaped.wait()
                return
            with contextlib.suppress(OSError):  # it had ended before there was a pidfd of it
                if not self._is_reaped():
                    await tracers.kill_tracers(self.pid)
                    if time.monotonic() - began >= bounds.TRACED_END:
                        self._give_up()

    def _give_up(self) -> None:
        """What traces it is out of reach: tell its end from /proc, unless PID 1 can tell it now."""
        fields = exit_fields(tracers.wait_status(self.pid))
        if self._is_reaped():  # before that was read, perhaps
            return
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        log(f"process {self.pid} has ended, and what traces it cannot be killed from here")
        self.ended(KeptStatus.from_map({**fields, "ended_ms": now * 1000}))

    def status(self) -> Exited:
        """See `Process.status`; only once `reaped` is set."""
        assert self._status is not None
        if self.leaf is not None:
            with REAPING:
                self._status = self._status.replace(oom_killed=self._leave())
        return self._status

    async def end(self) -> None:
        """Close its descriptors; it is not ours to wait for."""
        self.close_streams()
        os.close(self.exit_fd)
