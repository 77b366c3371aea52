"""What PID 1 tells the host over the one connection that the guest dials: lines of JSON.

The same line, prefixed with `CONSOLE_MARK`, is written to the console for `boot_failed`, so that a
machine whose vsock never came up still says why. Hosts treat all of it as untrusted input. What
else PID 1 says on the console begins with `line_mark`.
"""

from microguest.guest import bounds
from microguest.guest.record import Catalogue, Record, RecordError
from microguest.guest.status import ExitStatus

__all__ = [
    "CONSOLE_MARK",
    "REPORTS",
    "AgentExited",
    "AgentServes",
    "BootFailed",
    "FirstExec",
    "HandedOff",
    "OomKilled",
    "Ready",
    "Report",
    "Step",
    "Stopping",
    "WorkloadExited",
    "WorkloadFailed",
    "WorkloadStarted",
    "line_mark",
]

CONSOLE_MARK = "microguest-report: "


def line_mark(token: str) -> str:
    """What begins PID 1's lines on the console of the machine that has this agent token.

    The console is the workload's as well. Whoever does not know the token cannot make such a line,
    so that a host can leave out PID 1's and nothing else. It does not show the token.
    """
    import hashlib  # not at the start: PID 1 has no time for it there

    return f"microguest {hashlib.sha256(b'console ' + token.encode()).hexdigest()[:12]}: "


class Step(Record):
    """One step of the boot.

    name      what was done
    start_ms  milliseconds of CLOCK_BOOTTIME when it began
    end_ms    the same when it was done
    """

    name: str
    start_ms: float
    end_ms: float


class Ready(Record):
    """The agent serves and the root is in place. `token_proof` is the agent token's SHA-256.

    `left_out`: a sentence for each thing that was wanted and could not be, and that no boot needs.
    """

    steps: tuple[Step, ...]
    token_proof: str
    left_out: tuple[str, ...] = ()

    def check(self) -> None:
        if len(self.left_out) > bounds.LEFT_OUT or any(
            len(sentence) > bounds.LEFT_OUT_TEXT for sentence in self.left_out
        ):
            raise RecordError(
                f"left_out: at most {bounds.LEFT_OUT} texts of {bounds.LEFT_OUT_TEXT} characters"
            )


class BootFailed(Record):
    """PID 1 could not bring the machine up and powers off.

    step     in which
    message  a sentence
    syscall  the system call that failed, or ""
    path     what it was about, or ""
    errno    why; 0: it was no system call's
    steps    those that were done
    """

    step: str
    message: str
    syscall: str = ""
    path: str = ""
    errno: int = 0
    steps: tuple[Step, ...] = ()


class WorkloadStarted(Record):
    """The image's process runs, as process `pid` of the guest, for the `starts`-th time."""

    pid: int
    boot_ms: float
    starts: int = 1


class WorkloadFailed(Record):
    """The image's process could not be started; fields as in an error frame's.

    code        as "not_found"
    message     a sentence
    step        in which
    errno       why; 0: it was no system call's
    restart_in  seconds until it is tried again, where it had run before; None: never
    """

    code: str
    message: str
    step: str = ""
    errno: int = 0
    restart_in: float | None = None


class WorkloadExited(ExitStatus):
    """The image's process ended.

    code         its exit code; None where a signal killed it
    signal       the number of that signal, or None
    core_dumped  the kernel wrote a core dump
    boot_ms      when, milliseconds of CLOCK_BOOTTIME
    restart_in   seconds until it is started again; None: never
    oom_killed   the kernel has killed in its cgroup for want of memory
    """

    boot_ms: float = 0.0
    restart_in: float | None = None
    oom_killed: bool = False


class AgentExited(ExitStatus):
    """The agent died.

    code         its exit code; None where a signal killed it
    signal       the number of that signal, or None
    core_dumped  the kernel wrote a core dump
    crashes      how often within a while
    restart_in   seconds until it is started again; None: it stays down
    hung         PID 1 ended it, because it neither answered nor ran
    last_words   the end of what it wrote to stderr, at most LAST_WORDS characters
    """

    crashes: int
    restart_in: float | None
    hung: bool = False
    last_words: str = ""


class AgentServes(Record):
    """An agent that was started again serves: the `starts`-th one."""

    starts: int
    boot_ms: float


class FirstExec(Record):
    """The agent has started the first process for a host."""

    boot_ms: float


class HandedOff(Record):
    """The image's own init is PID 1 now; reports come from a child of it from here on."""

    boot_ms: float


class OomKilled(Record):
    """The kernel ended a process for want of memory."""

    pid: int
    name: str  # as the kernel has it: the first 15 bytes of its program's name
    cgroup: str  # its path in the hierarchy, or "" where the kernel does not say
    boot_ms: float
    limit: bool = False  # its own cgroup's limit, and not the machine's memory


class Stopping(Record):
    """The last report. `status`: what the machine ended with.

    "done" (the workload ended), "shutdown" (asked for), "reboot" (asked for), "boot-failed",
    "workload-failed".
    """

    status: str
    boot_ms: float


Report = (
    Ready
    | BootFailed
    | WorkloadStarted
    | WorkloadFailed
    | WorkloadExited
    | AgentExited
    | AgentServes
    | FirstExec
    | HandedOff
    | OomKilled
    | Stopping
)

REPORTS = Catalogue(
    {
        "ready": Ready,
        "boot_failed": BootFailed,
        "workload_started": WorkloadStarted,
        "workload_failed": WorkloadFailed,
        "workload_exited": WorkloadExited,
        "agent_exited": AgentExited,
        "agent_serves": AgentServes,
        "first_exec": FirstExec,
        "handed_off": HandedOff,
        "oom_killed": OomKilled,
        "stopping": Stopping,
    },
    maximum=bounds.REPORT_LINE,
)
