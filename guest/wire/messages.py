"""What control frames carry: one record per message, and the table of operations.

A control payload is a msgpack map. Strings are UTF-8 with surrogate escapes, so that argv, paths
and environment keep any byte that Linux allows. A peer ignores fields that it does not know.
"""

from types import GenericAlias, UnionType
from typing import Any

import msgpack

from microguest.guest import bounds
from microguest.guest.boot.workload import check_limits
from microguest.guest.errors import LocalProtocolError, RemoteProtocolError
from microguest.guest.record import Record, RecordError
from microguest.guest.status import ExitStatus
from microguest.guest.wire.frames import Kind
from microguest.guest.wire.renewal import Clock, ClockResult, Renew, Renewed, check_reading

__all__ = [
    "CONTROLS",
    "CREDIT",
    "FEATURES",
    "HOST_FEATURES",
    "OPERATIONS",
    "PROCESS_OPERATIONS",
    "STREAMS",
    "Acknowledge",
    "Attach",
    "Credit",
    "Detach",
    "Exited",
    "Failure",
    "Forget",
    "ForgetResult",
    "Hello",
    "Info",
    "InfoResult",
    "Keep",
    "Limits",
    "ListProcesses",
    "Ping",
    "PingResult",
    "ProcessInfo",
    "ProcessList",
    "Resize",
    "Shutdown",
    "ShutdownResult",
    "Signal",
    "SignalProcess",
    "SignalResult",
    "StagedFile",
    "Start",
    "Started",
    "Wait",
    "Welcome",
    "Winsize",
    "pack",
    "unpack",
]

# msgpack's own first buffer, of 256 KiB, would be mapped and unmapped for each message.
PACK_BUFFER = 1024

# What an agent names in its welcome: "engine" once it serves everything in this module, but for
# what has a name of its own.
FEATURES = ("engine", "seccomp", "renew", "id", "credit")
# What a host names in its hello.
HOST_FEATURES = ("credit",)
CREDIT = "credit"  # where both sides name it, stdin has a window

# Ids that are never a host's to choose; nor are those that the agent counts, p1, p2…
RESERVED_IDS = ("main", "agent")

# Channel numbers of a process's streams, as its file descriptors.
STREAMS = {0: "stdin", 1: "stdout", 2: "stderr"}


class Hello(Record):
    """First frame of the host. `token` is the machine's secret, `client` a name for logs."""

    token: str
    client: str = ""
    features: tuple[str, ...] = ()
    clock: bool = False  # the welcome shall say what time it is in the guest

    def check(self) -> None:
        if not self.token.isascii():  # what hmac.compare_digest takes as str
            raise RecordError("token: must be ASCII")


class Welcome(Record):
    """The agent's answer to a hello that it accepts."""

    agent: str  # its version
    features: tuple[str, ...] = ()
    # CLOCK_REALTIME and CLOCK_BOOTTIME in nanoseconds, where the hello asked for them and the
    # guest's clock can be stepped.
    clock: tuple[int, ...] = ()

    def check(self) -> None:
        if self.clock:
            if len(self.clock) != 2:
                raise RecordError("clock: must be two numbers, or none")
            check_reading(*self.clock)


class Ping(Record):
    """Is the agent alive? Answered without waiting for anything."""


class PingResult(Record):
    """That the agent answers.

    uptime      seconds since it started
    root_ready  processes can be started
    """

    uptime: float
    root_ready: bool


class Info(Record):
    """What the guest is."""


class InfoResult(Record):
    """Versions and identity of the guest, and when the agent came up.

    versions        of microguest, cpython, trio, msgpack…, by name
    kernel          its release, as of uname -r
    machine         as of uname -m
    hostname        the guest's
    boot_id         /proc/sys/kernel/random/boot_id: another one after each boot
    agent_pid       the agent's process id
    agent_starts    1 unless PID 1 had to restart it
    agent_ready_ms  when it began to serve, milliseconds of CLOCK_BOOTTIME
    processes       that run and were started by it
    connections     that are open, past their hello
    resident_kib    its resident memory, KiB
    """

    versions: dict[str, str]
    kernel: str
    machine: str
    hostname: str
    boot_id: str
    agent_pid: int
    agent_starts: int
    agent_ready_ms: float
    processes: int
    connections: int
    resident_kib: int


