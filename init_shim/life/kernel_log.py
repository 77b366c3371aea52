"""The kernel's own messages, for the one thing that only they tell: who was killed for memory.

/dev/kmsg (Documentation/ABI/testing/dev-kmsg) gives a record a read. A program may write there, but
never as facility 0, and its text is not at the start of a kernel's line; a process's name may be
anything, so every line is taken apart from the ends that the kernel wrote.
"""

import os

from microguest.guest import bounds
from microguest.guest.report import OomKilled
from microguest.init_shim.reporter import say
from microguest.init_shim.timeline import boot_ms

TYPE_CHECKING = False  # typing itself is too heavy for PID 1
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["KernelLog", "Kill", "OomWatch", "parse_kill", "parse_record", "parse_summary"]

KMSG = "/dev/kmsg"
RECORD_MAX = 8192  # bytes; less than the kernel's longest is EINVAL and loses that record
AT_ONCE = 128  # records a turn, so that a chatty kernel cannot hold PID 1 up
USER_FACILITY = 8  # syslog(2): facility 0, the kernel's own, are the priorities below

# mm/oom_kill.c: what stands before the process, and whether it was for the limit of a cgroup.
CAUSES = {
    "Memory cgroup out of memory: Killed process ": True,
    "Out of memory: Killed process ": False,
    "Out of memory (oom_kill_allocating_task): Killed process ": False,
}
SUMMARY = "oom-kill:constraint="
AFTER_NAME = ") total-vm:"
LAST_FIELD = " oom_score_adj:"


class Kill:
    """A process that the kernel killed. `of_cgroup`: because of a cgroup's limit."""

    def __init__(self, pid: int, name: str, *, of_cgroup: bool) -> None:
        self.pid = pid
        self.name = name
        self.of_cgroup = of_cgroup


class KernelLog:
    """What the kernel says from now on. Raises OSError where it cannot be read."""

    def __init__(self) -> None:
        self.fd = os.open(KMSG, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.lseek(self.fd, 0, os.SEEK_END)

    def messages(self) -> list[str]:
        """Lines of the kernel that have come, at most AT_ONCE. Raises OSError."""
        found = []
        for _ in range(AT_ONCE):
            try:
                message = parse_record(os.read(self.fd, RECORD_MAX))
            except BlockingIOError:
                break
            except BrokenPipeError:  # we were slow and some are overwritten; the next read goes on
                continue
            if message:
                found.append(message)
        return found


class OomWatch:
    """Reports each kill for want of memory, at most OOM_REPORTS of one boot.

    `is_own_limit` says of a cgroup's path whether its limit is one that somebody asked for, and not
    what there is for everybody.
    """

    def __init__(
        self,
        log: KernelLog,
        report: "Callable[[OomKilled], None]",
        is_own_limit: "Callable[[str], bool]",
    ) -> None:
        self._log = log
        self._report = report
        self._is_own_limit = is_own_limit
        self._left = bounds.OOM_REPORTS
        self._summary = ""  # the last one, which stands before the kill that it is about

    def look(self) -> None:
        """Report what the log has. Raises OSError where it cannot be read any more."""
        for message in self._log.messages():
            if message.startswith(SUMMARY):
                self._summary = message
            elif kill := parse_kill(message):
                self._tell(kill)

    def _tell(self, kill: Kill) -> None:
        limited, cgroup = parse_summary(self._summary, kill)
        self._summary = ""
        if self._left == 0:
            return
        self._left -= 1
        if self._left == 0:
            say(f"{bounds.OOM_REPORTS} processes were killed for memory; no more are reported")
        self._report(
            OomKilled(
                pid=kill.pid,
                name=kill.name,
                cgroup=cgroup,
                boot_ms=boot_ms(),
                limit=kill.of_cgroup and self._is_own_limit(limited),
            )
        )


def parse_record(record: bytes) -> str:
    """The kernel's message in a record; "" for a program's, or what is none.

    The kernel escapes control characters, backslashes and everything beyond ASCII as \\xNN.
    """
    head, semicolon, body = record.partition(b";")
    priority = head.partition(b",")[0]
    if not (semicolon and priority.isdigit() and int(priority) < USER_FACILITY):
        return ""
    return body.partition(b"\n")[0].decode("ascii", "replace")


def parse_kill(message: str) -> Kill | None:
    """Who was killed, if that is what the message says.

    The name has at most 15 bytes of anything, so its end is the last place where the kernel's own
    text goes on, and that has to be whole.
    """
    cause = next((cause for cause in CAUSES if message.startswith(cause)), None)
    if cause is None:
        return None
    rest, _, facts = message.removeprefix(cause).rpartition(AFTER_NAME)
    pid, parenthesis, name = rest.partition(" (")
    score = facts.rpartition(LAST_FIELD)[2]
    whole = parenthesis and pid.isdecimal() and score.removeprefix("-").isdecimal()
    return Kill(int(pid), unescaped(name), of_cgroup=CAUSES[cause]) if whole else None


def parse_summary(summary: str, kill: Kill) -> tuple[str, str]:
    """Paths of the cgroup that had too little and of the process's own, from the line before.

    "" for either that is not certain: the kernel leaves lines out when there are many, and whoever
    may make cgroups can give them names that look like a part of the line.
    """
    rest, found, ids = summary.rpartition(",pid=")
    place, task, name = rest.partition(",task=")
    if not (found and task and ids.partition(",")[0] == str(kill.pid)):
        return "", ""
    if unescaped(name) != kill.name or place.count(",task_memcg=") != 1:
        return "", ""
    before, _, own = place.partition(",task_memcg=")
    limited = before.partition(",oom_memcg=")[2] if before.count(",oom_memcg=") == 1 else ""
    return unescaped(limited), unescaped(own)


def unescaped(text: str) -> str:
    """With the bytes that the kernel shows as \\xNN; what is no UTF-8 stays escaped."""
    first, *rest = text.split("\\x")
    data = first.encode()
    for piece in rest:
        try:
            data += bytes([int(piece[:2], 16)]) + piece[2:].encode()
        except ValueError:
            data += f"\\x{piece}".encode()
    return data.decode("utf-8", "backslashreplace")
