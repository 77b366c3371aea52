"""The errors that only the host can meet, beside those of `guest.errors`.

`microguest.errors` draws the whole tree. Each survives pickle and copy with all of its fields.
"""

from typing import Final

from microguest.guest.errors import (
    BootConfigError,
    LocalProtocolError,
    ManifestError,
    MicroguestError,
    OperationError,
    ProtocolError,
    RemoteProtocolError,
    StartError,
    operation_error,
)

__all__ = [
    "BootConfigError",
    "BootFailed",
    "ConnectError",
    "ConnectionLost",
    "DeadlineExceeded",
    "IdTaken",
    "ImageError",
    "LocalProtocolError",
    "MachineError",
    "ManifestError",
    "MicroguestError",
    "NoSuchProcess",
    "NotReady",
    "OperationError",
    "OutputStalled",
    "OutputTooLarge",
    "ProgramNotFound",
    "ProtocolError",
    "RemoteProtocolError",
    "ShuttingDown",
    "StartError",
    "StdinTaken",
    "TooBusy",
    "Unauthorized",
    "refusal",
]


class ConnectError(MicroguestError):
    """No agent could be reached. `url` is what was dialled."""

    def __init__(self, message: str, *, url: str = "") -> None:
        super().__init__(message)
        self.url = url


class ConnectionLost(MicroguestError):
    """The connection broke before the operation was over: the agent or its machine is gone."""


class DeadlineExceeded(MicroguestError, TimeoutError):
    """The time that the caller allowed is over. `seconds` is that time.

    `stdout` and `stderr` are what a command had written until then.
    """

    def __init__(
        self, message: str, *, seconds: float, stdout: bytes = b"", stderr: bytes = b""
    ) -> None:
        super().__init__(message)
        self.seconds = seconds
        self.stdout = stdout
        self.stderr = stderr


class OutputStalled(MicroguestError):
    """Waiting would never end: the buffer of `stream` is full, and it is this caller's to read.

    Nothing is lost and nothing has ended: read that output, then go on.
    """

    def __init__(self, message: str, *, stream: str) -> None:
        super().__init__(message)
        self.stream = stream


class OutputTooLarge(MicroguestError):
    """A command wrote more than `limit` bytes to `stream`: more than is held in memory."""

    def __init__(self, message: str, *, stream: str, limit: int) -> None:
        super().__init__(message)
        self.stream = stream
        self.limit = limit


class ImageError(MicroguestError):
    """The image cannot be used; the message names the file, layer or entry."""


class MachineError(MicroguestError):
    """The machine cannot be started, found or stopped; the message says what to do."""


class BootFailed(MachineError):
    """The guest did not come up. Fields are empty where it could not say."""

    def __init__(
        self,
        message: str,
        *,
        step: str = "",
        syscall: str = "",
        path: str = "",
        errno: int = 0,
        console: str = "",
    ) -> None:
        super().__init__(message)
        self.step = step
        self.syscall = syscall
        self.path = path
        self.errno = errno
        self.console = console  # the last lines of the machine's console


class IdTaken(OperationError):
    """A process has the id that a `start` has chosen; nothing was started."""


class NoSuchProcess(OperationError):
    """Nothing has that id: it was forgotten, or it was never started. Or it is not kept."""


class NotReady(OperationError):
    """The guest's root is not in place yet. Later it may be."""


class ProgramNotFound(StartError):
    """The program does not exist in the image, nor does one of that name in PATH."""


class ShuttingDown(OperationError):
    """The machine is ending; nothing new is begun in it."""


class StdinTaken(OperationError):
    """Another connection may write to this process. When it is gone, one more may."""


class TooBusy(OperationError):
    """The agent has as many connections as it serves. When one is gone, one more is served."""


class Unauthorized(OperationError):
    """The token is not this machine's: it may be another one than was thought."""


# The codes that a caller would branch on. What has another one is told by its code.
OF_CODE: Final[dict[str, type[OperationError]]] = {
    "id_taken": IdTaken,
    "no_such_process": NoSuchProcess,
    "not_found": ProgramNotFound,
    "not_ready": NotReady,
    "shutting_down": ShuttingDown,
    "stdin_taken": StdinTaken,
    "too_busy": TooBusy,
    "unauthorized": Unauthorized,
}


def refusal(code: str, message: str, fields: dict[str, str | int | None]) -> OperationError:
    """The error for an agent's "no": the class of its code where there is one."""
    kind = OF_CODE.get(code)
    return kind(code, message, fields) if kind else operation_error(code, message, fields)
