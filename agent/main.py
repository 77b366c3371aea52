"""The agent's entry: `bootstrap` builds what is needed, `serve` runs it.

The process was started by PID 1 with one descriptor, its end of the supervision pair; everything
else comes over that. It ends when PID 1 does. The garbage collector is off while modules are
imported, and what they made is then left out of every collection.
"""

import gc
import resource
import socket
import time

import trio

from microguest.agent import operations, orders, service
from microguest.agent.link import Link
from microguest.agent.process.groups import Groups
from microguest.agent.process.starting import Starter
from microguest.agent.state import Agent
from microguest.agent.system import clock
from microguest.guest.supervision import AgentReady, Configure

__all__ = ["run"]

DESCRIPTORS = 16 * 1024  # open files: five a process and one a connection, with room


def run() -> None:
    """Serve until PID 1 is gone, which ends the process; returns only with an exception."""
    agent, starter, listener = bootstrap()
    gc.freeze()
    gc.enable()
    try:
        trio.run(serve, agent, starter, listener)
    finally:
        starter.kill_everything()


def bootstrap() -> tuple[Agent, Starter, socket.socket]:
    """Take the configuration and the listener from PID 1."""
    link = Link.inherited()
    configure, descriptors = link.receive_first()
    if not isinstance(configure, Configure) or len(descriptors) != 1:
        raise SystemExit(f"agent: expected Configure and a listener first, got {configure!r}")
    listener = socket.socket(fileno=descriptors[0])
    listener.setblocking(False)
    agent = Agent(configure, link)
    return agent, Starter(agent, Groups(agent), raise_descriptor_limit()), listener


async def serve(agent: Agent, starter: Starter, listener: socket.socket) -> None:
    """Follow PID 1's messages and answer hosts, both for ever."""
    async with trio.open_nursery() as nursery:
        agent.nursery = nursery
        nursery.start_soon(orders.follow, agent, starter)
        pauses = clock.Pauses()
        nursery.start_soon(clock.watch, agent, pauses)
        agent.ready_ms = time.clock_gettime(time.CLOCK_BOOTTIME) * 1000
        agent.link.send(AgentReady(boot_ms=agent.ready_ms))
        await service.serve(agent, operations.table(starter, pauses), listener)


def raise_descriptor_limit() -> tuple[tuple[int, int, int], ...]:
    """Make room for many connections; what processes get instead is what the agent was given."""
    given = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in ((DESCRIPTORS, max(DESCRIPTORS, given[1])), (given[1], given[1])):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, wanted)
        except (ValueError, OSError):
            continue  # raising the hard limit needs a privilege; the given one can always be used
        break
    return ((resource.RLIMIT_NOFILE, *given),)


if __name__ == "__main__":  # in a plain Python on the host: see docs/developing/building.md
    run()
