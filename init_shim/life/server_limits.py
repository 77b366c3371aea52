"""Resource limits that PID 1 takes for itself, and so for everything that it starts.

A kernel starts its init with 1,024 descriptors, and as many processes as a small machine's memory
suggests. Servers that are used to container engines stop at both.
"""

import resource

from microguest.init_shim import kind

__all__ = ["raise_limits"]

# What Debian's containerd gives containers. The hard limit is fs.nr_open's default as well.
DESCRIPTORS = 1024 * 1024
WANTED = (
    (resource.RLIMIT_NOFILE, DESCRIPTORS),
    (resource.RLIMIT_NPROC, resource.RLIM_INFINITY),
)


def raise_limits() -> None:
    """Soft and hard ones; in namespaces the hard ones are the host's, and stay."""
    own_kernel = not kind.in_namespaces()
    for number, wanted in WANTED:
        soft, hard = resource.getrlimit(number)
        if own_kernel and is_below(hard, wanted):
            hard = wanted
        if is_below(soft, wanted):
            soft = wanted if is_below(wanted, hard) else hard
        try:
            resource.setrlimit(number, (soft, hard))
        except (ValueError, OSError):
            pass  # a kernel with another fs.nr_open: as it was


def is_below(one: int, other: int) -> bool:
    """RLIM_INFINITY is above every number, and itself a small one."""
    if one == resource.RLIM_INFINITY:
        return False
    return other == resource.RLIM_INFINITY or one < other
