"""Control of a machine whose guest holds what its monitor reads, or whose processes do not end."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import machinekit
import pytest
from clikit import microguest
from init_machine import children_of, make_root
from machinekit import family, nothing_is_left, runs, wait_until
from patience import PATIENCE, SLACK

from microguest import boot
from microguest.errors import ConnectionLost, MicroguestError
from microguest.host_client.machines.control import KILL_WAIT
from microguest.host_client.machines.find import find
from microguest.host_client.machines.machine import Machine

# splice(2) waits for its socket, to which nothing ever comes, and has the mutex of the pipe on
# stdout meanwhile. Whoever reads or writes that pipe waits for the mutex, and no signal ends that.
# The first one lets go; what waits behind it then writes a line, for the monitor to read, and holds
# the mutex before the monitor has it. Where the monitor was quicker, the next two do it.
HOLD = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

static int ends[2];

static void begin(int write_first, int seconds)
{
    if (fork() == 0) {
        alarm(seconds);
        if (write_first)
            write(1, "\n", 1);
        else
            splice(ends[0], 0, 1, 0, 65536, 0);
        _exit(0);
    }
    usleep(30000);
}

int main(void)
{
    socketpair(AF_UNIX, SOCK_STREAM, 0, ends);
    begin(0, 2);
    for (int n = 1; n <= 8; n++) {
        begin(1, 300);
        begin(0, n < 8 ? 2 + n : 300);
    }
    alarm(300);
    for (;;)
        pause();
}
"""

# Traces a process, and neither lets it go nor looks at it. OPTIONS of ptrace(2).
TRACE = """
import ctypes, sys
ptrace = ctypes.CDLL(None, use_errno=True).ptrace
ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
SEIZE = 0x4206
assert ptrace(SEIZE, int(sys.argv[1]), None, int(sys.argv[2])) == 0, ctypes.get_errno()
print("traced", flush=True)
sys.stdin.read()
"""
# The same, but what it traces goes on with each signal that it gets: only its end stays.
FOLLOW = TRACE.replace(
    "sys.stdin.read()",
    """
import os
CONT, WALL, TRAP = 7, 0x40000000, 5
while True:
    try:
        stopped = os.waitid(os.P_ALL, 0, os.WSTOPPED | WALL)
    except ChildProcessError:  # it has ended
        sys.stdin.read()
    number = 0 if stopped.si_status & 0x7F == TRAP else stopped.si_status
    ptrace(CONT, stopped.si_pid, None, number)  # unless it is being killed
""",
)
NOTHING, TRACEEXIT = 0, 0x40
OPTIONS = pytest.mark.parametrize("options", [NOTHING, TRACEEXIT], ids=["ended", "ending"])

TRIES = 6  # machines
pytestmark = pytest.mark.usefixtures("machines_home")


@pytest.fixture(scope="module")
def holder(tmp_path_factory: pytest.TempPathFactory, elf: Path) -> str:
    """An image with busybox and the program above."""
    if shutil.which("gcc") is None:
        pytest.skip("needs a C compiler: apt install gcc")
    tree = make_root(tmp_path_factory.mktemp("image") / "root")
    command = ["gcc", "-static", "-O1", "-x", "c", "-o", str(tree / "bin" / "hold"), "-"]
    subprocess.run(command, input=HOLD, text=True, check=True)
    return f"dir:{tree}"


def in_the_kernel(pid: int) -> bool:
    """Whether a thread of the process sleeps so that no signal wakes it."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            stat = Path(f"/proc/{pid}/task/{thread}/stat").read_text()
            if stat.rpartition(")")[2].split()[0] == "D":
                return True
    return False


def stays_in_the_kernel(pid: int) -> bool:
    """A read or a write of a pipe, too, is there for an instant."""
    for _ in range(20):
        if not in_the_kernel(pid):
            return False
        time.sleep(0.01)
    return True


def comes_to_be_held(pid: int) -> bool:
    """Whether the guest gets the console's pipe from it: on a busy host it may miss it."""
    deadline = time.monotonic() + PATIENCE / TRIES
    while time.monotonic() < deadline:
        if stays_in_the_kernel(pid):
            return True
        time.sleep(0.01)
    return False


