"""The process that a machine belongs to: starts the VMM, serves its vsock, cleans up after it.

One per machine, one event loop; what a guest could hold has a thread of its own. Its life:

    wait for the plan ─▶ start the VMM ─▶ until `ready` ─▶ until the VMM ends ─▶ drain ─▶ clean up

Whatever ends it, nothing of the machine stays: the caller's death closes the link and that kills
the VMM; the VMM has this process as its death signal; this process's own death frees the folder's
lock, and the next command of anybody sweeps the folder. It imports no more than it needs.
"""

import contextlib
import fcntl
import os
import signal
import socket
import sys
import time
from select import EPOLLIN
from typing import Final

from microguest.guest.errors import printable
from microguest.guest.record import Record, RecordError
from microguest.guest.report import BootFailed, Ready, Stopping
from microguest.host_client.event_loop import EventLoop
from microguest.host_client.machines.console import RotatingLog, printable_lines
from microguest.host_client.machines.folder import (
    STATE_VARIABLE,
    remove_all,
    remove_running,
    write_file,
)
from microguest.host_client.machines.plan import (
    COMMANDS,
    CONSOLE_SHOWN,
    PACKET_MAX,
    SIGNALLED,
    Detach,
    End,
    MachineState,
    Pause,
    Plan,
    PowerOff,
    Resume,
    clipped,
    cut,
)
from microguest.host_client.monitor.boottime import BootTimeline
from microguest.host_client.monitor.history import changes, left_out
from microguest.host_client.monitor.qmp import Qmp
from microguest.host_client.monitor.reports import ReportReader
from microguest.host_client.monitor.shares import Shares
from microguest.host_client.monitor.verdict import failure_on_console, has_restarted, unexplained
from microguest.host_client.monitor.vmm import Device, Vmm
from microguest.host_client.shortage import cannot_start, explain

__all__ = ["Monitor", "main"]

CTRL_ALT_DEL: Final = [{"type": "qcode", "data": key} for key in ("ctrl", "alt", "delete")]
LAUNCHER_RESTARTED: Final = 3  # exit code of the namespaces launcher
# Seconds; a guest that is paused cannot act, so they begin anew where one is when they are over.
STOPPING_WAIT: Final = 15.0  # from PID 1's last report to the VMM's exit
FAILED_WAIT: Final = 12.0  # from a failed boot's report, after which it still writes its disks
# Seconds for a killed VMM to be gone. With all waits behind it, less than control.KILL_WAIT.
KILLED_WAIT: Final = 4.0
SERVANTS_WAIT: Final = 3.0  # seconds for what ran beside it to be gone
# Seconds for a caller to read the console of an ended machine. One that is busy has its last lines
# in the last state, which waits in the link for as long as the caller lives.
FAREWELL_WAIT: Final = 1.0
# Seconds from the VMM's exit for the guest's last bytes to reach their readers. A workload's output
# does not depend on it: PID 1 waits for its reader before it ends the machine.
DRAIN_WAIT: Final = 1.0
WRITE_EVERY: Final = 0.2  # seconds between two writes of what a guest reports after its boot
UNREAD_MAX: Final = 64 * 1024  # bytes; with two states more a socket's default buffer is full
UNREAD_EVERY: Final = 0.05  # seconds between looks whether the caller reads again
UNENDED_NAMED: Final = 8  # processes of a machine that do not end
SIOCOUTQ: Final = 0x5411  # linux/sockios.h: bytes that the other end has not read; as TIOCOUTQ


