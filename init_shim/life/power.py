"""The end: everybody asked to go, made to go, data written out, and the power switched off.

Each wait has a limit, and no step needs the one before to have worked. docs/design/boot.md has
their sum.
"""

import os
import time

import _guestsys

from microguest.guest import bounds
from microguest.guest.errors import raised_at
from microguest.guest.report import Stopping
from microguest.init_shim.kind import in_namespaces
from microguest.init_shim.life.supervisor import Supervisor
from microguest.init_shim.reporter import own_console, say
from microguest.init_shim.root import write_out
from microguest.init_shim.signals import CONTINUE, KILL, TERMINATE
from microguest.init_shim.timeline import boot_ms

TYPE_CHECKING = False  # typing itself is too heavy for PID 1
if TYPE_CHECKING:
    from typing import NoReturn

__all__ = ["end_machine", "prepare", "switch_off"]

# linux/reboot.h
CAD_OFF = 0x00000000  # Ctrl-Alt-Del sends SIGINT to PID 1 instead of restarting at once
POWER_OFF = 0x4321FEDC
RESTART = 0x01234567


def end_machine(supervisor: Supervisor) -> "NoReturn":
    """End everything, then the machine, as the supervisor's `status` and `grace` say."""
    try:
        end_processes(supervisor)
    except Exception as error:  # noqa: BLE001  the disks matter more
        say(f"processes were not ended: {raised_at(error)}")
    if not in_namespaces():
        write_out.write_out(bounds.SYNC_WAIT)
    supervisor.reporter.send(Stopping(status=supervisor.status, boot_ms=boot_ms()))
    supervisor.reporter.farewell()
    switch_off(restart=supervisor.status == "reboot")


def end_processes(supervisor: Supervisor) -> None:
    """The workload by its own stop signal, then TERM to all, then KILL to who is left.

    What descends from the workload is the workload's to end, as long as its grace lasts: a server
    that waits for its workers' last answers must not find them gone.
    """
    began = time.monotonic()
    supervisor.stop_workload()
    left = supervisor.grace - (time.monotonic() - began)
    others = max(left, min(supervisor.grace, bounds.OTHERS_GRACE))
    for number, patience in ((TERMINATE, others), (KILL, bounds.KILL_WAIT)):
        try:
            os.kill(-1, number)
            os.kill(-1, CONTINUE)  # a stopped process cannot act on TERM
        except ProcessLookupError:
            pass
        if supervisor.outlive(patience):
            return
    say("processes are left that cannot be killed; they hang in the kernel")


def switch_off(*, restart: bool = False) -> "NoReturn":
    """reboot(2). Where the machine has no way to cut its power, a restart ends it for its VMM."""
    off = POWER_OFF if in_namespaces() or has_power_switch() else RESTART
    try:
        _guestsys.reboot(RESTART if restart else off)
        time.sleep(bounds.KILL_WAIT)  # another CPU may still be on its way down
    except OSError as error:
        say(f"reboot: {error}")
    os._exit(1)  # in a virtual machine the kernel panics, and does what panic= says


def prepare() -> None:
    """At the boot's start: what later may be hidden or hang, and whose signal Ctrl-Alt-Del is.

    Ctrl-Alt-Del shall ask for a clean end instead of cutting the power.
    """
    has_power_switch()
    in_namespaces()
    own_console()
    try:
        _guestsys.reboot(CAD_OFF)
    except OSError:
        pass  # a PID namespace has no keyboard


def has_power_switch() -> bool:
    """Whether power-off works: ACPI or, on arm64, PSCI. Without, the kernel would only halt.

    As it was at the first call: a workload's masks may hide it from later ones.
    """
    global _power_switch  # noqa: PLW0603  the machine has one or none
    if _power_switch is None:
        acpi = os.path.isdir("/sys/firmware/acpi/tables")
        _power_switch = os.uname().machine != "x86_64" or acpi
    return _power_switch


_power_switch: bool | None = None
