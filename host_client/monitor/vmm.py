"""The processes of one machine, as its monitor has them: the VMM, and what serves its vsock."""

import base64
import contextlib
import ctypes
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from select import EPOLLIN
from typing import Final

from microguest.guest import bounds
from microguest.host_client.event_loop import EventLoop
from microguest.host_client.machines.kin import end_descendants, running_descendants
from microguest.host_client.machines.plan import HYBRID_SOCKET, Plan, blank, filled
from microguest.host_client.monitor.relay import relayed
from microguest.host_client.monitor.reports import ReportReader

__all__ = ["Device", "Vmm", "has_ended", "spawn"]

DAEMON_WAIT: Final = 15.0  # seconds from its start for a vsock daemon to listen
DAEMON_POLL: Final = 0.01
CHUNK: Final = 64 * 1024
CHUNKS_AT_END: Final = 64  # of console that is read after the VMM's exit; a socket holds less
RELAY_WAIT: Final = 1.0  # seconds after the VMM's exit for the relay to come to the console's end
REAP_EVERY: Final = 0.01  # seconds between looks whether what has ended can be reaped
ORPHANS_WAIT: Final = 0.5  # seconds for PID 1 to die of its launcher's death
ORPHANS_KILL: Final = 0.1  # seconds at a time in which what keeps it is killed
ENDED_WAIT: Final = 2.0  # seconds from the VMM's exit for all that
PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
PR_SET_SECCOMP: Final = 22
PR_SET_CHILD_SUBREAPER: Final = 36
SECCOMP_MODE_FILTER: Final = 2  # linux/seccomp.h
INSTRUCTION: Final = 8  # bytes of a struct sock_filter

_libc = ctypes.CDLL(None, use_errno=True)


