"""The boot config: all that one machine is told at its start, as one JSON document.

The host appends it to the bundle's initramfs as `/microguest/boot.json`, mode 0600; PID 1 reads and
removes it before anything else runs. Unknown fields are an error that names them. Every field says
in which version it appeared where that is not 1. The records of its parts are in `guest.boot.root`,
`guest.boot.workload` and `guest.boot.network`.
"""

from microguest.guest import bounds
from microguest.guest.boot.network import Network
from microguest.guest.boot.root import Root, Volume, check_size
from microguest.guest.boot.workload import ImageDefaults, Workload, check_init
from microguest.guest.errors import BootConfigError
from microguest.guest.record import Record, RecordError

__all__ = [
    "AGENT_PORT",
    "PATH",
    "REPORT_PORT",
    "SCHEMA",
    "AgentSettings",
    "BootConfig",
    "Endpoint",
    "Hardening",
    "parse",
]

SCHEMA = 1
PATH = "/microguest/boot.json"
AGENT_PORT = 1024  # vsock port that the agent serves
REPORT_PORT = 1025  # vsock port of the host that PID 1 reports to

CONFIG_SIZE = 4 * 1024 * 1024  # bytes; argv and env are most of it


class Endpoint(Record):
    """Where to listen or connect. Guest paths are seen from the initial root."""

    transport: str  # "vsock" or "unix"
    port: int = 0
    path: str = ""

    def check(self) -> None:
        if self.transport == "vsock" and not 0 < self.port < 2**32 - 1:
            raise RecordError(f"port: {self.port} is not a vsock port")
        if self.transport == "unix" and not self.path.startswith("/"):
            raise RecordError("path: must be absolute for transport unix")
        if "\0" in self.path:
            raise RecordError("path: has a NUL byte")
        if self.transport not in ("vsock", "unix"):
            raise RecordError(f"transport: {self.transport!r:.100} is not vsock or unix")


class AgentSettings(Record):
    """The agent's listener, the secret that its callers must know, and how it is looked after."""

    listen: Endpoint
    token: str
    # Seconds between two questions to it whether it is there; 0 asks none. One that neither answers
    # nor runs for WATCHDOG_MISSES of them is replaced.
    watchdog: float = bounds.WATCHDOG_INTERVAL

    def check(self) -> None:
        if self.watchdog and not bounds.WATCHDOG_MIN <= self.watchdog <= bounds.SECONDS_MAX:
            raise RecordError(f"watchdog: must be 0, or at least {bounds.WATCHDOG_MIN:g} seconds")
        if not self.token.isascii():
            raise RecordError("token: must be ASCII")
        if not bounds.TOKEN_MIN <= len(self.token) <= bounds.TOKEN_MAX:
            raise RecordError(
                f"token: must have {bounds.TOKEN_MIN} to {bounds.TOKEN_MAX} characters"
            )


class Hardening(Record):
    """What the guest does without, beyond what the workload gives up; see docs/design/security.md.

    profile: "default" has what breaks nothing that images are known to do; "strict" adds the rest;
    "off" has none. `sysctls` (as kernel.yama.ptrace_scope, or with slashes) are written after the
    profile's, so that they win; `modules` says whether kernel modules can be loaded after the boot.
    """

    profile: str = "default"
    sysctls: dict[str, str] = {}  # noqa: RUF012  frozen by convention
    modules: bool = False

    def check(self) -> None:
        if self.profile not in ("off", "default", "strict"):
            raise RecordError(f"profile: {self.profile!r:.100} is not off, default or strict")
        if len(self.sysctls) > bounds.SYSCTLS:
            raise RecordError(f"sysctls: at most {bounds.SYSCTLS}")
        for name in self.sysctls:
            if not name or name[0] in "./" or ".." in name.split("/") or "\0" in name:
                raise RecordError(f"sysctls: {name!r:.100} is not the name of a sysctl")


class BootConfig(Record):
    """The whole document."""

    schema: int = SCHEMA
    machine: str = "vm"  # "vm", or "namespaces": no modules, no devices of its own
    # With "supervise" PID 1 stays and the workload is its child. With "handoff" PID 1 becomes the
    # workload, an init of the image's own; a child of it keeps the agent and sends the reports.
    mode: str = "supervise"
    root: Root
    volumes: tuple[Volume, ...] = ()
    shm_size: str = "64m"  # of /dev/shm: as in Upper
    agent: AgentSettings
    report: Endpoint | None = None  # where PID 1 announces ready, exits and failures
    workload: Workload | None = None  # None: the machine runs until it is told to shut down
    image: ImageDefaults = ImageDefaults()
    hostname: str = "microguest"
    machine_id: str = ""  # 32 hexadecimal digits for /etc/machine-id; "": as the image has it
    network: Network = Network()
    hardening: Hardening = Hardening()
    modules: bool = True  # load the bundle's kernel modules

    def check(self) -> None:
        if self.schema != SCHEMA:
            raise RecordError(f"schema: {self.schema} is not supported, only {SCHEMA}")
        if self.machine not in ("vm", "namespaces"):
            raise RecordError(f"machine: {self.machine!r:.100} is not vm or namespaces")
        if self.mode not in ("supervise", "handoff"):
            raise RecordError(f"mode: {self.mode!r:.100} is not supervise or handoff")
        if self.mode == "handoff" and (self.workload is None or self.workload.stdio != "console"):
            raise RecordError("mode: handoff needs a workload, which has the console")
        if self.mode == "handoff" and self.workload is not None:
            check_init(self.workload)
        check_size(self.shm_size, "shm_size")
        if len(self.volumes) > bounds.VOLUMES:
            raise RecordError(f"volumes: at most {bounds.VOLUMES}")
        printable = self.hostname.isascii() and self.hostname.isprintable()
        if not 0 < len(self.hostname) <= 64 or not printable or " " in self.hostname:
            raise RecordError("hostname: must have 1 to 64 printable ASCII characters, no space")
        if self.machine_id and (
            len(self.machine_id) != 32 or not all(c in "0123456789abcdef" for c in self.machine_id)
        ):
            raise RecordError("machine_id: must be 32 hexadecimal digits in lower case")


def parse(text: str | bytes) -> BootConfig:
    """The boot config in a JSON document. Raises BootConfigError naming the field."""
    if len(text) > CONFIG_SIZE:
        raise BootConfigError(f"boot config of {len(text)} bytes, at most {CONFIG_SIZE}")
    try:
        return BootConfig.from_json(text)
    except RecordError as error:
        raise BootConfigError(f"boot config: {error}") from None
