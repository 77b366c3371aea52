"""`microguest ls`, `stop` and `logs`: machines by their names."""

import argparse
import os
import re
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Final

from guest.report import CONSOLE_MARK
from host_client.cli.output import write_all
from host_client.cli.table import duration, show
from host_client.cli.tell import complain, say
from host_client.errors import MachineError
from host_client.machines.console import LogReader, read_log
from host_client.machines.find import find
from host_client.machines.folder import (
    check_name,
    is_alive,
    machines_root,
    names,
    read_state,
    sweep,
)
from host_client.machines.plan import MachineState

__all__ = ["list_machines", "logs", "pause", "stop", "unpause"]

FOLLOW_EVERY: Final = 0.1  # seconds between looks at a console that is followed
# What PID 1 says, and the kernel's last words, which `quiet` does not silence.
NOT_THE_WORKLOADS: Final = re.compile(
    rb"microguest: |" + re.escape(CONSOLE_MARK.encode()) + rb"|\[ *[0-9]+\.[0-9]+\] reboot: "
)
ELSEWHERE: Final = {
    "terminal": "its command has a terminal: microguest attach -a {name}",
    "attached": "its command's output goes to who has started it",
}
ENDED_SHOWN: Final = 40  # characters of how it ended


def list_machines(options: argparse.Namespace) -> int:
    """A table, or the names only."""
    sweep()
    rows = []
    for name in names():
        alive, state = is_alive(name), read_state(name) or MachineState(name=name, phase="unknown")
        if not (alive or options.all):
            continue
        rows.append((name, state.machine, status(state, alive=alive), state.image, state.command))
    if options.quiet:
        for row in rows:
            say(row[0])
        return 0
    cut = () if options.no_trunc else ("IMAGE", "COMMAND")
    show(("NAME", "MACHINE", "STATUS", "IMAGE", "COMMAND"), rows, cut=cut)
    return 0


def status(state: MachineState, *, alive: bool) -> str:
    """One column of the table."""
    if alive:
        if state.phase != "running":
            return state.phase
        return up(state)
    exited = state.workload_exited
    if exited is not None:
        return f"exited ({exited.shell_code})"
    return " ".join((state.error or state.status or "gone").split())[:ENDED_SHOWN]


def up(state: MachineState) -> str:
    """For how long, and what is wrong with it."""
    exited = state.workload_exited
    if exited is not None and exited.restart_in is not None:
        return f"restarting ({exited.shell_code})"
    text = f"up {duration(time.time() - state.created)}"
    if state.paused:
        return f"{text} (paused)"
    return text if state.agent == "serving" else f"{text} (agent {state.agent})"


def stop(options: argparse.Namespace) -> int:
    """End each; those that have ended already are fine."""
    for name in options.names:
        check_name(name)
        state = read_state(name)
        if not is_alive(name) and state is not None and state.ended:
            continue
        find(name).stop(grace=options.time)
        say(name)
    return 0


def pause(options: argparse.Namespace) -> int:
    """Let each stand still."""
    for name in options.names:
        find(name).pause()
        say(name)
    return 0


def unpause(options: argparse.Namespace) -> int:
    """Let each go on, and set its clock."""
    for name in options.names:
        find(name).resume()
        say(name)
    return 0


def logs(options: argparse.Namespace) -> int:
    """The console without what PID 1 says; with -f until the machine ends."""
    name = check_name(options.name)
    folder = os.path.join(machines_root(), name)
    if not is_alive(name) and not os.path.isdir(folder):  # the first also asks whose it is
        raise MachineError(f"no machine named {name}: see microguest ls -a")
    path = os.path.join(folder, "console.log")
    state = read_state(name)
    if state is not None and state.stdio != "console":
        complain(f"this is the console; {ELSEWHERE[state.stdio].format(name=name)}")
    lines = follow(name, path) if options.follow else iter(read_log(path).splitlines(True))
    # Of a virtual machine the console is a terminal, which writes \r\n for \n (ONLCR); what the
    # program wrote is what is left without that. In namespaces it is a pipe.
    is_terminal = state is None or state.machine != "namespaces"
    for line in lines:
        if not NOT_THE_WORKLOADS.match(line):
            write_all(1, line.replace(b"\r\n", b"\n") if is_terminal else line)
    return 0


def follow(name: str, path: str) -> Iterator[bytes]:
    """Lines, and at the end what is no whole line."""
    rest = b""
    with closing(LogReader(path)) as log:
        while True:
            alive = is_alive(name)  # before the last look, so that it misses nothing
            *whole, rest = (rest + log.read()).split(b"\n")
            yield from (line + b"\n" for line in whole)
            if not alive:
                break
            time.sleep(FOLLOW_EVERY)
    if rest:
        yield rest
