"""The keeper: PID 1's child that stays for the host when PID 1 becomes the image's own init.

It is what PID 1 is in mode supervise, but for being PID 1: it holds the listener, the deposits and
the report connection, starts the agent again, and reaps what the agent leaves (as a subreaper).
The machine's end is the init's: the keeper asks it, notices when it comes, and ends the machine
itself where the init does not. Imported in mode handoff only.
"""

import _socket
import os
import time

import _guestsys

from microguest.guest import bounds
from microguest.guest.boot.config import BootConfig
from microguest.guest.boot.workload import signal_number
from microguest.guest.errors import raised_at
from microguest.guest.report import HandedOff, Stopping
from microguest.init_shim.failure import Failure, call
from microguest.init_shim.kind import in_namespaces
from microguest.init_shim.life import power, protection
from microguest.init_shim.life.agent_child import AgentProcess
from microguest.init_shim.life.supervisor import Supervisor, await_agent
from microguest.init_shim.reporter import Reporter, failed_boot, say
from microguest.init_shim.root import write_out
from microguest.init_shim.signals import CONTINUE, KILL, TERMINATE, Signals
from microguest.init_shim.timeline import Timeline, boot_ms

TYPE_CHECKING = False  # typing itself is too heavy for PID 1
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Keeper", "start"]

NAME = "microguest-keeper"
CGROUPS = "/sys/fs/cgroup/microguest"  # where the agent has its own as well
PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 15, 36  # linux/prctl.h
SERVES = b"serves"
CALLED_OFF = b"called off"
SENTENCE = 4096  # bytes of what the keeper says instead of SERVES
KEEPER_ALLOWANCE = 5.0  # seconds beyond those that the agent has
ANSWER_WAIT = 0.2  # seconds for the agent to answer the host; a quick init ends it at once
ASK_AGAIN = 1.0  # seconds; an init that has only just started is deaf
LAST_LOOK = 0.05  # seconds between two looks at what nothing tells of

# systemd(1), SIGNALS; busybox's init is told what reboot(8) and poweroff(8) tell it.
SYSTEMD_POWER_OFF, SYSTEMD_REBOOT = signal_number("RTMIN+4"), signal_number("RTMIN+5")
BUSYBOX_POWER_OFF, BUSYBOX_REBOOT = signal_number("USR2"), signal_number("TERM")


# ── as PID 1 sees it ─────────────────────────────────────────────────────────────────────────────


class Keeper:
    """The child and the pair to it, whose end at execve(2) tells it that PID 1 is another."""

    def __init__(self, pid: int, pair: _socket.socket) -> None:
        self.pid = pid
        self._pair = pair

    def await_agent(self, signals: Signals) -> bool:
        """Until the agent serves; False where PID 1 was told to end meanwhile. Raises Failure."""
        patience = bounds.AGENT_READY_TIMEOUT + KEEPER_ALLOWANCE
        deadline = time.monotonic() + patience
        while not signals.stop_requested:
            left = deadline - time.monotonic()
            if left <= 0:
                raise Failure(f"{NAME} has not said anything after {patience:g} s")
            if signals.wait(left, read=[self._pair.fileno()]):
                said = self._pair.recv(SENTENCE)
                if said == SERVES:
                    return True
                raise Failure(said.decode("utf-8", "replace") or f"{NAME} has died")
        return False

    def call_off(self) -> None:
        """PID 1 stays what it is, and ends the machine."""
        try:
            self._pair.send(CALLED_OFF, _socket.MSG_NOSIGNAL)
        except OSError:
            pass  # it has died


def start(
    config: BootConfig, agent: AgentProcess, reporter: Reporter, timeline: Timeline
) -> Keeper:
    """Fork it; in the child this does not return. Raises Failure."""
    with call("socketpair", NAME):
        kind = _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, kind)
    with call("fork", NAME):
        pid = os.fork()
    if pid:
        theirs.close()
        return Keeper(pid, ours)
    try:
        ours.close()
        keep(theirs, config, agent, reporter, timeline)
    except BaseException as error:  # noqa: BLE001  nothing may run on as a second PID 1
        say(f"{NAME} failed: {raised_at(error)}")
    finally:
        os._exit(0)


