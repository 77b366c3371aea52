"""What a machine's caller and its monitor say to each other, and what state.json holds.

Every message is one packet of a SOCK_SEQPACKET pair: commands go to the monitor, the machine's
whole state comes back whenever it has changed. Imports next to nothing but the contract.
"""

import json
import signal
from typing import Final

from microguest.guest.record import Catalogue, Record
from microguest.guest.report import AgentExited, BootFailed, Step, WorkloadExited, WorkloadFailed

__all__ = [
    "COMMANDS",
    "CONSOLE_SHOWN",
    "HYBRID_SOCKET",
    "PACKET_MAX",
    "SIGNALLED",
    "STATE_MAX",
    "STEPS_MAX",
    "TEXT_MAX",
    "Detach",
    "End",
    "Event",
    "MachineState",
    "Pause",
    "Plan",
    "PowerOff",
    "Resume",
    "Share",
    "blank",
    "clipped",
    "cut",
    "filled",
]

HYBRID_SOCKET: Final = "vsock.sock"  # in the run folder; host programs dial the guest there

PACKET_MAX: Final = 128 * 1024  # bytes; the kernel's default socket buffer takes it in one piece
STATE_MAX: Final = 120 * 1024
CONSOLE_SHOWN: Final = 16 * 1024  # bytes of JSON
TEXT_MAX: Final = 2048  # bytes of JSON of any text that comes from the guest
STEPS_MAX: Final = 64  # steps of a boot that are kept; the guest makes a dozen
AGENT_EXITS_MAX: Final = 16  # the latest ones are kept
EVENTS_MAX: Final = 64  # so are these
EVENT_MAX: Final = 256  # bytes of JSON of what one says


class Share(Record):
    """A directory of the host that a program beside the VMM serves as virtiofs."""

    source: str  # absolute path
    argv: tuple[str, ...]  # blank("listener"): the descriptor that it accepts the VMM on
    socket: str  # where that listens, below `run`
    seccomp: str = ""  # the filter that it runs under, as base64


class Plan(Record):
    """How to start one machine. Relative paths are below the machine's `run` folder."""

    name: str
    machine: str  # "qemu" or "namespaces"
    image: str  # as the caller named it
    command: str  # the workload, for people
    labels: dict[str, str] = {}  # noqa: RUF012  its caller's words for it
    stdio: str = "console"  # of the workload, as the boot config has it
    url: str  # where the agent will be
    # The VMM's words. blank() of "vsock", "console" and "qmp", QEMU's control connection: numbers
    # of inherited descriptors; of "monitor": the monitor's process id.
    argv: tuple[str, ...]
    console: str  # "socket": an inherited one; "stdout": the VMM's own output
    vsock: str = ""  # "built-in", "daemon", "kernel"; "" where the machine has none
    guest_cid: int = 3
    daemon_argv: tuple[str, ...] = ()  # for "daemon": runs beside the VMM
    daemon_socket: str = ""  # exists as soon as the daemon can be connected to
    shares: tuple[Share, ...] = ()
    report_socket: str = ""  # Unix socket that the guest's reports come to
    report_port: int = 0  # the vsock port that they come to, where there is no such socket
    lease: str = ""  # a directory of the image cache to keep locked
    token_proof: str  # what the guest's `ready` must carry
    boot_timeout: float  # seconds from launch to `ready`
    boot_files: tuple[str, ...] = ()  # are removed when the guest is ready: they hold the token
    keep: bool = False  # keep state and console after the end


class Detach(Record):
    """The machine shall outlive its caller."""


class End(Record):
    """Kill the machine now."""


class PowerOff(Record):
    """Ask it to end well, past its agent, which is gone; no answer, and it may be deaf."""


class Pause(Record):
    """Let its processors stand still; a machine that does already is fine."""


class Resume(Record):
    """Let them go on."""


COMMANDS = Catalogue(
    {
        "plan": Plan,
        "detach": Detach,
        "end": End,
        "power-off": PowerOff,
        "pause": Pause,
        "resume": Resume,
    },
    maximum=PACKET_MAX,
)


# What a signal to the monitor says, from who has no link to it. What comes of it is in the state.
SIGNALLED: Final[dict[int, Record]] = {
    signal.SIGTERM: End(),
    signal.SIGINT: End(),
    signal.SIGHUP: End(),
    signal.SIGPWR: PowerOff(),
    signal.SIGUSR1: Pause(),
    signal.SIGUSR2: Resume(),
}


