"""Whether a virtual machine's memory and processors are enough and can be had: before its launch.

A kernel that is short of memory while it unpacks the initramfs panics, and one that has too many
processors for its host comes up after every deadline; neither says why.
"""

import os
from typing import Final

from microguest.host_client.errors import MachineError
from microguest.host_client.machines.settings import Settings, mebibytes

__all__ = ["check_enough", "check_host", "least_memory"]

# MiB, measured with Debian 12's cloud kernel: what it, PID 1, the agent and one process need, and
# what the first few pages of a root's tmpfs do.
BASE: Final = 74
UNPACKING: Final = 2  # the initramfs is there twice while the kernel unpacks it
EACH_CPU: Final = 2  # MiB of the kernel's own for each processor beyond the first


def least_memory(initramfs: int, cpus: int) -> int:
    """MiB that a machine with this initramfs (bytes) and so many processors needs to be of use."""
    return BASE + -(-UNPACKING * initramfs // 2**20) + EACH_CPU * (cpus - 1)


def check_enough(settings: Settings, initramfs: str) -> None:
    """MachineError where the machine would not come up with the initramfs at this path."""
    size = os.stat(initramfs).st_size
    least = least_memory(size, settings.cpus)
    if mebibytes(settings.memory) < least:
        processors = "1 processor" if settings.cpus == 1 else f"{settings.cpus} processors"
        raise MachineError(
            f"memory {settings.memory} is too little: with {processors} and the bundle's initramfs "
            f"of {size / 2**20:.0f} MiB a machine needs {least}M, beside what its programs use"
        )


def check_host(settings: Settings) -> None:
    """MachineError for more than this host has. As docker; memory includes what can be swapped."""
    processors = os.cpu_count() or 1
    if settings.cpus > processors:
        raise MachineError(
            f"cpus {settings.cpus} is more than this host has: give 1 to {processors}"
        )
    there = host_memory()
    if mebibytes(settings.memory) > there:
        raise MachineError(
            f"memory {settings.memory} is more than this host has: {there}M, swap included"
        )


def host_memory() -> int:
    """MiB of memory and swap."""
    with open("/proc/meminfo", encoding="ascii") as file:
        fields = dict(line.split(":") for line in file)
    return sum(int(fields[name].split()[0]) for name in ("MemTotal", "SwapTotal")) >> 10
