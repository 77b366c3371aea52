"""argparse as docker's users expect it: `--rm=false`, no prefixes, hints, one line for an error."""

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import Any, Final, NoReturn

from microguest.host_client.cli.dockerwords import (
    COMMANDS,
    about_command,
    about_missing,
    about_option,
    about_signal,
    about_value,
)
from microguest.host_client.cli.tell import complain, say
from microguest.host_client.values import ALIKE

__all__ = ["Parser", "add_list", "add_switch", "hint", "seconds", "whole"]

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
        if about := about_missing(self.command, message.rpartition("required: ")[2]):
            message = f"{message}; {about}"
        complain(f"{message}: see {self.prog} --help", self.prog)
        raise SystemExit(OURS)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; what a command does not know is an error of that command's own."""
        if args == ["-h"]:  # also of `run`, whose -h has a value otherwise
            args = ["--help"]
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            options = [word for word in unknown if word.startswith("-")]
            word = (options or unknown)[0]
            self.error(f"unknown {'option' if options else 'argument'} {word}{self._meant(word)}")
        return found, unknown

    @property
    def command(self) -> str:
        """The word that this is the parser of."""
        return self.prog.rpartition(" ")[2]

    def _meant(self, word: str) -> str:
        """What does here what a word does in docker, or what it may have been meant to be."""
        if not word.startswith("-"):
            return ""
        if about := about_option(self.command, word):
            return f"; {about}"
        known = [name for name in self._option_string_actions if name.startswith("--")]
        return hint(word.partition("=")[0], known)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        if isinstance(action, argparse._SubParsersAction):
            about = about_command(str(value))
            meant = f"; {about}" if about else _command_meant(str(value), action.choices)
            raise argparse.ArgumentError(None, f"{value!r:.80} is no command{meant}")
        about = about_value(max(action.option_strings, key=len, default=""))
        why = f"; {about}" if about else ""
        known = ", ".join(map(str, action.choices))
        raise argparse.ArgumentError(action, f"{value!r:.80} is none of: {known}{why}")

    def _get_nargs_pattern(self, action: argparse.Action) -> str:
        """A `--` is the end of options where it stands before a word of ours. Behind the last one
        it is CMD's, as the rest is."""
        pattern = super()._get_nargs_pattern(action)
        if action.option_strings or action.nargs is not None:
            return pattern
        return pattern.replace("A-*", "A")

    def _parse_optional(self, arg_string: str) -> Any:
        """One tuple of (action, option, …, explicit value), or since Python 3.12 a list of them."""
        found: Any
        if about := about_signal(self.command, arg_string):
            found = super()._parse_optional("-s")
            refusal = _Refusal(f"unknown option {arg_string}; {about}")
            return [(refusal, *found[0][1:])] if isinstance(found, list) else (refusal, *found[1:])
        found = super()._parse_optional(arg_string)
        # `-it` is -i with an explicit t as well.
        change = self._switched if "=" in arg_string else self._joined
        if isinstance(found, list):
            return [change(*each) for each in found]
        return found and change(*found)

    def _switched(self, action: Any, *rest: Any) -> tuple[Any, ...]:
        """A switch with a truth value is the switch, or its opposite, without one.

        Nothing is raised here: the word may be one of CMD.
        """
        if isinstance(action, _Switch) and rest[-1] in WORDS:
            chosen = action if WORDS[rest[-1]] else action.opposite
            return (chosen, rest[0], *(None for _ in rest[1:]))
        if isinstance(action, _Switch) and rest[-1] and rest[0][:2] != "--" and rest[-1][0] != "=":
            letters, equals, value = rest[-1].partition("=")
            others = [self._option_string_actions.get(f"-{letter}") for letter in letters]
            switches = [each for each in others if isinstance(each, _Switch)]
            if equals and len(switches) == len(others):
                return (_Several(action, switches, value), rest[0], *(None for _ in rest[1:]))
            return self._joined(action, *rest)
        if isinstance(action, _Switch) and rest[0].startswith("--") and rest[-1] is not None:
            return (action.refusing(rest[-1]), rest[0], *(None for _ in rest[1:]))
        return (action, *rest)

    def _joined(self, action: Any, *rest: Any) -> tuple[Any, ...]:
        """Switches that were typed together; where one is none, what says that in its turn."""
        letters = rest[-1]
        if not (isinstance(action, _Switch) and letters and rest[0][:2] != "--"):
            return (action, *rest)
        unknown = self._unknown_letter(letters)
        if not unknown:
            return (action, *rest)
        about = f"unknown option -{unknown} in {rest[0]}{letters:.80}{self._meant(f'-{unknown}')}"
        return (_Refusal(about), rest[0], *(None for _ in rest[1:]))

    def _unknown_letter(self, letters: str) -> str:
        """The first of options that were typed together that is none; "" where the others are, or
        an option before it takes the rest for its value."""
        for letter in letters:
            action = self._option_string_actions.get(f"-{letter}")
            if action is None:
                return letter
            if action.nargs != 0:
                break
        return ""

    def _print_message(self, message: str, file: Any = None) -> None:
        """argparse's own writes to a stream that may be closed, and hides that it is full."""
        for line in message.splitlines():
            say(line)


