"""The workload, which PID 1 started and waits for, as the process "main".

With pipes or a terminal it is a kept process. On the console it only gets signals and has an end;
it may have several lives, each with a pid of its own.

PID 1 hands over its pipes or its terminal once, and from then on holds what the agent deposits, as
for every kept process.
"""

import errno
import os
import time

import trio

from microguest.agent.process.adopted import Adopted
from microguest.agent.process.child import Ends
from microguest.agent.process.kept import MAIN_ID, KeptProcess, Notes
from microguest.agent.registry import Process
from microguest.agent.state import Agent, log
from microguest.guest import bounds
from microguest.guest.errors import OperationError
from microguest.guest.launch import limit_advice
from microguest.guest.supervision import MainExited, MainStarted
from microguest.guest.wire.messages import Keep

__all__ = ["ConsoleMain", "find_main", "take_main"]


async def find_main(agent: Agent) -> KeptProcess:
    """The workload, which PID 1 starts right after the root is in place. OperationError."""
    with trio.move_on_after(bounds.MAIN_WAIT):
        await agent.main_started.wait()
    main = agent.processes.get(MAIN_ID)
    if isinstance(main, ConsoleMain):
        raise OperationError(
            "no_such_process",
            "the workload has no streams to attach to: what it writes is in the machine's log",
        )
    if agent.main_unserved:
        raise OperationError("no_such_process", agent.main_unserved)
    if not isinstance(main, KeptProcess):
        raise OperationError("no_such_process", "this machine has no workload to attach to")
    return main


async def take_main(agent: Agent, message: MainStarted, descriptors: list[int]) -> None:
    """The message: serve the workload, unless an earlier agent's deposit was.

    Where there is no room for that, who would attach to it is told: the agent has others to serve.
    """
    main: Process | None = agent.processes.get(MAIN_ID)
    agent.main_unserved = ""
    left = set(descriptors)  # what nobody has taken yet
    try:
        if message.console:
            if not isinstance(main, ConsoleMain):
                main = agent.processes[MAIN_ID] = ConsoleMain()
            main.lives(message.pid, message.argv)
        elif main is None:
            await attachable(agent, message, descriptors, left)
    except (OSError, ValueError) as error:  # also where descriptors were lost on their way
        agent.main_unserved = unserved(error)
        log(f"process {message.pid}: {agent.main_unserved}")
    for fd in left:
        os.close(fd)
    agent.main = agent.processes.get(MAIN_ID)
    agent.main_started.set()


def unserved(error: OSError | ValueError) -> str:
    """Why nobody can attach to a workload that runs."""
    number = errno.EMFILE  # descriptors were lost for want of it
    if isinstance(error, OSError):
        number = error.errno or 0
    reason = limit_advice(number) or os.strerror(number)
    return f"the workload runs, but nobody can attach to it: {reason}"[: bounds.ERROR_MESSAGE]


async def attachable(
    agent: Agent, message: MainStarted, descriptors: list[int], left: set[int]
) -> None:
    """Keep the workload's output; `left` loses what is taken. Raises OSError."""
    for fd in descriptors:
        os.set_blocking(fd, False)
    notes = Notes(
        keep=Keep(),
        started=time.monotonic(),
        argv=message.argv,
        tty=message.terminal,
        reader_wait=message.output_wait,
    )
    exit_fd = exit_descriptor(message.pid)
    outputs: dict[int, int] = {}
    try:
        stdin, outputs = streams(descriptors)
        child = Adopted(MAIN_ID, message.pid, exit_fd, (stdin, outputs))
        child.tty = message.terminal
        kept = KeptProcess.new(agent, child, notes)
    except (OSError, ValueError):
        for fd in {exit_fd, *outputs.values()} - left:
            os.close(fd)
        raise
    left.clear()
    await kept.begin()


class ConsoleMain(Process):
    """The workload on the machine's console. `pid` is 0 between its lives."""

    kept = True

    def __init__(self) -> None:
        super().__init__(MAIN_ID, 0, exit_fd=-1, stdin=-1, outputs={})
        self._life: Adopted | None = None

    def lives(self, pid: int, argv: tuple[str, ...]) -> None:
        """PID 1 has started it, perhaps again. Raises OSError."""
        self._life_over()
        self._life = Adopted(MAIN_ID, pid, exit_descriptor(pid), (-1, {}))
        self.pid, self.exit_fd = pid, self._life.exit_fd
        self.argv = argv
        self.started = time.monotonic()

    def ended(self, message: MainExited) -> None:
        """PID 1 has reaped it: for good, or another life follows."""
        if self._life is None:
            return
        self._life.ended(message)
        if not message.restarts:
            self.finish(self._life.status())
        self._life_over()

    def _life_over(self) -> None:
        if self._life is not None:
            os.close(self._life.exit_fd)
            self._life = None
            self.pid, self.exit_fd = 0, -1

    def signal(self, number: int, target: str) -> bool:
        """See `Process.signal`."""
        return self._life is not None and self._life.signal(number, target)

    async def deliver(self, number: int, target: str) -> bool:
        """See `Process.deliver`."""
        return self._life is not None and await self._life.deliver(number, target)

    async def forget(self) -> None:
        """See `Process.forget`."""
        raise OperationError("bad_request", "the workload is the machine's; stop the machine")


def streams(descriptors: list[int]) -> Ends:
    """Three pipes, or a terminal, of which the output is the same as the input. Raises OSError."""
    if len(descriptors) == 1:
        return descriptors[0], {1: os.dup(descriptors[0])}  # each stream is closed by itself
    stdin, stdout, stderr = descriptors
    return stdin, {1: stdout, 2: stderr}


def exit_descriptor(pid: int) -> int:
    """Readable once it has ended. Raises OSError."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:  # already
        return os.eventfd(1, os.EFD_CLOEXEC)