class Event(Record):
    """Something that happened to a machine after its start.

    kind     "agent-exited", "agent-serves", "workload-restarts" (it ended and is started again),
             "oom-killed", "handed-off", "left-out" (its boot did without something)
    at_ms    milliseconds since the launch
    message  a sentence
    """

    kind: str
    at_ms: float
    message: str


class MachineState(Record):
    """All that is known of a machine. Times are milliseconds since its launch where not said.

    schema           of this record
    name             the machine's
    machine          "qemu" or "namespaces"
    image            as it was named
    command          of its process, as a shell would take it, shortened
    labels           as they were given
    stdio            of the command: "console", "attached", "terminal"
    url              where its agent is
    phase            "starting", "running", "stopping", "ended"
    paused           its processors stand still
    monitor          process id
    vmm              process id
    created          seconds since the epoch
    launched         CLOCK_MONOTONIC in seconds
    kept             its state stays after its end
    timeline         the boot: "launch", "kernel", each step of PID 1, and the moments
                     "workload-runs", "ready", "handed-off" and "first-exec" (the agent has started
                     a process for a host)
    agent            "starting"; "serving"; "restarting" (it died, another one is on its way);
                     "down" (it died too often and stays down)
    handed_off       the image's own init is PID 1
    workload_pid     in the guest, of the last start
    workload_starts  how often it was started
    workload_exited  how it ended; None: it runs, or never ran
    workload_failed  why it could not be started
    boot_failed      why the guest did not come up
    agent_exits      the latest AGENT_EXITS_MAX
    events           the latest EVENTS_MAX
    status           why it ended: as in guest.report.Stopping, or "killed" (by its caller), "lost"
                     (its caller died), "crashed" (the VMM ended by itself), "boot-failed"
    error            a sentence, where the end was not a good one
    vmm_code         the VMM's exit, as subprocess has it: minus a signal's number
    console          its last lines, when it has ended
    """

    schema: int = 1
    name: str
    machine: str = ""
    image: str = ""
    command: str = ""
    labels: dict[str, str] = {}  # noqa: RUF012  frozen by convention
    stdio: str = "console"
    url: str = ""
    phase: str = "starting"
    paused: bool = False
    monitor: int = 0
    vmm: int = 0
    created: float = 0.0
    launched: float = 0.0
    kept: bool = False
    timeline: tuple[Step, ...] = ()
    agent: str = "starting"
    handed_off: bool = False
    workload_pid: int | None = None
    workload_starts: int = 0
    workload_exited: WorkloadExited | None = None
    workload_failed: WorkloadFailed | None = None
    boot_failed: BootFailed | None = None
    agent_exits: tuple[AgentExited, ...] = ()
    events: tuple[Event, ...] = ()
    status: str = ""
    error: str = ""
    vmm_code: int | None = None
    console: str = ""

    @property
    def ended(self) -> bool:
        """Whether nothing of it runs any more."""
        return self.phase == "ended"

    def describe_end(self) -> str:
        """How it ended, as one sentence; "" while it runs."""
        if not self.status:
            return ""
        reason = {
            "done": "its workload ended",
            "shutdown": "it was shut down",
            "reboot": "it asked to be started again",
            "killed": "it was killed",
            "lost": "the program that started it is gone",
        }.get(self.status, self.status)
        if self.status == "workload-failed" and self.workload_failed is not None:
            reason = f"its command could not be started: {self.workload_failed.message}"
        return f"machine {self.name} has ended: {self.error or reason}"


def blank(name: str) -> str:
    """What stands in a word of a program for a number that only the monitor knows.

    No word of a user's has a NUL in it, and so none of these.
    """
    return f"\0{name}\0"


def filled(word: str, numbers: dict[str, str]) -> str:
    """`word` with the blanks of these names filled in."""
    for name, number in numbers.items():
        word = word.replace(blank(name), number)
    return word


def clipped(report: Record) -> Record:
    """A guest's report with every text and list cut, so that the state stays below STATE_MAX."""
    changes: dict[str, object] = {}
    for name, value in vars(report).items():
        if isinstance(value, str):
            changes[name] = cut(value)
        elif isinstance(value, tuple):
            changes[name] = tuple(
                item.replace(name=cut(item.name, 64)) if isinstance(item, Step) else cut(item)
                for item in value[:STEPS_MAX]
                if isinstance(item, Step | str)
            )
    return report.replace(**changes)


def cut(text: str, size: int = TEXT_MAX, *, tail: bool = False) -> str:
    """The beginning or end of a text that takes at most about `size` bytes as JSON."""
    text = text[-size:] if tail else text[:size]
    while len(json.dumps(text)) > size + 2:
        half = len(text) // 2
        text = text[half:] if tail else text[:half]
    return text
