"""argparse as docker's users expect it: `--rm=false`, no prefixes, hints, one line for an error."""

import argparse
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, Final, NoReturn

from host_client.cli.tell import complain, say

__all__ = ["Parser", "add_list", "add_switch", "hint"]

# What Go's strconv.ParseBool takes.
WORDS: Final = {
    **dict.fromkeys(("1", "t", "T", "true", "TRUE", "True"), True),
    **dict.fromkeys(("0", "f", "F", "false", "FALSE", "False"), False),
}
OURS: Final = 125


class Parser(argparse.ArgumentParser):
    """Of one command. Wrong usage is an error of ours: exit code 125 and one line."""

    def __init__(self, **how: Any) -> None:
        # A prefix of an option would mean another one as soon as there is a new one.
        super().__init__(**{"allow_abbrev": False, **how})

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where the help is."""
        complain(f"{message}: see {self.prog} --help", self.prog)
        raise SystemExit(OURS)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; what a command does not know is an error of that command's own."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            options = [word for word in unknown if word.startswith("-")]
            word = (options or unknown)[0]
            known = [name for name in self._option_string_actions if name.startswith("--")]
            suggestion = hint(word.partition("=")[0], known) if options else ""
            self.error(f"unknown {'option' if options else 'argument'} {word}{suggestion}")
        return found, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            raise argparse.ArgumentError(
                None, f"{value!r} is no command{hint(str(value), action.choices)}"
            )
        super()._check_value(action, value)

    def _parse_optional(self, arg_string: str) -> Any:
        """One tuple of (action, option, …, explicit value), or since Python 3.12 a list of them."""
        found: Any = super()._parse_optional(arg_string)
        if "=" not in arg_string:  # `-it` is -i with an explicit t as well
            return found
        if isinstance(found, list):
            return [self._switched(*each) for each in found]
        return found and self._switched(*found)

    def _switched(self, action: Any, *rest: Any) -> tuple[Any, ...]:
        """A switch with a truth value is the switch, or its opposite, without one."""
        if isinstance(action, _Switch) and rest[-1] in WORDS:
            chosen = action if WORDS[rest[-1]] else action.opposite
            return (chosen, rest[0], *(None for _ in rest[1:]))
        return (action, *rest)

    def _print_message(self, message: str, file: Any = None) -> None:
        """argparse's own writes to a stream that may be closed, and hides that it is full."""
        for line in message.splitlines():
            say(line)


class _Switch(argparse.Action):
    """True where it is given; `--name=false` is False."""

    def __init__(
        self, option_strings: Sequence[str], dest: str, *, const: bool = True, **how: Any
    ) -> None:
        super().__init__(option_strings, dest, nargs=0, const=const, default=False, **how)

    @property
    def opposite(self) -> "_Switch":
        """What unsets it."""
        return _Switch(self.option_strings, self.dest, const=False)

    def __call__(self, _parser: Any, namespace: Any, _values: Any, _option: Any = None) -> None:
        setattr(namespace, self.dest, self.const)


def add_switch(group: Any, *names: str, **how: Any) -> None:
    """An option that is on or off, and off where it is not given."""
    group.add_argument(*names, action=_Switch, **how)


def add_list(group: Any, *names: str, **how: Any) -> None:
    """An option that may be given more than once."""
    group.add_argument(*names, action="append", default=[], **how)


def hint(word: str, known: Iterable[str]) -> str:
    """What may have been meant, to be put behind a message; "" where nothing is like it."""
    like = get_close_matches(word, list(known), n=3)
    return f"; did you mean {' or '.join(like)}?" if like else ""
