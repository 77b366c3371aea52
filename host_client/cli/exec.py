"""`microguest exec`: a command in a machine that runs."""

import argparse

from guest.messages import Start
from host_client.agent import words
from host_client.cli import INTERRUPTED
from host_client.cli.stream import Interrupted, join, terminal_signals
from host_client.errors import MachineError
from host_client.machines.find import agent_of

__all__ = ["main"]


def main(options: argparse.Namespace) -> int:
    """The command's exit code."""
    if not options.command:
        raise MachineError(f"exec {options.target}: name a command")
    start = Start(
        argv=words(options.command),
        env=dict(options.env),
        cwd=options.workdir,
        user=options.user,
        stdin=options.interactive,
    )
    with (
        agent_of(options.target) as agent,
        terminal_signals() as signals,
        agent.open_process(start) as process,
    ):
        try:
            return join(process, signals, stdin=options.interactive).shell_code
        except Interrupted:
            return INTERRUPTED
