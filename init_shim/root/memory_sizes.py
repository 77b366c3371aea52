"""How large the file systems in memory get that come without being asked for, /, /dev/shm and /run,
and System V's shared memory.

Whoever may write to all of them must not get all of the memory: what they hold stays when its
writer is killed.
"""

import os

from microguest.guest import bounds
from microguest.guest.boot.config import BootConfig
from microguest.guest.boot.root import Upper
from microguest.init_shim.reporter import leave_out

__all__ = ["Sizes", "measured", "sizes_of"]

UNITS = {"k": 10, "m": 20, "g": 30}
RUN_SHARE = 20  # /run has this part of memory; what is there are sockets and numbers
SEGMENTS_SHARE = 8  # System V's have this part of memory, or what /dev/shm has if that is more
LEAST_SEGMENTS_SHARE = 16  # and this part, however little the file systems leave
LEAST_SHARE = 3  # all of them have that part of it, however small the machine is
LEAST = 4096  # bytes of each: 0 would be no limit


class Sizes:
    """In bytes. `root`: of the tmpfs that takes the root's writes, 0 where it has none.

    `segments`: of System V's shared memory, all together.
    """

    def __init__(self, root: int, shm: int, run: int, segments: int) -> None:
        self.root = root
        self.shm = shm
        self.run = run
        self.segments = segments


def measured(config: BootConfig) -> Sizes:
    """Those of this machine. In namespaces the memory is the host's, and nothing of it is kept."""
    page = os.sysconf("SC_PAGE_SIZE")
    memory = os.sysconf("SC_PHYS_PAGES") * page
    free = os.sysconf("SC_AVPHYS_PAGES") * page if config.machine == "vm" else 2 * memory
    return sizes_of(config, memory, free)


def sizes_of(config: BootConfig, memory: int, free: int) -> Sizes:
    """What the config wants in a machine of `memory` bytes of which `free` are; or of each the same
    part, so that enough is left for the agent, its reserve, and as much again for the workload.
    """
    upper = config.root.upper
    root = in_bytes(upper.size, memory) if upper is not None and upper.kind == "tmpfs" else 0
    wanted = (root, in_bytes(config.shm_size, memory), memory // RUN_SHARE)
    most = max(free - bounds.AGENT_MEMORY - 2 * bounds.MEMORY_RESERVE, memory // LEAST_SHARE)
    if sum(wanted) <= most:
        return Sizes(*wanted, segments_beside(*wanted, memory, free))
    root, shm, run = (size and max(size * most // sum(wanted), LEAST) for size in wanted)
    if config.shm_size != BootConfig.shm_size or (upper is not None and upper.size != Upper.size):
        what = f"/ has {root >> 10} KiB and /dev/shm {shm >> 10} KiB"
        leave_out(f"the file systems in memory would take all of it: {what}")
    return Sizes(root, shm, run, segments_beside(root, shm, run, memory, free))


def segments_beside(root: int, shm: int, run: int, memory: int, free: int) -> int:
    """Bytes for System V's shared memory, which leave enough beside full file systems."""
    room = free - bounds.AGENT_MEMORY - bounds.MEMORY_RESERVE - root - shm - run
    return max(min(max(shm, memory // SEGMENTS_SHARE), room), memory // LEAST_SEGMENTS_SHARE)


def in_bytes(size: str, memory: int) -> int:
    """As tmpfs(5) reads it: a percentage of memory, or bytes with k, m or g; 0 is no limit."""
    unit = size[-1:].lower()
    if unit == "%":
        found = memory * int(size[:-1]) // 100
    elif unit in UNITS:
        found = int(size[:-1]) << UNITS[unit]
    else:
        found = int(size)
    return min(found or memory, memory)
