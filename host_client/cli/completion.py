"""`microguest completion SHELL`: the shell's own program that completes this one's words."""

import argparse

from microguest.host_client.cli.arguments import make_parser
from microguest.host_client.cli.tell import say
from microguest.host_client.errors import MachineError

__all__ = ["main"]

# Names of machines are asked for when they are completed. A policy may have a number behind it, so
# it is no choice of the parser's.
PREAMBLE = {
    "bash": """
_microguest_machines() { compgen -W "$(microguest ls -a -q 2>/dev/null)" -- "$1"; }
_microguest_policies() { compgen -W "no on-failure always unless-stopped" -- "$1"; }
""",
    "zsh": """
_microguest_machines() { compadd -- $(microguest ls -a -q 2>/dev/null) }
_microguest_policies() { compadd -- no on-failure always unless-stopped }
""",
}
OF_MACHINES = {"target", "name", "names"}


def main(options: argparse.Namespace) -> int:
    """Print it. MachineError where shtab is not installed."""
    try:
        import shtab
    except ImportError:
        raise MachineError("completion needs shtab: pip install 'microguest[completion]'") from None
    parser = make_parser()
    for command in commands_of(parser).values():
        for action in command._actions:
            if not action.option_strings and action.dest in OF_MACHINES:
                action.complete = dict.fromkeys(PREAMBLE, "_microguest_machines")  # type: ignore[attr-defined]
            elif action.metavar == "POLICY":
                action.complete = dict.fromkeys(PREAMBLE, "_microguest_policies")  # type: ignore[attr-defined]
            elif action.metavar == "FILE":
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    text = shtab.complete(parser, shell=options.shell, preamble=PREAMBLE[options.shell])
    for line in text.splitlines():
        say(line)
    return 0


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each command, by its name."""
    (commands,) = (
        action for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    )
    return dict(commands.choices)
