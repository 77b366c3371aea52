"""`microguest ls`, `logs`, `stop`, `rm`, `pause` and `unpause`: machines by their names."""

import argparse
import datetime as dt
import os
import time
from collections.abc import Callable, Sequence
from typing import Final

from microguest.guest.errors import MicroguestError
from microguest.host_client.cli.output import write_all
from microguest.host_client.cli.table import duration, show
from microguest.host_client.cli.tell import complain, say
from microguest.host_client.cli.template import Row, filtered, formatted
from microguest.host_client.errors import MachineError
from microguest.host_client.machines import named
from microguest.host_client.machines.find import find
from microguest.host_client.machines.folder import (
    check_name,
    is_alive,
    machines_root,
    read_state,
    remove_dead,
)
from microguest.host_client.machines.named import MachineInfo

__all__ = ["list_machines", "logs", "pause", "remove", "stop", "unpause", "with_each"]

ELSEWHERE: Final = {
    "terminal": "its command has a terminal: microguest attach -a {name}",
    "attached": "its command's output goes to who has started it",
}
# What --format can name. Names and ID are docker's.
FIELDS: Final = (
    *("Name", "Names", "ID", "Machine", "State", "Status", "Image", "Command", "CreatedAt"),
    *("Labels",),
)
FILTERS: Final = {
    "name": "Name",
    "status": "State",
    "label": "Labels",
    "machine": "Machine",
    "image": "Image",
    "ancestor": "Image",
}
KNOWN: Final = {
    "status": ("created", "running", "restarting", "paused", "stopping", "exited"),
    "machine": ("qemu", "namespaces"),
}
CUT: Final = ("IMAGE", "LABEL", "COMMAND")  # on a terminal that has no room for them
CUT_LAST: Final = ("NAME", "ID", "STATUS")
COLUMNS: Final = ("Name", "Machine", "Status", "Image", "Command")


def list_machines(options: argparse.Namespace) -> int:
    """A table, what --format makes of each, or the names only."""
    everything = options.all or any(text.startswith("status=") for text in options.filter)
    rows = [row_of(machine) for machine in named.list_machines(all=everything)]
    print_rows(options, filtered(rows, options.filter, FILTERS, KNOWN), FIELDS, COLUMNS)
    return 0


def print_rows(
    options: argparse.Namespace, rows: Sequence[Row], fields: Sequence[str], columns: Sequence[str]
) -> None:
    """As the options of every listing ask. The first field is what -q shows."""
    if options.quiet:
        for row in rows:
            say(str(row[fields[0]]))
    elif options.format not in (None, "", "table"):
        formatted(rows, options.format, fields)
    else:
        heads = [column.upper() for column in columns]
        cut, last = ((), ()) if options.no_trunc else (CUT, CUT_LAST)
        cells = [[str(row[column]) for column in columns] for row in rows]
        show(
            heads,
            cells,
            cut=[head for head in heads if head in cut],
            cut_last=[head for head in heads if head in last],
        )


def row_of(machine: MachineInfo) -> Row:
    """By FIELDS."""
    created = dt.datetime.fromtimestamp(machine.created).astimezone()
    return {
        "Name": machine.name,
        "Names": machine.name,
        "ID": machine.name,
        "Machine": machine.machine,
        "State": state_word(machine),
        "Status": status(machine),
        "Image": machine.image,
        "Command": machine.command,
        "CreatedAt": created.isoformat(" ", "seconds"),
        "Labels": dict(machine.labels),
    }


def state_word(machine: MachineInfo) -> str:
    """One of docker's words where it has one."""
    if not machine.running:
        return "exited"
    if machine.phase != "running":
        return {"starting": "created"}.get(machine.phase, machine.phase)
    if machine.status.startswith("restarting"):
        return "restarting"
    return "paused" if machine.paused else "running"


def status(machine: MachineInfo) -> str:
    """One column of the table: how it is, and where it runs for how long."""
    word, space, remark = machine.status.partition(" ")
    if not machine.running or word != "up":
        return machine.status
    return f"up {duration(time.time() - machine.created)}{space}{remark}"


def with_each(words: Sequence[str], action: Callable[[str], str | None]) -> int:
    """Do it with each, print what it returns, and say where it fails; 1 where one of them did."""
    failed = 0
    for word in words:
        try:
            said = action(word)
        except MicroguestError as error:
            complain(str(error))
            failed = 1
        else:
            if said is not None:
                say(said)
    return failed


def stop(options: argparse.Namespace) -> int:
    """End each and print its name; those that have ended already are fine."""

    def end(name: str) -> str:
        check_name(name)
        if not is_alive(name) and read_state(name) is not None:
            return name
        find(name).stop(grace=options.time)
        return name

    return with_each(options.names, end)


def remove(options: argparse.Namespace) -> int:
    """Remove the state and the logs of each; with --force also of those that run."""

    def take_away(name: str) -> str | None:
        check_name(name)
        if is_alive(name):
            if not options.force:
                raise MachineError(f"machine {name} runs: stop it first, or use rm --force")
            find(name).stop(grace=0.0)
        elif not os.path.isdir(os.path.join(machines_root(), name)):
            if options.force:
                return None
            raise MachineError(f"no machine named {name}: see microguest ls -a")
        remove_dead(name)
        return name

    return with_each(options.names, take_away)


def pause(options: argparse.Namespace) -> int:
    """Let each stand still."""

    def hold(name: str) -> str:
        find(name).pause()
        return name

    return with_each(options.names, hold)


def unpause(options: argparse.Namespace) -> int:
    """Let each go on, and set its clock."""

    def let_go(name: str) -> str:
        find(name).resume()
        return name

    return with_each(options.names, let_go)


def logs(options: argparse.Namespace) -> int:
    """The console without what PID 1 says; with -f until the machine ends."""
    tail = None if options.tail == "all" else whole_number(options.tail)
    name = check_name(options.name)
    try:
        lines = named.NamedMachine(name).logs(
            follow=options.follow,
            tail=tail,
            since=options.since,
            until=options.until,
            timestamps=options.timestamps,
        )
    except ValueError as error:
        raise MachineError(str(error)) from None
    state = read_state(name)
    if state is not None and state.stdio != "console":
        complain(f"this is the console; {ELSEWHERE[state.stdio].format(name=name)}")
    for line in lines:
        write_all(1, line)
    return 0


def whole_number(text: str) -> int | None:
    """As docker's --tail, of which a negative one is all: None. MachineError."""
    if text[:1] == "-" and text[1:].isascii() and text[1:].isdecimal():
        return None
    if not (text.isascii() and text.isdecimal()):
        raise MachineError(f"tail {text!r:.40} is neither a number of lines nor all")
    return int(text[:9])
