"""The workload as a process that hosts can attach to, under the id "main".

PID 1 started it and waits for it; the agent has its pipes. So losing a connection here ends
nothing: what the workload writes stays in its pipes until another host attaches, one at a time.
"""

import os

import trio

from agent.channel import Channel, ConnectionLost
from agent.exchange import Exchange
from agent.state import Agent, Process
from guest import limits
from guest.connection import Event, Response
from guest.errors import OperationError, RemoteProtocolError
from guest.messages import Attach, Exited, Started
from guest.record import Record
from guest.supervision import MainCollected, MainExited

__all__ = ["MainProcess", "attach"]

MAIN_ID = "main"


async def attach(agent: Agent, channel: Channel, args: Record, early: list[Event]) -> None:
    """The operation: hand over streams and status of the workload. Raises OperationError."""
    assert isinstance(args, Attach)
    if args.id != MAIN_ID:
        raise OperationError("no_such_process", f"no process {args.id!r:.100} to attach to")
    main = await wait_for_main(agent)
    if main.attached:
        raise OperationError("too_busy", "another host is attached to the workload")
    main.attached = True
    try:
        channel.queue(Response(result=Started(id=MAIN_ID, pid=main.pid)))
        await Exchange(channel, main, timeout=None).run(early)
        await wait_for_close(channel)
    finally:
        main.attached = False
    agent.link.send(MainCollected())


async def wait_for_main(agent: Agent) -> "MainProcess":
    """The workload, which PID 1 starts right after the root is in place. OperationError."""
    await agent.wait_root()
    with trio.move_on_after(limits.MAIN_WAIT):
        await agent.main_started.wait()
    if not isinstance(agent.main, MainProcess):
        raise OperationError("no_such_process", "this machine has no workload to attach to")
    return agent.main


async def wait_for_close(channel: Channel) -> None:
    """Until the host has read everything, which it shows by closing; or long enough."""
    try:
        with trio.move_on_after(limits.COLLECT_WAIT):
            while True:
                await channel.receive()
    except (ConnectionLost, RemoteProtocolError):
        pass


class MainProcess(Process):
    """`ended` is called when PID 1 says so; `exit_fd` is an eventfd that turns readable then."""

    def __init__(self, pid: int, descriptors: list[int]) -> None:
        stdin, stdout, stderr = descriptors
        for fd in descriptors:
            os.set_blocking(fd, False)
        super().__init__(
            MAIN_ID,
            pid,
            exit_fd=os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK),
            stdin=stdin,
            outputs={1: stdout, 2: stderr},
        )
        self.attached = False
        self._exited: MainExited | None = None

    def ended(self, message: MainExited) -> None:
        """PID 1 has reaped it."""
        self._exited = message
        os.eventfd_write(self.exit_fd, 1)

    def signal(self, number: int, target: str) -> bool:
        """As long as PID 1 has not reaped it, its pid is its own."""
        if self._exited is not None:
            return False
        try:
            if target == "process":
                os.kill(self.pid, number)
            else:
                os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):
            return False
        return True

    def status(self) -> Exited:
        """How it ended, as PID 1 said."""
        assert self._exited is not None
        values = self._exited
        return Exited(
            code=values.code,
            signal=values.signal,
            core_dumped=values.core_dumped,
            duration=values.duration,
        )
