"""What the guest's reports change in a machine's state, apart from its start and its end. Pure."""

from collections.abc import Callable
from typing import Any, Final

from microguest.guest.record import Record
from microguest.guest.report import (
    AgentExited,
    AgentServes,
    HandedOff,
    OomKilled,
    Ready,
    WorkloadExited,
    WorkloadFailed,
    WorkloadStarted,
)
from microguest.host_client.machines.plan import (
    AGENT_EXITS_MAX,
    EVENT_MAX,
    EVENTS_MAX,
    Event,
    MachineState,
    cut,
)

__all__ = ["changes", "left_out"]

Changes = dict[str, object]


def changes(state: MachineState, report: Record, at_ms: float) -> Changes:
    """The fields that are other ones after `report`, which arrived so long after the launch."""
    rule = RULES.get(type(report))
    return {} if rule is None else rule(state, report, at_ms)


def workload_started(state: MachineState, report: WorkloadStarted, at_ms: float) -> Changes:
    """It runs, so that it has not ended."""
    return {
        "workload_pid": report.pid,
        "workload_starts": report.starts,
        "workload_exited": None,
    }


def workload_failed(state: MachineState, report: WorkloadFailed, at_ms: float) -> Changes:
    """It was never started."""
    return {"workload_failed": report}


def workload_exited(state: MachineState, report: WorkloadExited, at_ms: float) -> Changes:
    """Its end, which is an event where it is not the last one."""
    found: Changes = {"workload_exited": report}
    if report.restart_in is not None:
        message = f"the workload ended ({report.shell_code}); again in {report.restart_in:g} s"
        found |= event(state, "workload-restarts", at_ms, message)
    return found


def agent_exited(state: MachineState, report: AgentExited, at_ms: float) -> Changes:
    """Whether there will be another one."""
    down = report.restart_in is None
    how = "hung and was killed" if report.hung else f"died ({report.shell_code})"
    then = "it stays down" if down else f"again in {report.restart_in:g} s"
    message = f"the agent {how}, crash {report.crashes}; {then}"
    return {
        "agent": "down" if down else "restarting",
        "agent_exits": (*state.agent_exits, report)[-AGENT_EXITS_MAX:],
        **event(state, "agent-exited", at_ms, message),
    }


def agent_serves(state: MachineState, report: AgentServes, at_ms: float) -> Changes:
    """The one after that."""
    message = f"the agent serves again, start {report.starts}"
    return {"agent": "serving", **event(state, "agent-serves", at_ms, message)}


def handed_off(state: MachineState, report: HandedOff, at_ms: float) -> Changes:
    """PID 1 is the image's own."""
    message = "the image's own init is PID 1 now"
    return {"handed_off": True, **event(state, "handed-off", at_ms, message)}


def oom_killed(state: MachineState, report: OomKilled, at_ms: float) -> Changes:
    """Who, and whose limit it was."""
    why = "its own limit" if report.limit else "the machine's memory"
    message = f"the kernel killed {report.name[:40]!r} (pid {report.pid}) for want of memory: {why}"
    return event(state, "oom-killed", at_ms, message)


def left_out(state: MachineState, report: Ready, at_ms: float) -> Changes:
    """What its boot did without."""
    events = state.events
    for sentence in report.left_out:
        events += (Event(kind="left-out", at_ms=at_ms, message=cut(sentence, EVENT_MAX)),)
    return {"events": events[-EVENTS_MAX:]}


def event(state: MachineState, kind: str, at_ms: float, message: str) -> Changes:
    """One more, and no more than EVENTS_MAX."""
    new = Event(kind=kind, at_ms=at_ms, message=cut(message, EVENT_MAX))
    return {"events": (*state.events, new)[-EVENTS_MAX:]}


# The reports that are not here begin or end a machine: the monitor has those.
RULES: Final[dict[type[Record], Callable[[MachineState, Any, float], Changes]]] = {
    WorkloadStarted: workload_started,
    WorkloadFailed: workload_failed,
    WorkloadExited: workload_exited,
    AgentExited: agent_exited,
    AgentServes: agent_serves,
    HandedOff: handed_off,
    OomKilled: oom_killed,
}
