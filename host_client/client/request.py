"""What callers write, as the records that travel. Does no I/O; shared by every kind of client."""

import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypedDict

from microguest.guest import bounds
from microguest.guest.errors import OperationError
from microguest.guest.record import RecordError
from microguest.guest.wire.messages import (
    Attach,
    Keep,
    Limits,
    StagedFile,
    Start,
    Winsize,
    exactly_typed,
    pack,
)
from microguest.host_client.values import (
    Argument,
    Buffer,
    check_bytes,
    check_count,
    check_flag,
    identity,
    kind_of,
    listed,
    nearest,
    path,
    text,
    word_of,
)

__all__ = [
    "Argument",
    "Buffer",
    "Options",
    "attach_record",
    "check_reading",
    "exec_record",
    "signal_number",
    "start_record",
    "words",
]

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
    capabilities  the only ones that it can ever have, as "net_admin" or "CAP_NET_ADMIN"
    no_new_privs  setuid bits and file capabilities give it nothing
    seccomp       a compiled filter of system calls, as microguest.seccomp makes; no_new_privs too
    keep          True or a Keep: it outlives its connection; see docs/reference/host.md
    id            of a kept process, chosen here: found again also where this program has died
    files         written before it starts and owned by its user: {path: content} or StagedFiles
    label         shown in lists
    drain_idle    seconds without output after its exit, until what others hold open is cut
    drain_cap     seconds after its exit until that is cut in any case
    """

    shell: str | None
    env: Mapping[str, str] | None
    clear_env: bool
    cwd: str | os.PathLike[str] | None
    user: str | int | None
    groups: Sequence[str | int]
    timeout: float | None
    grace: float
    limits: Limits | None
    umask: int
    capabilities: Sequence[str] | None
    no_new_privs: bool
    seccomp: bytes | None
    keep: bool | Keep | None
    id: str
    files: Mapping[str, bytes] | Sequence[StagedFile]
    label: str
    drain_idle: float
    drain_cap: float


def exec_record(
    argv: Sequence[Argument],
    options: Options,
    stdin: Buffer | None,
    max_output: int,
) -> Start:
    """The request of `exec`. Raises as `start_record` does."""
    if stdin is not None:
        check_bytes(stdin, "input")
    check_count(max_output, "max_output")
    return start_record(argv, options, stdin=stdin is not None)


def start_record(
    argv: Sequence[Argument],
    options: Options,
    *,
    stdin: bool,
    tty: bool | tuple[int, int] | None = None,
) -> Start:
    """The request. Holds only what was given, so that the wire carries no more.

    TypeError and ValueError, naming the option, for what cannot be run or sent.
    """
    try:
        return _started(argv, options, stdin=stdin, tty=tty)
    except RecordError as error:
        raise ValueError(str(error)) from None


def _started(
    argv: Sequence[Argument], options: Options, *, stdin: bool, tty: bool | tuple[int, int] | None
) -> Start:
    """See `start_record`; RecordError as well."""
    _check_names(options)
    check_flag(stdin, "stdin", "write to the process's stdin, or pass exec(input=…)")
    given: dict[str, Any] = {
        name: value
        for name, value in options.items()
        if value is not None and not (value is False and name in _FLAGS)
    }
    if "shell" in given:
        if argv:
            raise ValueError("give either argv or a shell line")
        given["shell"] = text(given["shell"], "shell")
        given["argv"] = ()
    else:
        given["argv"] = words(argv)
    for name, convert in _CONVERT.items():
        if name in given:
            given[name] = convert(given[name])
    if tty is not None and tty is not False:
        given["tty"] = winsize(tty)
        given["stdin"] = True
    elif stdin:
        given["stdin"] = True
    start = Start(**given)
    if not exactly_typed(start):
        start.check_types()
    _check_size(start)
    return start


# What Python's subprocess takes there.
OF_SUBPROCESS: Final = {
    **dict.fromkeys(("text", "encoding", "universal_newlines"), "output is bytes: decode it"),
    **dict.fromkeys(("stdout", "stderr", "capture_output"), "both outputs are always passed on"),
    "input": "exec takes it, and of start the process's stdin.write",
    "stdin": "exec takes input, and start(stdin=True) makes a stdin to write to",
    "tty": "start(tty=True) gives a process a terminal",
    "check": "exec raises CommandFailed where check is True; what start returns has an exit status",
}


def _check_names(options: Options) -> None:
    """TypeError for an option that there is not."""
    for name in options:
        if name not in Options.__annotations__:
            about = OF_SUBPROCESS.get(name) or nearest(name, Options.__annotations__)
            raise TypeError(f"there is no option {name}: {about}")


def _check_size(start: Start) -> None:
    """ValueError for more than a request may hold, which is far below what a file may."""
    staged = sum(len(file.data) for file in start.files)
    texts = (*start.argv, *start.env, *start.env.values(), start.shell or "")
    size = staged + sum(map(len, texts))  # most often far from the limit: then this is enough
    if size < bounds.CONTROL_PAYLOAD // 4:
        return
    size = len(pack({"op": "start", "args": start.to_map()}))
    if size <= bounds.CONTROL_PAYLOAD:
        return
    what, advice = "argv and env", "a command finds the rest in a file or on its stdin"
    if staged > size // 2:
        what, advice = "files", 'send more as stdin: exec(["tar", "-x"], input=…), or share it'
    raise ValueError(
        f"{what}: the request has {size} bytes, at most {bounds.CONTROL_PAYLOAD} are taken: "
        f"{advice}"
    )


def check_reading(acknowledge: bool, max_unread: int) -> None:
    """TypeError, ValueError for options of how a process's output is read."""
    check_flag(acknowledge, "acknowledge")
    check_count(max_unread, "max_unread")


