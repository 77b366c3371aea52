"""How much of System V's objects there may be (sysvipc(7)): shared memory, queues, semaphores.

The kernel keeps them for as long as it runs, in nobody's limit once the cgroup of their makers is
gone. Its own bounds are more than the memory of any machine.
"""

import errno
import os

from microguest.init_shim import kind
from microguest.init_shim.failure import Failure
from microguest.init_shim.hardening import sysctls
from microguest.init_shim.reporter import leave_out

__all__ = ["bound"]

# What one queue can hold of the kernel's memory with its default of 16,384 bytes: messages without
# any count as one each, and take 64.
QUEUE = 1024 * 1024
QUEUES_SHARE = 32  # part of memory that all queues can fill
FEWEST_QUEUES = 16  # the kernel's default of old, which programs were written for
# The same for semaphores of 64 bytes, and for their sets.
SEMAPHORE, SEMAPHORE_SET = 64, 512
SEMAPHORES_SHARE = 128


def bound(segments: int) -> None:
    """Let there be so much; a boot config's own sysctls come later, and may say more.

    segments: bytes of all shared memory together. In namespaces the memory is the host's, and all
    of it goes with the machine.
    """
    if kind.in_namespaces():
        return
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name, value in settings(segments, memory).items():
        try:
            sysctls.write(sysctls.path_of(name), value)
        except Failure as failure:
            if failure.errno != errno.ENOENT:  # a kernel without System V's
                leave_out(f"hardening: {name} is left out: {failure}")


def settings(segments: int, memory: int) -> dict[str, str]:
    """Sysctls and their values (proc_sys_kernel(5)). `segments`: bytes of shared memory."""
    semaphores = memory // SEMAPHORES_SHARE
    return {
        "kernel.shmall": str(segments // os.sysconf("SC_PAGE_SIZE")),
        "kernel.msgmni": str(max(memory // QUEUES_SHARE // QUEUE, FEWEST_QUEUES)),
        # In one set, in all, operations of one call, sets.
        "kernel.sem": f"32000 {semaphores // SEMAPHORE} 500 {semaphores // SEMAPHORE_SET}",
    }
