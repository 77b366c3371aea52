"""What PID 1 says is acted upon.

When PID 1 closes the pair, or says something that cannot be understood, the agent ends: there is
nobody left who would reap for it or power off.
"""

import os

from microguest.agent.process.guard import Guard
from microguest.agent.process.inheriting import restore_all
from microguest.agent.process.kept import MAIN_ID, KeptProcess
from microguest.agent.process.starting import Starter
from microguest.agent.process.workload import ConsoleMain, take_main
from microguest.agent.state import Agent
from microguest.guest.supervision import (
    AreYouThere,
    Here,
    KeptExited,
    MainExited,
    MainStarted,
    Restored,
    RootReady,
    Taken,
)

__all__ = ["follow"]


async def follow(agent: Agent, starter: Starter) -> None:
    """Act on PID 1's messages. When it is gone, end the whole agent."""
    deposits: list[tuple[Restored, list[int]]] = []
    while True:
        message, descriptors = await agent.link.receive()
        match message:
            case Restored():
                deposits.append((message, descriptors))
            case RootReady():
                enter_root(descriptors[0])
                await begin(agent, starter, message, deposits)
            case MainStarted():
                await take_main(agent, message, descriptors)
            case MainExited() | KeptExited():
                process_id = message.id if isinstance(message, KeptExited) else MAIN_ID
                process = agent.processes.get(process_id)
                if isinstance(process, KeptProcess):
                    process.reaped(message)
                elif isinstance(process, ConsoleMain) and isinstance(message, MainExited):
                    process.ended(message)
            case Taken():
                agent.link.taken()
            case AreYouThere():
                answer(agent, message)
            case _:
                starter.kill_everything()
                os._exit(0)


async def begin(
    agent: Agent,
    starter: Starter,
    message: RootReady,
    deposits: list[tuple[Restored, list[int]]],
) -> None:
    """The root is in place: serve what waits for that."""
    Guard(agent).start()  # now, as a machine may have no /proc before
    await restore_all(agent, starter.groups, deposits)
    if not message.workload:
        agent.main_started.set()  # nobody has to wait for it
    agent.root_ready.set()


def answer(agent: Agent, question: AreYouThere) -> None:
    """Say that the event loop turns; not in `follow` itself, which goes on hearing meanwhile."""
    assert agent.nursery is not None  # since before PID 1's messages are followed
    agent.nursery.start_soon(agent.link.deliver, lambda: (Here(number=question.number), ()))


def enter_root(directory: int) -> None:
    """Make the image's root the agent's own, from its O_PATH descriptor."""
    os.fchdir(directory)
    os.chroot(".")
    os.chdir("/")
    os.close(directory)
