"""The manual page, made of the command line's own parser: `man_page.py FILE`, or `make man`.

Reads nothing but the package; a test compares docs/reference/microguest.1 with what this makes.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from microguest.host_client.cli.arguments import make_parser
from microguest.host_client.cli.completion import commands_of

EXIT_CODES = (
    ("the command's own", "It ran; 128 + n where signal n killed it."),
    ("125", "Something of ours went wrong; one line on stderr says what."),
    ("126, 127", "The command could not be started; it does not exist."),
    ("1", "One of several names failed; the others were done."),
)


def page() -> str:
    """The whole text, in the macros of man(7)."""
    parser = make_parser()
    about = str(parser.description)
    lines = [
        '.TH MICROGUEST 1 "" microguest "User Commands"',
        ".SH NAME",
        f"microguest \\- {escaped(about[0].lower() + about[1:].rstrip('.'))}",
        ".SH SYNOPSIS",
        ".B microguest",
        ".I COMMAND",
        "[options] [words]",
        ".SH DESCRIPTION",
        "Words, flags and exit codes are docker's where docker has them.",
    ]
    for name, command in commands_of(parser).items():
        lines += section(name, command)
    lines += [".SH EXIT STATUS", *(line for item in EXIT_CODES for line in entry(*item))]
    lines += [
        ".SH FILES",
        *entry("~/.local/state/microguest/machines", "The machines; below XDG_STATE_HOME if set."),
        ".SH SEE ALSO",
        ".BR docker (1),",
        ".BR qemu (1)",
    ]
    return "\n".join(lines) + "\n"


def section(name: str, command: argparse.ArgumentParser) -> Iterator[str]:
    """One command: what it does, its words, its options."""
    yield f".SH {escaped(f'microguest {name}').upper()}"
    text = str(command.description)
    yield escaped(text[0].upper() + text[1:] + ".")
    for action in command._actions:
        if action.help == argparse.SUPPRESS or "--help" in action.option_strings:
            continue
        yield from entry(words_of(action), str(action.help or ""))


def words_of(action: argparse.Action) -> str:
    """How it is written: `-m, --memory MEMORY`, or the name of a word."""
    value = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    if action.choices is not None:
        value = "|".join(map(str, action.choices))
    if not action.option_strings:
        return value
    names = ", ".join(action.option_strings)
    return names if action.nargs == 0 else f"{names} {value}"


def entry(head: str, text: str) -> Iterator[str]:
    """An item with a hanging paragraph."""
    yield ".TP"
    yield f".B {escaped(head)}"
    yield escaped(text.replace("%%", "%")) if text else "\\&"


def escaped(text: str) -> str:
    """Text that roff does not take for a macro, nor its hyphens for typographic ones."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{text}" if text.startswith((".", "'")) else text


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
