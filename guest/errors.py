"""Every error that both sides know, as one tree.

    MicroguestError
    ├── ProtocolError
    │   ├── LocalProtocolError       this side used the protocol wrongly
    │   └── RemoteProtocolError      the peer did; says which error code to answer with
    ├── OperationError               the agent answered "no": code, message, fields
    │   └── StartError               the process was never started: step and errno
    ├── BootConfigError              a boot config that cannot be used, with the field's path
    └── ManifestError                a bundle manifest that cannot be used

Errors that only the host can have (machines, images, connections) are in `microguest.errors`.
"""

__all__ = [
    "START_CODES",
    "BootConfigError",
    "LocalProtocolError",
    "ManifestError",
    "MicroguestError",
    "OperationError",
    "ProtocolError",
    "RemoteProtocolError",
    "StartError",
    "operation_error",
    "printable",
    "raised_at",
]

# Why a process was not started. Apart from these, an OperationError has one of:
# bad_request, bad_preface, frame_too_large, unauthorized, unsupported_version, unknown_operation,
# too_busy, hello_timeout, not_ready, no_such_process, stdin_taken, fell_behind, cannot_keep,
# still_running, shutting_down, kernel_shared, not_permitted, internal.
START_CODES = frozenset(
    {
        "not_found",
        "permission_denied",
        "not_executable",
        "bad_interpreter",
        "bad_cwd",
        "bad_user",
        "argument_list_too_long",
        "resource_limit",
        "out_of_memory",
        "cgroup_unavailable",
        "bad_file",
        "setup_failed",
    }
)


def printable(text: str, keep: str = "") -> str:
    """The text with all that could drive a terminal as escapes, as `\\x1b`; `keep` stays.

    That is what `str.isprintable` says no to: C0, C1 and DEL, marks that turn the direction of
    writing, and lone surrogates, which no terminal can be sent.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in keep else ascii(char)[1:-1] for char in text
    )


class MicroguestError(Exception):
    """Base of every error that this project raises on purpose.

    Its text goes to terminals and logs, and much of it comes from guests: so `str` makes it
    printable. What was said is in `args` and in the fields, as it was said.

    Each can be pickled and copied with its message, its fields and its notes, whatever its
    `__init__` asks for; without its traceback and its cause, as any exception.
    """

    def __str__(self) -> str:
        return printable(super().__str__(), keep="\n\t")

    # An exception is made anew from `args`, which lacks what is given by keyword.
    def __reduce__(self) -> "tuple[object, ...]":
        return _made_again, (type(self), self.args), self.__dict__


def _made_again(kind: type[MicroguestError], args: tuple[object, ...]) -> MicroguestError:
    """An error without its fields, which whoever unpickles or copies it sets next."""
    error = kind.__new__(kind)
    error.args = args
    return error


class ProtocolError(MicroguestError):
    """A rule of docs/reference/protocol.md was broken; the connection cannot be used any more."""


class LocalProtocolError(ProtocolError):
    """This side tried to send what the protocol does not allow now: a bug on this side."""


class RemoteProtocolError(ProtocolError):
    """The peer sent what the protocol does not allow. `code` is what to answer, if anything."""

    def __init__(self, message: str, *, code: str = "bad_request") -> None:
        super().__init__(message)
        self.code = code


class OperationError(MicroguestError):
    """The agent refused or failed an operation. `fields` has what is known: errno, path, step…"""

    def __init__(
        self, code: str, message: str, fields: dict[str, str | int | None] | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.fields = dict(fields or {})


class StartError(OperationError):
    """The process was not started; there is no exit status. `step` and `errno` say why."""

    @property
    def step(self) -> str:
        """Name of the step that failed between clone and exec, for instance "exec" or "chdir"."""
        return str(self.fields.get("step") or "")

    @property
    def errno(self) -> int | None:
        """The errno of that step, or None where the agent refused without a system call."""
        value = self.fields.get("errno")
        return value if isinstance(value, int) else None


class BootConfigError(MicroguestError):
    """The boot config cannot be used. The message names the field, as in `root.lower[0].fstype`."""


class ManifestError(MicroguestError):
    """The bundle's manifest.json cannot be used. The message names the field."""


def operation_error(code: str, message: str, fields: dict[str, str | int | None]) -> OperationError:
    """The exception for an error frame: a StartError where the code is one of START_CODES."""
    kind = StartError if code in START_CODES else OperationError
    return kind(code, message, fields)


def raised_at(error: BaseException) -> str:
    """An exception with the place that raised it, without the weight of `traceback`."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else ""
    return f"{type(error).__name__}: {error}{where}"