class Winsize(Record):
    """A terminal's size.

    rows     lines of text, 1 to 65535
    columns  characters in each, 1 to 65535
    """

    rows: int
    columns: int

    def check(self) -> None:
        if not (0 < self.rows < 65536 and 0 < self.columns < 65536):
            raise RecordError("rows, columns: must be 1 to 65535")


class Limits(Record):
    """What a process and all its descendants may use together; None is no limit.

    The first three need cgroup v2 in the guest; where it is missing, asking for them is an error
    and nothing is started.

    memory     bytes, swap included
    cpu        processors, as 0.5
    processes  how many of them, threads included
    rlimits    getrlimit(2)'s, by name without RLIMIT_ and in lower case ("nofile"), each (soft,
               hard), with -1 for unlimited
    """

    memory: int | None = None
    cpu: float | None = None
    processes: int | None = None
    rlimits: dict[str, tuple[int, ...]] = {}  # noqa: RUF012

    def check(self) -> None:
        check_limits(self.memory, self.cpu, self.processes)
        if any(len(pair) != 2 for pair in self.rlimits.values()):
            raise RecordError("rlimits: each must be soft and hard")


class StagedFile(Record):
    """A file that is written before the process starts, owned by its user.

    path  relative to cwd, or absolute; its directory must exist
    data  its bytes
    mode  its permissions, 0 to 0o777
    """

    path: str
    data: bytes
    mode: int = 0o644

    def check(self) -> None:
        if not 0 <= self.mode <= 0o777:
            raise RecordError(f"mode: {self.mode:o} is not 0 to 777")


class Keep(Record):
    """The process outlives its connection, and its output can be read again.

    buffer   bytes of each output that wait for an acknowledgement, 4 KiB to 64 MiB
    on_full  "block": the process waits; "drop": the oldest bytes go, and are counted
    retain   seconds that status and output stay after the exit, at most 7 days
    """

    buffer: int = 1024 * 1024
    on_full: str = "block"
    retain: float = 3600.0

    def check(self) -> None:
        if not bounds.KEEP_BUFFER_MIN <= self.buffer <= bounds.KEEP_BUFFER_MAX:
            raise RecordError(
                f"buffer: must be {bounds.KEEP_BUFFER_MIN} to {bounds.KEEP_BUFFER_MAX} bytes"
            )
        if self.on_full not in ("block", "drop"):
            raise RecordError("on_full: must be block or drop")
        if not 0 <= self.retain <= bounds.KEEP_RETAIN_MAX:
            raise RecordError(f"retain: must be 0 to {bounds.KEEP_RETAIN_MAX:.0f} seconds")


class Start(Record):
    """Start a process; the connection is its from then on. `None` takes the image's default.

    argv          program and arguments; empty where a shell line is given
    shell         a line for the image's /bin/sh -c
    env           variables, merged over the image's
    clear_env     `env` replaces the image's instead
    cwd           working directory
    user          as `docker exec -u`: name, uid, name:group, uid:gid
    groups        names or ids, beside those that the user has
    tty           a terminal of that size: output is all stdout, and `stdin` must be True
    stdin         False: /dev/null; True: a pipe or terminal that the host feeds and ends
    timeout       seconds from the start until everything of it is ended
    grace         seconds between TERM and KILL of a timeout
    umask         file mode creation mask
    capabilities  the only ones it may ever have, as "net_admin"
    no_new_privs  setuid bits and file capabilities give it nothing
    seccomp       struct sock_filter[], as seccomp(2) takes it; implies `no_new_privs`
    keep          None: losing the connection kills everything of it
    id            of a kept process, where the host has chosen it; "": the agent does
    files         written before it starts
    label         for lists; means nothing to the agent
    drain_idle    seconds without output after its exit, until what others hold open is cut
    drain_cap     seconds after its exit until that is cut in any case
    limits        what it may use
    """

    argv: tuple[str, ...]
    shell: str | None = None
    env: dict[str, str] = {}  # noqa: RUF012  frozen by convention
    clear_env: bool = False
    cwd: str | None = None
    user: str | None = None
    groups: tuple[str, ...] = ()
    tty: Winsize | None = None
    stdin: bool = False
    timeout: float | None = None
    grace: float = bounds.TIMEOUT_GRACE
    umask: int = 0o022
    capabilities: tuple[str, ...] | None = None
    no_new_privs: bool = False
    seccomp: bytes = b""
    keep: Keep | None = None
    id: str = ""
    files: tuple[StagedFile, ...] = ()
    label: str = ""
    drain_idle: float = bounds.STREAM_IDLE_AFTER_EXIT
    drain_cap: float = bounds.STREAM_CAP_AFTER_EXIT
    # Last, because from here on the name means this field and not the module.
    limits: Limits | None = None

    def check(self) -> None:
        if self.shell is not None and self.argv:
            raise RecordError("shell: cannot be given together with argv")
        for name in ("timeout", "grace", "drain_idle", "drain_cap"):
            seconds = getattr(self, name)
            if seconds is not None and not 0 <= seconds <= bounds.SECONDS_MAX:
                raise RecordError(f"{name}: must be 0 to {bounds.SECONDS_MAX:.0f} seconds")
        if not 0 <= self.umask <= 0o777:
            raise RecordError(f"umask: {self.umask:o} is not 0 to 777")
        if self.tty is not None and not self.stdin:
            raise RecordError("tty: needs stdin")
        if self.id:
            check_id(self.id)
            if self.keep is None:
                raise RecordError("id: is chosen only for a process with keep")
        if len(self.label) > bounds.LABEL:
            raise RecordError(f"label: longer than {bounds.LABEL} characters")
        if len(self.seccomp) % 8 or len(self.seccomp) > bounds.SECCOMP_FILTER:
            raise RecordError("seccomp: must be at most 4096 instructions of 8 bytes each")


