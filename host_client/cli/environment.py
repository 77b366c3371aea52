"""`-e NAME[=VALUE]` and `--env-file FILE`, as docker has them."""

import argparse
import os
from collections.abc import Iterable
from typing import Final

from microguest.host_client.cli.files import read_named
from microguest.host_client.errors import MachineError

__all__ = ["environment"]

FILE_MAX: Final = 4 * 1024 * 1024  # bytes; a request to an agent is no longer


def environment(options: argparse.Namespace) -> dict[str, str]:
    """The variables that the command is given; those of `-e` win. MachineError.

    NAME alone is the value that it has here; where it has none, it is left out.
    """
    found: dict[str, str] = {}
    for path in options.env_file:
        found |= taken(read(path))
    return found | taken(options.env)


def taken(texts: Iterable[str]) -> dict[str, str]:
    """By name, of NAME=VALUE and of the NAMEs that are set here. MachineError."""
    pairs = [text.partition("=") for text in texts]
    if nameless := [value for name, _, value in pairs if not name]:
        raise MachineError(f"env: {nameless[0]!r:.80} has no name: expected NAME[=VALUE]")
    return {
        name: value if equals else os.environ[name]
        for name, equals, value in pairs
        if equals or name in os.environ
    }


def read(path: str) -> list[str]:
    """The lines that are neither empty nor comments. Nothing in them is quoted or replaced."""
    data = read_named(path, "env-file", FILE_MAX)
    lines = []
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        line = os.fsdecode(raw).removesuffix("\r").lstrip()
        if not line or line.startswith("#"):
            continue
        name = line.partition("=")[0]
        if not name or any(char.isspace() for char in name):
            raise MachineError(
                f"line {number} of the env-file {path}: {name!r:.80} cannot be a variable's name"
            )
        lines.append(line)
    return lines