class FilterProgram(ctypes.Structure):
    """struct sock_fprog of linux/filter.h."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def dies_with(parent: int, filtered: str = "") -> Callable[[], None]:
    """For subprocess's preexec_fn: be killed with `parent`, and at once if it is dead already.

    filtered: a filter of system calls as base64, for root's. The monitor has one thread until its
    last child runs, so nothing can hold a lock across the fork.
    """
    code = base64.b64decode(filtered)
    program = FilterProgram(len(code) // INSTRUCTION, code)

    def ask() -> None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
        if code and _libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0):
            os._exit(1)  # nothing runs without the filter that it was to have

    return ask


def spawn(
    argv: list[str],
    *,
    stdout: int,
    stderr: int,
    keep: tuple[int, ...] = (),
    filtered: str = "",
) -> "subprocess.Popen[bytes]":
    """A child that ends with this process. OSError where it cannot be started.

    filtered: as `dies_with` has it.
    """
    return subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        pass_fds=keep,
        preexec_fn=dies_with(os.getpid(), filtered),  # noqa: PLW1509
        start_new_session=True,
    )


def has_ended(process: "subprocess.Popen[bytes]", deadline: float) -> bool:
    """Whether it has until then (time.monotonic()), and is reaped.

    A killed one need not: where a program traces it, that one comes first.
    """
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    return True


class Device:
    """The machine's vsock on this side: built in, a daemon, the kernel's, or none."""

    def __init__(
        self,
        plan: Plan,
        loop: EventLoop,
        reports: ReportReader,
        on_failure: Callable[[str], None],
    ) -> None:
        self._plan = plan
        self._loop = loop
        self._reports = reports
        self._on_failure = on_failure
        self._daemon: subprocess.Popen[bytes] | None = None
        self._daemon_pidfd = -1
        self._closed = False
        self.vmm_end: socket.socket | None = None  # is inherited by the VMM
        self._built_in = self._make_built_in() if plan.vsock == "built-in" else None

    def start(self, ready: Callable[[], None]) -> None:
        """Call `ready` as soon as the VMM can be started."""
        if self._plan.vsock == "kernel":
            self._listen_in_kernel()
        if not self._plan.daemon_argv:
            ready()
            return
        self._daemon = spawn(
            list(self._plan.daemon_argv), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._daemon_pidfd = os.pidfd_open(self._daemon.pid)
        self._loop.add(self._daemon_pidfd, lambda _events: self._daemon_died(), EPOLLIN)
        self._await_daemon(ready, int(DAEMON_WAIT / DAEMON_POLL))

    def drain(self, done: Callable[[], None], timeout: float) -> None:
        """The VMM has ended: deliver what the guest sent, then call `done`."""
        if self._built_in is not None:
            self._built_in.drain(done, timeout)
        else:
            self._loop.defer(done)

    def close(self, deadline: float) -> list[int]:
        """End all of it; which processes have not ended until then, though killed.

        deadline: time.monotonic().
        """
        self._closed = True
        if self._built_in is not None:
            self._built_in.close()
        if self.vmm_end is not None:
            self.vmm_end.close()
        if self._daemon is not None:
            self._loop.remove(self._daemon_pidfd)
            os.close(self._daemon_pidfd)
            self._daemon.kill()
            if not has_ended(self._daemon, deadline):
                return [self._daemon.pid]
        return []

    def _make_built_in(self) -> "VsockDevice":
        from microguest.host_client.vhost_vsock import VsockDevice

        ours, self.vmm_end = socket.socketpair()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(HYBRID_SOCKET)
        listener.listen(bounds.LISTEN_BACKLOG)
        return VsockDevice(
            self._loop,
            guest_cid=self._plan.guest_cid,
            control=ours,
            hybrid_listener=listener,
            connect_to_host=self._dialled_by_guest,
            on_failure=self._on_failure,
        )

    def _dialled_by_guest(self, port: int) -> socket.socket | None:
        return self._reports.dialled() if port == self._plan.report_port else None

    def _listen_in_kernel(self) -> None:
        """Any guest of the host may dial this, and any program of it; only ours is heard."""
        listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        listener.bind((socket.VMADDR_CID_ANY, self._plan.report_port))
        listener.listen(16)
        self._reports.listen(listener, cid=self._plan.guest_cid)

    def _await_daemon(self, ready: Callable[[], None], tries: int) -> None:
        if self._closed:
            return
        if os.path.exists(self._plan.daemon_socket):
            ready()
        elif tries == 0:
            self._on_failure(f"{self._plan.daemon_argv[0]} does not listen after {DAEMON_WAIT:g} s")
        else:
            self._loop.call_later(DAEMON_POLL, lambda: self._await_daemon(ready, tries - 1))

    def _daemon_died(self) -> None:
        self._loop.remove(self._daemon_pidfd)
        self._on_failure(f"{self._plan.daemon_argv[0]} ended")


class Vmm:
    """The VMM's process, its console and what it complains about."""

    def __init__(self, plan: Plan, loop: EventLoop, device: Device) -> None:
        """Start it. OSError where that fails."""
        self._loop = loop
        self._closed = False
        self._on_exit: Callable[[], None] | None = None
        self._inputs: dict[int, Callable[[bytes], None]] = {}
        keep: list[int] = [] if device.vmm_end is None else [device.vmm_end.fileno()]
        names = {"vsock": str(keep[0] if keep else ""), "monitor": str(os.getpid()), "console": ""}
        messages, messages_end = os.pipe2(os.O_CLOEXEC)
        console_end = messages_end
        self._messages = self._console = messages
        if plan.console == "socket":
            ours, theirs = socket.socketpair()
            self._console, console_end = ours.detach(), theirs.detach()
            keep.append(console_end)
            names["console"] = str(console_end)
        self.qmp: socket.socket | None = None  # QEMU's control connection
        qmp_end = -1
        if any(blank("qmp") in word for word in plan.argv):
            self.qmp, qemus = socket.socketpair()
            qmp_end = qemus.detach()
            keep.append(qmp_end)
            names["qmp"] = str(qmp_end)
        argv = [filled(word, names) for word in plan.argv]
        # The launcher's orphan, PID 1, becomes this process's child: nothing of it ends unseen.
        self._launches = plan.console == "stdout"
        if self._launches:
            _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        try:
            self._process = spawn(argv, stdout=messages_end, stderr=messages_end, keep=tuple(keep))
        except OSError:
            for fd in {self._messages, self._console}:
                os.close(fd)
            if self.qmp is not None:
                self.qmp.close()
            raise
        finally:
            for fd in {messages_end, console_end, qmp_end} - {-1}:
                os.close(fd)
            if device.vmm_end is not None:
                device.vmm_end.close()
        self.pid = self._process.pid
        self._pidfd = os.pidfd_open(self.pid)
        self._myself = -1
        if self._launches:
            self._myself = os.pidfd_open(os.getpid())
            self._messages = self._console = relayed(messages)

    def watch(
        self,
        on_console: Callable[[bytes], None],
        on_message: Callable[[bytes], None],
        on_exit: Callable[[], None],
    ) -> None:
        """Begin to call back. Where the console is the VMM's output, there are no messages."""
        self._inputs[self._messages] = on_message
        self._inputs[self._console] = on_console
        for fd in self._inputs:
            os.set_blocking(fd, False)
            self._loop.add(fd, self._reader(fd), EPOLLIN)
        self._on_exit = on_exit
        self._loop.add(self._pidfd, lambda _events: self._exited(), EPOLLIN)

    def terminate(self) -> None:
        """SIGTERM, which the namespaces launcher passes on to PID 1."""
        self._process.terminate()

    def kill(self) -> None:
        """SIGKILL, once it runs."""
        self._process.kill()

    def close(self) -> int | None:
        """Read what is left, reap it, and give its return code; None where it has not ended."""
        self._closed = True
        deadline = time.monotonic() + (RELAY_WAIT if self._launches else 0.0)
        for fd in list(self._inputs):
            for _ in range(CHUNKS_AT_END):
                if not (self._readable(fd) or self._becomes_readable(fd, deadline)):
                    break
            self._forget(fd)
        self._loop.remove(self._pidfd)
        os.close(self._pidfd)
        if self._launches:
            end_descendants(self._myself, ORPHANS_KILL)
            os.close(self._myself)
        return self._process.poll()

    def left(self) -> list[int]:
        """The processes of it that have not ended, though they were killed."""
        if self._process.poll() is None:
            return [self.pid]
        return running_descendants(os.getpid()) if self._has_orphans() else []

    def _reader(self, fd: int) -> Callable[[int], None]:
        def ready(_events: int) -> None:
            self._readable(fd)

        return ready

    def _readable(self, fd: int) -> bool:
        """One read(2). False where there is no more now."""
        callback = self._inputs.get(fd)
        if callback is None:
            return False
        try:
            data = os.read(fd, CHUNK)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._forget(fd)
            return False
        callback(data)
        return True

    def _becomes_readable(self, fd: int, deadline: float) -> bool:
        """Until then; where it is at its end, or nothing may come any more, it does not."""
        if fd not in self._inputs:
            return False
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(max(0, int((deadline - time.monotonic()) * 1000))))

    def _forget(self, fd: int) -> None:
        if self._inputs.pop(fd, None) is not None:
            self._loop.remove(fd)
            os.close(fd)

    def _exited(self) -> None:
        self._loop.remove(self._pidfd)
        self._await_end(time.monotonic())

    def _await_end(self, exited: float) -> None:
        """Until it is reaped, for which a debugger comes first, and so is what it has left."""
        if self._closed:
            return
        since = time.monotonic() - exited
        ended = self._process.poll() is not None and not self._has_orphans()
        if ended or since > ENDED_WAIT:
            assert self._on_exit is not None
            self._on_exit()
            return
        if since > ORPHANS_WAIT and self._launches:
            end_descendants(self._myself, ORPHANS_KILL)
        self._loop.call_later(REAP_EVERY, lambda: self._await_end(exited))

    def _has_orphans(self) -> bool:
        """Whether what the launcher has left runs; what of that has ended is reaped."""
        with contextlib.suppress(ChildProcessError):
            while self._launches:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    return True
        return False


TYPE_CHECKING = False
if TYPE_CHECKING:
    from microguest.host_client.vhost_vsock import VsockDevice