def check_id(name: str) -> None:
    """RecordError for what a host may not choose as a process's id: the agent's own look other."""
    plain = name.isascii() and name.replace("-", "").replace("_", "").replace(".", "").isalnum()
    if not (plain and name[0].isalnum() and len(name) <= bounds.KEPT_NAME):
        raise RecordError(
            f"id: must be 1 to {bounds.KEPT_NAME} ASCII letters, digits, '-', '_' and '.', and "
            "begin with a letter or digit"
        )
    if name in RESERVED_IDS or (name[0] == "p" and name[1:2].isdigit()):
        raise RecordError("id: main, agent, and p with a digit behind it are the agent's to give")


class Attach(Record):
    """Take over or watch the streams of a kept process, or of the image's.

    id       of the process; the image's is "main"
    offsets  by stream, the number of the first byte wanted, counted from the process's first; -1 is
             only what comes from now on; left out is from the oldest that is retained
    write    feed stdin and acknowledge output, which one host can do at a time
    """

    id: str = "main"
    offsets: dict[str, int] | None = None
    write: bool = True

    def check(self) -> None:
        if self.offsets is not None and not (
            self.offsets.keys() <= {"stdout", "stderr"}
            and all(offset >= -1 for offset in self.offsets.values())
        ):
            raise RecordError("offsets: must be of stdout and stderr, -1 or more")


class Started(Record):
    """The process runs. `id` names it for later operations.

    After an attach, `offsets` has the number of the first byte that follows of each stream, and
    `dropped` how many were asked for and are not retained any more. `stdin`: whether it can be fed;
    not where it was started without one, or nothing may follow what an earlier connection fed.
    """

    id: str
    pid: int
    offsets: dict[str, int] = {}  # noqa: RUF012
    dropped: dict[str, int] = {}  # noqa: RUF012
    stdin: bool = True

    def check(self) -> None:
        for field in (self.offsets, self.dropped):
            if not all(0 <= count <= bounds.OFFSET_MAX for count in field.values()):
                raise RecordError(f"offsets, dropped: must be 0 to {bounds.OFFSET_MAX}")


class Signal(Record):
    """Sent by the host on a process connection: send signal number `signal` to the process.

    The one control without an entry "do", which is how it has been since the first host.
    """

    signal: int
    target: str = "group"  # "process", "group", or "tree": everything that descends from it

    def check(self) -> None:
        if not 1 <= self.signal <= 64:
            raise RecordError(f"signal: {self.signal} is not a signal")
        if self.target not in ("process", "group", "tree"):
            raise RecordError("target: must be process, group or tree")


class Resize(Winsize):
    """Sent by the host on a process connection: the terminal's new size; SIGWINCH in any case."""


