"""docs/reference/cli.md and the parser have the same commands and options, in both directions."""

import argparse
import re
from pathlib import Path

import pytest

from microguest.host_client.cli.arguments import make_parser

PROJECT = Path(__file__).parent.parent
PAGE = (PROJECT / "docs" / "reference" / "cli.md").read_text()
SPELLING = re.compile(r"(?<![\w-])--?[a-z][a-z-]*")
EVERYWHERE = {"--help"}  # argparse's, and -h but of `run`


def parsers() -> dict[str, argparse.ArgumentParser]:
    (commands,) = [
        action
        for action in make_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    return dict(commands.choices)


def of_parser(command: argparse.ArgumentParser) -> list[set[str]]:
    """The spellings of each option."""
    found = [set(action.option_strings) for action in command._actions if action.option_strings]
    return [spellings for spellings in found if not spellings & EVERYWHERE]


def rows(page: str, head: str) -> list[list[str]]:
    """The cells of a table of the page."""
    (table,) = re.findall(rf"(?m)^{re.escape(head)}\n\|---.*\n((?:\|.*\n)+)", page)
    return [re.split(r"(?<!\\)\|", row)[1:-1] for row in table.splitlines()]


def of_machine(page: str) -> set[str]:
    """The spellings in the table of what a machine is like."""
    cells = rows(page, "| option | meaning | otherwise than in docker |")
    return {each for option, *_ in cells for each in SPELLING.findall(option)}


def of_tables(page: str) -> dict[str, set[str]]:
    """The spellings that the two tables of options have, by command."""
    found = {"run": of_machine(page)}
    for option, commands, _ in rows(page, "| option | of | meaning |"):
        for command in re.findall(r"`([a-z-]+)`", commands):
            found.setdefault(command, set()).update(SPELLING.findall(option))
    return found


def of_synopsis(page: str) -> dict[str, set[str]]:
    """The spellings that the synopsis has, by command."""
    found: dict[str, set[str]] = {}
    synopsis = page.split("```\n")[1]
    for entry in re.split(r"(?m)^microguest ", synopsis)[1:]:
        found[entry.split()[0]] = set(SPELLING.findall(entry))
    return found


def differences(page: str) -> list[str]:
    """What one of the page's places and the parser do not have in common."""
    wrong = []
    tables, synopsis = of_tables(page), of_synopsis(page)
    known = parsers()
    for place, commands in (("table", tables), ("synopsis", synopsis)):
        wrong += [f"{place}: no command {name}" for name in commands.keys() - known.keys()]
    wrong += [f"synopsis: {name} is missing" for name in known.keys() - synopsis.keys()]
    for name, parser in known.items():
        spelled = set().union(*of_parser(parser))
        wrong += [f"table: {name} lacks {each}" for each in spelled - tables.get(name, set())]
        for place, commands in (("table", tables), ("synopsis", synopsis)):
            unknown = commands.get(name, set()) - spelled - EVERYWHERE
            wrong += [f"{place}: {name} has no {each}" for each in unknown]
        for spellings in of_parser(parser):
            elsewhere = of_machine(page) if name == "run" else set()
            if not spellings & (synopsis.get(name, set()) | elsewhere):
                wrong.append(f"synopsis: {name} lacks {min(spellings)}")
    return sorted(wrong)


def test_the_page_has_each_option_of_each_command_and_no_other() -> None:
    assert differences(PAGE) == []


@pytest.mark.parametrize(
    ("there", "instead", "found"),
    [
        ("[--drain SECONDS] ", "", ["synopsis: exec lacks --drain"]),
        ("| `--drain SECONDS` | `exec` |", "| x | `exec` |", ["table: exec lacks --drain"]),
        (
            "| `--json` | `boot-chart`",
            "| `--yaml` | `boot-chart`",
            ["table: boot-chart has no --yaml"],
        ),
        ("microguest doctor\n", "", ["synopsis: doctor is missing"]),
        ("| `--read-only`, ", "| ", ["table: run lacks --read-only"]),
    ],
)
def test_what_the_page_lacks_is_found(there: str, instead: str, found: list[str]) -> None:
    assert there in PAGE
    assert set(found) <= set(differences(PAGE.replace(there, instead, 1)))


def test_the_readme_names_each_command() -> None:
    readme = (PROJECT / "README.md").read_text()
    assert [name for name in parsers() if f"`{name}`" not in readme] == []


def test_options_that_the_page_uses_exist() -> None:
    """Also those in its sentences."""
    spelled = {each for parser in parsers().values() for each in set().union(*of_parser(parser))}
    words = set(re.findall(r"`(--[a-z][a-z-]*)", PAGE))
    assert words - spelled - EVERYWHERE == set()