# ── its life ─────────────────────────────────────────────────────────────────────────────────────


def keep(
    pair: _socket.socket,
    config: BootConfig,
    agent: AgentProcess,
    reporter: Reporter,
    timeline: Timeline,
) -> None:
    """From the agent's start to the end of the machine, or until PID 1 calls it off."""
    leave_pid_1()
    try:
        signals = Signals()  # PID 1 would take bytes out of the pipe of its own
        supervisor = Supervisor(signals, reporter, agent)
        agent.start()
        protection.watch_oom(config, supervisor, reporter)
        await_agent(supervisor, agent)
    except Failure as failure:
        pair.send(failure.message.encode()[:SENTENCE], _socket.MSG_NOSIGNAL)
        return
    if not agent.ready:
        return  # told to end, as PID 1 was
    pair.send(SERVES, _socket.MSG_NOSIGNAL)
    if not await_handoff(pair, signals):
        return
    reporter.send(HandedOff(boot_ms=boot_ms()))
    try:
        supervisor.run(lambda: False)
    except BaseException as error:  # noqa: BLE001  nobody could reach the machine any more
        reporter.send(failed_boot(error, timeline))
        supervisor.fail("boot-failed")
    if signals.stop_requested:  # by the init, and not by a host, which the agent would have told
        supervisor.status = "reboot" if systemd_verb() == "reboot" else "done"
    end(supervisor, config.workload.stop_signal if config.workload is not None else "TERM")


def leave_pid_1() -> None:
    """A session, a name and a cgroup of its own; orphans of the agent's come here."""
    os.setsid()
    _guestsys.prctl(PR_SET_CHILD_SUBREAPER, 1)
    set_title(NAME)
    try:
        # An init that takes over the hierarchy moves what is in its root: docs/design/handoff.md.
        for folder in (CGROUPS, f"{CGROUPS}/keeper"):
            if not os.path.isdir(folder):
                os.mkdir(folder, 0o755)
        with open(f"{CGROUPS}/keeper/cgroup.procs", "w", encoding="ascii") as file:
            file.write("0")
    except OSError:
        pass  # there is no hierarchy, or none to write to


def set_title(title: str) -> None:
    """What ps(1) shows. Short of a new program only this changes /proc/PID/cmdline: proc(5)."""
    try:
        with open("/proc/self/comm", "w", encoding="ascii") as file:
            file.write(title[:15])
        with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
        arguments, end_of_environment = int(fields[45]), int(fields[48])
        text = title.encode()
        if end_of_environment - arguments > len(text):  # which the environment lies behind
            with open("/proc/self/mem", "r+b", buffering=0) as memory:
                memory.seek(arguments)
                memory.write(text + bytes(end_of_environment - arguments - len(text)))
    except (OSError, ValueError, IndexError):
        pass  # only for people


def await_handoff(pair: _socket.socket, signals: Signals) -> bool:
    """Until PID 1 is the init; False where it stays what it was.

    A signal does not end the wait before: it comes from a PID 1 that calls everything off.
    """
    while not signals.wait(None, read=[pair.fileno()]):
        if signals.stop_requested:
            return False
    try:
        handed_off = not pair.recv(SENTENCE)
    except ConnectionResetError:  # closed with SERVES unread
        handed_off = False
    pair.close()
    return handed_off


# ── the end ──────────────────────────────────────────────────────────────────────────────────────


def end(supervisor: Supervisor, stop_signal: str) -> None:
    """Have the init end the machine; end it here where that takes INIT_ALLOWANCE too long.

    The init's own end begins with a TERM to every process. That is the moment for the last report:
    what comes next is a KILL. And it is for the disk under the root's overlay, which no init knows
    of. Returns where systemd does the rest: it waits for whom it has told.
    """
    signals = supervisor.signals
    deadline = time.monotonic() + supervisor.grace + bounds.INIT_ALLOWANCE
    if not signals.stop_requested:
        supervisor.outlive(ANSWER_WAIT)
    wait_asking(supervisor, stop_signal, deadline, lambda: signals.stop_requested)
    if signals.stop_requested:
        supervisor.reporter.send(Stopping(status=supervisor.status, boot_ms=boot_ms()))
        supervisor.reporter.farewell()
        end_children(supervisor)
        wait_until_alone(supervisor, bounds.KILL_WAIT if systemd_verb() else bounds.FAILED_GRACE)
        if not in_namespaces():
            write_out.write_out(bounds.SYNC_WAIT, root_only=True)
        if systemd_verb():
            return
        wait_asking(supervisor, stop_signal, deadline, lambda: False)
    say("the init does not end the machine; it is ended without it")
    for number in (TERMINATE, CONTINUE):
        kill_all(number)
    time.sleep(bounds.FAILED_GRACE)
    kill_all(KILL)
    supervisor.grace = 0.0
    power.end_machine(supervisor)


