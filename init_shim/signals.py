"""The signals that PID 1 acts on, and its one way to wait.

The kernel drops a signal for which PID 1 has no handler, and a handler that does work could run
anywhere; so handlers only note the number, and a byte in a pipe ends the wait.
"""

import os
import select
import time

import _guestsys

from microguest.guest import bounds
from microguest.init_shim.failure import Failure, call

TYPE_CHECKING = False  # typing itself is too heavy for PID 1
if TYPE_CHECKING:
    import signal
    from collections.abc import Iterable
    from types import FrameType
else:
    import _signal as signal  # `signal` itself makes enums, whose module is larger than PID 1

__all__ = ["CONTINUE", "KILL", "STOP_SIGNALS", "TERMINATE", "Signals", "fork"]

TERMINATE, KILL, CONTINUE = signal.SIGTERM, signal.SIGKILL, signal.SIGCONT

# What asks for the machine's end: from outside, by Ctrl-Alt-Del, by a failing power supply.
STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGPWR})

# Not caught. A handler would turn a fault of PID 1 itself into an endless loop, and PID 1's own
# write to a reader who has left into a signal for the workload.
FAULTS = frozenset(
    {
        signal.SIGSEGV,
        signal.SIGBUS,
        signal.SIGFPE,
        signal.SIGILL,
        signal.SIGTRAP,
        signal.SIGSYS,
        signal.SIGPIPE,
    }
)
UNCATCHABLE = frozenset({signal.SIGKILL, signal.SIGSTOP, 32, 33, 34})  # musl keeps three for itself

NOTED_AT_ONCE = 64 * 1024  # signals: all that the pipe holds


class Signals:
    """Install once, first thing: until then a SIGTERM is lost, and SIGINT would be an exception.

    `stop_requested` stays True once one of STOP_SIGNALS came. Raises Failure.
    """

    def __init__(self) -> None:
        self.stop_requested = False
        self._received: list[int] = []
        with call("pipe2", "signals"):
            self._reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in range(1, signal.NSIG):
            if number not in FAULTS and number not in UNCATCHABLE:
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
        too_late_at = time.monotonic() + bounds.BOOT_DEADLINE

        def too_late(number: int, frame: "FrameType | None") -> None:
            if time.monotonic() >= too_late_at:  # otherwise anybody's signal
                raise Failure(
                    f"the boot is not done after {bounds.BOOT_DEADLINE:g} s", syscall="alarm"
                )

        signal.signal(signal.SIGALRM, too_late)
        signal.setitimer(signal.ITIMER_REAL, bounds.BOOT_DEADLINE)

    def end_deadline(self) -> None:
        """The boot is over, well or badly."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._note)

    def take(self) -> list[int]:
        """The signals since the last call that are not PID 1's own, in the order of their coming.

        Each as often as the kernel delivered it: real-time signals queue there, others coalesce.
        What comes faster than the loop turns, NOTED_AT_ONCE in one turn, is dropped.
        """
        received, self._received = self._received, []
        return received

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
            noted = os.read(self._reader, NOTED_AT_ONCE)
        except BlockingIOError:
            return
        room = NOTED_AT_ONCE - len(self._received)
        theirs = (number for number in noted if number != signal.SIGCHLD)
        self._received += [number for number in theirs if number not in STOP_SIGNALS][:room]


def fork() -> int:
    """fork(2) whose child has every signal's default. Raises OSError.

    With PID 1's handlers it would lose a TERM that comes before it has become another program.
    """
    former = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = _guestsys.fork()
        if pid == 0:
            _guestsys.reset_signals()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)
    return pid
