"""The caller's end of a machine's monitor: it starts it, sends the plan, hears the state."""

import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
import time
import warnings
from typing import Final

from microguest.guest.record import Record, RecordError
from microguest.host_client.descriptors import above_standard
from microguest.host_client.errors import MachineError
from microguest.host_client.forking import close_in_children, tell_children
from microguest.host_client.log import INFO, WARNING, note
from microguest.host_client.machines.console import printable_lines, read_log
from microguest.host_client.machines.control import VMM_WAIT, not_ended
from microguest.host_client.machines.folder import Folder, is_alive, read_state
from microguest.host_client.machines.kin import end_descendants
from microguest.host_client.machines.plan import COMMANDS, STATE_MAX, End, MachineState
from microguest.host_client.shortage import cannot_start

__all__ = ["Link"]

REAP_WAIT: Final = 10.0  # seconds for a monitor that closed its link to be gone
TURN: Final = 0.2  # seconds that one thread listens before another may
BURST: Final = 64  # states that are read at once: as many as a socket holds
LOOK_EVERY: Final = 0.05  # seconds between looks at the state of a machine that is not ours
MONITOR: Final = "a monitor process"

# The monitor must run whatever the caller's environment, folder and site-packages are: isolated,
# without `site`, with just the folder that holds our package.
# Not resolved: what is imported are links to where this file is.
HOME: Final = os.path.abspath(__file__).rpartition("/microguest/")[0]
PROGRAM: Final = (
    "import sys; sys.path.append({home!r}); "
    "from microguest.host_client.monitor.main import main; sys.exit(main(sys.argv[1:]))"
)