def wait_asking(
    supervisor: Supervisor, stop_signal: str, deadline: float, done: "Callable[[], bool]"
) -> None:
    """Ask the init once and then each ASK_AGAIN seconds, until `done` or the deadline."""
    ask_at = 0.0
    while (now := time.monotonic()) < deadline:
        if now >= ask_at and not systemd_verb():
            ask_init(stop_signal, reboot=supervisor.status == "reboot")
            ask_at = now + ASK_AGAIN
        if done():
            return
        if supervisor.outlive(LAST_LOOK):  # nobody is left to look after
            supervisor.signals.wait(LAST_LOOK)


def ask_init(stop_signal: str, *, reboot: bool) -> None:
    """By the signal that this init understands; `stop_signal` where it is an unknown one."""
    number = signal_number(stop_signal)
    if os.path.isdir("/run/systemd/system"):  # sd_booted(3)
        number = SYSTEMD_REBOOT if reboot else SYSTEMD_POWER_OFF
    elif init_is_busybox():
        number = BUSYBOX_REBOOT if reboot else BUSYBOX_POWER_OFF
    try:
        os.kill(1, number)
    except ProcessLookupError:
        pass


def init_is_busybox() -> bool:
    """Whether PID 1 is busybox, and that its init and not its shell."""
    try:
        program = os.path.basename(os.readlink("/proc/1/exe"))
        with open("/proc/1/comm", "rb", buffering=0) as file:
            return (program, file.read(16)) == ("busybox", b"init\n")
    except OSError:
        return False


def systemd_verb() -> str:
    """What systemd's last program was told to do (systemd-shutdown(8)); "" before PID 1 is that."""
    try:
        with open("/proc/1/cmdline", "rb", buffering=0) as file:
            words = (file.read(4096) or b"").split(b"\0")
    except OSError:
        return ""
    if os.path.basename(words[0]) != b"systemd-shutdown" or len(words) < 2:
        return ""
    return words[1].decode("ascii", "replace")


def end_children(supervisor: Supervisor) -> None:
    """The agent and what it has started; they were told already, if the init is one that tells."""
    for number, patience in ((TERMINATE, bounds.FAILED_GRACE), (KILL, bounds.KILL_WAIT)):
        deadline = time.monotonic() + patience
        told: set[int] = set()
        while not supervisor.outlive(LAST_LOOK) and time.monotonic() < deadline:
            for pid in children_of(os.getpid()) - told:  # a dead one's own come one by one
                told.add(pid)
                os.kill(pid, number)
                os.kill(pid, CONTINUE)


def wait_until_alone(supervisor: Supervisor, patience: float) -> None:
    """Until the init has ended all others. `patience`: seconds; busybox kills after one."""
    ours = {1, os.getpid()}
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and parents().keys() - ours:
        supervisor.signals.wait(LAST_LOOK)


def children_of(parent: int) -> set[int]:
    """Those not reaped yet; only their parent may take the numbers for granted."""
    return {pid for pid, its_parent in parents().items() if its_parent == parent}


def parents() -> dict[int, int]:
    """Of every process; the kernel's own left out, which descend from process 2."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdecimal() and name != "2":
            try:
                with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                    found[int(name)] = int(file.read().rpartition(")")[2].split()[1])
            except (OSError, IndexError):  # it has ended
                continue
    return {pid: parent for pid, parent in found.items() if parent != 2}


def kill_all(number: int) -> None:
    """To everybody but the init and the keeper, as kill(2) has it for -1."""
    try:
        os.kill(-1, number)
    except ProcessLookupError:
        pass
