"""Capabilities, resource limits and filters, as a request or an image gives them.

Pure tables and checks; PID 1 and the agent both use them, so it imports nothing but the contract's
cheap parts. The numbers are the kernel's and the same on every architecture that is supported.
"""

from microguest.guest import bounds
from microguest.guest.boot.workload import Capabilities
from microguest.guest.errors import operation_error

__all__ = [
    "CAPABILITIES",
    "RESOURCES",
    "capability_mask",
    "capability_sets",
    "resource_limits",
    "seccomp_program",
]

# include/uapi/linux/capability.h, in the order of their numbers
CAPABILITIES = (
    *("chown", "dac_override", "dac_read_search", "fowner", "fsetid", "kill", "setgid", "setuid"),
    *("setpcap", "linux_immutable", "net_bind_service", "net_broadcast", "net_admin", "net_raw"),
    *("ipc_lock", "ipc_owner", "sys_module", "sys_rawio", "sys_chroot", "sys_ptrace", "sys_pacct"),
    *("sys_admin", "sys_boot", "sys_nice", "sys_resource", "sys_time", "sys_tty_config", "mknod"),
    *("lease", "audit_write", "audit_control", "setfcap", "mac_override", "mac_admin", "syslog"),
    *("wake_alarm", "block_suspend", "audit_read", "perfmon", "bpf", "checkpoint_restore"),
)

# include/uapi/asm-generic/resource.h, in the order of their numbers
RESOURCES = (
    *("cpu", "fsize", "data", "stack", "core", "rss", "nproc", "nofile", "memlock", "as"),
    *("locks", "sigpending", "msgqueue", "nice", "rtprio", "rttime"),
)
UNLIMITED = 2**64 - 1  # RLIM_INFINITY of struct rlimit64


def capability_mask(names: tuple[str, ...]) -> int:
    """A bit for each name, as in "net_admin". Raises OperationError bad_request."""
    mask = 0
    for name in names:
        if name not in CAPABILITIES:
            raise operation_error(
                "bad_request",
                f"capabilities: no capability is called {name!r:.100}; they are as net_admin",
                {"field": "capabilities"},
            )
        mask |= 1 << CAPABILITIES.index(name)
    return mask


def capability_sets(wanted: Capabilities) -> tuple[int, int, int, int, int]:
    """The masks in the order in which they are declared. Raises OperationError bad_request."""
    bounding, permitted, effective, inheritable, ambient = (
        capability_mask(getattr(wanted, name)) for name in Capabilities._fields
    )
    for name, inner, outer in (
        ("effective: one is not permitted", effective, permitted),
        ("ambient: one is not permitted", ambient, permitted),
        ("ambient: one is not inheritable", ambient, inheritable),
    ):
        if inner & ~outer:
            raise operation_error(
                "bad_request", f"capabilities: {name} (capabilities(7))", {"field": "capabilities"}
            )
    return bounding, permitted, effective, inheritable, ambient


def seccomp_program(text: str) -> bytes:
    """A filter that is given as base64. Raises OperationError bad_request."""
    import binascii  # the agent is given bytes

    try:
        program = binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        program = b""
    if not 0 < len(program) <= bounds.SECCOMP_FILTER or len(program) % 8:
        raise operation_error(
            "bad_request",
            "seccomp: must be an array of struct sock_filter as base64, "
            f"at most {bounds.SECCOMP_FILTER} bytes",
            {"field": "seccomp"},
        )
    return program


def resource_limits(wanted: dict[str, tuple[int, ...]]) -> tuple[tuple[int, int, int], ...]:
    """(number, soft, hard) for each name, where -1 is unlimited. Raises OperationError bad_request.

    Whether the process may have them is the kernel's affair.
    """
    found = []
    for name, pair in wanted.items():
        if name not in RESOURCES:
            raise _bad_limit(f"no resource limit is called {name!r:.100}, as nofile and nproc are")
        if any(not -1 <= value <= UNLIMITED for value in pair):
            raise _bad_limit(f"{name}: must be -1 to 2**64 - 1")
        soft, hard = (UNLIMITED if value == -1 else value for value in pair)
        if soft > hard:
            raise _bad_limit(f"{name}: the soft limit is above the hard one")
        found.append((RESOURCES.index(name), soft, hard))
    return tuple(found)


def _bad_limit(reason: str) -> Exception:
    return operation_error("bad_request", f"rlimits: {reason}", {"field": "limits"})