class Link:
    """Thread-safe. The machine ends when this is closed, unless it was detached."""

    def __init__(self, folder: Folder) -> None:
        """Start the monitor, which takes over the folder's lock."""
        self.name = folder.name
        self._console_path = os.path.join(folder.path, "console.log")
        self._console = b""
        self.state = MachineState(name=folder.name)
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._closed_by_monitor = False
        self._detached = False
        try:
            self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            raise MachineError(cannot_start(MONITOR, error)) from error
        close_in_children(self._socket)
        close_in_children(theirs)
        tell_children(self)
        try:
            self._process = start_monitor(folder, theirs)
        except OSError as error:
            self._socket.close()
            raise MachineError(cannot_start(MONITOR, error)) from error
        finally:
            theirs.close()
        folder.release()

    def forked(self) -> None:
        """See `Owner.forked`: the monitor and its machine are the parent's."""
        self._lock = threading.Lock()
        if hasattr(self, "_process"):
            self._process.returncode = 0  # not ours to reap

    @property
    def foreign(self) -> bool:
        """Whether this is a forked child's copy."""
        return os.getpid() != self._owner

    @property
    def held(self) -> bool:
        """Whether the machine is ours to end: neither a forked child's copy nor detached."""
        return not (self.foreign or self._detached)

    def check_owner(self) -> None:
        """MachineError in a forked child, and where the machine was detached."""
        if self._detached:
            raise MachineError(
                f"machine {self.name} was detached and goes on without this object: use "
                f"find({self.name!r}), or microguest stop {self.name}"
            )
        if self.foreign:
            raise MachineError(
                f"machine {self.name} belongs to process {self._owner}, from which this one was "
                f"forked: end it there, or by its name: microguest stop {self.name}"
            )

    def send(self, command: Record) -> None:
        """Give a command; a monitor that is gone is noticed when its state is asked for."""
        self.check_owner()
        try:
            self._socket.send(COMMANDS.encode(command), socket.MSG_NOSIGNAL)
        except OSError:
            pass

    def listen(self, seconds: float) -> MachineState:
        """The newest state, waiting so long for another one than the last."""
        if not self.held:
            return self._look(seconds)
        deadline = time.monotonic() + seconds
        before = self.state
        while True:
            left = max(0.0, deadline - time.monotonic())
            with self._lock:
                took = self._receive(min(left, TURN))
                for _ in range(BURST):  # to the newest, but not for as long as there are newer ones
                    if not took:
                        break
                    took = self._receive(0.0)
            if self.state is not before or self._closed_by_monitor or not left:
                return self.state

    def _look(self, seconds: float) -> MachineState:
        """The state on disk, for who has no link."""
        time.sleep(min(seconds, LOOK_EVERY))
        self.state = read_state(self.name) or self.state
        self._closed_by_monitor = not is_alive(self.name)
        if self._closed_by_monitor:
            self.state = self.state.replace(phase="ended")  # a machine of that name is another one
        return self.state

    def console(self) -> str:
        """All of the console that is kept; of an ended machine at least the last lines."""
        self._console = read_log(self._console_path) or self._console
        return printable_lines(self._console.decode("utf-8", "replace")) or self.state.console

    @property
    def over(self) -> bool:
        """Whether the monitor is gone and with it every trace of the machine."""
        return self._closed_by_monitor

    def wait(self, seconds: float) -> bool:
        """Whether nothing of it runs any more, within that time."""
        deadline = time.monotonic() + seconds
        while not (self._closed_by_monitor or self.state.ended):
            left = min(1.0, deadline - time.monotonic())
            if left <= 0:
                return False
            self.listen(left)
        return True

    def await_over(self, seconds: float) -> bool:
        """Wait until nothing is left of the machine. False where that takes longer."""
        deadline = time.monotonic() + seconds
        while not self._closed_by_monitor and time.monotonic() < deadline:
            self.listen(max(0.0, deadline - time.monotonic()))
        if self._closed_by_monitor:
            self._reap()
        return self._closed_by_monitor

    def kill(self) -> None:
        """The monitor does not answer: kill the VMM, which could outlive it, and then it.

        MachineError where it does not end.
        """
        self.check_owner()
        with contextlib.suppress(OSError):  # no descriptor is left for it
            pidfd = os.pidfd_open(self._process.pid)
            try:
                end_descendants(pidfd, VMM_WAIT)
            finally:
                os.close(pidfd)
        self._process.kill()
        self.close()

    def abandon(self) -> None:
        """Stop listening: a detached machine goes on without us."""
        self.check_owner()
        self._detached = True
        self._socket.close()
        self._process.returncode = 0  # not ours to reap any more: init inherits it

    def close(self) -> None:
        """Close the link, by which an attached machine ends, and wait for that.

        MachineError where its monitor does not end.
        """
        self.check_owner()
        if self._socket.fileno() >= 0:
            self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()
        self._reap()

    def obituary(self, seconds: float) -> str:
        """How the machine ended, for its agent's connections; "" where it seems to live."""
        deadline = time.monotonic() + seconds
        while True:
            state = self.listen(max(0.0, deadline - time.monotonic()))
            if state.ended or self.over:
                return state.describe_end() or f"machine {self.name} has ended: its monitor died"
            if time.monotonic() >= deadline:
                return ""

    def __del__(self) -> None:
        """Nobody can end the machine any more: its monitor does, once it hears of this end."""
        link = getattr(self, "_socket", None)
        if link is not None and link.fileno() >= 0 and not self.foreign:
            message = f"machine {self.name} was left running: use it in a with block, or stop it"
            warnings.warn(message, ResourceWarning, stacklevel=2, source=self)
            link.close()

    def _receive(self, seconds: float) -> bool:
        """Take one packet. False where none came in time, or none can come any more."""
        if self._closed_by_monitor or self._socket.fileno() < 0:
            return False
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        if not poll.poll(int(seconds * 1000)):
            return False
        try:
            packet = self._socket.recv(STATE_MAX + 1)
        except OSError:
            packet = b""
        if not packet:
            self._closed_by_monitor = True
            return False
        try:
            self.state = MachineState.from_json(packet)
        except RecordError as error:
            raise MachineError(f"the monitor of {self.name} sent nonsense: {error}") from None
        if self.state.ended:
            level = WARNING if self.state.error else INFO
            note(level, "%s", self.state.describe_end() or f"machine {self.name} has ended")
            self.console()  # a moment later the monitor removes it
            self.send(End())
        return True

    def _reap(self) -> None:
        for _ in range(2):
            try:
                self._process.wait(REAP_WAIT)
            except subprocess.TimeoutExpired:
                self._process.kill()
            else:
                return
        raise not_ended(self.name, self._process.pid)


def start_monitor(folder: Folder, link: socket.socket) -> "subprocess.Popen[bytes]":
    """In a session of its own: what a person types at the terminal is not for it."""
    opened: list[int] = []
    try:
        opened.append(
            os.open(
                "monitor.log",
                os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC,
                0o600,
                dir_fd=folder.fd,
            )
        )
        # Behind those that become the child's standard ones, whichever are closed here.
        for fd in (link.fileno(), folder.fd):
            opened.append(above_standard(fd))
        log, *descriptors = opened
        return subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", "-c", PROGRAM.format(home=HOME)),
                *(folder.path, *map(str, descriptors)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=descriptors,
            start_new_session=True,
        )
    finally:
        for fd in opened:
            os.close(fd)
