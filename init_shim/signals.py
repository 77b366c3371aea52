"""The signals that PID 1 acts on, and its one way to wait.

The kernel drops a signal for which PID 1 has no handler, and a handler that does work could run
anywhere; so handlers only note the number, and a byte in a pipe ends the wait.
"""

import os
import select
import signal

TYPE_CHECKING = False  # typing itself is too heavy for PID 1
if TYPE_CHECKING:
    from types import FrameType

__all__ = ["STOP_SIGNALS", "Signals"]

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

    def wait(self, fd: int, timeout: float | None) -> bool:
        """Wait for a signal, for `fd` (-1: none) to be readable, or for `timeout` seconds.

        Returns whether `fd` is readable or closed by its peer.
        """
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        if fd >= 0:
            poll.register(fd, select.POLLIN)
        milliseconds = None if timeout is None else max(0, int(timeout * 1000) + 1)
        ready = {number for number, _ in poll.poll(milliseconds)}
        if self._reader in ready:
            try:
                while len(os.read(self._reader, 4096)) == 4096:
                    pass
            except BlockingIOError:
                pass
        return fd in ready
