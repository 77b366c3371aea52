"""Who holds a machine: its monitor's process, proven to be that before anything is sent to it.

The number in the machine's state is no more than a hint. It may be another process's by now, and a
state that cannot be read has none; then all processes are looked through.
"""

import os
from typing import Final

from microguest.host_client.machines.folder import check_name, machines_root

__all__ = ["MONITOR_MODULE", "monitor_of"]

MONITOR_MODULE: Final = "microguest.host_client.monitor.main"
ARGUMENTS_MAX: Final = 64 * 1024  # bytes; a monitor's have a few hundred
OURS: Final = 3  # the last arguments of a monitor: its folder, its link, its lock


def monitor_of(name: str, hint: int = 0) -> int:
    """A pidfd of the process that is the machine's monitor; -1 where none is."""
    path = os.path.join(machines_root(), check_name(name))
    found = _proven(hint, path)
    if found >= 0:
        return found
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        found = _proven(int(entry), path)
        if found >= 0:
            return found
    return -1


def _proven(pid: int, path: str) -> int:
    """A pidfd, opened before the process is looked at, so that it can be no other one; or -1."""
    if pid <= 0:
        return -1
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return -1
    try:
        if _is_monitor(pid, path):
            return pidfd
    except (OSError, ValueError):
        pass
    os.close(pidfd)
    return -1


def _is_monitor(pid: int, path: str) -> bool:
    """Our user's, started as `link` starts monitors, with the folder as its open lock."""
    if os.stat(f"/proc/{pid}").st_uid != os.geteuid():
        return False
    with open(f"/proc/{pid}/cmdline", "rb", buffering=0) as file:
        arguments = (file.read(ARGUMENTS_MAX) or b"").rstrip(b"\0").split(b"\0")
    if len(arguments) <= OURS or not any(MONITOR_MODULE.encode() in word for word in arguments):
        return False
    lock = int(arguments[-1])
    return os.path.samestat(os.stat(f"/proc/{pid}/fd/{lock}"), os.stat(path, follow_symlinks=False))
