"""The errors that only the host can meet, beside those of `guest.errors`.

`microguest.errors` draws the whole tree. Each survives pickle and copy with all of its fields.
"""

from microguest.guest.errors import (
    BootConfigError,
    LocalProtocolError,
    ManifestError,
    MicroguestError,
    OperationError,
    ProtocolError,
    RemoteProtocolError,
    StartError,
)

__all__ = [
    "BootConfigError",
    "BootFailed",
    "ConnectError",
    "ConnectionLost",
    "DeadlineExceeded",
    "ImageError",
    "LocalProtocolError",
    "MachineError",
    "ManifestError",
    "MicroguestError",
    "OperationError",
    "OutputStalled",
    "OutputTooLarge",
    "ProtocolError",
    "RemoteProtocolError",
    "StartError",
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
