"""`microguest exec` and `microguest shell`: a command in a machine that runs."""

import argparse
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from microguest.guest.errors import OperationError
from microguest.guest.wire.messages import Keep, Start
from microguest.host_client.cli import INTERRUPTED
from microguest.host_client.cli.detachkeys import parse as parse_keys
from microguest.host_client.cli.environment import environment
from microguest.host_client.cli.foreground import Detached, Interrupted, in_foreground
from microguest.host_client.cli.tell import complain, say
from microguest.host_client.cli.terminal import Terminal, size_of
from microguest.host_client.client.request import Options, start_record, words
from microguest.host_client.errors import MachineError
from microguest.host_client.machines.find import agent_of

__all__ = ["main", "shell"]

# Whatever the image has: the user's shell as passwd says, else bash, else sh. What is there may be
# a FIFO, a file of /proc, which has no size, or without end; then it says nothing.
SHELL_OF_USER = """
shell=$(
    [ -f /etc/passwd ] && [ -s /etc/passwd ] && head -c 1048576 /etc/passwd |
        while IFS=: read -r name _ uid _ _ home shell; do
            [ "$home" = "$HOME" ] && echo "$shell" && break
        done
) 2>/dev/null
case $shell in */nologin|*/false) shell= ;; esac
for shell in "$shell" /bin/bash /bin/sh; do
    [ -x "$shell" ] && SHELL=$shell exec "$shell"
done
"""


def main(options: argparse.Namespace) -> int:
    """The command's exit code; with -d its id is printed and the code 0."""
    if not options.command:
        raise MachineError(f"exec {options.target}: name a command")
    if options.detach:
        parse_keys(options.detach_keys)
        return detached(options)
    return attached(options, words(options.command))


def shell(options: argparse.Namespace) -> int:
    """As `exec -it NAME` of the shell that the user has in the image."""
    options.interactive = options.tty = True
    instead = f"use microguest exec -i {options.target} sh"
    return attached(options, ("/bin/sh", "-c", SHELL_OF_USER), without=instead)


def attached(
    options: argparse.Namespace, argv: Sequence[str], *, without: str = "leave out -t"
) -> int:
    """The exit code of a process whose streams are ours. without: as of `Terminal`."""
    terminal = Terminal(without=without) if options.tty and options.interactive else None
    keys = parse_keys(options.detach_keys)  # also where they are of no use: they may be a slip
    if terminal is None:
        keys = b""
    start = start_of(options, argv, keep=Keep() if keys else None)
    with agent_of(options.target) as agent, told_of_room(options.target):
        try:
            return in_foreground(
                agent, start, stdin=options.interactive, terminal=terminal, keys=keys
            ).shell_code
        except Interrupted:
            return INTERRUPTED
        except Detached as process:
            complain(f"detached: microguest attach {options.target} {shlex.quote(str(process))}")
            return 0


def detached(options: argparse.Namespace) -> int:
    """Start it, print its id; it goes on, and the last of what it writes is kept."""
    start = start_of(options, words(options.command), keep=Keep(on_full="drop"))
    with (
        agent_of(options.target) as agent,
        told_of_room(options.target),
        agent.open_process(start) as process,
    ):
        assert process.started is not None
        say(process.started.id)
    return 0


@contextmanager
def told_of_room(target: str) -> Iterator[None]:
    """Where no more processes can be kept, say by which commands one goes. MachineError."""
    try:
        yield
    except OperationError as error:
        if error.code != "cannot_keep":
            raise
        raise MachineError(
            f"{error.message}: microguest ps {target} lists them, and microguest kill {target} ID "
            "ends one"
        ) from None


def start_of(options: argparse.Namespace, argv: Sequence[str], keep: Keep | None = None) -> Start:
    """The request that the options describe."""
    given = Options(env=environment(options), cwd=options.workdir, user=options.user, keep=keep)
    if options.drain is not None:
        given["drain_idle"] = given["drain_cap"] = options.drain
    if options.label:
        given["label"] = options.label
    size = size_of(1, 0)
    tty = (size.rows, size.columns) if options.tty else None
    return start_record(argv, given, stdin=options.interactive, tty=tty)
