"""`microguest run`: a machine for one command, in the foreground or detached."""

import argparse
import time
from typing import Final

from guest import limits
from guest.errors import StartError
from guest.messages import Attach, Keep, Start
from guest.report import WorkloadFailed
from host_client.cli import INTERRUPTED, complain
from host_client.cli.detachkeys import parse as parse_keys
from host_client.cli.foreground import Detached, Interrupted, in_foreground
from host_client.cli.runoptions import machine_options
from host_client.cli.stream import passed_signals
from host_client.cli.terminal import Terminal, size_of
from host_client.errors import ConnectionLost, DeadlineExceeded, MachineError
from host_client.images import open_image, process_for
from host_client.machines.boot import start
from host_client.machines.machine import Machine
from host_client.machines.settings import Settings

__all__ = ["main"]

WORKLOAD_WAIT: Final = 30.0  # seconds from `ready` to the workload's start or failure
POWER_OFF_WAIT: Final = 20.0  # seconds from the workload's end to the machine's


def main(options: argparse.Namespace) -> int:
    """The command's exit code; 127 and 126 where it could not be started."""
    if options.tty:
        return in_terminal(options)
    machine = start(settings_of(options))
    if options.detach:
        return detach(machine)
    try:
        return foreground(machine, stdin=options.interactive)
    except Interrupted:
        machine.kill()
        return INTERRUPTED
    except BaseException:
        machine.kill()
        raise


def settings_of(options: argparse.Namespace) -> Settings:
    """What `boot` would be called with."""
    return Settings(
        image=options.image,
        workload=not options.tty,
        stdio="console" if options.detach else "attached",
        keep=not options.rm,
        **machine_options(options),
    )


def entrypoint_of(options: argparse.Namespace) -> list[str] | None:
    """None: the image's."""
    return None if options.entrypoint is None else [options.entrypoint]


def foreground(machine: Machine, *, stdin: bool) -> int:
    """Join the workload's streams to ours; the machine ends with it."""
    with passed_signals() as signals:  # what comes before the workload runs is passed on later
        await_workload(machine)
        exited = in_foreground(machine.agent, Attach(), stdin=stdin, signals=signals)
    try:
        machine.wait(POWER_OFF_WAIT)
    except DeadlineExceeded:
        machine.kill()
    return exited.shell_code


def in_terminal(options: argparse.Namespace) -> int:
    """The command on a terminal, started by the agent of a machine that idles; it ends with it."""
    if options.detach:
        raise MachineError(
            "run -d gives the command no terminal: leave out -t, and use microguest shell"
        )
    terminal = Terminal() if options.interactive else None
    keys = parse_keys(options.detach_keys) if terminal else b""
    with open_image(options.image) as image:
        argv = process_for(image.config, options.command or None, entrypoint_of(options))
    request = Start(argv=argv, stdin=True, tty=size_of(1, 0), keep=Keep() if keys else None)
    machine = start(settings_of(options))
    try:
        exited = in_foreground(
            machine.agent, request, stdin=options.interactive, terminal=terminal, keys=keys
        )
    except Interrupted:
        machine.kill()
        return INTERRUPTED
    except Detached as process:
        machine.detach()
        complain(
            f"detached: microguest attach {machine.name} {process}; the machine goes on until "
            f"microguest stop {machine.name}"
        )
        return 0
    except BaseException:
        machine.kill()
        raise
    machine.stop(grace=0.0)  # as docker: what else runs ends with the command
    return exited.shell_code


def detach(machine: Machine) -> int:
    """Print the name; the machine goes on by itself."""
    try:
        await_workload(machine)
    except BaseException:
        machine.kill()
        raise
    machine.detach()
    print(machine.name)
    return 0


def await_workload(machine: Machine) -> None:
    """Until the workload runs. StartError where it could not be started."""
    deadline = time.monotonic() + WORKLOAD_WAIT
    state = machine.state
    while state.workload_pid is None:
        if state.workload_failed is not None:
            raise start_error(state.workload_failed)
        if state.ended:
            raise ConnectionLost(state.describe_end())
        if time.monotonic() > deadline:
            raise MachineError(f"machine {machine.name} started no command in {WORKLOAD_WAIT:g} s")
        state = machine.await_change(1.0)


def start_error(failed: WorkloadFailed) -> StartError:
    """As the agent would have said it."""
    message = failed.message[: limits.ERROR_MESSAGE]
    return StartError(failed.code, message, {"step": failed.step, "errno": failed.errno})