def main(arguments: list[str]) -> int:
    """`FOLDER LINK_FD LOCK_FD`: the machine's folder, the link to its caller, the folder's lock."""
    # Whatever signals who started us ignores or blocks: ours end the machine, and with SIGCHLD
    # ignored no exit code could be had.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    folder, link_fd, lock_fd = arguments[0], int(arguments[1]), int(arguments[2])
    os.set_inheritable(link_fd, False)
    os.set_inheritable(lock_fd, False)
    link = socket.socket(fileno=link_fd)
    plan, keep = None, False
    try:
        plan = await_plan(link)
        if plan is not None:
            monitor = Monitor(folder, lock_fd, link, plan)
            keep = plan.keep  # whatever this process does
            keep = monitor.run() and plan.keep
    except OSError as error:
        if plan is None or keep:  # it ran
            raise
        tell_never_made(link, plan, error, folder)
        return 1
    finally:
        remove_leftovers(folder, lock_fd, keep=keep)
        link.close()
    return 0


def await_plan(link: socket.socket) -> Plan | None:
    """The plan, which comes when the image is ready; None where the caller gave up or died."""
    try:
        packet = link.recv(PACKET_MAX)
        command = COMMANDS.decode(packet) if packet else None
    except (OSError, RecordError):
        return None
    return command if isinstance(command, Plan) else None


def tell_never_made(link: socket.socket, plan: Plan, error: OSError, folder: str) -> None:
    """The only state of a machine that there was no room for; its caller may be gone."""
    why = f"cannot prepare the machine: {explain(error, folder, move=STATE_VARIABLE)}"
    state = MachineState(
        name=plan.name, machine=plan.machine, phase="ended", status="boot-failed", error=cut(why)
    )
    with contextlib.suppress(OSError):
        link.send(state.to_json().encode("ascii"), socket.MSG_NOSIGNAL)


def remove_leftovers(path: str, folder: int, *, keep: bool) -> None:
    """Everything, or all but the state and the logs. folder: its descriptor."""
    os.chdir("/")
    if keep:
        remove_running(folder)
    else:
        remove_all(path, folder)


