"""`microguest ls`, `stop` and `logs`: machines by their names."""

import argparse
import time
from typing import Final

from host_client.cli.output import write_all
from host_client.cli.table import duration, show
from host_client.cli.tell import complain, say
from host_client.machines import named
from host_client.machines.find import find
from host_client.machines.folder import check_name, is_alive, read_state
from host_client.machines.logs import console_lines
from host_client.machines.named import MachineInfo

__all__ = ["list_machines", "logs", "pause", "stop", "unpause"]

ELSEWHERE: Final = {
    "terminal": "its command has a terminal: microguest attach -a {name}",
    "attached": "its command's output goes to who has started it",
}


def list_machines(options: argparse.Namespace) -> int:
    """A table, or the names only."""
    found = named.list_machines(all=options.all)
    if options.quiet:
        for each in found:
            say(each.name)
        return 0
    rows = [(each.name, each.machine, status(each), each.image, each.command) for each in found]
    cut = () if options.no_trunc else ("IMAGE", "COMMAND")
    show(("NAME", "MACHINE", "STATUS", "IMAGE", "COMMAND"), rows, cut=cut)
    return 0


def status(machine: MachineInfo) -> str:
    """One column of the table: how it is, and where it runs for how long."""
    word, space, remark = machine.status.partition(" ")
    if not machine.running or word != "up":
        return machine.status
    return f"up {duration(time.time() - machine.created)}{space}{remark}"


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
    lines = console_lines(name, follow=options.follow)
    state = read_state(name)
    if state is not None and state.stdio != "console":
        complain(f"this is the console; {ELSEWHERE[state.stdio].format(name=name)}")
    for line in lines:
        write_all(1, line)
    return 0