@pytest.fixture
def machine(holder: str) -> Iterator[Machine]:
    """A machine whose monitor is held; others are tried where that does not come about."""
    with contextlib.ExitStack() as cleanup:
        for _ in range(TRIES):
            machine = cleanup.enter_context(
                boot(holder, machine="namespaces", user="tester", command=["hold"])
            )
            if comes_to_be_held(machine.state.monitor):
                break
            machine.kill()
        else:
            pytest.fail(f"in {TRIES} machines the guest missed the console's pipe")
        pids = family(machine.state.monitor)
        try:
            yield machine
        finally:
            for pid in pids - {machine.state.monitor} if not machine.state.ended else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)  # the test has failed


def hold_init(machine: Machine) -> int:
    """Stop PID 1, which the console that is held does not stop; its number on this host."""
    (init,) = children_of(machine.state.vmm)
    with pytest.raises(ConnectionLost):
        machine.agent.exec(["sh", "-c", "kill -9 $PPID"], user="root")  # which PID 1 says there
    wait_until("PID 1 goes on", lambda: serves(machine))
    os.kill(init, signal.SIGSTOP)
    return init


def serves(machine: Machine) -> bool:
    """Whether an agent does, of which PID 1 starts the next one."""
    try:
        return machine.agent.exec(["true"]).returncode == 0
    except MicroguestError:
        return False


@pytest.mark.parametrize("by_name", [True, False], ids=["by-name", "its-starter"])
@pytest.mark.parametrize("init_too", [False, True], ids=["monitor", "monitor-and-init"])
def test_a_guest_that_holds_its_console_is_killed(
    machine: Machine, by_name: bool, init_too: bool
) -> None:
    if init_too:
        hold_init(machine)
    pids = family(machine.state.monitor)
    began = time.monotonic()
    if by_name:
        find(machine.name).kill()
    else:
        machine.kill()
    assert time.monotonic() - began < KILL_WAIT
    wait_until("its processes end", lambda: not any(map(runs, pids)))
    assert machine.kill().status == "killed"
    nothing_is_left(machine.name, pids, within=SLACK)


def test_what_is_told_of_a_machine_that_holds_its_console(machine: Machine) -> None:
    """Its monitor takes reports, and hears its starter."""
    assert "first-exec" not in {step.name for step in machine.timeline()}
    machine.agent.exec(["true"])
    wait_until("it is told", lambda: "first-exec" in {step.name for step in machine.timeline()})


def test_a_deaf_monitor_and_a_held_init_are_killed(machine: Machine) -> None:
    """So is a monitor that is stopped, and what is left behind it."""
    hold_init(machine)
    pids = family(machine.state.monitor)
    os.kill(machine.state.monitor, signal.SIGSTOP)
    find(machine.name).kill()
    wait_until("its processes end", lambda: not any(map(runs, pids)))
    assert microguest("ls", "-a", "-q").stdout == b""


# ── processes that are killed and do not end ─────────────────────────────────────────────────────


@pytest.fixture
def trace() -> Iterator[Callable[[int, int], None]]:
    """Keep a process from ending; it needs the right to, so the tests are root's."""
    if os.geteuid() != 0:
        pytest.skip("needs root to trace what others have started")
    with contextlib.ExitStack() as tracers:

        def traced(pid: int, options: int, program: str = TRACE) -> None:
            tracer = machinekit.python(program, str(pid), str(options))
            tracers.enter_context(tracer)
            tracers.callback(tracer.kill)
            assert tracer.stdout is not None
            assert tracer.stdout.readline() == b"traced\n", tracer.communicate()

        yield traced


@OPTIONS
@pytest.mark.parametrize("by_name", [True, False], ids=["by-name", "its-starter"])
def test_a_machine_ends_whose_launcher_does_not(
    image: str, trace: Callable[[int, int], None], options: int, by_name: bool
) -> None:
    with boot(image, machine="namespaces", command=["sleep", "1000"]) as machine:
        vmm, monitor = machine.state.vmm, machine.state.monitor
        pids = family(vmm) - {vmm}
        trace(vmm, options)
        began = time.monotonic()
        if by_name:
            find(machine.name).kill()
        state = machine.kill()
        assert time.monotonic() - began < KILL_WAIT
        wait_until("its processes end", lambda: not any(map(runs, pids | {monitor})))
        assert (state.phase, state.status) == ("ended", "killed")
        assert f"process {vmm} does not end" in state.error
        assert microguest("ls", "-a", "-q").stdout == b""


