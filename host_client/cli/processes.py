"""`microguest attach`, `ps`, `kill` and `wait`: processes of a machine by their ids."""

import argparse
import shlex
import signal
import time
from typing import Final

from microguest.guest.errors import MicroguestError
from microguest.guest.wire.messages import ProcessInfo
from microguest.host_client.cli import INTERRUPTED
from microguest.host_client.cli.detachkeys import parse as parse_keys
from microguest.host_client.cli.foreground import Detached, Interrupted, in_foreground
from microguest.host_client.cli.machines import list_machines, print_rows, with_each
from microguest.host_client.cli.table import duration
from microguest.host_client.cli.tell import complain
from microguest.host_client.cli.template import Row, filtered
from microguest.host_client.cli.terminal import Terminal
from microguest.host_client.client.agent import Agent
from microguest.host_client.client.request import attach_record, signal_number
from microguest.host_client.errors import ConnectionLost, MachineError, NoSuchProcess
from microguest.host_client.machines.find import agent_of
from microguest.host_client.machines.folder import is_alive
from microguest.host_client.machines.named import find as find_machine
from microguest.host_client.machines.named import is_another

__all__ = ["attach", "kill", "list_processes", "wait"]

FROM_NOW: Final = {"stdout": -1, "stderr": -1}
MAIN: Final = "main"
FIELDS: Final = ("ID", "PID", "State", "Status", "Label", "Command")
FILTERS: Final = {"id": "ID", "status": "State", "label": "Label"}
STATES: Final = ("running", "exited")
COLUMNS: Final = ("ID", "PID", "Status", "Label", "Command")
LOOK_EVERY: Final = 0.1  # seconds between looks at a machine's state


def attach(options: argparse.Namespace) -> int:
    """The process's exit code; 0 after the detach keys."""
    keys = parse_keys(options.detach_keys)
    with agent_of(options.target) as agent:
        process = find(agent, options.target, options.process)
        if on_console(process):
            raise nothing_to_reach(options.target, process.id)
        writes = not options.no_stdin
        terminal = Terminal(without="add --no-stdin") if process.tty and writes else None
        # What a terminal has shown would be a screen of long ago, and its questions would be
        # answered again: the program draws a new one when it is told the size.
        offsets = FROM_NOW if process.tty and not options.all else None
        request = attach_record(process.id, offsets, write=writes)
        try:
            return in_foreground(
                agent, request, stdin=writes, terminal=terminal, keys=keys if terminal else b""
            ).shell_code
        except Interrupted:
            return INTERRUPTED
        except Detached:
            complain(f"detached: microguest attach {options.target} {shlex.quote(process.id)}")
            return 0


def find(agent: Agent, target: str, name: str) -> ProcessInfo:
    """One of the list. NoSuchProcess."""
    for process in agent.processes():
        if process.id == name:
            return process
    raise nothing_to_reach(target, name)


def nothing_to_reach(target: str, name: str) -> NoSuchProcess:
    """The error that says where to look instead."""
    hint = f"logs {target}" if name == MAIN else f"ps -a {target}"
    return NoSuchProcess(
        "no_such_process", f"machine {target} has no process {name} to reach: see microguest {hint}"
    )


def on_console(process: ProcessInfo) -> bool:
    """Whether it is a workload whose output is in the machine's log: nothing of it is retained."""
    return process.id == MAIN and not process.retained


def list_processes(options: argparse.Namespace) -> int:
    """Those of a machine; without one, as docker's `ps`, the machines."""
    if options.target is None:
        return list_machines(options)
    with agent_of(options.target) as agent:
        listed = [row(each) for each in agent.processes() if options.all or each.exited is None]
    print_rows(
        options, filtered(listed, options.filter, FILTERS, {"status": STATES}), FIELDS, COLUMNS
    )
    return 0


def row(process: ProcessInfo) -> Row:
    """By FIELDS."""
    return {
        "ID": process.id,
        "PID": process.pid,
        "State": "running" if process.exited is None else "exited",
        "Status": status(process),
        "Label": process.label,
        "Command": shlex.join(process.argv),
    }


def status(process: ProcessInfo) -> str:
    """Whether it runs, how long, and who can come back to it."""
    long = duration(process.running_seconds)
    if process.exited is not None:
        return f"exited ({process.exited.shell_code}) after {long}"
    about = [
        word
        for word, applies in (
            ("terminal", process.tty),
            ("console", on_console(process)),  # its output is there: nobody can attach to it
            ("kept", process.kept and not on_console(process)),
            ("attached", process.attached > 0),
        )
        if applies
    ]
    return f"up {long}" + (f" ({', '.join(about)})" if about else "")


def kill(options: argparse.Namespace) -> int:
    """Print each id that received the signal; KILL takes all that descends from the process."""
    number = signal_number(int(options.signal) if options.signal.isdecimal() else options.signal)
    target = "tree" if number == signal.SIGKILL else "group"
    machine = options.target
    try:
        with agent_of(machine) as agent:

            def send(name: str) -> str:
                find(agent, machine, name)
                if not agent.signal(name, number, target):
                    raise MachineError(f"process {name} of machine {machine} has ended already")
                return name

            return with_each(options.processes, send)
    except MicroguestError as error:
        complain(str(error))
        return 1


def wait(options: argparse.Namespace) -> int:
    """Print the exit code of each when it has ended, in the order asked for."""

    def await_end(name: str) -> str:
        of_main = name == MAIN
        return str(of_workload(options.target) if of_main else of_process(options.target, name))

    return with_each(options.processes, await_end)


def of_process(target: str, name: str) -> int:
    """The exit code of a process when it has ended."""
    with agent_of(target) as agent:
        return agent.wait(name).shell_code


def of_workload(target: str) -> int:
    """The exit code of the machine's own command, also where the machine has ended with it."""
    machine = find_machine(target)
    before = machine.state
    while True:
        alive = is_alive(target)  # before the last look, so that it misses nothing
        state = machine.state
        if is_another(state, before):
            raise ConnectionLost(f"machine {target} has ended, and another one has its name")
        before = state
        exited = state.workload_exited
        if exited is not None and exited.restart_in is None:
            return exited.shell_code
        if not alive:
            raise ConnectionLost(state.describe_end() or f"machine {target} has ended")
        time.sleep(LOOK_EVERY)
