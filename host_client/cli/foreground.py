"""A process of a guest in the foreground: our streams, our signals and our terminal are its own."""

import select
import signal
import socket
from contextlib import ExitStack
from typing import Final

from microguest.guest.errors import MicroguestError
from microguest.guest.wire.messages import Attach, Exited, Start
from microguest.host_client.cli.killed import Killed
from microguest.host_client.cli.stream import (
    FORWARDED,
    Detached,
    Insisted,
    Interrupted,
    join,
    passed_signals,
)
from microguest.host_client.cli.tell import complain
from microguest.host_client.cli.terminal import Terminal, write_undo
from microguest.host_client.client.agent import Agent
from microguest.host_client.client.deadline import Deadline
from microguest.host_client.client.process import ProcessStream
from microguest.host_client.errors import ConnectError, ConnectionLost, DeadlineExceeded

__all__ = ["Detached", "Interrupted", "in_foreground"]

HANG_UP_WAIT: Final = 1.0  # seconds for a process to end after its HUP, before it is killed
DETACH_WAIT: Final = 2.0  # seconds for what was typed before a detach to be sent


def in_foreground(
    agent: Agent,
    request: Start | Attach,
    *,
    stdin: bool,
    tty: bool = False,
    terminal: Terminal | None = None,
    keys: bytes = b"",
    signals: socket.socket | None = None,
    main: bool = False,
) -> Exited:
    """Start or attach, and join it to us until its end.

    stdin: pass ours on. tty: it has a terminal; terminal: ours, for that. keys: what detaches from
    it. signals: where they arrive already. main: it is the one that the machine was made for.
    It is hung up where a signal ends us, if it is `main` or was started here; of a kept process
    that was started here and has ended, nothing is retained. Raises as `open_process` and `join`
    do; Detached's text is the process's id.
    """
    with ExitStack() as stack:
        if signals is None:
            watches = isinstance(request, Attach) and not request.write
            signals = stack.enter_context(passed_signals(() if watches else FORWARDED))
        process = stack.enter_context(opened(agent, request, main=main))
        assert process.started is not None
        name = process.started.id
        ours = isinstance(request, Start) and request.keep is not None
        if isinstance(request, Attach) and request.write and not (stdin or tty):
            process.end_input()
        if terminal is not None:
            stack.callback(tidy_screen, terminal)
            stack.enter_context(terminal)
        try:
            exited = join(process, signals, stdin=stdin, terminal=terminal, keys=keys)
        except Detached:
            leave(process)
            raise Detached(name) from None
        except (Interrupted, Killed) as why:
            if ours or main:
                hang_up(process, patient=not isinstance(why, Interrupted | Insisted))
            if ours:
                forget(agent, name)
            raise
        if ours:
            forget(agent, name)
    if not tty and not (isinstance(request, Start) and request.tty):
        tell_what_was_cut(exited, can_wait=isinstance(request, Start))
    return exited


def tell_what_was_cut(exited: Exited, *, can_wait: bool) -> None:
    """Say that output may be missing. Of a terminal it is usual that something stays on it."""
    if exited.open_streams:
        names = " and ".join(exited.open_streams)
        one = len(exited.open_streams) == 1
        cut, it = ("was cut at its end", "it") if one else ("were cut at their ends", "them")
        hint = f": --drain SECONDS waits longer for {it}" if can_wait else ""
        complain(f"{names} {cut}, as another process still held {it} open{hint}")


def opened(agent: Agent, request: Start | Attach, *, main: bool) -> ProcessStream:
    """As `open_process`. ConnectError where that can be tried again, as nothing has begun."""
    try:
        return agent.open_process(request)
    except (ConnectionLost, DeadlineExceeded) as error:
        if not main:
            raise
        raise ConnectError(str(error)) from error


def leave(process: ProcessStream) -> None:
    """Send what is queued and that we leave; the process goes on."""
    process.detach()
    deadline = Deadline(DETACH_WAIT)
    process.flush()
    while process.pending and not deadline.passed:
        poll = select.poll()
        poll.register(process, select.POLLOUT)
        poll.poll(deadline.within(DETACH_WAIT) * 1000)
        process.flush()


def hang_up(process: ProcessStream, *, patient: bool) -> None:
    """As a terminal that goes: HUP, and a moment to save what has to be saved."""
    try:
        process.signal(signal.SIGHUP)
        deadline = Deadline(HANG_UP_WAIT if patient else 0.0)
        while process.exited is None:
            process.step(deadline)
    except (MicroguestError, DeadlineExceeded):
        pass  # it is killed next, or gone with its machine


def forget(agent: Agent, name: str) -> None:
    """Free what the agent retains; a process that still runs is killed with all of its own."""
    try:
        agent.forget(name)
    except MicroguestError:
        pass  # its machine is ending, or the agent has forgotten it already


def tidy_screen(terminal: Terminal) -> None:
    """Undo what the process did to the screen and did not undo itself."""
    write_undo(terminal.modes.undo())
