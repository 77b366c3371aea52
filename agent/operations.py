"""Small requests: one question, one answer, nothing left behind."""

import os
import time

import trio

from agent.channel import Channel, ConnectionLost
from agent.state import Agent
from guest import limits
from guest.connection import Event, Response
from guest.errors import OperationError, RemoteProtocolError
from guest.messages import (
    Forget,
    ForgetResult,
    InfoResult,
    PingResult,
    ProcessList,
    Shutdown,
    ShutdownResult,
    SignalProcess,
    SignalResult,
    Wait,
    pack,
)
from guest.record import Record
from guest.supervision import ShutdownRequest

__all__ = ["forget", "info", "ping", "processes", "shutdown", "signal", "wait"]

SHORT = 48  # characters of a list's entries where there are too many of them
PAGE_KIB = os.sysconf("SC_PAGE_SIZE") // 1024


async def ping(agent: Agent, _channel: Channel, _args: Record, _early: list[Event]) -> Record:
    """Answered without waiting for anything."""
    return PingResult(uptime=time.monotonic() - agent.started, root_ready=agent.root_ready.is_set())


async def info(agent: Agent, _channel: Channel, _args: Record, _early: list[Event]) -> Record:
    """What the guest is, read at this moment."""
    system = os.uname()
    return InfoResult(
        versions=agent.configure.versions,
        kernel=system.release,
        machine=system.machine,
        hostname=system.nodename,
        boot_id=_first_line("/proc/sys/kernel/random/boot_id"),
        agent_pid=os.getpid(),
        agent_starts=agent.configure.starts,
        agent_ready_ms=agent.ready_ms,
        processes=sum(
            process.exited is None and process is not agent.main
            for process in agent.processes.values()
        ),
        connections=agent.connections,
        resident_kib=_resident_kib(),
    )


async def processes(agent: Agent, _channel: Channel, _args: Record, _early: list[Event]) -> Record:
    """All that run and all that are retained."""
    await agent.wait_known()
    infos = [process.info() for process in agent.processes.values()]
    result = ProcessList(processes=tuple(infos))
    if len(pack(result.to_map())) <= limits.RESPONSE_PAYLOAD:
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
    process = agent.find(args.id)
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
    return SignalResult(delivered=await agent.find(args.id).deliver(args.signal, args.target))


async def forget(agent: Agent, _channel: Channel, args: Record, _early: list[Event]) -> Record:
    """Drop what is retained of a kept process."""
    assert isinstance(args, Forget)
    await agent.wait_known()
    await agent.find(args.id).forget()
    return ForgetResult()


async def shutdown(agent: Agent, channel: Channel, args: Record, _early: list[Event]) -> None:
    """Pass the request on to PID 1, which ends the machine; this agent may be the first to go."""
    assert isinstance(args, Shutdown)
    request = ShutdownRequest(grace=args.grace, reboot=args.reboot)
    channel.queue(Response(result=ShutdownResult()))
    try:
        channel.flush_now()
    except ConnectionLost:
        pass  # a host need not wait for the answer
    await agent.link.deliver(lambda: (request, ()))


def _resident_kib() -> int:
    """From proc_pid_statm(5); 0 where the root has no /proc."""
    fields = _first_line("/proc/self/statm").split()
    return int(fields[1]) * PAGE_KIB if len(fields) > 1 else 0


def _first_line(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.readline(256).strip()
    except OSError:
        return ""
