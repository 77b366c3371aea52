"""Which operations there are, and who handles each."""

from collections.abc import Awaitable, Callable
from functools import partial

from microguest.agent.channel import Channel
from microguest.agent.process import attaching, requests
from microguest.agent.process.starting import Starter
from microguest.agent.state import Agent
from microguest.agent.system import clock, machine, renewing
from microguest.agent.system.clock import Pauses
from microguest.guest.record import Record
from microguest.guest.wire.connection import Event
from microguest.guest.wire.messages import OPERATIONS as NAMED

__all__ = ["Handler", "table"]

# A handler gives the result, or None when the connection belonged to a process and that has ended.
# `early` are events that arrived together with the request. Raises OperationError.
Handler = Callable[[Agent, Channel, Record, list[Event]], Awaitable[Record | None]]


def table(starter: Starter, pauses: Pauses) -> dict[str, Handler]:
    """Every operation that the protocol names; it refuses all others."""
    handlers: dict[str, Handler] = {
        "ping": machine.ping,
        "info": machine.info,
        "shutdown": machine.shutdown,
        "start": partial(attaching.start, starter),
        "attach": attaching.attach,
        "processes": requests.processes,
        "wait": requests.wait,
        "signal": requests.signal,
        "forget": requests.forget,
        "clock": partial(clock.clock, pauses),
        "renew": renewing.renew,
    }
    # One without a handler would fail hosts as `internal`; so it fails every boot.
    assert handlers.keys() == NAMED.keys()
    return handlers
