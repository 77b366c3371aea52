"""Which kind of machine this is: one with a kernel of its own, or namespaces of another's."""

import os

__all__ = ["in_namespaces"]


def in_namespaces() -> bool:
    """Whether this is not the kernel's first PID namespace, whose inode number is fixed.

    As it was at the first call: what is at /proc when the machine ends may be a workload's.
    """
    global _in_namespaces  # noqa: PLW0603  nobody leaves a PID namespace
    if _in_namespaces is None:
        try:
            own = os.readlink("/proc/self/ns/pid")
        except OSError:
            return False
        _in_namespaces = own != "pid:[4026531836]"  # linux/proc_ns.h
    return _in_namespaces


_in_namespaces: bool | None = None
