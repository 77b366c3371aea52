"""How a machine ended, where its VMM's exit and its console have to tell. Pure."""

import os

from microguest.guest import bounds
from microguest.guest.record import RecordError
from microguest.guest.report import CONSOLE_MARK, REPORTS, BootFailed
from microguest.host_client.machines.plan import MachineState

__all__ = ["failure_on_console", "has_restarted", "unexplained"]

LAST_WORDS = 500  # characters of what the kernel or the VMM said last


def failure_on_console(text: str) -> BootFailed | None:
    """The report of a failed boot whose connection never came up; None where there is none."""
    for line in reversed(text.splitlines()):
        mark = line.find(CONSOLE_MARK)
        if mark >= 0:
            try:
                report = REPORTS.decode(line[mark + len(CONSOLE_MARK) :][: bounds.REPORT_LINE])
            except RecordError:
                continue
            if isinstance(report, BootFailed):
                return report
    return None


def has_restarted(state: MachineState, console: str, *, restarted: bool) -> bool:
    """Whether an init of the image's own has restarted what it was reported to end.

    Few inits tell the keeper what they are about to do. A kernel that panics restarts as well.
    """
    reported = state.handed_off and state.status == "done"
    return restarted and reported and not panics(console)


def unexplained(
    state: MachineState, code: int | None, *, restarted: bool, program: str, last: str, console: str
) -> tuple[str, str]:
    """(status, error) of a machine whose VMM ended, and nobody had said why.

    code: of the VMM, as subprocess has it. restarted: by the guest. last: the VMM's messages.
    """
    panicked = panics(console)
    if code == 0 and state.phase == "running" and not panicked:
        return "crashed", "the guest switched itself off, or was restarted"
    if restarted and state.machine == "namespaces":
        return "reboot", ""
    how = f"ended (exit code {code})"
    if code is not None and code < 0:
        how = f"was killed (signal {-code})"
    words = panicked[-1:] or last.strip().splitlines()[-1:]
    when = " before the guest was ready" if state.phase == "starting" else ""
    status = "boot-failed" if state.phase == "starting" else "crashed"
    said = f": {words[0]}"[:LAST_WORDS] if words else ""
    return status, f"{short_name(program)} {how}{when}{said}"


def short_name(program: str) -> str:
    """A list of machines has little room for it: qemu, for /usr/bin/qemu-system-x86_64."""
    return os.path.basename(program).partition("-system-")[0]


def panics(console: str) -> list[str]:
    """What the guest's kernel said when it gave up, as at the end of PID 1."""
    mark = "Kernel panic - not syncing"
    return [line[line.find(mark) :].strip() for line in console.splitlines() if mark in line]
