"""What control frames carry: one record per message, and the table of operations.

A control payload is a msgpack map. Strings are UTF-8 with surrogate escapes, so that argv, paths
and environment keep any byte that Linux allows. A peer ignores fields that it does not know.
"""

from typing import Any

import msgpack

from guest import limits
from guest.errors import LocalProtocolError, RemoteProtocolError
from guest.frames import Kind
from guest.record import Record, RecordError
from guest.status import ExitStatus

__all__ = [
    "OPERATIONS",
    "PROCESS_OPERATIONS",
    "STREAMS",
    "Attach",
    "Exited",
    "Failure",
    "Hello",
    "Info",
    "InfoResult",
    "Ping",
    "PingResult",
    "Shutdown",
    "ShutdownResult",
    "Signal",
    "Start",
    "Started",
    "Welcome",
    "pack",
    "unpack",
]

# Channel numbers of a process's streams, as its file descriptors.
STREAMS = {0: "stdin", 1: "stdout", 2: "stderr"}


class Hello(Record):
    """First frame of the host. `token` is the machine's secret, `client` a name for logs."""

    token: str
    client: str = ""
    features: tuple[str, ...] = ()

    def check(self) -> None:
        if not self.token.isascii():  # what hmac.compare_digest takes as str
            raise RecordError("token: must be ASCII")


class Welcome(Record):
    """The agent's answer to a hello that it accepts."""

    agent: str  # its version
    features: tuple[str, ...] = ()


class Ping(Record):
    """Is the agent alive? Answered without waiting for anything."""


class PingResult(Record):
    """`uptime`: seconds since the agent started. `root_ready`: processes can be started."""

    uptime: float
    root_ready: bool


class Info(Record):
    """What the guest is."""


class InfoResult(Record):
    """Versions and identity of the guest, and when the agent came up."""

    versions: dict[str, str]  # microguest, cpython, trio, msgpack…
    kernel: str  # uname -r
    machine: str  # uname -m
    hostname: str
    boot_id: str  # /proc/sys/kernel/random/boot_id
    agent_pid: int
    agent_starts: int  # 1 unless PID 1 had to restart the agent
    agent_ready_ms: float  # CLOCK_BOOTTIME when the agent began to serve
    processes: int  # running, started by the agent
    connections: int  # open, past hello
    resident_kib: int  # the agent's own resident memory


class Start(Record):
    """Start a process; the connection is its from then on. `None` takes the image's default."""

    argv: tuple[str, ...]
    env: dict[str, str] = {}  # noqa: RUF012  frozen by convention; merged over the image's
    cwd: str | None = None
    user: str | None = None  # as `docker exec -u`: name, uid, name:group, uid:gid
    stdin: bool = False  # False: /dev/null; True: a pipe that the host feeds and ends
    timeout: float | None = None  # seconds from the start until the process group is killed

    def check(self) -> None:
        if self.timeout is not None and self.timeout < 0:
            raise RecordError("timeout: must not be negative")


class Attach(Record):
    """Take over the streams of the workload that PID 1 started. The only id so far is "main"."""

    id: str = "main"


class Started(Record):
    """The process runs. `id` names it for later operations."""

    id: str
    pid: int


class Signal(Record):
    """Sent by the host on a process connection: send signal number `signal` to the process."""

    signal: int
    target: str = "group"  # "process" or "group"

    def check(self) -> None:
        if not 1 <= self.signal <= 64:
            raise RecordError(f"signal: {self.signal} is not a signal")
        if self.target not in ("process", "group"):
            raise RecordError("target: must be process or group")


class Exited(ExitStatus):
    """How the process ended; always the last frame."""

    timed_out: bool = False
    duration: float = 0.0  # seconds from start to exit
    open_streams: tuple[str, ...] = ()  # still held open by another process when cut


class Shutdown(Record):
    """End the machine: TERM, `grace` seconds, KILL, sync, power off."""

    grace: float = limits.STOP_GRACE

    def check(self) -> None:
        if not 0 <= self.grace <= limits.STOP_GRACE_MAX:
            raise RecordError(f"grace: must be 0 to {limits.STOP_GRACE_MAX:.0f} seconds")


class ShutdownResult(Record):
    """The request reached PID 1; the connection ends when the machine does."""


class Failure(Record):
    """Payload of an error frame. `fields` has errno, path, step… where they are known."""

    code: str
    message: str
    fields: dict[str, str | int | None] = {}  # noqa: RUF012


# Every operation that exists: its request and its result. The agent has one handler for each.
OPERATIONS: dict[str, tuple[type[Record], type[Record]]] = {
    "ping": (Ping, PingResult),
    "info": (Info, InfoResult),
    "start": (Start, Started),
    "attach": (Attach, Started),
    "shutdown": (Shutdown, ShutdownResult),
}

# After these, the connection belongs to one process and ends with it.
PROCESS_OPERATIONS = frozenset({"start", "attach"})

_PAYLOADS: dict[int, type[Record]] = {
    Kind.HELLO: Hello,
    Kind.WELCOME: Welcome,
    Kind.ERROR: Failure,
    Kind.CONTROL: Signal,
    Kind.EXITED: Exited,
}


def pack(values: dict[str, Any]) -> bytes:
    """A msgpack map. Raises LocalProtocolError for what msgpack cannot carry."""
    try:
        packed: bytes = msgpack.packb(values, unicode_errors="surrogateescape")
    except (TypeError, ValueError, OverflowError) as error:
        raise LocalProtocolError(f"message cannot be encoded: {error}") from error
    return packed


def unpack(payload: bytes | bytearray, what: str) -> dict[str, Any]:
    """The map in a control payload. Raises RemoteProtocolError for anything else."""
    try:
        values = msgpack.unpackb(payload, unicode_errors="surrogateescape", strict_map_key=True)
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise RemoteProtocolError(f"{what}: not a msgpack map: {error!s:.200}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise RemoteProtocolError(f"{what}: not a map with string keys")
    return values


def decode(kind: int, payload: bytes | bytearray) -> Record:
    """The message in a frame of a kind that has one fixed record. Raises RemoteProtocolError."""
    record = _PAYLOADS[kind]
    return check(record, unpack(payload, record.__name__), record.__name__)


def check(record: type[Record], values: object, where: str) -> Record:
    """`values` as a `record`, ignoring unknown fields. Raises RemoteProtocolError."""
    try:
        return record.from_map(values, where=where, ignore_unknown=True)
    except RecordError as error:
        raise RemoteProtocolError(str(error)) from None
