"""The process that a machine is for, in the words of the OCI runtime spec: part of the boot config.

Field names are those of the rest of the contract; docs/reference/boot-config.md says which of the
spec's each one is. Pure records.
"""

from microguest.guest import bounds
from microguest.guest.record import Record, RecordError

__all__ = [
    "Capabilities",
    "ImageDefaults",
    "Restart",
    "Workload",
    "check_init",
    "check_limits",
    "signal_number",
]

# Those that have a name on every architecture (signal(7)); the others by number or as RTMIN+N.
SIGNALS = {
    "HUP": 1,
    "INT": 2,
    "QUIT": 3,
    "ABRT": 6,
    "KILL": 9,
    "USR1": 10,
    "SEGV": 11,
    "USR2": 12,
    "PIPE": 13,
    "ALRM": 14,
    "TERM": 15,
    "CHLD": 17,
    "CONT": 18,
    "STOP": 19,
    "TSTP": 20,
    "TTIN": 21,
    "TTOU": 22,
    "WINCH": 28,
    "PWR": 30,
}
REALTIME = 34  # what every libc shows as SIGRTMIN; the kernel's is 32
SIGNAL_MAX = 64
LONGEST_SIGNAL = 16  # characters


class ImageDefaults(Record):
    """What the image's config says; processes that the agent starts begin with these."""

    env: dict[str, str] = {}  # noqa: RUF012  frozen by convention
    cwd: str = "/"
    user: str = ""

    def check(self) -> None:
        if self.env and len(self.to_json()) > bounds.IMAGE_DEFAULTS:
            raise RecordError(
                f"env, cwd, user: together longer than {bounds.IMAGE_DEFAULTS} bytes as JSON"
            )


class Restart(Record):
    """What happens when the workload ends. The machine ends when it is not started again.

    The delay doubles with each restart up to `delay_max` and is `delay` again once the workload has
    run for RESTART_RESET seconds.
    """

    policy: str = "never"  # "on-failure": an exit code but 0, or a signal; "always"
    limit: int = 0  # restarts of on-failure in a row; 0: as many as it takes
    delay: float = 0.1  # seconds before the first restart
    delay_max: float = 60.0

    def check(self) -> None:
        if self.policy not in ("never", "on-failure", "always"):
            raise RecordError(f"policy: {self.policy!r:.100} is not never, on-failure or always")
        if self.limit < 0 or (self.limit and self.policy != "on-failure"):
            raise RecordError("limit: must be 0 or more, and 0 but for on-failure")
        if not 0 <= self.delay <= self.delay_max <= bounds.RESTART_DELAY_MAX:
            raise RecordError(
                f"delay: must be 0 to delay_max, which is at most {bounds.RESTART_DELAY_MAX:g} s"
            )


class Capabilities(Record):
    """The five sets of capabilities(7), each by names as net_admin."""

    bounding: tuple[str, ...] = ()
    permitted: tuple[str, ...] = ()
    effective: tuple[str, ...] = ()
    inheritable: tuple[str, ...] = ()
    ambient: tuple[str, ...] = ()


