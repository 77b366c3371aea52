"""Processes that hosts start: from a request to the end of everything that was started.

The connection is the process's: while it is open the process runs, and when it is lost the process
group is killed. Each child is waited for by its pidfd and by nobody else.
"""

import os
import signal
import time

import _guestsys
import trio

from agent.channel import Channel
from agent.exchange import Exchange
from agent.state import Agent, Process
from guest.connection import Event, Response
from guest.errors import OperationError, operation_error
from guest.messages import Exited, Start, Started
from guest.process import Plan, plan, start_failure
from guest.record import Record

__all__ = ["ChildProcess", "start"]


async def start(agent: Agent, channel: Channel, args: Record, early: list[Event]) -> None:
    """The operation: spawn, exchange bytes until it has ended, leave nothing. OperationError."""
    assert isinstance(args, Start)
    await agent.wait_root()
    process = spawn(agent, args)
    agent.processes[process.id] = process
    try:
        channel.queue(Response(result=Started(id=process.id, pid=process.pid)))
        alone = len(agent.processes) == 1
        await Exchange(channel, process, args.timeout).run(early, alone=alone)
    finally:
        await process.end()
        del agent.processes[process.id]


class ChildProcess(Process):
    """A process of our own. Until it is reaped, its pid and process group cannot be another's."""

    def __init__(
        self, process_id: str, pid: int, pidfd: int, stdin: int, outputs: dict[int, int]
    ) -> None:
        super().__init__(process_id, pid, exit_fd=pidfd, stdin=stdin, outputs=outputs)
        self._reaped = False

    def signal(self, number: int, target: str) -> bool:
        """To the process or its group; False where it has ended."""
        if self._reaped:
            return False
        try:
            if target == "process":
                os.kill(self.pid, number)
            else:
                os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):
            return False  # it has ended
        return True

    def status(self) -> Exited:
        """Reap it, which must have ended."""
        result = os.waitid(os.P_PIDFD, self.exit_fd, os.WEXITED)
        assert result is not None
        self._reaped = True
        duration = time.monotonic() - self.started
        if result.si_code == os.CLD_EXITED:
            return Exited(code=result.si_status, duration=duration)
        dumped = result.si_code == os.CLD_DUMPED
        return Exited(signal=result.si_status, core_dumped=dumped, duration=duration)

    async def end(self) -> None:
        """Kill what still runs, reap it, close every descriptor."""
        self.close_streams()
        if not self._reaped:
            self.signal(signal.SIGKILL, "group")
            with trio.CancelScope(shield=True):
                await trio.lowlevel.wait_readable(self.exit_fd)
            self.status()
        os.close(self.exit_fd)


def spawn(agent: Agent, args: Start) -> ChildProcess:
    """Start what was asked for. Raises OperationError, and then nothing was started."""
    image = agent.configure.image
    identity = agent.accounts.identity(image.user if args.user is None else args.user)
    planned = plan(args.argv, identity, env=args.env, cwd=args.cwd, image=image)
    step = "pipe"
    opened: list[int] = []  # in pairs: ours, the child's
    try:
        opened += reversed(os.pipe2(os.O_CLOEXEC)) if args.stdin else (-1, null_input())
        opened += os.pipe2(os.O_CLOEXEC)
        opened += os.pipe2(os.O_CLOEXEC)
        step = "spawn"
        pid, pidfd = _guestsys.spawn(
            planned.argv,
            planned.env,
            candidates=planned.candidates,
            cwd=planned.cwd,
            fds=(opened[1], opened[3], opened[5]),
            uid=identity.uid,
            gid=identity.gid,
            groups=identity.groups,
            rlimits=agent.child_limits,
        )
    except OSError as error:
        close_all(opened[0::2])
        raise not_started(planned, getattr(error, "step", step), error) from None
    finally:
        close_all(opened[1::2])
    stdin, stdout, stderr = opened[0::2]
    for fd in (stdin, stdout, stderr):
        if fd >= 0:
            os.set_blocking(fd, False)  # anybody in the guest may open the pipe's other end again
    return ChildProcess(agent.next_id(), pid, pidfd, stdin, {1: stdout, 2: stderr})


def null_input() -> int:
    """An input that is at its end. Raises OSError."""
    try:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # a root without /dev
        reader, writer = os.pipe2(os.O_CLOEXEC)
        os.close(writer)
        return reader


def not_started(planned: Plan, step: str, error: OSError) -> OperationError:
    """The error for the host, from the step that failed."""
    exists = any(os.path.exists(path) for path in planned.program_paths())
    code, message, fields = start_failure(
        step,
        error.errno or 0,
        os.fsdecode(planned.argv[0]),
        os.fsdecode(planned.cwd),
        program_exists=exists,
    )
    return operation_error(code, message, fields)


def close_all(descriptors: list[int]) -> None:
    """Close those that are open."""
    for fd in descriptors:
        if fd >= 0:
            os.close(fd)