class Acknowledge(Record):
    """Sent by the host on a process connection: it needs nothing before these offsets again."""

    stdout: int = 0
    stderr: int = 0

    def check(self) -> None:
        if self.stdout < 0 or self.stderr < 0:
            raise RecordError("stdout, stderr: must not be negative")


class Detach(Record):
    """Sent by the host on a process connection: a kept process goes on without it.

    The agent closes the connection. Without it a lost connection has the same effect, later.
    """

    forget: bool = False  # it does not go on: it is killed and forgotten, as nobody has its id


class Credit(Record):
    """Sent by the agent on a process connection: how much stdin the host may send there in all.

    `stdin`: bytes, counted from the connection's first; more each time.
    """

    stdin: int

    def check(self) -> None:
        if not 0 <= self.stdin <= bounds.CREDIT_MAX:
            raise RecordError(f"stdin: must be 0 to {bounds.CREDIT_MAX}")


class Exited(ExitStatus):
    """How the process ended; always the last frame.

    code            its exit code; None where a signal killed it
    signal          the number of that signal, or None
    core_dumped     the kernel wrote a core dump
    timed_out       the agent killed it because its time was over
    oom_killed      the kernel killed something in its cgroup for want of memory
    duration        seconds from start to exit
    open_streams    outputs still held open by another process when they were cut
    user_seconds    processor time of it and of what it waited for: getrusage(2)
    system_seconds  the same in the kernel
    max_rss_kib     largest resident memory of one of them, KiB
    dropped         by stream: bytes that were lost before they were acknowledged
    """

    timed_out: bool = False
    oom_killed: bool = False
    duration: float = 0.0
    open_streams: tuple[str, ...] = ()
    user_seconds: float = 0.0
    system_seconds: float = 0.0
    max_rss_kib: int = 0
    dropped: dict[str, int] = {}  # noqa: RUF012


class ListProcesses(Record):
    """Every process that was started and is not forgotten yet, the workload included."""


class ProcessInfo(Record):
    """One of them.

    id               its name for requests
    pid              its process id in the guest
    argv             program and arguments, cut to bounds.LISTED_ARGV characters together
    label            as it was started with
    kept             it outlives its connection
    tty              it has a terminal
    running_seconds  since its start, until its end
    attached         connections to it
    retained         by stream: bytes that can be read again
    exited           how it ended; None while it runs
    """

    id: str
    pid: int
    argv: tuple[str, ...]
    label: str = ""
    kept: bool = False
    tty: bool = False
    running_seconds: float = 0.0
    attached: int = 0
    retained: dict[str, int] = {}  # noqa: RUF012
    exited: Exited | None = None

    def check(self) -> None:
        # Who lists them may pad each row to the longest.
        if len(self.id) > bounds.KEPT_NAME or len(self.label) > bounds.LABEL:
            raise RecordError("id, label: longer than any process has")
        # A word counts one more than its length, so that empty ones do; and the mark of a cut one.
        if sum(len(word) + 1 for word in self.argv) > bounds.LISTED_ARGV + 1:
            raise RecordError(f"argv: longer than {bounds.LISTED_ARGV} characters")


class ProcessList(Record):
    """In the order of their starts."""

    processes: tuple[ProcessInfo, ...]


class Wait(Record):
    """Answered with Exited when the process ends, or with the error `still_running`."""

    id: str
    timeout: float = 0.0  # seconds

    def check(self) -> None:
        if not 0 <= self.timeout <= bounds.SECONDS_MAX:
            raise RecordError(f"timeout: must be 0 to {bounds.SECONDS_MAX:.0f} seconds")


class SignalProcess(Signal):
    """As Signal, for any process by its id."""

    id: str


class SignalResult(Record):
    """`delivered`: whether something was there to receive it."""

    delivered: bool


class Forget(Record):
    """Drop what is retained of a kept process that has ended; one that runs is killed first."""

    id: str


class ForgetResult(Record):
    """It is gone."""


