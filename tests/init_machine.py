"""The frozen program run as PID 1 in namespaces, straight through its launcher, for test_init_*.

Nothing of host_client is involved: the boot config is written by hand and the reports are read off
the socket line by line.
"""

import contextlib
import itertools
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import pytest
from patience import PATIENCE

from microguest.guest.report import line_mark

PROJECT = Path(__file__).parent.parent
PROGRAM = PROJECT / "dist" / "guest" / platform.machine() / "microguest"
BUSYBOX = shutil.which("busybox")
TOKEN = "0123456789abcdef0123456789abcdef"
CONSOLE_MARK = "microguest-report: "
# In boot order, as docs/design/boot.md lists them; `ready` is reported after the last of these.
STEPS = (
    "api-mounts",
    "config",
    "modules",
    "listener",
    "report",
    "agent-start",
    "root-lower",
    "root-upper",
    "root-overlay",
    "volumes",
    "switch-root",
    "network",
    "hardening",
    "workload",
    "agent-ready",
)

TRIES = 10  # where a test has to be faster than what it tests
ASIDES = ("agent_serves", "first_exec")  # reports that most tests do not ask for

Found = TypeVar("Found")
Config = dict[str, Any]
Report = tuple[str, dict[str, Any]]


def require_program() -> None:
    if not PROGRAM.exists():
        pytest.skip(f"{PROGRAM} is missing: make guest")
    if os.geteuid() != 0:
        pytest.skip("needs root")
    if BUSYBOX is None:
        pytest.skip("needs busybox: apt install busybox-static")


