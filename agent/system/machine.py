"""The machine itself: is it there, what is it, and shall it end?"""

import os
import time

from microguest.agent.channel import Channel, ConnectionLost
from microguest.agent.state import Agent
from microguest.guest.record import Record
from microguest.guest.supervision import ShutdownRequest
from microguest.guest.wire.connection import Event, Response
from microguest.guest.wire.messages import InfoResult, PingResult, Shutdown, ShutdownResult

__all__ = ["info", "ping", "shutdown"]

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
