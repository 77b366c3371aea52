"""`microguest run`: a machine for one command, in the foreground or detached."""

import argparse
import contextlib
import os
import shlex
import signal
import socket
import time
from collections.abc import Callable
from typing import Final

from microguest.guest import bounds
from microguest.guest.errors import MicroguestError, StartError
from microguest.guest.report import WorkloadFailed
from microguest.guest.status import ExitStatus
from microguest.guest.wire.messages import Attach
from microguest.host_client.cli import INTERRUPTED
from microguest.host_client.cli.detachkeys import parse as parse_keys
from microguest.host_client.cli.foreground import Detached, Interrupted, in_foreground
from microguest.host_client.cli.progress import Display
from microguest.host_client.cli.runoptions import machine_options
from microguest.host_client.cli.stream import ended_in_order, passed_signals
from microguest.host_client.cli.tell import complain, say
from microguest.host_client.cli.terminal import Terminal, size_of
from microguest.host_client.errors import (
    ConnectError,
    ConnectionLost,
    DeadlineExceeded,
    MachineError,
)
from microguest.host_client.machines.boot import start
from microguest.host_client.machines.machine import Machine
from microguest.host_client.machines.settings import Settings
from microguest.host_client.shortage import explain

__all__ = ["main"]

WORKLOAD_WAIT: Final = 30.0  # seconds from `ready`, before which PID 1 has tried to start it
OF_THE_COMMAND: Final = frozenset(
    {"not_found", "permission_denied", "not_executable", "bad_interpreter"}
)
# Seconds from the workload's end, which we have just heard of, to the machine's: COLLECT_WAIT and
# all that follows in a guest's end (docs/design/boot.md) are less.
POWER_OFF_WAIT: Final = 30.0
ATTACH_WAIT: Final = 120.0  # seconds from `ready` for an agent to greet us, however slow it is
TOLD_WAIT: Final = 5.0  # seconds from a lost connection until PID 1's report is here


def main(options: argparse.Namespace) -> int:
    """The command's exit code; 127 and 126 where it could not be started."""
    with ended_in_order():
        return run(options)


def run(options: argparse.Namespace) -> int:
    """The same, but Killed at any moment where a signal shall end this program."""
    terminal = Terminal() if options.tty and options.interactive and not options.detach else None
    keys = parse_keys(options.detach_keys)  # also where they are of no use: they may be a slip
    if options.cidfile and os.path.lexists(options.cidfile):
        raise MachineError(
            f"{options.cidfile} exists: is its machine still wanted? Remove it or name another file"
        )
    settings = settings_of(options)
    if options.rm and options.restart != "no":
        raise MachineError("--rm and --restart exclude each other: leave one of them out")
    with Display(quiet=options.quiet) as progress:
        machine = start(settings, progress=progress)
    if options.cidfile:
        try:
            write_name(options.cidfile, machine.name)
        except BaseException:
            machine.kill()
            raise
    if options.detach:
        return detach(machine)
    try:
        return foreground(machine, options, terminal, keys)
    except Interrupted:
        machine.kill()
        return INTERRUPTED
    except Detached as process:
        machine.detach()
        complain(
            f"detached: microguest attach {machine.name} {shlex.quote(str(process))}; the machine "
            f"goes on until microguest stop {machine.name}"
        )
        return 0
    except BaseException:
        machine.kill()
        raise


def write_name(path: str, name: str) -> None:
    """Into a file that was not there. MachineError."""
    try:
        with open(path, "x", encoding="ascii") as file:
            file.write(name)
    except OSError as error:
        raise MachineError(f"cannot write {explain(error, path)}") from error


