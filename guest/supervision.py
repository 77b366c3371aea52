"""What PID 1 and the agent say to each other over their SOCK_SEQPACKET pair: one message a packet.

File descriptors travel beside a message (SCM_RIGHTS), in the order that the message's docstring
gives. The agent finds its end of the pair as file descriptor 3.
"""

from guest import limits
from guest.bootconfig import ImageDefaults
from guest.record import Catalogue, Record
from guest.status import ExitStatus

__all__ = [
    "AGENT_FD",
    "MESSAGES",
    "AgentReady",
    "Configure",
    "MainCollected",
    "MainExited",
    "MainStarted",
    "Message",
    "RootReady",
    "ShutdownRequest",
]

AGENT_FD = 3


class Configure(Record):
    """PID 1's first message. Descriptors: the listening socket."""

    transport: str  # of the listening socket: "vsock" or "unix"
    token: str
    image: ImageDefaults
    starts: int  # how often the agent has been started, this time included
    versions: dict[str, str]


class RootReady(Record):
    """The image's root is in place. Descriptors: the root directory, opened O_PATH."""


class MainStarted(Record):
    """The workload runs with pipes. Descriptors: its stdin (write), stdout and stderr (read)."""

    pid: int


class MainExited(ExitStatus):
    """The workload ended."""

    duration: float = 0.0


class AgentReady(Record):
    """From the agent: it serves. `boot_ms`: CLOCK_BOOTTIME in milliseconds."""

    boot_ms: float


class MainCollected(Record):
    """From the agent: the workload's output and exit status reached a host."""


class ShutdownRequest(Record):
    """From the agent: a host asked for the end of the machine."""

    grace: float


Message = (
    Configure | RootReady | MainStarted | MainExited | AgentReady | MainCollected | ShutdownRequest
)

MESSAGES = Catalogue(
    {
        "configure": Configure,
        "root_ready": RootReady,
        "main_started": MainStarted,
        "main_exited": MainExited,
        "agent_ready": AgentReady,
        "main_collected": MainCollected,
        "shutdown": ShutdownRequest,
    },
    maximum=limits.SUPERVISION_MESSAGE,
)
