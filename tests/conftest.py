"""What every test gets: nothing may be left behind, and nothing is skipped without being seen.

Each test is surrounded by a check that it leaves no file descriptor, thread or child process.
Fixtures of a wider scope are set up before it and may keep theirs. What is mounted is seen by this
run alone, and goes with it. `--require-all` turns a skip into a failure, for machines that are
meant to have everything; `--most-reruns=N` fails a run of which more tests than that were run a
second time (`--reruns`). Hypothesis runs a small repeatable profile; `--hypothesis-profile=deep`
looks for new examples.
"""

import contextlib
import ctypes
import gc
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import machinekit
import pytest
from hypothesis import HealthCheck, settings
from patience import SLACK
from sleepers import Sleeper

from microguest.errors import MachineError

PROJECT = Path(__file__).parent.parent
LEAK_GRACE = SLACK  # seconds in which what a test stopped may still be going away

settings.register_profile(
    "fast",
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("deep", max_examples=3000, deadline=None)
settings.load_profile("fast")

# Mounts of this run's own: of unshare(2) and mount(2). Those of the host still come in.
NEW_MOUNTS, NO_WAY_OUT = 0x20000, 0x80000 | 0x4000  # CLONE_NEWNS, MS_SLAVE | MS_REC
if os.geteuid() == 0:  # where it is not to be had, nothing can be mounted
    _libc = ctypes.CDLL(None)
    if _libc.unshare(NEW_MOUNTS) == 0:
        _libc.mount(None, b"/", None, NO_WAY_OUT, None)

# In a job of a shell without job control, and under nohup(1), these are ignored, and would be by
# every program that a test starts and sends them to.
for _number in (signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves a descriptor, thread or child process, naming it."""
    before = {kind: look() for kind, look in RESOURCES.items()}
    yield
    deadline = time.monotonic() + LEAK_GRACE
    while left := _left(before):
        if time.monotonic() > deadline:
            pytest.fail("the test left behind: " + "; ".join(left))
        gc.collect()  # only now: it takes long, and what is in a cycle was left behind so far
        time.sleep(0.01)


def _left(before: dict[str, dict[str, str]]) -> list[str]:
    return [
        f"{kind} {key} ({what})"
        for kind, look in RESOURCES.items()
        for key, what in look().items()
        if before[kind].get(key) != what
    ]


def _descriptors() -> dict[str, str]:
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # the listing's own descriptor
            continue
    return found


def _threads() -> dict[str, str]:
    """Threads by identity, without trio's idle cached ones, which end by themselves in 10 s."""
    return {
        str(thread.ident): thread.name
        for thread in threading.enumerate()
        if not thread.name.startswith("Trio thread")
    }


def _children() -> dict[str, str]:
    """Processes whose parent is this one: fields 2 and 4 of proc_pid_stat(5)."""
    found = {}
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        name, _, rest = stat.partition("(")[2].rpartition(")")
        if rest.split()[1] == str(os.getpid()):
            found[pid] = name
    return found


RESOURCES: dict[str, Callable[[], dict[str, str]]] = {
    "descriptor": _descriptors,
    "thread": _threads,
    "child process": _children,
}


@pytest.fixture
def sleeper() -> Iterator[Sleeper]:
    """Processes that this test can tell from all others of the host; none is left of them."""
    found = Sleeper()
    yield found
    found.end()


@pytest.fixture(scope="session")
def elf() -> Path:
    """The frozen guest program for this machine; a failure, not a skip, where it is not built."""
    path = PROJECT / "dist" / "guest" / platform.machine() / "microguest"
    if not path.is_file():
        pytest.fail(f"{path} does not exist: build it with `make guest`")
    return path


@pytest.fixture(scope="session")
def image(elf: Path) -> str:
    """Busybox, for `boot` and `microguest run`."""
    return machinekit.demo_image()


@pytest.fixture
def machines_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the machines that this test starts. None of them runs on after it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    yield tmp_path / "state" / "microguest" / "machines"
    with contextlib.suppress(MachineError):  # where the test has spoiled the folder
        machinekit.end_machines()


@pytest.fixture(scope="module")
def module_machines_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same for all tests of a module, whose machines some of them share."""
    with pytest.MonkeyPatch.context() as patch:
        state = tmp_path_factory.mktemp("state")
        patch.setenv("XDG_STATE_HOME", str(state))
        yield state / "microguest" / "machines"
        machinekit.end_machines()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-all", action="store_true", help="a skipped test is a failure")
    parser.addoption("--most-reruns", type=int, help="reruns that do not fail the whole run")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first: no worker has one of them left when the others are done."""
    marks = {"qemu", "slow"}
    slow = {item.path for item in items if marks & {mark.name for mark in item.iter_markers()}}
    items.sort(key=lambda item: item.path not in slow)


def pytest_sessionfinish(session: pytest.Session) -> None:
    most = session.config.option.most_reruns
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")  # none in a worker
    if most is not None and reporter and len(reporter.stats.get("rerun", ())) > most:
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What failed at the first try is shown as a failure is: the reason is to be found."""
    reruns = terminalreporter.stats.get("rerun", ())
    most = terminalreporter.config.option.most_reruns
    if not reruns:
        return
    terminalreporter.section(f"run again: {len(reruns)}, borne: {most}")
    for report in reruns:
        terminalreporter.section(report.nodeid, sep="_")
        terminalreporter.write_line(report.longreprtext)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and item.config.option.require_all:
        report.outcome = "failed"
        report.longrepr = f"skipped although everything is required: {report.longrepr}"
    return report