def make_root(folder: Path) -> Path:
    """A small image: busybox under all its names, passwd and group with a user `tester`."""
    assert BUSYBOX is not None
    for name in ("bin", "etc", "tmp"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    (folder / "tmp").chmod(0o1777)
    shutil.copy(BUSYBOX, folder / "bin" / "busybox")
    listing = subprocess.run([BUSYBOX, "--list"], check=True, capture_output=True, text=True)
    for applet in listing.stdout.split():
        if applet != "busybox":
            (folder / "bin" / applet).symlink_to("busybox")
    (folder / "etc" / "passwd").write_text(
        "root:x:0:0::/root:/bin/sh\ntester:x:1000:1000::/home/tester:/bin/sh\n"
    )
    (folder / "etc" / "group").write_text("root:x:0:\ntester:x:1000:\nextra:x:2000:tester\n")
    return folder


def shell(script: str) -> list[str]:
    """The arguments of a process that runs a script."""
    return ["/bin/sh", "-c", script]


def boot_config(argv: list[str] | None = None, **workload: object) -> Config:
    """A boot config that works, with `argv` as the workload (None: no workload)."""
    config: Config = {
        "machine": "namespaces",
        "root": {"lower": [{"kind": "directory", "path": "/microguest/lower"}]},
        "agent": {
            "listen": {"transport": "unix", "path": "/microguest/host/agent.sock"},
            "token": TOKEN,
        },
        "report": {"transport": "unix", "path": "/microguest/host/report.sock"},
    }
    if argv is not None:
        config["workload"] = {"argv": argv, **workload}
    return config


class Machine:
    """`with Machine(root, config) as machine:` starts it; leaving kills what is left of it."""

    def __init__(
        self,
        root: Path,
        config: Config | str,
        *,
        listen: bool = True,
        user: int | None = None,
        prepare: Callable[[Path], object] = lambda host: None,
        console_fd: int | None = None,
        under: Sequence[str] = (),
    ) -> None:
        self.root = root
        self.config = config if isinstance(config, str) else json.dumps(config)
        self.listen = listen
        self.user = user
        self.prepare = prepare  # fills the host's folder before the start
        self.under = under  # a command that becomes the launcher, as prlimit
        self.console_fd = console_fd  # instead of the file that `console` reads

    def __enter__(self) -> Self:
        self._cleanup = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            self._start(stack)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._cleanup.close()

    def _start(self, stack: contextlib.ExitStack) -> None:
        # A short path: a Unix socket's has at most 107 characters.
        self.run = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mg-")))
        self.host = self.run / "host"
        self.host.mkdir()
        self.prepare(self.host)
        boot = self.run / "boot.json"
        boot.touch(mode=0o600)
        boot.write_text(self.config)
        self._listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        if self.listen:
            self._listener.bind(str(self.host / "report.sock"))
            self._listener.listen(1)
        if self.user is not None:
            for path in (self.run, self.host, *self.host.iterdir(), boot):
                os.chown(path, self.user, self.user)
        self._console = stack.enter_context((self.run / "console").open("w+b"))
        self._reports: Iterator[Report] | None = None
        identity: dict[str, Any] = {}
        if self.user is not None:
            identity = {"user": self.user, "group": self.user, "extra_groups": []}
        command = [str(PROGRAM), "namespaces", "--root", str(self.root), "--run", str(self.run)]
        self.process = subprocess.Popen(
            [*self.under, *command],
            stdin=subprocess.DEVNULL,
            stdout=self._console if self.console_fd is None else self.console_fd,
            stderr=subprocess.STDOUT,
            **identity,
        )
        stack.callback(self._end)

    def _end(self) -> None:
        self.process.kill()
        self.process.wait()

    def wait(self, timeout: float = PATIENCE) -> int:
        """The launcher's exit code."""
        return self.process.wait(timeout)

    @property
    def console(self) -> str:
        """All that was written to the console so far, without the key in what PID 1 says."""
        text = (self.run / "console").read_text(errors="backslashreplace")
        return text.replace(line_mark(TOKEN), "microguest: ")

    def console_report(self) -> Report:
        """The one report on the console."""
        lines = [line for line in self.console.splitlines() if line.startswith(CONSOLE_MARK)]
        assert len(lines) == 1, self.console
        return parse(lines[0].removeprefix(CONSOLE_MARK))

    def report(self, name: str, timeout: float = PATIENCE) -> dict[str, Any]:
        """The fields of the next report, which must be `name`.

        The workload does not wait for the agent: what it does is looked over for `ready`, and
        comes afterwards. So are ASIDES, for good, where another report is asked for.
        """
        if self._reports is None:
            self._reports = self._read_reports(timeout)
        early: list[Report] = []
        while True:
            found, fields = next(self._reports, ("no report", {}))
            if found in ASIDES and found != name:
                continue
            if name != "ready" or not found.startswith("workload_"):
                break
            early.append((found, fields))
        self._reports = itertools.chain(early, self._reports)
        assert found == name, f"{found} {fields}; console: {self.console}"
        return fields

    def next_report(self, timeout: float = PATIENCE) -> Report:
        """The next report, whatever it is; ("", {}) after the last."""
        if self._reports is None:
            self._reports = self._read_reports(timeout)
        return next(self._reports, ("", {}))

    def no_more_reports(self) -> None:
        """PID 1 closed the connection without another report."""
        assert self._reports is not None
        assert next(self._reports, None) is None

    def _read_reports(self, timeout: float) -> Iterator[Report]:
        self._listener.settimeout(timeout)
        try:
            connection, _ = self._listener.accept()
        except TimeoutError:
            pytest.fail(f"no report connection; console: {self.console}")
        self._cleanup.enter_context(connection)
        connection.settimeout(timeout)
        file = self._cleanup.enter_context(connection.makefile("rb"))
        for line in file:
            yield parse(line)

    def init_pid(self) -> int:
        """PID 1, as the host numbers it."""
        return wait_for(lambda: next(iter(children(self.process.pid)), 0), "PID 1")

    def agent_pid(self) -> int:
        """The agent, as the host numbers it."""
        init = self.init_pid()
        return wait_for(
            lambda: next((pid for pid in children(init) if command_of(pid) == ["agent"]), 0),
            "the agent",
        )

    def kill_every_agent(self) -> list[Report]:
        """As soon as it is there, until the machine has ended. All of its reports."""
        killed: set[int] = set()
        init = self.init_pid()
        with at_once():
            while self.process.poll() is None:
                ours = children_of(init)
                for pid in {*ours, *(each for child in ours for each in children_of(child))}:
                    if pid not in killed and command_of(pid) == ["agent"]:
                        killed.add(pid)
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
        return list(iter(self.next_report, ("", {})))

    def everybody(self) -> set[int]:
        """Every process inside, and the launcher."""
        found = {self.process.pid}
        for pid in found.copy():
            found |= descendants(pid)
        return found


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """This process comes before all others of the host."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, -20)
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, before)


def agents_that_keep_dying(root: Path, config: Config) -> tuple[list[Report], str]:
    """The reports and the console of a machine whose agents are all killed before they serve.

    On a busy machine one may be faster than who kills it: then another machine is tried.
    """
    for _ in range(TRIES):
        with Machine(root, config) as machine:
            reports = machine.kill_every_agent()
            if not {name for name, _ in reports} & {"ready", "agent_serves"}:
                return reports, machine.console
    pytest.fail(f"in {TRIES} machines an agent was faster")


def parse(line: str | bytes) -> Report:
    ((name, fields),) = json.loads(line).items()
    return name, fields


def children(parent: int) -> list[int]:
    """Pids of the processes whose parent is `parent`."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and _stat(int(name))[1:2] == [str(parent)]:
            found.append(int(name))
    return sorted(found)


def children_of(pid: int) -> list[int]:
    """The same for a process of one thread, and quicker: it looks at no other."""
    try:
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def descendants(pid: int) -> set[int]:
    found: set[int] = set()
    for child in children(pid):
        found |= {child} | descendants(child)
    return found


def state_of(pid: int) -> str:
    """As in ps(1); "" where there is no such process."""
    return next(iter(_stat(pid)), "")


def _stat(pid: int) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def command_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0")
    except OSError:
        return []


def wait_for(look: Callable[[], Found], what: str, timeout: float = PATIENCE) -> Found:
    """What `look()` returns, once that is true."""
    deadline = time.monotonic() + timeout
    while not (found := look()):
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not after {timeout} s")
        time.sleep(0.01)
    return found