def settings_of(options: argparse.Namespace) -> Settings:
    """What `boot` would be called with."""
    size = size_of(1, 0)
    streams = "console" if options.detach else "attached"
    return Settings.of(
        options.image,
        machine_options(options),
        workload=True,
        stdio="terminal" if options.tty else streams,
        # As long as we live: our end is the machine's. Stopped or slow, we come all the same.
        output_wait=bounds.OUTPUT_GRACE if options.detach else bounds.OUTPUT_WAIT_MAX,
        terminal=(size.rows, size.columns),
        keep=not options.rm,
    )


def foreground(
    machine: Machine, options: argparse.Namespace, terminal: Terminal | None, keys: bytes
) -> int:
    """Join the workload's streams or its terminal to ours; the machine ends with it."""
    with passed_signals() as signals:  # what comes before the workload runs is passed on later
        await_workload(machine)

        def attached() -> ExitStatus:
            return in_foreground(
                machine.agent,
                Attach(),
                stdin=options.interactive,
                tty=options.tty,
                terminal=terminal,
                keys=keys if terminal else b"",
                signals=signals,
                main=True,
            )

        try:
            exited = until_served(machine, signals, attached)
        except (ConnectError, ConnectionLost):
            told = exit_told(machine)
            if told is None:
                raise
            exited = told
    try:
        machine.wait(POWER_OFF_WAIT)
    except DeadlineExceeded:
        machine.kill()
    return exited.shell_code


def until_served(
    machine: Machine, signals: socket.socket, attached: Callable[[], ExitStatus]
) -> ExitStatus:
    """What `attached` returns, tried again while it cannot connect and the machine lives: an agent
    that has told that it serves may be slow. Interrupted where Ctrl-C has come meanwhile."""
    deadline = time.monotonic() + ATTACH_WAIT
    while True:
        try:
            return attached()
        except ConnectError:
            state = machine.state
            if state.ended or state.agent == "down" or time.monotonic() > deadline:
                raise
            with contextlib.suppress(BlockingIOError):
                if signal.SIGINT in signals.recv(64, socket.MSG_PEEK):
                    raise Interrupted from None


def exit_told(machine: Machine) -> ExitStatus | None:
    """How the workload ended, as PID 1 has told, where nobody can be asked for its output any more.

    None where PID 1 has not told: the machine died before the workload's end.
    """
    deadline = time.monotonic() + TOLD_WAIT
    state = machine.state
    while state.workload_exited is None and not state.ended and time.monotonic() < deadline:
        state = machine.await_change(TOLD_WAIT)
    if state.workload_exited is not None:
        complain(f"{state.describe_end() or 'the agent is gone'}: the last of its output is lost")
    return state.workload_exited


def detach(machine: Machine) -> int:
    """Print the name; the machine goes on by itself."""
    try:
        await_workload(machine)
    except BaseException:
        machine.kill()
        raise
    machine.detach()
    say(machine.name)
    return 0


def await_workload(machine: Machine) -> None:
    """Until the workload runs. StartError, MachineError where it could not be started."""
    deadline = time.monotonic() + WORKLOAD_WAIT
    state = machine.state
    while state.workload_pid is None and not state.handed_off:
        if state.workload_failed is not None:
            if state.workload_failed.restart_in is None:  # it ends by itself, and says why
                with contextlib.suppress(DeadlineExceeded):
                    machine.wait(POWER_OFF_WAIT)
            raise start_error(state.workload_failed)
        if state.ended:
            raise ConnectionLost(state.describe_end())
        if time.monotonic() > deadline:
            raise MachineError(f"machine {machine.name} started no command in {WORKLOAD_WAIT:g} s")
        state = machine.await_change(1.0)


def start_error(failed: WorkloadFailed) -> MicroguestError:
    """As the agent would have said it, where it is about the command. As docker's `run` has it, the
    rest (the user, the directory, a limit) is no fault of the command: its exit code is 125."""
    message = failed.message[: bounds.ERROR_MESSAGE]
    if failed.code not in OF_THE_COMMAND:
        return MachineError(message)
    return StartError(failed.code, message, {"step": failed.step, "errno": failed.errno})
