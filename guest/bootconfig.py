"""The boot config: all that one machine is told at its start, as one JSON document.

The host appends it to the bundle's initramfs as `/microguest/boot.json`, mode 0600; PID 1 reads and
removes it before anything else runs. Unknown fields are an error that names them. Every field says
in which version it appeared where that is not 1.
"""

from guest import limits
from guest.errors import BootConfigError
from guest.record import Record, RecordError

__all__ = [
    "AGENT_PORT",
    "PATH",
    "REPORT_PORT",
    "SCHEMA",
    "AgentSettings",
    "BootConfig",
    "Endpoint",
    "ImageDefaults",
    "Lower",
    "Root",
    "Workload",
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
        if self.transport not in ("vsock", "unix"):
            raise RecordError(f"transport: {self.transport!r:.100} is not vsock or unix")


class Lower(Record):
    """One read-only layer of the root; the first of `Root.lower` is the topmost."""

    kind: str  # "disk": a virtio-blk device; "directory": a path in the initial root
    serial: str = ""  # disk: the serial that the host gave it
    fstype: str = ""  # disk: "erofs" or "squashfs"
    path: str = ""  # directory

    def check(self) -> None:
        if self.kind == "disk":
            if self.fstype not in ("erofs", "squashfs"):
                raise RecordError(f"fstype: {self.fstype!r:.100} is not erofs or squashfs")
            if not self.serial:
                raise RecordError("serial: is needed to find the disk")
        elif self.kind == "directory":
            if not self.path.startswith("/"):
                raise RecordError("path: must be absolute")
        else:
            raise RecordError(f"kind: {self.kind!r:.100} is not disk or directory")


class Root(Record):
    """The root file system: overlayfs of the lowers under a tmpfs."""

    lower: tuple[Lower, ...]
    upper_size: str = "50%"  # of memory, or bytes with k, m, g: tmpfs(5) size=

    def check(self) -> None:
        if not self.lower:
            raise RecordError("lower: needs at least one layer")
        if len(self.lower) > 64:
            raise RecordError(f"lower: {len(self.lower)} layers, at most 64")
        size = self.upper_size
        number = size[:-1] if size[-1:] in tuple("%kmgKMG") else size
        if not (number.isascii() and number.isdecimal()):
            raise RecordError(f"upper_size: {self.upper_size!r:.100} is not a size or percentage")


class Workload(Record):
    """The process that the machine is for. Its end is the machine's end."""

    argv: tuple[str, ...]
    env: dict[str, str] = {}  # noqa: RUF012  frozen by convention
    cwd: str = "/"
    user: str = ""  # as USER in an image: name, uid, name:group, uid:gid; "" is root
    # "attached": pipes that the agent serves as process "main"; the machine stays until its output
    # is collected (at most OUTPUT_GRACE). "console": the machine's console, no stdin.
    stdio: str = "console"

    def check(self) -> None:
        if not self.argv or not self.argv[0]:
            raise RecordError("argv: must name a program")
        if self.stdio not in ("attached", "console"):
            raise RecordError(f"stdio: {self.stdio!r:.100} is not attached or console")


class ImageDefaults(Record):
    """What the image's config says; processes that the agent starts begin with these."""

    env: dict[str, str] = {}  # noqa: RUF012
    cwd: str = "/"
    user: str = ""

    def check(self) -> None:
        if self.env and len(self.to_json()) > limits.IMAGE_DEFAULTS:
            raise RecordError(f"env: longer than {limits.IMAGE_DEFAULTS} bytes as JSON")


class AgentSettings(Record):
    """The agent's listener and the secret that its callers must know."""

    listen: Endpoint
    token: str

    def check(self) -> None:
        if not self.token.isascii():
            raise RecordError("token: must be ASCII")
        if not limits.TOKEN_MIN <= len(self.token) <= limits.TOKEN_MAX:
            raise RecordError(
                f"token: must have {limits.TOKEN_MIN} to {limits.TOKEN_MAX} characters"
            )


class BootConfig(Record):
    """The whole document."""

    schema: int = SCHEMA
    machine: str = "vm"  # "vm", or "namespaces": no modules, no devices of its own
    root: Root
    agent: AgentSettings
    report: Endpoint | None = None  # where PID 1 announces ready, exits and failures
    workload: Workload | None = None  # None: the machine runs until it is told to shut down
    image: ImageDefaults = ImageDefaults()
    hostname: str = "microguest"
    modules: bool = True  # load the bundle's kernel modules

    def check(self) -> None:
        if self.schema != SCHEMA:
            raise RecordError(f"schema: {self.schema} is not supported, only {SCHEMA}")
        if self.machine not in ("vm", "namespaces"):
            raise RecordError(f"machine: {self.machine!r:.100} is not vm or namespaces")
        printable = self.hostname.isascii() and self.hostname.isprintable()
        if not 0 < len(self.hostname) <= 64 or not printable or " " in self.hostname:
            raise RecordError("hostname: must have 1 to 64 printable ASCII characters, no space")


def parse(text: str | bytes) -> BootConfig:
    """The boot config in a JSON document. Raises BootConfigError naming the field."""
    if len(text) > CONFIG_SIZE:
        raise BootConfigError(f"boot config of {len(text)} bytes, at most {CONFIG_SIZE}")
    try:
        return BootConfig.from_json(text)
    except RecordError as error:
        raise BootConfigError(f"boot config: {error}") from None