class Shutdown(Record):
    """End the machine: TERM, `grace` seconds, KILL, sync, power off, or with `reboot` restart."""

    grace: float = bounds.STOP_GRACE
    reboot: bool = False

    def check(self) -> None:
        if not 0 <= self.grace <= bounds.STOP_GRACE_MAX:
            raise RecordError(f"grace: must be 0 to {bounds.STOP_GRACE_MAX:.0f} seconds")


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
    "processes": (ListProcesses, ProcessList),
    "wait": (Wait, Exited),
    "signal": (SignalProcess, SignalResult),
    "forget": (Forget, ForgetResult),
    "shutdown": (Shutdown, ShutdownResult),
    "clock": (Clock, ClockResult),
    "renew": (Renew, Renewed),
}

# After these, the connection belongs to one process and ends with it.
PROCESS_OPERATIONS = frozenset({"start", "attach"})

# What a control frame on a process connection can be, by its entry "do"; without one, a signal.
CONTROLS: dict[str, type[Record]] = {
    "signal": Signal,
    "resize": Resize,
    "acknowledge": Acknowledge,
    "detach": Detach,
}
_CONTROL_NAMES = {record: name for name, record in CONTROLS.items()}

_PAYLOADS: dict[int, type[Record]] = {
    Kind.HELLO: Hello,
    Kind.WELCOME: Welcome,
    Kind.ERROR: Failure,
    Kind.EXITED: Exited,
    Kind.CREDIT: Credit,
}


def pack(values: dict[str, Any]) -> bytes:
    """A msgpack map. Raises LocalProtocolError for what msgpack cannot carry."""
    try:
        packed: bytes = msgpack.packb(
            values, unicode_errors="surrogateescape", buf_size=PACK_BUFFER
        )
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
    if kind == Kind.CONTROL:
        return decode_control(payload)
    record = _PAYLOADS[kind]
    return check(record, unpack(payload, record.__name__), record.__name__)


def encode_control(control: Record) -> bytes:
    """The payload of a control frame. Raises LocalProtocolError."""
    name = _CONTROL_NAMES[type(control)]
    values = control.to_map()
    return pack(values if name == "signal" else {"do": name, **values})


def decode_control(payload: bytes | bytearray) -> Record:
    """The message in a control frame. Raises RemoteProtocolError."""
    values = unpack(payload, "control")
    name = values.pop("do", "signal")
    if not isinstance(name, str):
        raise RemoteProtocolError("control: do must be text")
    if name not in CONTROLS:
        raise RemoteProtocolError(f"unknown control {name!r:.100}", code="unknown_operation")
    return check(CONTROLS[name], values, name)


def exactly_typed(record: Record) -> bool:
    """Whether each field that was given has plainly one of the types that a receiver takes.

    Then the receiver takes the record, as its own `check` has passed. False means only that it has
    to be looked at closely: a map or list of anything but text, a number that may not be finite.
    """
    accepted = _ACCEPTED.get(type(record))
    if accepted is None:
        accepted = _ACCEPTED[type(record)] = {
            name: _accepted(kind) for name, kind in record._fields.items()
        }
    for name, value in vars(record).items():
        kind = type(value)
        if kind not in accepted[name] or (kind is float and value - value != 0):
            return False
        if kind in _TEXTS and value and not (_TEXTS[kind] in accepted[name] and _only_texts(value)):
            return False
    return True


_ACCEPTED: dict[type[Record], dict[str, frozenset[object]]] = {}
_TEXTS: dict[Any, Any] = {tuple: tuple[str, ...], dict: dict[str, str]}


def _only_texts(values: dict[Any, Any] | tuple[Any, ...]) -> bool:
    if isinstance(values, dict) and not all(type(key) is str for key in values):
        return False
    items = values.values() if isinstance(values, dict) else values
    return all(type(item) is str for item in items)


def _accepted(kind: Any) -> frozenset[object]:
    """Types of values that fit a field whatever is in them, and containers of nothing but text."""
    if isinstance(kind, UnionType):
        return frozenset().union(*(_accepted(choice) for choice in kind.__args__))
    if isinstance(kind, GenericAlias):
        return frozenset((kind, kind.__origin__))
    if kind is float:
        return frozenset((float, int))
    return frozenset() if issubclass(kind, Record) else frozenset((kind,))


def check(record: type[Record], values: object, where: str) -> Record:
    """`values` as a `record`, ignoring unknown fields. Raises RemoteProtocolError."""
    try:
        return record.from_map(values, where=where, ignore_unknown=True)
    except RecordError as error:
        raise RemoteProtocolError(str(error)) from None