def attach_record(process: str, offsets: Mapping[str, int] | None, *, write: bool) -> Attach:
    """The request, with only what was given. TypeError, ValueError for what cannot be."""
    check_flag(write, "write")
    given: dict[str, Any] = {} if process == "main" else {"id": text(process, "process")}
    if offsets is not None:
        if not isinstance(offsets, Mapping):
            raise TypeError(
                f"offsets: expected a mapping, as Process.offsets, got {kind_of(offsets)}"
            )
        given["offsets"] = dict(offsets)
    if not write:
        given["write"] = False
    attach = Attach(**given)
    attach.check_types()
    return attach


def words(argv: Sequence[Argument]) -> tuple[str, ...]:
    """`argv` as the wire has it. TypeError for one string, ValueError for what cannot be run."""
    if isinstance(argv, str | bytes | os.PathLike):
        raise TypeError(
            f"argv must be a list of words, not one string: pass shell={argv!r} for a shell, or "
            "split it"
        )
    decoded = tuple(word_of(word, "argv") for word in listed(argv, "argv"))
    if not decoded or not decoded[0]:
        raise ValueError("argv must begin with the name of a program")
    return decoded


def signal_number(name: str | int) -> int:
    """The number of "TERM", "SIGTERM", "RTMIN+2" or 15. ValueError where there is none such."""
    if isinstance(name, int) and not isinstance(name, bool):
        number = int(name)
    elif not isinstance(name, str):
        raise TypeError(f'signal: expected a name as "TERM", or a number, got {kind_of(name)}')
    else:
        base, plus, distance = name.upper().removeprefix("SIG").partition("+")
        found = signal.Signals.__members__.get(f"SIG{base}")
        if found is None or (plus and not (distance.isdecimal() and len(distance) < 4)):
            raise ValueError(f"{name!r:.100} is not a signal: write TERM, SIGTERM or its number")
        number = found + int(distance or 0)
    if not 1 <= number <= 64:
        raise ValueError(f"{name!r:.100} is not a signal: they have the numbers 1 to 64")
    return number


def winsize(size: bool | tuple[int, int]) -> Winsize:
    """(rows, columns); for True those of this program's own terminal."""
    if not isinstance(size, bool):
        if not isinstance(size, tuple | list) or len(size) != 2:
            raise TypeError(f"tty: expected True or (rows, columns), got {size!r:.80}")
        if any(type(each) is not int for each in size):
            raise TypeError(f"tty: rows and columns are whole numbers, not {size!r:.80}")
        return Winsize(rows=size[0], columns=size[1])
    for fd in (0, 1, 2):
        try:
            columns, rows = os.get_terminal_size(fd)
        except OSError:
            continue
        if rows and columns:
            return Winsize(rows=rows, columns=columns)
    return FALLBACK_SIZE


def _environment(env: Mapping[str, str]) -> dict[str, str]:
    if not isinstance(env, Mapping):
        raise TypeError(f"env: expected a mapping of names to values, got {kind_of(env)}")
    checked = {
        word_of(name, "env"): word_of(value, f"env: {name!r:.80}") for name, value in env.items()
    }
    for name in checked:
        if not name or "=" in name:
            raise ValueError(f"env: {name!r:.80} cannot be the name of an environment variable")
    return checked


def _capabilities(given: Sequence[str]) -> tuple[str, ...]:
    """As `--cap-drop` takes them, too: "NET_ADMIN", "CAP_NET_ADMIN"."""
    from microguest.guest.privileges import capability_mask

    names = tuple(text(name, "capabilities") for name in listed(given, "capabilities"))
    names = tuple(name.lower().removeprefix("cap_") for name in names)
    try:
        capability_mask(names)
    except OperationError as error:
        raise ValueError(error.message) from None
    return names


def _limits(given: Limits) -> Limits:
    if isinstance(given, Limits) and given.rlimits:
        from microguest.guest.privileges import resource_limits

        given.check_types()
        try:
            resource_limits(given.rlimits)
        except OperationError as error:
            raise ValueError(f"limits: {error.message}") from None
    return given


def _keep(keep: object) -> Keep:
    if keep is not True and not isinstance(keep, Keep):
        raise TypeError(f"keep: expected True or a Keep, got {kind_of(keep)}")
    return keep if isinstance(keep, Keep) else Keep()


def _filter(program: bytes) -> bytes:
    if not isinstance(program, bytes | bytearray | memoryview):
        raise TypeError(
            f"seccomp must be a compiled program in bytes, not {type(program).__name__}: "
            "microguest.seccomp.deny() makes one from names"
        )
    return bytes(program)


def _staged(files: Mapping[str, bytes] | Sequence[StagedFile]) -> tuple[StagedFile, ...]:
    if not isinstance(files, Mapping):
        each_of = listed(files, "files")
        for each in each_of:
            if not isinstance(each, StagedFile):
                raise TypeError(f"files: expected StagedFile(path=, data=), got {kind_of(each)}")
        return each_of
    staged = []
    for name, data in files.items():
        check_bytes(data, f"files: {name!r:.80}")
        staged.append(StagedFile(path=path(name, "files"), data=bytes(data)))
    return tuple(staged)


_FLAGS: Final = frozenset({"clear_env", "no_new_privs", "keep"})
_CONVERT: Final[dict[str, Any]] = {
    "env": _environment,
    "cwd": lambda cwd: path(cwd, "cwd"),
    "user": lambda user: identity(user, "user"),
    "groups": lambda groups: tuple(identity(g, "groups") for g in listed(groups, "groups")),
    "keep": _keep,
    "capabilities": _capabilities,
    "limits": _limits,
    "seccomp": _filter,
    "files": _staged,
    "id": lambda name: text(name, "id"),
    "label": lambda label: text(label, "label"),
}
