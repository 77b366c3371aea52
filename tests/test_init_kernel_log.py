"""What PID 1 makes of the kernel's messages, with processes whose names are meant to mislead it."""

import pytest

from microguest.guest import bounds
from microguest.guest.report import OomKilled
from microguest.init_shim.life.kernel_log import KernelLog, OomWatch, parse_kill, parse_record

FACTS = (
    " total-vm:99kB, anon-rss:9kB, file-rss:9kB, shmem-rss:0kB, UID:0 pgtables:9kB oom_score_adj:0"
)
PLACE = "oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0"
OWN, ALL = "Memory cgroup out of memory", "Out of memory"


def killed(name: str, pid: int = 7, cause: str = ALL) -> str:
    return f"{cause}: Killed process {pid} ({name}){FACTS}"


def summary(name: str, pid: int = 7, where: str = ",oom_memcg=/a,task_memcg=/a/b") -> str:
    return f"{PLACE}{where},task={name},pid={pid},uid=0"


class Log:
    """Lines in place of the kernel's."""

    def __init__(self, *lines: str) -> None:
        self.lines = list(lines)

    def messages(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines


def reports(*lines: str, own: bool = True) -> list[OomKilled]:
    found: list[OomKilled] = []
    log: KernelLog = Log(*lines)  # type: ignore[assignment]
    OomWatch(log, found.append, lambda cgroup: own).look()
    return found


@pytest.mark.parametrize(
    "name",
    [
        "dd",
        "",
        " ",
        "x) total-vm:1kB",
        ") total-vm:",
        "(1) (2)",
        "a, b",
        ",pid=1,uid=0",
        ",task=x,pid=7",
        "Killed process",
        "grüße",
        "a\nb",
        "\\x41",
        "\x7f\x01",
    ],
)
def test_any_name_is_told_as_it_is(name: str) -> None:
    # As the kernel prints it: printk escapes what is not printable ASCII, and backslashes.
    shown = "".join(
        chr(byte) if 32 <= byte < 127 and byte != 92 else f"\\x{byte:02x}" for byte in name.encode()
    )
    (report,) = reports(summary(shown), killed(shown, cause=OWN))
    assert (report.pid, report.name, report.cgroup, report.limit) == (7, name, "/a/b", True)


def test_bytes_that_are_no_text_stay_escaped() -> None:
    (report,) = reports(killed("a\\xffb"))
    assert report.name == "a\\xffb"


@pytest.mark.parametrize(
    "line",
    [
        "Killed process 1 (init)" + FACTS,
        "x: Out of memory: Killed process 1 (init)" + FACTS,
        "Out of memory: Killed process 1 (init) total-vm:9kB IN=eth0 OUT= oom_score_adj:",
        "Out of memory: Killed process x (init)" + FACTS,
        "Out of memory: Killed process 1 init" + FACTS,
        "Out of memory: Killed process 1 (init) and more",
        "",
    ],
)
def test_other_lines_are_no_kills(line: str) -> None:
    assert parse_kill(line) is None


def test_whose_limit_it_was() -> None:
    assert [report.limit for report in reports(summary("a"), killed("a"))] == [False]
    assert [report.limit for report in reports(killed("a", cause=OWN), own=False)] == [False]
    assert [report.limit for report in reports(killed("a", cause=OWN))] == [True]


@pytest.mark.parametrize(
    "before",
    [
        "",
        summary("dd", pid=8),
        summary("de"),
        summary("dd", where=",oom_memcg=/a,task_memcg=/c,task_memcg=/b"),
        summary("dd")[:-20],
    ],
)
def test_a_cgroup_that_is_not_certain_is_left_out(before: str) -> None:
    (report,) = reports(before, killed("dd"))
    assert (report.name, report.cgroup) == ("dd", "")


def test_a_summary_is_of_the_next_kill_only() -> None:
    first, second = reports(summary("dd"), killed("dd"), killed("dd"))
    assert (first.cgroup, second.cgroup) == ("/a/b", "")


def test_reports_are_limited() -> None:
    assert len(reports(*[killed("dd")] * (bounds.OOM_REPORTS + 50))) == bounds.OOM_REPORTS


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"6,339,5140900,-;a line\n SUBSYSTEM=acpi\n", "a line"),
        (b"3,1,2,-,caller=T1;a; line\n", "a; line"),
        (b"12,1,2,-;" + killed("init", 1).encode() + b"\n", ""),  # LOG_USER: a program wrote it
        (b"30,1,2,-;anything\n", ""),
        (b"-1,1,2,-;anything\n", ""),
        (b"x;y\n", ""),
        (b"no record", ""),
        (b"", ""),
    ],
)
def test_only_the_kernels_own_records_count(record: bytes, message: str) -> None:
    assert parse_record(record) == message