class Monitor:
    """One machine's life after its plan is there."""

    def __init__(self, folder: str, lock_fd: int, link: socket.socket, plan: Plan) -> None:
        self.folder = folder
        self._lock_fd = lock_fd  # the same folder
        self.plan = plan
        self.loop = EventLoop()
        self.state = MachineState(
            name=plan.name,
            machine=plan.machine,
            image=plan.image,
            command=plan.command,
            labels=plan.labels,
            stdio=plan.stdio,
            url=plan.url,
            monitor=os.getpid(),
            created=time.time(),
            kept=plan.keep,
        )
        self._link: socket.socket | None = link
        self._unsent = False
        self._unwritten = False
        self._written = float("-inf")  # time.monotonic()
        self._attached = True
        self._over = False
        self._restarted = False
        self._asked_to_end = False
        self._timeline = BootTimeline(shared_clock=plan.machine == "namespaces")
        self._reports = ReportReader(self.loop, self._on_report, self._on_bad_report)
        self._console = RotatingLog(os.path.join(folder, "console.log"), timed=True)
        self._messages = RotatingLog(os.path.join(folder, "vmm.log"), 64 * 1024)
        self._vmm: Vmm | None = None
        self._device: Device | None = None
        self._qmp: Qmp | None = None
        self._shares = Shares(
            plan.shares,
            self.loop,
            self._messages.write,
            lambda reason: self._end("crashed", reason),
        )
        self._wakeup = socket.socketpair()
        self._lease = hold_lease(plan.lease)

    def run(self) -> bool:
        """Until the machine has ended and is known to have. True where it ever came up."""
        os.chdir(os.path.join(self.folder, "run"))
        assert self._link is not None
        self._link.setblocking(False)
        self.loop.add(self._link.fileno(), lambda _events: self._on_link(), EPOLLIN)
        self._take_signals()
        self.loop.defer(self._launch)
        try:
            self.loop.run()
        except Exception as error:
            self._change(phase="ended", status="crashed", error=f"its monitor failed: {error!r}")
            raise
        self._console.close()
        self._messages.close()
        if self._lease >= 0:
            os.close(self._lease)
        return any(step.name == "ready" for step in self.state.timeline)

    # ── the start ────────────────────────────────────────────────────────────────────────────────

    def _launch(self) -> None:
        try:
            if self.plan.report_socket:
                self._reports.listen(listening_at(self.plan.report_socket))
            self._shares.start()
            self._device = Device(self.plan, self.loop, self._reports, self._on_device_failure)
            self._device.start(self._start_vmm)
        except OSError as error:
            why = explain(error, os.path.join(self.folder, "run"), move=STATE_VARIABLE)
            self._never_started(f"cannot prepare the machine: {why}")

    def _start_vmm(self) -> None:
        assert self._device is not None
        launched = time.monotonic()
        try:
            self._vmm = Vmm(self.plan, self.loop, self._device)
        except OSError as error:
            self._never_started(cannot_start(self.plan.argv[0], error))
            return
        self._vmm.watch(self._on_console, self._messages.write, self._on_vmm_exit)
        if self._vmm.qmp is not None:
            self._qmp = Qmp(self.loop, self._vmm.qmp, self._on_vmm_event)
        self._timeline.launched(launched)
        self._change(launched=launched, vmm=self._vmm.pid, timeline=self._timeline.steps)
        self.loop.call_later(self.plan.boot_timeout, self._boot_timeout)

    def _never_started(self, error: str) -> None:
        self._note_end("boot-failed", error)
        self._finish()

    def _boot_timeout(self) -> None:
        if self.state.paused:
            self.loop.call_later(self.plan.boot_timeout, self._boot_timeout)
        elif self.state.phase == "starting":
            seconds = self.plan.boot_timeout
            self._end("boot-failed", f"it was not ready {seconds:g} s after its launch")

    def _take_signals(self) -> None:
        """They are commands of somebody who has no link.

        They are taken in the loop, not between two of its lines.
        """
        reader, writer = self._wakeup
        for end in self._wakeup:
            end.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        for number in SIGNALLED:
            signal.signal(number, lambda _number, _frame: None)

        def taken(_events: int) -> None:
            for number in reader.recv(64):
                self._obey(SIGNALLED[number])

        self.loop.add(reader.fileno(), taken, EPOLLIN)

    # ── the caller ───────────────────────────────────────────────────────────────────────────────

    def _on_link(self) -> None:
        assert self._link is not None
        try:
            packet = self._link.recv(PACKET_MAX)
            command = COMMANDS.decode(packet) if packet else None
        except (OSError, RecordError):
            command = None
        if isinstance(command, Detach):
            self._attached = False
        elif command is not None:
            self._obey(command)
        else:
            self._close_link()
            if self._attached:
                self._end("lost")

    def _obey(self, command: Record) -> None:
        if isinstance(command, End):
            self._end("killed")
        elif isinstance(command, PowerOff):
            self._ask_to_end()
        elif isinstance(command, Pause | Resume):
            self._tell_vmm("stop" if isinstance(command, Pause) else "cont")

    def _close_link(self) -> None:
        if self._link is not None:
            self.loop.remove(self._link.fileno())
            self._link.close()
            self._link = None

    def _change(self, **fields: object) -> None:
        """The state is another now: to disk, and to the caller."""
        self.state = self.state.replace(**fields)
        self._write()
        self._tell()

    def _note(self, **fields: object) -> None:
        """The same for what a guest may say again and again: to disk when it is time."""
        self.state = self.state.replace(**fields)
        self._tell()
        wait = self._written + WRITE_EVERY - time.monotonic()
        if wait <= 0:
            self._write()
        elif not self._unwritten:
            self._unwritten = True
            self.loop.call_later(wait, self._write_again)

    def _write_again(self) -> None:
        if self._unwritten and not self._over:
            self._write()

    def _write(self) -> None:
        self._unwritten = False
        self._written = time.monotonic()
        document = self.state.to_json().encode("ascii")
        try:
            write_file("state.json", document, self._lock_fd)
        except OSError as error:
            note(f"state.json: {error}")

    def _tell(self) -> None:
        """Send the state. A caller that does not read gets the newest one when it does again.

        So that the last one has room, it never has more of them unread than UNREAD_MAX and one.
        """
        if self._link is None or self._unsent:
            return
        if unread(self._link) > UNREAD_MAX:
            self._unsent = True
            self.loop.call_later(UNREAD_EVERY, self._tell_again)
            return
        try:
            self._link.send(self.state.to_json().encode("ascii"), socket.MSG_NOSIGNAL)
        except OSError:
            pass  # its end is noticed by `_on_link`

    def _tell_again(self) -> None:
        self._unsent = False
        self._tell()

    # ── by way of the VMM ────────────────────────────────────────────────────────────────────────

    def _tell_vmm(self, command: str, **arguments: object) -> None:
        """What comes of it is in the state; a refusal is among the VMM's messages."""

        def answered(error: str) -> None:
            if error:
                self._messages.write(f"{command}: {error}\n".encode())

        if self._qmp is not None:
            self._qmp.execute(command, answered, **arguments)

    def _ask_to_end(self) -> None:
        """As a person at its keyboard would; PID 1 and inits of images' own understand that."""
        self._asked_to_end = True
        if self.plan.machine == "namespaces":
            if self._vmm is not None:
                self._vmm.terminate()
        else:
            self._tell_vmm("send-key", keys=CTRL_ALT_DEL)

    def _on_vmm_event(self, name: str, reason: str) -> None:
        if name in ("STOP", "RESUME"):
            self._change(paused=name == "STOP")
        elif (name, reason) == ("SHUTDOWN", "guest-reset"):
            self._restarted = True

    # ── the guest ────────────────────────────────────────────────────────────────────────────────

    def _on_console(self, data: bytes) -> None:
        self._console.write(data)

    def _on_bad_report(self, what: str) -> None:
        note(what)

    def _on_report(self, report: Record) -> None:
        report = clipped(report)
        moved = self._timeline.take(report)
        match report:
            case Ready():
                self._on_ready(report)
            case BootFailed():
                self._on_boot_failed(report)
            case Stopping():
                if not self.state.status:
                    self._change(phase="stopping", status=report.status)
                self._end_after(STOPPING_WAIT, "it did not power off")
            case _:
                fields = changes(self.state, report, self._timeline.now())
                if moved:
                    fields["timeline"] = self._timeline.steps
                if fields:
                    self._note(**fields)

    def _on_ready(self, report: Ready) -> None:
        if self.state.phase != "starting":
            return
        if report.token_proof != self.plan.token_proof:
            self._end("boot-failed", "what came up has another token than this machine was given")
            return
        for name in self.plan.boot_files:
            os.unlink(name)
        self._change(
            phase="running",
            agent="serving",
            timeline=self._timeline.steps,
            **left_out(self.state, report, self._timeline.now()),
        )

    def _on_boot_failed(self, report: BootFailed) -> None:
        self._change(boot_failed=report)
        self._note_end("boot-failed", f"boot failed in step {report.step}: {report.message}")
        self._end_after(FAILED_WAIT, "")

    # ── the end ──────────────────────────────────────────────────────────────────────────────────

    def _end(self, status: str, error: str = "") -> None:
        """Kill the VMM; the first reason that is given is the one that counts."""
        if self._over:
            return
        self._note_end(status, error)
        if self._vmm is None:
            self._finish()
        else:
            self._vmm.kill()
            self.loop.call_later(KILLED_WAIT, self._finish)

    def _end_after(self, seconds: float, error: str) -> None:
        def over() -> None:
            if self.state.paused:
                self._end_after(seconds, error)
            else:
                self._end("crashed", error)

        self.loop.call_later(seconds, over)

    def _note_end(self, status: str, error: str = "") -> None:
        if not self.state.status:
            self._change(phase="stopping", status=status, error=cut(error))

    def _on_device_failure(self, reason: str) -> None:
        self._end("crashed", f"its vsock device failed: {reason}")

    def _on_vmm_exit(self) -> None:
        """What the guest said last may still be on its way."""
        assert self._device is not None
        self._device.drain(self._drained, DRAIN_WAIT)

    def _drained(self) -> None:
        self._reports.drain()
        self._finish()

    def _finish(self) -> None:
        """Everything is known: say so, and leave the loop."""
        if self._over:
            return
        self._over = True
        code = None
        if self._qmp is not None:
            self._qmp.drain()
            self._qmp.close()
        if self._vmm is not None:
            code = self._vmm.close()
        if self.plan.machine == "namespaces":
            self._restarted = code == LAUNCHER_RESTARTED
        if has_restarted(self.state, self._console.tail(), restarted=self._restarted):
            self._change(status="reboot")
        if self._asked_to_end and (code == 0 or self._restarted):
            self._note_end("shutdown")
        if not self.state.status:
            self._explain_exit(code)
        self._reports.close()
        self._close_servants()
        last = cut(printable_lines(self._console.tail()), CONSOLE_SHOWN, tail=True)
        self._change(phase="ended", vmm_code=code, console=last)
        self._farewell()
        self.loop.stop()

    def _close_servants(self) -> None:
        """End what ran beside the VMM, and tell of what does not end."""
        left = [] if self._vmm is None else self._vmm.left()
        deadline = time.monotonic() + SERVANTS_WAIT
        left += self._shares.close(deadline)
        if self._device is not None:
            left += self._device.close(deadline)
        if left:
            error = f"{still_running(left)}: {self.state.error}".removesuffix(": ")
            note(error)
            self._change(error=cut(error))

    def _explain_exit(self, code: int | None) -> None:
        """The VMM ended and nobody had said why."""
        console = self._console.tail()
        failure = failure_on_console(console)
        if failure is not None:
            self._on_report(failure)
            return
        status, error = unexplained(
            self.state,
            code,
            restarted=self._restarted,
            program=self.plan.argv[0],
            last=self._messages.tail(),
            console=console,
        )
        self._note_end(status, error)

    def _farewell(self) -> None:
        """Let a caller that listens have the final state and read the console before it is gone.

        Its answer is any packet, or that it closes; a caller that is busy is not waited for.
        """
        if self._link is None or not self._attached:
            return
        with contextlib.suppress(OSError):
            if self._unsent:  # not by poll(2), which wants three quarters to be free
                self._link.send(self.state.to_json().encode("ascii"), socket.MSG_NOSIGNAL)
            self._link.settimeout(FAREWELL_WAIT)
            self._link.recv(PACKET_MAX)


def unread(link: socket.socket) -> int:
    """Bytes that the other end has not read, as the kernel counts them."""
    count = bytearray(4)
    fcntl.ioctl(link, SIOCOUTQ, count)
    return int.from_bytes(count, sys.byteorder)


def still_running(pids: list[int]) -> str:
    """Of a machine that has ended but for these."""
    numbers = ", ".join(map(str, pids[:UNENDED_NAMED]))
    more = len(pids) - UNENDED_NAMED
    numbers += f" and {more} more" if more > 0 else ""
    what = f"process {numbers} does" if len(pids) == 1 else f"processes {numbers} do"
    return (
        f"its {what} not end, though killed: traced by another program, or in a call that the "
        "kernel does not end (look at ps -o pid,stat,wchan)"
    )


def note(what: str) -> None:
    """A line in monitor.log, which somebody may read at a terminal."""
    print(printable(what), file=sys.stderr, flush=True)


def hold_lease(path: str) -> int:
    """A shared lock on an entry of the image cache, so that it stays; -1 without one."""
    if not path:
        return -1
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return fd


def listening_at(path: str) -> socket.socket:
    """A Unix socket below the current folder, which keeps its path short."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener
