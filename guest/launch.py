"""What to spawn, worked out before anything is spawned; and what a failure to spawn means.

Pure: `plan` turns a request and the image's defaults into the arguments of `_guestsys.spawn`,
`start_failure` turns the step and errno of a SpawnError into an error for the host. PID 1 and the
agent both use it, so it imports nothing but the contract's cheap parts. Defaults are docker's.
"""

import errno
import os

from microguest.guest import bounds
from microguest.guest.boot.workload import ImageDefaults
from microguest.guest.errors import operation_error
from microguest.guest.record import Record
from microguest.guest.users import Identity

__all__ = [
    "DEFAULT_PATH",
    "DEFAULT_TERM",
    "Plan",
    "limit_advice",
    "listed_argv",
    "plan",
    "share_of_processes",
    "shell_argv",
    "start_failure",
]

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DEFAULT_TERM = "xterm"  # of a process with a terminal


class Plan(Record):
    """A checked start: nothing in it can be refused for its form any more."""

    argv: tuple[bytes, ...]
    env: tuple[bytes, ...]  # "NAME=value"
    candidates: tuple[bytes, ...]  # paths to try in order; relative ones are relative to cwd
    cwd: bytes
    identity: Identity

    def program_paths(self) -> list[bytes]:
        """The candidates as absolute paths, for finding out which of them exist."""
        return [os.path.join(self.cwd, candidate) for candidate in self.candidates]


def plan(
    argv: tuple[str, ...],
    identity: Identity,
    *,
    env: dict[str, str] | None = None,
    clear_env: bool = False,
    cwd: str | None = None,
    image: ImageDefaults | None = None,
    tty: bool = False,
) -> Plan:
    """The plan for a request. `env` goes over the image's, or with `clear_env` in its place.

    `cwd` None takes the image's. PATH, HOME and, with `tty`, TERM are filled in as docker does
    where nothing sets them. Raises OperationError with code bad_request, or bad_cwd where the
    working directory is not absolute.
    """
    image = image or ImageDefaults()
    if not argv or not argv[0]:
        raise operation_error("bad_request", "argv: must name a program", {"field": "argv"})
    directory = (image.cwd if cwd is None else cwd) or "/"
    if not directory.startswith("/"):
        raise operation_error(
            "bad_cwd",
            f"cwd: {directory!r:.200} is not an absolute path",
            {"path": directory[: bounds.ERROR_MESSAGE]},
        )
    merged = {"PATH": DEFAULT_PATH}
    if tty:
        merged["TERM"] = DEFAULT_TERM
    merged.update({} if clear_env else image.env)
    merged.update(env or {})
    if not merged.get("HOME"):
        merged["HOME"] = identity.home
    return Plan(
        argv=tuple(_encoded(word, "argv") for word in argv),
        env=tuple(_variable(name, value) for name, value in merged.items()),
        candidates=_candidates(_encoded(argv[0], "argv"), _encoded(merged["PATH"], "env")),
        cwd=_encoded(directory, "cwd"),
        identity=identity,
    )


def shell_argv(argv: tuple[str, ...], shell: str | None) -> tuple[str, ...]:
    """The arguments of a request that gives either a program or a line for the image's shell."""
    return argv if shell is None else ("/bin/sh", "-c", shell)


def _candidates(program: bytes, search: bytes) -> tuple[bytes, ...]:
    """As execvp(3): no search for a name with a slash; an empty entry is the working directory."""
    if b"/" in program:
        return (program,)
    if not search:
        return ()
    return tuple((entry or b".") + b"/" + program for entry in search.split(b":"))


def _variable(name: str, value: str) -> bytes:
    if not name or "=" in name:
        raise operation_error(
            "bad_request", f"env: {name!r:.200} is not a variable's name", {"field": "env"}
        )
    return _encoded(name, "env") + b"=" + _encoded(value, "env")


def _encoded(text: str, field: str) -> bytes:
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise operation_error(
            "bad_request", f"{field}: {text!r:.100} cannot be encoded", {"field": field}
        ) from None
    if b"\0" in data:
        raise operation_error(
            "bad_request", f"{field}: NUL byte in {text!r:.100}", {"field": field}
        )
    return data


# ── how many there may be ────────────────────────────────────────────────────────────────────────

RESERVED_PIDS = 300  # kernel/pid.c: smaller ones are given once only
LEAST_SHARE = 32  # of fewer processes nobody can make two shares


def share_of_processes(threads_max: int, pid_max: int, others: int) -> int | None:
    """How many processes and threads the workload may be at most, and hosts' processes together.

    Each half of what the kernel allows, less the `others` that there are (the kernel's threads,
    PID 1, the agent) and PIDS_RESERVE, so that neither can take the other's, nor the reserve. None
    where the kernel allows too few to divide.
    """
    left = min(threads_max, pid_max - RESERVED_PIDS) - max(others, 0) - bounds.PIDS_RESERVE
    return left // 2 if left >= 2 * LEAST_SHARE else None


# ── why it was not started ───────────────────────────────────────────────────────────────────────

_EXEC_CODES = {
    errno.ENOENT: "not_found",
    errno.ENOTDIR: "not_found",
    errno.ENAMETOOLONG: "not_found",
    errno.EACCES: "permission_denied",
    errno.EPERM: "permission_denied",
    errno.ENOEXEC: "not_executable",
    errno.EINVAL: "not_executable",
    errno.ELOOP: "not_executable",
    errno.ETXTBSY: "not_executable",
    errno.EISDIR: "bad_interpreter",
    errno.ELIBBAD: "bad_interpreter",
    errno.E2BIG: "argument_list_too_long",
}
_RESOURCE_CODES = {
    errno.EAGAIN: "resource_limit",
    errno.EMFILE: "resource_limit",
    errno.ENFILE: "resource_limit",
    errno.ENOSPC: "resource_limit",
    errno.ENOMEM: "out_of_memory",
}
_STEP_CODES = {
    "chdir": "bad_cwd",
    "mkdir": "bad_cwd",  # of a working directory that was missing
    "setgroups": "bad_user",
    "setgid": "bad_user",
    "setuid": "bad_user",
}

_ADVICE = {
    "not_found": "no such program; give a path, or a name that is in PATH",
    "permission_denied": "the user may not execute it; check its mode and that it is a file",
    "not_executable": "the kernel cannot run this file; is it built for this architecture?",
    "bad_interpreter": "the file is there, but the interpreter that it names is not usable",
    "bad_cwd": "cannot be the working directory",
    "bad_user": "the process cannot take on these ids",
    "argument_list_too_long": "argv and env together are larger than the kernel allows",
    "resource_limit": "a limit of the guest is reached; end other processes or raise it",
    "out_of_memory": "the guest has no memory left for another process",
    "setup_failed": "the process could not be prepared",
}

# Which limit it is, where that is known.
_LIMIT_ADVICE = {
    errno.EAGAIN: "there are as many processes and threads as there may be: a cgroup's pids.max,"
    " kernel.threads-max or the user's nproc; end other processes or raise it",
    errno.EMFILE: "too many open files in one process (nofile); end other processes, or raise the"
    " limit (ulimit -n) of the program that boots the machine",
    errno.ENFILE: "too many open files in the guest (fs.file-max); end other processes or raise it",
}


def limit_advice(error: int) -> str:
    """Which limit this errno is about and what to do; "" where that is not known."""
    return _LIMIT_ADVICE.get(error, "")


def start_failure(
    step: str, error: int, argv0: str, cwd: str, *, program_exists: bool = False
) -> tuple[str, str, dict[str, str | int | None]]:
    """(code, message, fields) for a start that failed at `step` with errno `error`.

    `program_exists`: one of the candidates is there, so that ENOENT speaks of its interpreter. The
    codes are those of `guest.errors.START_CODES`.
    """
    code = _RESOURCE_CODES.get(error) or _STEP_CODES.get(step)
    if step == "mkdir" and error == errno.ENOSPC:
        code = "bad_cwd"  # a full disk; of other steps it is a limit on processes or namespaces
    if code is None:
        code = _EXEC_CODES.get(error, "setup_failed") if step == "exec" else "setup_failed"
    if code == "not_found" and program_exists:
        code = "bad_interpreter"
    subject = cwd if step in ("chdir", "mkdir") else argv0
    advice = _ADVICE[code]
    if code == "resource_limit":
        advice = _LIMIT_ADVICE.get(error, advice)
    message = f"{subject!r:.200}: {advice} ({step}: {os.strerror(error)})"
    fields: dict[str, str | int | None] = {
        "step": step,
        "errno": error,
        "path": subject[: bounds.ERROR_MESSAGE],
    }
    return code, message, fields


def listed_argv(argv: tuple[str, ...]) -> tuple[str, ...]:
    """What a list shows of the arguments: LISTED_ARGV characters together, with … for the rest."""
    room = bounds.LISTED_ARGV  # a word takes one more than its length, so that empty ones count
    shown: list[str] = []
    for word in argv:
        room -= len(word) + 1
        if room <= 0:
            return (*shown, word[: room + len(word)] + "…")
        shown.append(word)
    return tuple(shown)
