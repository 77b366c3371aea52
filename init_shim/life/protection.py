"""Memory and processes: PID 1 and the agent go on when a workload uses all of them; the host hears
who was killed for memory.

PID 1 stays in the hierarchy's root cgroup: it has no limit there, no swap takes it away, and its
program is in memory that is never written back, so that there is nothing to reserve for it.
"""

import os

from microguest.guest import bounds
from microguest.guest.boot.config import BootConfig
from microguest.guest.launch import share_of_processes
from microguest.init_shim import kind
from microguest.init_shim.life.supervisor import Supervisor
from microguest.init_shim.reporter import Reporter

__all__ = ["memory_for_workload", "processes_for_workload", "unkillable", "watch_oom"]

WORKLOAD_CGROUP = "/microguest/workload"
# The ends of the paths under which an agent starts all of its own.
HOSTS_PROCESSES = ("/processes", "/reserve")


def unkillable() -> None:
    """Choose anybody else when memory runs out; the agent inherits it, the workload does not."""
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("-1000")
    except OSError:
        pass  # an ordinary user's namespaces may not


def memory_for_workload(agent_pid: int) -> int | None:
    """Bytes that the workload may use at most, asked before it starts: what is free, less what the
    agent will need and MEMORY_RESERVE. None where there is not enough to divide.

    At this limit the kernel kills in the workload's cgroup. Without it, it would look everywhere
    for something to free before it kills, and everybody would wait meanwhile.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    free = os.sysconf("SC_AVPHYS_PAGES") * page
    to_come = max(0, bounds.AGENT_MEMORY - resident_pages(agent_pid) * page)
    left = free - to_come - bounds.MEMORY_RESERVE
    return left if left > bounds.MEMORY_RESERVE else None


def processes_for_workload() -> int | None:
    """How many processes and threads the workload may be, asked before it starts; None for any.

    Where all are used, nobody can start another one to end them.
    """
    try:
        threads_max = int(first_line("/proc/sys/kernel/threads-max"))
        pid_max = int(first_line("/proc/sys/kernel/pid_max"))
        all_there_are = int(first_line("/proc/loadavg").split()[3].partition("/")[2])
    except (OSError, ValueError, IndexError):
        return None
    try:
        of_hosts = int(first_line("/sys/fs/cgroup/microguest/pids.current"))
    except (OSError, ValueError):
        of_hosts = 0  # none yet
    return share_of_processes(threads_max, pid_max, all_there_are - of_hosts)


def first_line(path: str) -> str:
    """Of a short file of the kernel's. Raises OSError."""
    with open(path, encoding="ascii") as file:
        return file.readline()


def resident_pages(pid: int) -> int:
    """Of a process; 0 where there is none."""
    try:
        return int(first_line(f"/proc/{pid}/statm").split()[1])
    except (OSError, IndexError):
        return 0


def is_below(cgroup: str, limit: int) -> bool:
    """Whether a cgroup has less than this limit, which was more than there is."""
    try:
        most = int(first_line(f"/sys/fs/cgroup{cgroup}/memory.max"))
        return most + os.sysconf("SC_PAGE_SIZE") <= limit  # whole pages count
    except (OSError, ValueError):
        return False


def watch_oom(config: BootConfig, supervisor: Supervisor, reporter: Reporter) -> None:
    """From now on each process that the kernel kills for memory is reported.

    Not in namespaces, where the kernel's messages are the host's.
    """
    if config.machine != "vm" or kind.in_namespaces():
        return
    # The agent starts meanwhile.
    from microguest.init_shim.life.kernel_log import KernelLog, OomWatch

    try:
        log = KernelLog()
    except OSError:
        return  # a kernel without it
    workload_limit = None if config.workload is None else config.workload.memory

    def is_own_limit(cgroup: str) -> bool:
        if cgroup == WORKLOAD_CGROUP:
            return workload_limit is not None and not is_below(cgroup, workload_limit)
        return not (cgroup.startswith("/microguest/") and cgroup.endswith(HOSTS_PROCESSES))

    watch = OomWatch(log, reporter.send, is_own_limit)

    def look() -> None:
        try:
            watch.look()
        except OSError:
            supervisor.forget(log.fd)
            os.close(log.fd)

    supervisor.when_readable(log.fd, look)
