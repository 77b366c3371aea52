"""What PID 1 and the agent say to each other over their SOCK_SEQPACKET pair: one message a packet.

File descriptors travel beside a message (SCM_RIGHTS), in the order that the message's docstring
gives. The agent finds its end of the pair as file descriptor 3.

A kept process survives the agent's death because PID 1 has what belongs to it: the agent makes a
`Deposit` for each before anything of it is promised to a host, and a `Withdraw` when it is
forgotten. To a new agent PID 1 hands every deposit as a `Restored`, after `Configure` and before
`RootReady`. By then the process is PID 1's own child, so PID 1 reaps it and says `KeptExited`.
"""

from microguest.guest import bounds
from microguest.guest.boot.workload import ImageDefaults
from microguest.guest.record import Catalogue, Record, RecordError
from microguest.guest.status import ExitStatus

__all__ = [
    "AGENT_FD",
    "AGENT_ID",
    "MESSAGES",
    "AgentReady",
    "AreYouThere",
    "Configure",
    "Deposit",
    "ExecStarted",
    "Here",
    "KeptExited",
    "KeptStatus",
    "MainCollected",
    "MainExited",
    "MainReader",
    "MainStarted",
    "Message",
    "Restored",
    "RootReady",
    "ShutdownRequest",
    "Taken",
    "Withdraw",
]

AGENT_FD = 3
AGENT_ID = "agent"  # of the agent's deposit of itself, whose `meta` is the path of its cgroups


class Configure(Record):
    """PID 1's first message. Descriptors: the listening socket."""

    transport: str  # of the listening socket: "vsock" or "unix"
    token: str
    image: ImageDefaults
    starts: int  # how often the agent has been started, this time included
    versions: dict[str, str]


class RootReady(Record):
    """The image's root is in place. Descriptors: the root directory, opened O_PATH.

    `workload`: whether there is one, or will be, of which `MainStarted` tells.
    """

    workload: bool = True


class MainStarted(Record):
    """The workload runs with pipes. Descriptors: its stdin (write), stdout and stderr (read).

    `terminal`: it has a terminal instead. Descriptors: the terminal's other end.
    `console`: it has the machine's console instead. No descriptors; each of its lives is told.
    `output_wait`: as of the workload in the boot config.
    `argv`: what it was started with, cut to LISTED_ARGV characters. In /proc it is in memory of the
    workload's, and who reads that can be made to wait.
    """

    pid: int
    argv: tuple[str, ...]
    terminal: bool = False
    console: bool = False
    output_wait: float = bounds.OUTPUT_GRACE


class MainExited(ExitStatus):
    """The workload ended. `restarts`: it has another life to come."""

    restarts: bool = False
    duration: float = 0.0
    oom_killed: bool = False  # as in `guest.report.WorkloadExited`


class AgentReady(Record):
    """From the agent: it serves. `boot_ms`: CLOCK_BOOTTIME in milliseconds."""

    boot_ms: float


class MainReader(Record):
    """From the agent: whether a host that may write to the workload is there."""

    there: bool


class MainCollected(Record):
    """From the agent: the workload's output and exit status reached a host."""


class ShutdownRequest(Record):
    """From the agent: a host asked for the end of the machine, or for another start of it."""

    grace: float
    reboot: bool = False


class AreYouThere(Record):
    """From PID 1's watchdog, to be answered with `Here` of the same number."""

    number: int


class Here(Record):
    """From the agent."""

    number: int


class ExecStarted(Record):
    """From the agent, once: it has started the first process for a host. CLOCK_BOOTTIME in ms."""

    boot_ms: float


class Deposit(Record):
    """From the agent: keep this for the next agent. Descriptors: the pidfd, then one per name.

    The same `id` again replaces what was there, and its descriptors are closed. See `Taken`.
    """

    id: str
    pid: int
    meta: str  # the agent's own notes, which PID 1 does not look into
    names: tuple[str, ...] = ()  # of the descriptors behind the pidfd: "stdin", "stdout"…

    def check(self) -> None:
        if not (len(self.meta) <= bounds.KEPT_META and _plain(self.meta)):
            raise RecordError(
                f"meta: must be at most {bounds.KEPT_META} printable ASCII characters"
            )
        if not (0 < len(self.id) <= bounds.KEPT_NAME and _plain(self.id)):
            raise RecordError(f"id: must be 1 to {bounds.KEPT_NAME} printable ASCII characters")
        if not (
            len(self.names) < bounds.SUPERVISION_DESCRIPTORS
            and all(0 < len(name) <= bounds.KEPT_NAME and _plain(name) for name in self.names)
        ):
            raise RecordError(
                f"names: must be at most {bounds.SUPERVISION_DESCRIPTORS - 1}, "
                f"each of 1 to {bounds.KEPT_NAME} printable ASCII characters"
            )


class Withdraw(Record):
    """From the agent: forget the process and close its descriptors. An unknown id is no error."""

    id: str


class Taken(Record):
    """From PID 1, for each `Deposit` and `Withdraw` in their order: it has closed what it had to.

    Only then does the agent close its own copies. Who closes a pipe last may have to wait for its
    lock, which is the process's to hold; PID 1 may not wait.
    """


class KeptStatus(ExitStatus):
    """How a kept process ended. `ended_ms`: CLOCK_BOOTTIME in milliseconds; the rest: wait4(2)."""

    ended_ms: float = 0.0
    user_seconds: float = 0.0
    system_seconds: float = 0.0
    max_rss_kib: int = 0


class KeptExited(KeptStatus):
    """A kept process ended; in both directions.

    From the agent, which looks with WNOWAIT and says it before it reaps, so that the status is not
    lost with the agent. From PID 1, when it has reaped what an earlier agent had started.
    """

    id: str


class Restored(Deposit):
    """What an earlier agent deposited, with the same descriptors in the same order.

    `exited` is None while it runs.
    """

    exited: KeptStatus | None = None


Message = (
    Configure
    | RootReady
    | MainStarted
    | MainExited
    | AgentReady
    | MainReader
    | MainCollected
    | ShutdownRequest
    | AreYouThere
    | Here
    | ExecStarted
    | Deposit
    | Withdraw
    | Taken
    | KeptExited
    | Restored
)

MESSAGES = Catalogue(
    {
        "configure": Configure,
        "root_ready": RootReady,
        "main_started": MainStarted,
        "main_exited": MainExited,
        "agent_ready": AgentReady,
        "main_reader": MainReader,
        "main_collected": MainCollected,
        "shutdown": ShutdownRequest,
        "are_you_there": AreYouThere,
        "here": Here,
        "exec_started": ExecStarted,
        "deposit": Deposit,
        "withdraw": Withdraw,
        "taken": Taken,
        "kept_exited": KeptExited,
        "restored": Restored,
    },
    maximum=bounds.SUPERVISION_MESSAGE,
)


def _plain(text: str) -> bool:
    """Text that grows to at most twice its length in a message."""
    return text.isascii() and text.isprintable()
