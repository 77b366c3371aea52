"""The end: everybody asked to go, made to go, data written out, and the power switched off.

Each wait has a limit, and no step needs the one before to have worked.
"""

import os
import time

import _guestsys

from guest import limits
from guest.report import Stopping
from init_shim.reporter import Reporter, say
from init_shim.signals import CONTINUE, KILL, TERMINATE, Signals
from init_shim.supervisor import reap
from init_shim.timeline import boot_ms

TYPE_CHECKING = False  # typing itself is too heavy for PID 1
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

__all__ = ["keyboard_as_signal", "power_off", "switch_off"]

# linux/reboot.h
CAD_OFF = 0x00000000  # Ctrl-Alt-Del sends SIGINT to PID 1 instead of restarting at once
POWER_OFF = 0x4321FEDC
RESTART = 0x01234567

LOOK_AGAIN = 0.05  # seconds, should a SIGCHLD be missed
KEPT_MOUNTS = ("/", "/proc", "/dev")


def power_off(status: str, grace: float, signals: Signals, reporter: Reporter) -> "NoReturn":
    """End everything, then the machine. `grace`: seconds between TERM and KILL."""
    machine_is_virtual = not in_namespaces()
    end_processes(signals, grace)
    if machine_is_virtual:
        in_child_with_limit(write_out, limits.SYNC_WAIT)
    reporter.send(Stopping(status=status, boot_ms=boot_ms()))
    reporter.farewell()
    switch_off()


def end_processes(signals: Signals, grace: float) -> None:
    """TERM to all, KILL after `grace` seconds to who is left; no wait where nobody is."""
    for number, patience in ((TERMINATE, grace), (KILL, limits.KILL_WAIT)):
        try:
            os.kill(-1, number)
            os.kill(-1, CONTINUE)  # a stopped process cannot act on TERM
        except ProcessLookupError:
            pass
        deadline = time.monotonic() + patience
        while not everybody_is_gone():
            left = deadline - time.monotonic()
            if left <= 0:
                break
            signals.wait(min(left, LOOK_AGAIN))
        else:
            return
    say("processes are left that cannot be killed; they hang in the kernel")


def everybody_is_gone() -> bool:
    """Reaps what ended. Every process but PID 1 descends from a child of PID 1: none, nobody."""
    while reap():
        pass
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return True
    return False


def write_out() -> None:
    """Unmount what can be, latest first, and write everything to the disks."""
    with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as file:
        targets = [line.split(" ")[1] for line in file]
    for target in reversed(targets):
        if target not in KEPT_MOUNTS:
            try:
                _guestsys.umount2(target.encode().decode("unicode_escape"))
            except (OSError, ValueError):
                pass
    os.sync()


def in_child_with_limit(work: "Callable[[], None]", patience: float) -> None:
    """Run `work` in a process of its own: PID 1 must not be the one that hangs in the kernel."""
    try:
        pid = os.fork()
    except OSError:
        return
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return
        time.sleep(0.001)
    say(f"disks are not written out after {patience:g} s; powering off all the same")


def switch_off() -> "NoReturn":
    """reboot(2). Where the machine has no way to cut its power, a restart ends it for its VMM."""
    command = POWER_OFF if in_namespaces() or has_power_switch() else RESTART
    try:
        _guestsys.reboot(command)
        time.sleep(limits.KILL_WAIT)  # another CPU may still be on its way down
    except OSError as error:
        say(f"reboot: {error}")
    os._exit(1)  # in a virtual machine the kernel panics, and does what panic= says


def has_power_switch() -> bool:
    """Whether power-off works: ACPI or, on arm64, PSCI. Without, the kernel would only halt."""
    return os.uname().machine != "x86_64" or os.path.isdir("/sys/firmware/acpi/tables")


def in_namespaces() -> bool:
    """Whether this is not the kernel's first PID namespace, whose inode number is fixed."""
    try:
        return os.readlink("/proc/self/ns/pid") != "pid:[4026531836]"  # linux/proc_ns.h
    except OSError:
        return False


def keyboard_as_signal() -> None:
    """Ctrl-Alt-Del asks for a clean end instead of cutting the power."""
    try:
        _guestsys.reboot(CAD_OFF)
    except OSError:
        pass  # a PID namespace has no keyboard
