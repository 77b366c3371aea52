"""The signals that PID 1 acts on, and its one way to wait.

The kernel drops a signal for which PID 1 has no handler, and a handler that does work could run
anywhere; so handlers only note the number, and a byte in a pipe ends the wait.
"""

import os
import select

from guest import limits
from init_shim.failure import Failure

TYPE_CHECKING = False  # typing itself is too heavy for PID 1
if TYPE_CHECKING:
    import signal
    from collections.abc import Iterable
    from types import FrameType
else:
    import _signal as signal  # `signal` itself makes enums, whose module is larger than PID 1

__all__ = ["CONTINUE", "KILL", "STOP_SIGNALS", "TERMINATE", "Signals", "reset_all"]

TERMINATE, KILL, CONTINUE = signal.SIGTERM, signal.SIGKILL, signal.SIGCONT

# What asks for the machine's end: from outside, by Ctrl-Alt-Del, by a failing power supply.
STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGPWR})


class Signals:
    """Install once, first thing: until then a SIGTERM is lost, and SIGINT would be an exception.

    `stop_requested` stays True once one of STOP_SIGNALS came.
    """

    def __init__(self) -> None:
        self.stop_requested = False
        self._reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, *STOP_SIGNALS):
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def _note(self, number: int, frame: "FrameType | None") -> None:
        if number in STOP_SIGNALS:
            self.stop_requested = True

    def start_deadline(self) -> None:
        """From now on a boot longer than BOOT_DEADLINE is a Failure, wherever it waits.

        It interrupts every wait that a signal can interrupt; a task stuck in uninterruptible sleep
        inside the kernel is beyond its reach.
        """
        signal.signal(signal.SIGALRM, _too_late)
        signal.setitimer(signal.ITIMER_REAL, limits.BOOT_DEADLINE)

    def end_deadline(self) -> None:
        """The boot is over, well or badly."""
        signal.setitimer(signal.ITIMER_REAL, 0)

    def wait(
        self, timeout: float | None, *, read: "Iterable[int]" = (), write: "Iterable[int]" = ()
    ) -> set[int]:
        """Wait for a signal, for a descriptor, or for `timeout` seconds; None: as long as it takes.

        Returns those of `read` that can be read and those of `write` that take something, or that
        were closed by their peer.
        """
        events = dict.fromkeys(read, select.POLLIN)
        for fd in write:
            events[fd] = events.get(fd, 0) | select.POLLOUT
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        for fd, wanted in events.items():
            poll.register(fd, wanted)
        milliseconds = None if timeout is None else max(0, int(timeout * 1000) + 1)
        ready = {fd for fd, _ in poll.poll(milliseconds)}
        if self._reader in ready:
            ready.remove(self._reader)
            self._drain()
        return ready

    def _drain(self) -> None:
        try:
            while len(os.read(self._reader, 4096)) == 4096:
                pass
        except BlockingIOError:
            pass


def _too_late(number: int, frame: "FrameType | None") -> None:
    raise Failure(f"the boot is not done after {limits.BOOT_DEADLINE:g} s", syscall="alarm")


def reset_all() -> None:
    """Every signal's default, none blocked: execve(2) keeps what is ignored or blocked."""
    for number in range(1, signal.NSIG):
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            try:
                signal.signal(number, signal.SIG_DFL)
            except (OSError, ValueError):
                pass  # those that the C library keeps for itself
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
