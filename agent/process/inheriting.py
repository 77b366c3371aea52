"""What an earlier agent had deposited with PID 1 becomes this one's; what it had not is ended."""

import os
import signal

from microguest.agent.process import tree
from microguest.agent.process.adopted import Adopted
from microguest.agent.process.groups import Groups
from microguest.agent.process.hunting import Hunters, in_slices
from microguest.agent.process.kept import KeptProcess, Notes
from microguest.agent.process.leaf import Leaf
from microguest.agent.process.ring import OPEN, Ring
from microguest.agent.state import Agent, log
from microguest.guest.record import RecordError
from microguest.guest.supervision import AGENT_ID, Restored
from microguest.guest.wire.messages import STREAMS

__all__ = ["restore_all"]


async def restore_all(
    agent: Agent, groups: Groups, deposits: list[tuple[Restored, list[int]]]
) -> None:
    """Go on with what is kept, and end what was not. The image's root is in place. Raises nothing.

    All that dies with its connection should have died with the agent, which had the connection.
    """
    earlier = ""  # path of its cgroup
    for message, descriptors in deposits:
        if message.id == AGENT_ID:
            earlier = message.meta
            for fd in descriptors:
                os.close(fd)
        else:
            await restore_deposit(agent, groups, message, descriptors)
    if agent.configure.starts > 1:
        kept = [p.notes for p in agent.processes.values() if isinstance(p, KeptProcess)]
        await end_others(groups, earlier, kept)


async def end_others(groups: Groups, earlier: str, kept: list[Notes]) -> None:
    """Kill the processes of the agent before this one that are not kept."""
    cgroups = groups.own()
    if cgroups is None:
        spared_marks = {os.fsencode(notes.mark) for notes in kept}
        marks = await in_slices(tree.marked()) - spared_marks
        hunts = [Hunters.send(tree.NOBODY, mark, signal.SIGKILL) for mark in marks]
        for hunt in hunts:
            await hunt.done.wait()
    elif earlier:
        spared = {notes.leaf for notes in kept}
        for leaf in cgroups.left_by(earlier):
            if leaf.name not in spared:
                leaf.kill()
            leaf.close()


async def restore_deposit(
    agent: Agent, groups: Groups, message: Restored, descriptors: list[int]
) -> None:
    """Go on with one. Raises nothing: what cannot be understood is closed, and that is said."""
    left = set(descriptors)  # what nobody has taken yet
    try:
        process = build(agent, groups, message, descriptors, left)
    except (OSError, RecordError, KeyError, ValueError) as error:
        log(f"process {message.id} is not kept any more: {type(error).__name__}: {error}")
    else:
        for fd in left:
            process.let_go(fd)
        await process.begin()
        return
    for fd in left:
        os.close(fd)


def build(
    agent: Agent, groups: Groups, message: Restored, descriptors: list[int], left: set[int]
) -> KeptProcess:
    """From `descriptors`; `left` loses what is taken. Raises OSError, RecordError, KeyError."""
    notes = Notes.from_json(message.meta)
    pidfd, *others = descriptors
    held = dict(zip(message.names, others, strict=True))
    rings = {
        stream: Ring.restore(held[f"{name}-ring"], drops=notes.keep.on_full == "drop")
        for stream, name in STREAMS.items()
        if f"{name}-ring" in held
    }
    # An output whose end was noted in its ring is over, even if PID 1 was not told any more.
    outputs = {
        stream: held[STREAMS[stream]]
        for stream, ring in rings.items()
        if ring.state == OPEN and STREAMS[stream] in held
    }
    stage = (held["stage-out"], held["stage-in"]) if "stage-out" in held else None
    child = Adopted(
        message.id,
        message.pid,
        pidfd,
        (held.get("stdin", -1), outputs),
        leaf=adopted_leaf(groups, notes.leaf),
        mark=os.fsencode(notes.mark),
        started=notes.started,
    )
    child.tty = notes.tty
    if message.exited is not None:
        child.ended(message.exited)
    taken = {pidfd, child.stdin, *outputs.values(), *(stage or ())}
    process = KeptProcess(agent, child, notes, rings, stage)
    left -= taken | {ring.fd for ring in rings.values()}
    return process


def adopted_leaf(groups: Groups, name: str) -> Leaf | None:
    """The cgroup that the process is in, where it still is."""
    if not name:
        return None
    try:
        return groups.adopt(name)
    except OSError:
        return None