def test_a_machine_whose_init_is_traced_has_an_end(image: str, trace: Callable[..., None]) -> None:
    """Its launcher is the init's parent, and so is the monitor then."""
    with boot(image, machine="namespaces", command=["sleep", "1000"]) as machine:
        (init,) = children_of(machine.state.vmm)
        trace(init, NOTHING, FOLLOW)
        with contextlib.suppress(ConnectionLost):
            machine.agent.exec(["sh", "-c", "kill -9 $(pidof sleep)"])
        state = machine.wait(PATIENCE)
        assert (state.phase, state.status) == ("ended", "done")
        assert state_letter(init) == "Z"


def state_letter(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


KILLS = """
import sys
from microguest import boot
from microguest.errors import MachineError
from microguest.host_client.machines import control, find, monitor_link as link, machine

link.REAP_WAIT = control.KILL_WAIT = 0.5
started = boot(sys.argv[1], machine="namespaces", name="stuck")
print(started.state.monitor, flush=True)
sys.stdin.readline()
for kill in (find.find("stuck").kill, started.kill):
    try:
        kill()
    except MachineError as error:
        print(error, flush=True)
"""


def test_a_monitor_that_does_not_end_is_named(
    image: str, trace: Callable[[int, int], None]
) -> None:
    with machinekit.python(KILLS, image) as program:
        assert program.stdout is not None
        monitor = int(program.stdout.readline())
        os.kill(monitor, signal.SIGSTOP)
        trace(monitor, TRACEEXIT)
        out, err = program.communicate(b"\n", timeout=PATIENCE)
        said = f"machine stuck was killed, but its monitor, process {monitor}, does not end"
        assert [line.partition(":")[0] for line in out.decode().splitlines()] == [said, said], err


DAEMONS = {
    "a-share": """
shares = Shares((Share(source="/", argv=DAEMON, socket="one.sock"),), loop, ignored, ignored)
shares.start()
closed = shares.close
""",
    "vsock": """
plan = Plan(
    name="one", machine="qemu", url="", argv=(), console="socket", vsock="daemon", image="",
    command="", token_proof="", boot_timeout=1.0, daemon_argv=DAEMON, daemon_socket="/nowhere",
)
device = Device(plan, loop, ReportReader(loop, ignored, ignored), ignored)
device.start(lambda: None)
closed = device.close
""",
}
CLOSES = """
import sys, time
from microguest.host_client.machines.plan import Plan, Share
from microguest.host_client.monitor.reports import ReportReader
from microguest.host_client.monitor.shares import Shares
from microguest.host_client.monitor.vmm import Device
from microguest.host_client.event_loop import EventLoop

DAEMON, loop, ignored = ("sleep", "1000"), EventLoop(), lambda _: None
{starts}
print("started", flush=True)
sys.stdin.readline()
print(closed(time.monotonic() + 0.5), flush=True)
"""


@OPTIONS
@pytest.mark.parametrize("daemon", DAEMONS)
def test_a_daemon_that_does_not_end_is_told(
    tmp_path: Path,
    trace: Callable[[int, int], None],
    options: int,
    daemon: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # where its socket is
    with machinekit.python(CLOSES.format(starts=DAEMONS[daemon])) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"started\n", program.communicate()
        (pid,) = children_of(program.pid)
        trace(pid, options)
        out, _ = program.communicate(b"\n", timeout=PATIENCE)
        assert out.decode() == f"[{pid}]\n"


DIES = """
import os, sys, time
from microguest.host_client.machines.plan import Share
from microguest.host_client.monitor.shares import Shares
from microguest.host_client.event_loop import EventLoop

def told(reason):
    print(reason, flush=True)
    print(shares.close(time.monotonic() + 0.5), flush=True)
    loop.stop()

loop = EventLoop()
share = Share(source="/", argv=("sleep", "1000"), socket="one.sock")
shares = Shares((share,), loop, lambda _: None, told)
shares.start()
print("started", flush=True)
loop.run()
"""


def test_a_daemon_whose_end_is_kept_back_holds_up_no_monitor(
    tmp_path: Path, trace: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where its socket is
    with machinekit.python(DIES) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"started\n", program.communicate()
        (pid,) = children_of(program.pid)
        trace(pid, NOTHING)
        os.kill(pid, signal.SIGKILL)
        out, err = program.communicate(timeout=PATIENCE)
        said = "virtiofsd, which shows it /, ended (a debugger keeps how)"
        assert out.decode().splitlines() == [said, f"[{pid}]"]
        assert err == b""