class Workload(Record):
    """The process that the machine is for. Its end is the machine's, unless it is restarted."""

    argv: tuple[str, ...]
    env: dict[str, str] = {}  # noqa: RUF012  frozen by convention
    cwd: str = "/"
    user: str = ""  # as USER in an image: name, uid, name:group, uid:gid; "" is root
    groups: tuple[str, ...] = ()  # names or ids, beside those that the user has
    # "attached": pipes that the agent serves as process "main"; the machine stays until its output
    # is collected. "terminal": the same with a terminal. "console": the machine's, no stdin.
    stdio: str = "console"
    # Seconds that the output of a workload that has ended waits for a reader who has not come yet,
    # or is there and slow. For one who has left it is OUTPUT_GRACE at most.
    output_wait: float = bounds.OUTPUT_GRACE
    rows: int = 24  # terminal: its size before anybody resizes it
    columns: int = 80
    umask: int = 0o022
    rlimits: dict[str, tuple[int, ...]] = {}  # noqa: RUF012  name: (soft, hard), -1 unlimited
    capabilities: Capabilities | None = None  # None: what the kernel gives its user
    no_new_privs: bool = False
    # struct sock_filter[] as base64. As with runc it has to allow execve and, without no_new_privs,
    # also what becoming the user takes: setgroups, setresuid, capset, prctl and their like.
    seccomp: str = ""
    masked: tuple[str, ...] = ()  # paths that nobody can look into, neither agent-started processes
    read_only_paths: tuple[str, ...] = ()  # and those that nobody can write to
    memory: int | None = None  # bytes, of it and all that descends from it; needs cgroup v2
    cpu: float | None = None  # processors
    processes: int | None = None  # threads included
    stop_signal: str = "TERM"  # what asks it to end: a name, a number or RTMIN+N
    signal_group: bool = False  # signals go to its process group, not to it alone
    restart: Restart = Restart()

    def check(self) -> None:
        if not self.argv or not self.argv[0]:
            raise RecordError("argv: must name a program")
        if self.stdio not in ("attached", "terminal", "console"):
            raise RecordError(f"stdio: {self.stdio!r:.100} is not attached, terminal or console")
        if not 0 <= self.output_wait <= bounds.OUTPUT_WAIT_MAX:
            raise RecordError(f"output_wait: must be 0 to {bounds.OUTPUT_WAIT_MAX:g} seconds")
        if not (0 < self.rows < 65536 and 0 < self.columns < 65536):
            raise RecordError("rows, columns: must be 1 to 65535")
        if not 0 <= self.umask <= 0o777:
            raise RecordError(f"umask: {self.umask:o} is not 0 to 777")
        check_hidden(self.masked, self.read_only_paths)
        check_limits(self.memory, self.cpu, self.processes)
        signal_number(self.stop_signal)
        if self.restart.policy != "never" and self.stdio != "console":
            raise RecordError(
                "restart: only a workload on the console can be started again; "
                "one with pipes or a terminal ends with its reader"
            )


def check_hidden(masked: tuple[str, ...], read_only: tuple[str, ...]) -> None:
    """Raises RecordError where there are too many paths, or one is not absolute."""
    if len(masked) + len(read_only) > bounds.HIDDEN_PATHS:
        raise RecordError(f"masked, read_only_paths: at most {bounds.HIDDEN_PATHS} together")
    for field, paths in (("masked", masked), ("read_only_paths", read_only)):
        for path in paths:
            if not path.startswith("/") or ".." in path.split("/") or "\0" in path:
                raise RecordError(f"{field}: {path!r:.200} is not an absolute path without ..")


# What an init has none of: it is root, it is not started again, and its own children's limits and
# privileges are its own business.
NOT_FOR_INIT = (
    *("groups", "rlimits", "capabilities", "no_new_privs", "seccomp"),
    *("memory", "cpu", "processes", "signal_group", "restart"),
)


def check_init(workload: Workload) -> None:
    """Raises RecordError for what a workload that PID 1 becomes cannot have."""
    plain = Workload(argv=workload.argv)
    for field in NOT_FOR_INIT:
        if getattr(workload, field) != getattr(plain, field):
            raise RecordError(f"workload.{field}: cannot be set with mode handoff")


def check_limits(memory: int | None, cpu: float | None, processes: int | None) -> None:
    """Raises RecordError for what no cgroup takes."""
    if memory is not None and memory <= 0:
        raise RecordError("memory: must be positive")
    if cpu is not None and not 0.01 <= cpu <= 1024:
        raise RecordError("cpu: must be 0.01 to 1024 processors")
    if processes is not None and processes <= 0:
        raise RecordError("processes: must be positive")


def signal_number(name: str) -> int:
    """1 to 64 for a signal's name with or without SIG, its number, or as RTMIN+3 and RTMAX-1."""
    word = name.upper().removeprefix("SIG")
    found = SIGNALS.get(word, 0)
    if len(word) > LONGEST_SIGNAL:
        word = ""  # thousands of digits are an error of int()'s own
    if word.isascii() and word.isdecimal():
        found = int(word)
    for base, start, sign in (("RTMIN", REALTIME, "+"), ("RTMAX", SIGNAL_MAX, "-")):
        distance = word.removeprefix(base)
        if word == base:
            found = start
        elif word != distance and distance[0] == sign and distance[1:].isdecimal():
            found = start + int(distance)
    if not 1 <= found <= SIGNAL_MAX:
        raise RecordError(f"stop_signal: {name!r:.40} is not a signal")
    return found
