"""Small requests about processes: one question, one answer, nothing left behind."""

import trio

from microguest.agent.channel import Channel, ConnectionLost
from microguest.agent.state import Agent
from microguest.guest import bounds
from microguest.guest.errors import OperationError, RemoteProtocolError
from microguest.guest.record import Record
from microguest.guest.wire.connection import Event
from microguest.guest.wire.messages import (
    Forget,
    ForgetResult,
    ProcessList,
    SignalProcess,
    SignalResult,
    Wait,
    pack,
)

__all__ = ["forget", "processes", "signal", "wait"]

SHORT = 48  # characters of a list's entries where there are too many of them


async def processes(agent: Agent, _channel: Channel, _args: Record, _early: list[Event]) -> Record:
    """All that run and all that are retained."""
    await agent.wait_known()
    infos = [process.info() for process in agent.processes.values()]
    result = ProcessList(processes=tuple(infos))
    if len(pack(result.to_map())) <= bounds.RESPONSE_PAYLOAD:
        return result
    return ProcessList(
        processes=tuple(
            info.replace(argv=(info.argv[0][:SHORT],), label=info.label[:SHORT]) for info in infos
        )
    )


async def wait(agent: Agent, channel: Channel, args: Record, _early: list[Event]) -> Record:
    """How a process ended, as soon as it has. Raises OperationError still_running."""
    assert isinstance(args, Wait)
    await agent.wait_known()
    process = agent.processes.find(args.id)
    if not process.finished.is_set():
        with trio.move_on_after(args.timeout):
            await finished_or_lost(process.finished, channel)
    if process.exited is None:
        raise OperationError(
            "still_running", f"process {args.id} has not ended within {args.timeout:g} s"
        )
    return process.exited


async def finished_or_lost(finished: trio.Event, channel: Channel) -> None:
    """Wait for the event, and for the end of a connection that nobody waits at any more.

    Raises ConnectionLost and RemoteProtocolError.
    """
    failure: Exception | None = None

    async def watch(scope: trio.CancelScope) -> None:
        nonlocal failure
        try:
            await channel.receive()  # nothing may come, so that this ends with an error
        except (ConnectionLost, RemoteProtocolError) as error:
            failure = error
        scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch, nursery.cancel_scope)
        await finished.wait()
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def signal(agent: Agent, _channel: Channel, args: Record, _early: list[Event]) -> Record:
    """Send a signal to any process by its id."""
    assert isinstance(args, SignalProcess)
    await agent.wait_known()
    process = agent.processes.find(args.id)
    return SignalResult(delivered=await process.deliver(args.signal, args.target))


async def forget(agent: Agent, _channel: Channel, args: Record, _early: list[Event]) -> Record:
    """Drop what is retained of a kept process."""
    assert isinstance(args, Forget)
    await agent.wait_known()
    await agent.processes.find(args.id).forget()
    return ForgetResult()