class _Switch(argparse.Action):
    """True where it is given; `--name=false` is False."""

    wrong: str | None = None  # a value that is none

    def __init__(
        self, option_strings: Sequence[str], dest: str, *, const: bool = True, **how: Any
    ) -> None:
        super().__init__(option_strings, dest, nargs=0, const=const, default=False, **how)

    @property
    def opposite(self) -> "_Switch":
        """What unsets it."""
        return _Switch(self.option_strings, self.dest, const=False)

    def refusing(self, value: str) -> "_Switch":
        """What says that the value is none."""
        refusal = _Switch(self.option_strings, self.dest)
        refusal.wrong = value
        return refusal

    def __call__(self, _parser: Any, namespace: Any, _values: Any, _option: Any = None) -> None:
        if self.wrong is not None:
            raise argparse.ArgumentError(self, f"{self.wrong!r:.40} is neither true nor false")
        setattr(namespace, self.dest, self.const)


class _Refusal(argparse.Action):
    """What says, in its turn, that a word is no option."""

    def __init__(self, message: str) -> None:
        super().__init__([], argparse.SUPPRESS, nargs=0)
        self._message = message

    def __call__(self, _parser: Any, _namespace: Any, _values: Any, _option: Any = None) -> None:
        raise argparse.ArgumentError(None, self._message)


class _Several(_Switch):
    """Switches that were typed together, as -it=false: the value is the last one's."""

    def __init__(self, first: _Switch, others: Sequence[_Switch], value: str) -> None:
        super().__init__(first.option_strings, first.dest)
        last = others[-1]
        if value not in WORDS:
            last = last.refusing(value)
        elif not WORDS[value]:
            last = last.opposite
        self._all = (first, *others[:-1], last)

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        for each in self._all:
            each(parser, namespace, values, option)


def add_switch(group: Any, *names: str, **how: Any) -> None:
    """An option that is on or off, and off where it is not given."""
    group.add_argument(*names, action=_Switch, **how)


def add_list(group: Any, *names: str, **how: Any) -> None:
    """An option that may be given more than once."""
    group.add_argument(*names, action="append", default=[], **how)


def seconds(text: str) -> float:
    """The type of an option that is a time."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if math.isnan(found):
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not a number of seconds")
    return found


def whole(of: str) -> Callable[[str], int]:
    """The type of an option that is a number of those."""

    def convert(text: str) -> int:
        try:
            return int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r:.40} is not a whole number of {of}"
            ) from None

    return convert


def hint(word: str, known: Iterable[str]) -> str:
    """What may have been meant, to be put behind a message; "" where nothing is much like it."""
    bare = {name.lstrip("-"): name for name in known}  # or any two options would be alike in these
    typed = word.lstrip("-")
    if typed.lower() in bare:  # as LS
        return f"; did you mean {bare[typed.lower()]}?"
    like = _swapped(typed, bare) or get_close_matches(typed, bare, n=3, cutoff=ALIKE)
    return f"; did you mean {' or '.join(bare[name] for name in like)}?" if like else ""


def _swapped(word: str, known: Iterable[str]) -> list[str]:
    """Those that differ in two neighbours that changed places, which few letters have in common."""
    swaps = {word[:n] + word[n + 1] + word[n] + word[n + 2 :] for n in range(len(word) - 1)}
    return [name for name in known if name in swaps]


def _command_meant(word: str, ours: Iterable[str]) -> str:
    """As `hint`; also a command of docker's, with what does the same here."""
    if not _swapped(word, ours):
        for name in _swapped(word, COMMANDS):
            return f"; did you mean {name}? {about_command(name)}"
    return hint(word, ours)
