"""The workload, which PID 1 started and waits for, as the kept process "main".

PID 1 hands over its pipes or its terminal once, and from then on holds what the agent deposits, as
for every kept process.
"""

import os
import time

import trio

from agent.adopted import Adopted
from agent.kept import MAIN_ID, KeptProcess, Notes, new_rings
from agent.processes import Channels
from agent.state import Agent, listed_argv
from guest import limits
from guest.errors import OperationError
from guest.messages import Keep
from guest.supervision import MainStarted

__all__ = ["find_main", "take_main"]


async def find_main(agent: Agent) -> KeptProcess:
    """The workload, which PID 1 starts right after the root is in place. OperationError."""
    with trio.move_on_after(limits.MAIN_WAIT):
        await agent.main_started.wait()
    main = agent.processes.get(MAIN_ID)
    if not isinstance(main, KeptProcess):
        raise OperationError("no_such_process", "this machine has no workload to attach to")
    return main


async def take_main(agent: Agent, message: MainStarted, descriptors: list[int]) -> None:
    """The message: serve the workload, unless an earlier agent's deposit was. Raises OSError."""
    if MAIN_ID in agent.processes:
        for fd in descriptors:
            os.close(fd)
    else:
        for fd in descriptors:
            os.set_blocking(fd, False)
        child = Adopted(MAIN_ID, message.pid, exit_descriptor(message.pid), streams(descriptors))
        child.tty = message.terminal
        argv = listed_argv(command_line(message.pid))
        notes = Notes(
            keep=Keep(),
            started=time.monotonic(),
            argv=argv,
            tty=message.terminal,
            reader_wait=message.output_wait,
        )
        main = KeptProcess(agent, child, notes, new_rings(child, notes))
        await main.begin()
    agent.main = agent.processes[MAIN_ID]
    agent.main_started.set()


def streams(descriptors: list[int]) -> Channels:
    """Three pipes, or a terminal, of which the output is the same as the input. Raises OSError."""
    if len(descriptors) == 1:
        return descriptors[0], {1: os.dup(descriptors[0])}  # each stream is closed by itself
    stdin, stdout, stderr = descriptors
    return stdin, {1: stdout, 2: stderr}


def command_line(pid: int) -> tuple[str, ...]:
    """Its arguments, which PID 1 does not tell; its id where they cannot be seen any more."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb", buffering=0) as file:
            text = file.read(limits.LISTED_ARGV) or b""
    except OSError:
        text = b""
    return tuple(os.fsdecode(text).rstrip("\0").split("\0")) if text else (MAIN_ID,)


def exit_descriptor(pid: int) -> int:
    """Readable once it has ended. Raises OSError."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:  # already
        return os.eventfd(1, os.EFD_CLOEXEC)
