"""`microguest run`: a machine for one command, in the foreground or detached."""

import argparse
import time
from typing import Final

from guest import limits
from guest.errors import StartError
from guest.report import WorkloadFailed
from host_client.cli import INTERRUPTED
from host_client.cli.stream import Interrupted, join, terminal_signals
from host_client.errors import ConnectionLost, DeadlineExceeded, MachineError
from host_client.machines.boot import start
from host_client.machines.machine import Machine
from host_client.machines.settings import Settings

__all__ = ["main"]

WORKLOAD_WAIT: Final = 30.0  # seconds from `ready` to the workload's start or failure
POWER_OFF_WAIT: Final = 20.0  # seconds from the workload's end to the machine's


def main(options: argparse.Namespace) -> int:
    """The command's exit code; 127 and 126 where it could not be started."""
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
    entrypoint = None if options.entrypoint is None else [options.entrypoint]
    return Settings(
        image=options.image,
        machine=options.machine,
        memory=options.memory,
        cpus=options.cpus,
        name=options.name,
        kernel=options.kernel,
        command=options.command or None,
        entrypoint=entrypoint,
        workload=True,
        stdio="console" if options.detach else "attached",
        env=dict(options.env),
        user=options.user,
        cwd=options.workdir,
        hostname=options.hostname,
        timeout=options.timeout,
        keep=not options.rm,
    )


def foreground(machine: Machine, *, stdin: bool) -> int:
    """Join the workload's streams to ours; the machine ends with it."""
    with terminal_signals() as signals:
        await_workload(machine)
        with machine.agent.attach("main") as process:
            if not stdin:
                process.end_input()
            exited = join(process, signals, stdin=stdin)
    try:
        machine.wait(POWER_OFF_WAIT)
    except DeadlineExceeded:
        machine.kill()
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
