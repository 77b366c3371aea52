"""What callers write, as the records that travel. Does no I/O; shared by every kind of client."""

import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypedDict

from guest.messages import Attach, Keep, Limits, StagedFile, Start, Winsize

__all__ = [
    "Argument",
    "Options",
    "attach_record",
    "signal_number",
    "start_record",
    "words",
]

Argument = str | bytes | os.PathLike[str] | os.PathLike[bytes]
FALLBACK_SIZE: Final = Winsize(rows=24, columns=80)  # where the caller has no terminal


class Options(TypedDict, total=False):
    """How a process is started; what is left out is as in the image, or off.

    shell         a line for the image's /bin/sh -c, instead of argv
    env           merged over the image's environment
    clear_env     env replaces the image's instead
    cwd           working directory
    user          as `docker exec -u` takes it: name, uid, name:group, uid:gid
    groups        names or ids of more groups, beside those that the user has
    timeout       seconds after which its group gets TERM
    grace         seconds after that until all that descends from it gets KILL
    limits        memory, cpu and processes that it may use with its descendants, and rlimits
    umask         file mode creation mask, 0o022 by default
    capabilities  the only ones that it can ever have, as "net_admin"
    no_new_privs  setuid bits and file capabilities give it nothing
    seccomp       a compiled filter of system calls, as host_client.seccomp makes; no_new_privs too
    keep          True or a Keep: it outlives its connection; see docs/host.md
    files         written before it starts and owned by its user: {path: content} or StagedFiles
    label         shown in lists
    drain_idle    seconds without output after its exit, until what others hold open is cut
    drain_cap     seconds after its exit until that is cut in any case
    """

    shell: str | None
    env: Mapping[str, str] | None
    clear_env: bool
    cwd: str | None
    user: str | None
    groups: Sequence[str | int]
    timeout: float | None
    grace: float
    limits: Limits | None
    umask: int
    capabilities: Sequence[str] | None
    no_new_privs: bool
    seccomp: bytes | None
    keep: bool | Keep | None
    files: Mapping[str, bytes] | Sequence[StagedFile]
    label: str
    drain_idle: float
    drain_cap: float


def start_record(
    argv: Sequence[Argument],
    options: Options,
    *,
    stdin: bool,
    tty: bool | tuple[int, int] | None = None,
) -> Start:
    """The request. Holds only what was given, so that the wire carries no more.

    TypeError and ValueError for what cannot be run; ValueError for numbers out of their range.
    """
    given: dict[str, Any] = {
        name: value for name, value in options.items() if value is not None and value is not False
    }
    if "shell" in given:
        if argv:
            raise ValueError("give either argv or a shell line")
        _refuse_nul(given["shell"], "shell")
        given["argv"] = ()
    else:
        given["argv"] = words(argv)
    for name, convert in _CONVERT.items():
        if name in given:
            given[name] = convert(given[name])
    if tty:
        given["tty"] = winsize(tty)
    if stdin or tty:
        given["stdin"] = True
    return Start(**given)


def attach_record(process: str, offsets: Mapping[str, int] | None, *, write: bool) -> Attach:
    """The request, with only what was given. ValueError for offsets that cannot be."""
    given: dict[str, Any] = {} if process == "main" else {"id": process}
    if offsets is not None:
        given["offsets"] = dict(offsets)
    if not write:
        given["write"] = False
    return Attach(**given)


def words(argv: Sequence[Argument]) -> tuple[str, ...]:
    """`argv` as the wire has it. TypeError for one string, ValueError for what cannot be run."""
    if isinstance(argv, str | bytes | os.PathLike):
        raise TypeError(
            f"argv must be a list of words, not one string: pass shell={argv!r} for a shell, or "
            "split it"
        )
    decoded = tuple(map(_word, argv))
    if not decoded or not decoded[0]:
        raise ValueError("argv must begin with the name of a program")
    return decoded


def signal_number(name: str | int) -> int:
    """The number of "TERM", "SIGTERM", "RTMIN+2" or 15. ValueError where there is none such."""
    if isinstance(name, int):
        number = int(name)
    else:
        base, plus, distance = name.upper().removeprefix("SIG").partition("+")
        found = signal.Signals.__members__.get(f"SIG{base}")
        if found is None or (plus and not distance.isdecimal()):
            raise ValueError(f"{name!r:.100} is not a signal: write TERM, SIGTERM or its number")
        number = found + int(distance or 0)
    if not 1 <= number <= 64:
        raise ValueError(f"{name!r:.100} is not a signal: they have the numbers 1 to 64")
    return number


def winsize(size: bool | tuple[int, int]) -> Winsize:
    """(rows, columns); for True those of this program's own terminal."""
    if not isinstance(size, bool):
        return Winsize(rows=size[0], columns=size[1])
    for fd in (0, 1, 2):
        try:
            columns, rows = os.get_terminal_size(fd)
        except OSError:
            continue
        if rows and columns:
            return Winsize(rows=rows, columns=columns)
    return FALLBACK_SIZE


def _word(word: Argument) -> str:
    if type(word) is str:
        text = word
    else:
        raw = os.fspath(word)
        text = raw.decode("utf-8", "surrogateescape") if isinstance(raw, bytes) else raw
    _refuse_nul(text, "argv")
    return text


def _refuse_nul(text: str, where: str) -> None:
    if "\0" in text:
        raise ValueError(f"{where} holds a NUL byte: {text!r:.100}")


def _environment(env: Mapping[str, str]) -> dict[str, str]:
    for name, value in env.items():
        _refuse_nul(name, "env")
        _refuse_nul(value, f"env: {name}")
    return dict(env)


def _filter(program: bytes) -> bytes:
    if not isinstance(program, bytes | bytearray | memoryview):
        raise TypeError(
            f"seccomp must be a compiled program in bytes, not {type(program).__name__}: "
            "host_client.seccomp.deny() makes one from names"
        )
    return bytes(program)


def _staged(files: Mapping[str, bytes] | Sequence[StagedFile]) -> tuple[StagedFile, ...]:
    if isinstance(files, Mapping):
        return tuple(StagedFile(path=path, data=bytes(data)) for path, data in files.items())
    return tuple(files)


_CONVERT: Final[dict[str, Any]] = {
    "env": _environment,
    "groups": lambda groups: tuple(map(str, groups)),
    "keep": lambda keep: keep if isinstance(keep, Keep) else Keep(),
    "capabilities": tuple,
    "seccomp": _filter,
    "files": _staged,
}
