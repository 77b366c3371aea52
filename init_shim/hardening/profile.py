"""What the guest does without once it is up; docs/design/security.md says what each prevents.

A profile is a table of sysctls (`init_shim.hardening.sysctls`) and a few measures that are none.
What this kernel does not have is left out; what it has and refuses is said on the console. In
namespaces only what is the machine's own is touched: the rest is the host's.
"""

import errno
import os
import resource

import _guestsys

from microguest.guest.boot.config import BootConfig
from microguest.init_shim import kind
from microguest.init_shim.failure import Failure, call
from microguest.init_shim.mounts import BIND, NODEV, NOEXEC, NOSUID, READ_ONLY, REMOUNT, mount
from microguest.init_shim.reporter import leave_out

TYPE_CHECKING = False  # typing itself is too heavy for PID 1
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DEFAULT_MEASURES", "STRICT_MEASURES", "forbid_core_dumps", "harden"]

GROUP_MAP = "/proc/self/gid_map"
SECURITY = "/sys/kernel/security"  # where securityfs belongs

# Those of docker, for what containers must not see or change of the machine.
MASKED = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
READ_ONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")

# What a kernel says that does not have something: no such file, file system or option.
ABSENT = (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP)


def harden(config: BootConfig) -> None:
    """Apply the profile and the config's own sysctls. Raises Failure for the latter only.

    Call it in the image's root, before anything of the image runs.
    """
    # Nobody waits for it before the listener is open.
    from microguest.init_shim.hardening import sysctls

    hardening = config.hardening
    in_namespaces = config.machine != "vm" or kind.in_namespaces()
    own = {sysctls.path_of(name): value for name, value in hardening.sysctls.items()}
    for path, value in profile_sysctls(hardening.profile, modules=hardening.modules):
        if path not in own and (sysctls.is_namespaced(path) or not in_namespaces):
            attempt(path, sysctls.write_each, path, value)
    for path, value in own.items():
        if in_namespaces and not sysctls.is_namespaced(path):
            raise Failure(
                f"sysctl {path}: is the host's, which a machine in namespaces does not change; "
                "leave it out or boot a virtual machine",
                path=f"{sysctls.ROOT}/{path}",
            )
        sysctls.write(path, value)
    for name, measure in measures(hardening.profile, in_namespaces=in_namespaces).items():
        attempt(name, measure)


def forbid_core_dumps(config: BootConfig) -> None:
    """The soft limit of everything that is started later; who wants a core raises it again."""
    if config.hardening.profile != "off":
        hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
        resource.setrlimit(resource.RLIMIT_CORE, (0, hard))


def profile_sysctls(profile: str, *, modules: bool) -> "list[tuple[str, str]]":
    """Paths and values, those last that others might need to be still open for."""
    from microguest.init_shim.hardening import sysctls

    table = {**sysctls.SERVERS, sysctls.PING_GROUPS: f"0 {last_group()}"}
    if profile == "strict":
        for name in sysctls.UNTRUSTING:
            del table[name]
    if profile != "off":
        table |= {**sysctls.DEFAULT, **(sysctls.STRICT if profile == "strict" else {})}
        table |= {} if modules else sysctls.LOCKED_MODULES
    return [(sysctls.path_of(name), value) for name, value in table.items()]


def last_group() -> int:
    """The highest group that there is; in an ordinary user's namespace few have a number."""
    with call("open", GROUP_MAP), open(GROUP_MAP, encoding="ascii") as file:
        first, _, count = map(int, file.readline().split())
    return min(first + count - 1, 2**31 - 1)


def measures(profile: str, *, in_namespaces: bool) -> "dict[str, Callable[[], None]]":
    """What a profile has beside sysctls, by the names in docs/design/security.md."""
    found: dict[str, Callable[[], None]] = {}
    if profile != "off":
        found |= DEFAULT_MEASURES
    if profile == "strict":
        found |= STRICT_MEASURES
        if in_namespaces:
            del found["lockdown"]  # it would be the host's
    return found


def attempt(name: str, measure: "Callable[..., None]", *arguments: str) -> None:
    """Without it the machine is less hardened, and works."""
    try:
        measure(*arguments)
    except Failure as failure:
        if failure.errno not in ABSENT:
            leave_out(f"hardening: {name} is left out: {failure}")


# ── measures that are no sysctls ─────────────────────────────────────────────────────────────────


def shared_memory_without_programs() -> None:
    """What everybody may write to in memory is not run from there."""
    mount(None, "/dev/shm", None, REMOUNT | BIND | NOSUID | NODEV | NOEXEC)  # noqa: S108


def hide_processes() -> None:
    """A user sees processes of its own only (proc(5), hidepid=2). Root and the agent see all."""
    mount(None, "/proc", None, REMOUNT | NOSUID | NODEV | NOEXEC, "hidepid=2")


def lock_kernel_down() -> None:
    """Root may not change the running kernel's code or data (kernel_lockdown(7))."""
    mount("securityfs", SECURITY, "securityfs", NOSUID | NODEV | NOEXEC)
    try:
        with call("write", f"{SECURITY}/lockdown"):
            fd = os.open(f"{SECURITY}/lockdown", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, b"integrity")
            finally:
                os.close(fd)
    finally:
        with call("umount2", SECURITY):
            _guestsys.umount2(SECURITY)


def protect_kernel_files() -> None:
    """The kernel's files in /proc as docker shows them to a container."""
    from microguest.init_shim.hardening import masks

    masks.hide(MASKED, READ_ONLY_PATHS)


def protect_sys() -> None:
    """/sys without its cgroups, which are a mount of their own."""
    mount(None, "/sys", None, REMOUNT | BIND | READ_ONLY | NOSUID | NODEV | NOEXEC)


DEFAULT_MEASURES: "dict[str, Callable[[], None]]" = {"shm-noexec": shared_memory_without_programs}
STRICT_MEASURES: "dict[str, Callable[[], None]]" = {
    "hidepid": hide_processes,
    "lockdown": lock_kernel_down,
    "proc-masks": protect_kernel_files,
    "sys-read-only": protect_sys,
}
