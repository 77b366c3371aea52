"""The caller's terminal: raw while a process of the guest has it, and as it was in every way out.

Two things are put back: the modes of the line discipline, and the screen's own (alternate screen,
mouse, hidden cursor), where the process that set them did not live to unset them. By this program;
where it is killed before it can, by a small process that waits for its end.
"""

import errno
import mmap
import os
import re
import select
import signal
import termios
from typing import Any, Final, Self

from microguest.guest.wire.messages import Winsize

__all__ = ["NoTerminal", "ScreenModes", "Terminal", "size_of", "write_undo"]

USUAL: Final = Winsize(rows=24, columns=80)  # where nobody knows better
UNDO_MAX: Final = 256  # bytes, with their count: every mode below takes less than 10
# Seconds for the guard to end by itself, and once it was killed; then init gets it.
GUARD_WAITS: Final = (2.0, 1.0)
LAST_FD: Final = os.sysconf("SC_OPEN_MAX")
IFLAG, OFLAG, CFLAG, LFLAG, CC = 0, 1, 2, 3, 6  # indices of tcgetattr's list


class NoTerminal(ValueError):
    """A terminal was asked for, and stdin is none, or is another's for good."""


def size_of(*descriptors: int) -> Winsize:
    """The size of the first of them that is a terminal and knows it."""
    for fd in descriptors:
        try:
            columns, rows = os.get_terminal_size(fd)
        except OSError:
            continue
        if rows > 0 and columns > 0:
            return Winsize(rows=rows, columns=columns)
    return USUAL


class Terminal:
    """A context manager: raw inside, restored outside. Ctrl-C and the like are bytes meanwhile."""

    def __init__(self, fd: int = 0, *, without: str = "leave out -t") -> None:
        """In the background it waits for the foreground. NoTerminal where `fd` is not one.

        without: what to do where there is none, for the message.
        """
        self._fd = fd
        self._without = without
        if not os.isatty(fd):
            raise NoTerminal(
                f"the input device is not a TTY: {without}, or start this in a terminal"
            )
        await_foreground(fd, without)
        # Not earlier: until then it may have the modes of a shell that edits its line.
        self._before: list[Any] = termios.tcgetattr(fd)
        self._raw = raw_modes(self._before)
        self._guard: _Guard | None = None
        self.modes = ScreenModes()

    def __enter__(self) -> Self:
        self.resume()
        self._raw = termios.tcgetattr(self._fd)  # as the kernel has it, for the guard to compare
        self._guard = _Guard(self._fd, self._before, self._raw)
        return self

    def __exit__(self, *_how: object) -> None:
        self.suspend()
        if self._guard is not None:
            self._guard.dismiss()
            self._guard = None

    def watch_screen(self, output: bytes) -> None:
        """Look at bytes on their way to the screen."""
        if self.modes.feed(output) and self._guard is not None:
            self._guard.note(self.modes.resets)

    @property
    def size(self) -> Winsize:
        """In characters, now."""
        return size_of(1, self._fd)

    def resume(self) -> None:
        """Make it raw; in the background, when we are brought to the foreground."""
        await_foreground(self._fd, self._without)
        self._set(self._raw)

    def suspend(self) -> None:
        """Put it back as it was."""
        self._set(self._before)

    def _set(self, modes: list[Any]) -> None:
        # TCSANOW: waiting for output to drain would hang where nobody reads it any more.
        if in_foreground(self._fd):
            try:
                termios.tcsetattr(self._fd, termios.TCSANOW, modes)
            except termios.error:
                pass  # it is gone


def in_foreground(fd: int) -> bool:
    """Whether the terminal is ours to change: in the background it belongs to somebody else."""
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:
        return True  # not our controlling terminal: no job control


def await_foreground(fd: int, without: str) -> None:
    """Stop as other programs do that want a terminal in the background, until `fg`.

    From there a change of the terminal makes the kernel send SIGTTOU to our process group, unless
    that is orphaned: then nobody could go on with us (POSIX, General Terminal Interface).
    NoTerminal there, and where the signal is ignored.
    """
    while not in_foreground(fd):
        try:
            termios.tcflow(fd, termios.TCOON)  # changes nothing where output was not stopped
        except termios.error as error:
            if error.args[0] == errno.EINTR:  # by a SIGCONT, which has brought us here or there
                continue
        if not in_foreground(fd):
            raise NoTerminal(
                "the terminal belongs to another job and this one cannot wait for it: "
                f"{without}, or start this in the foreground"
            )


def raw_modes(modes: list[Any]) -> list[Any]:
    """As cfmakeraw(3) has it, with reads of at least one byte."""
    t = termios
    raw = [*modes[:CC], [*modes[CC]]]
    raw[IFLAG] &= ~(t.IGNBRK | t.BRKINT | t.PARMRK | t.ISTRIP | t.INLCR | t.IGNCR | t.ICRNL)
    raw[IFLAG] &= ~t.IXON
    raw[OFLAG] &= ~t.OPOST
    raw[CFLAG] = raw[CFLAG] & ~(t.CSIZE | t.PARENB) | t.CS8
    raw[LFLAG] &= ~(t.ECHO | t.ECHONL | t.ICANON | t.ISIG | t.IEXTEN)
    raw[CC][t.VMIN], raw[CC][t.VTIME] = 1, 0
    return raw


class _Guard:
    """A process that puts the terminal back where ours died without doing it."""

    def __init__(self, fd: int, before: list[Any], raw: list[Any]) -> None:
        self._undo = mmap.mmap(-1, UNDO_MAX)  # is the child's as well
        reader, self._writer = os.pipe()
        self._pid = os.fork()
        if self._pid:
            os.close(reader)
            return
        try:
            _watch(reader, fd, before, raw, self._undo)
        finally:
            os._exit(0)

    def note(self, undo: bytes) -> None:
        """What the screen needs from now on. Killed within this, we leave it as it is."""
        self._undo[0] = 0
        self._undo[1 : 1 + len(undo)] = undo
        self._undo[0] = len(undo)

    def dismiss(self) -> None:
        """It is not needed any more; the screen is its owner's affair."""
        self._undo[0] = 0
        os.close(self._writer)
        try:
            for wait in GUARD_WAITS:
                if has_ended(self._pid, wait):
                    os.waitpid(self._pid, 0)
                    break
                os.kill(self._pid, signal.SIGKILL)  # somebody has stopped it, or the terminal does
        finally:
            self._undo.close()


def has_ended(pid: int, seconds: float) -> bool:
    """Whether a child of ours ends within that time; it is not reaped."""
    pidfd = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    finally:
        os.close(pidfd)


def _watch(reader: int, fd: int, before: list[Any], raw: list[Any], undo: mmap.mmap) -> None:
    """Wait for the other end's close; put back what nobody else has changed since."""
    signal.set_wakeup_fd(-1)
    os.setsid()  # out of reach of the terminal's signals, and of its job control
    kept = sorted({reader, fd, *((1,) if os.isatty(1) else ())})
    for first, end in zip((0, *(each + 1 for each in kept)), (*kept, LAST_FD), strict=True):
        if first < end:  # an empty range that ends at 0 would be everything
            os.closerange(first, end)
    os.read(reader, 1)
    if termios.tcgetattr(fd) == raw:
        termios.tcsetattr(fd, termios.TCSANOW, before)
    write_undo(undo[1 : 1 + undo[0]])


def write_undo(undo: bytes) -> None:
    """Bring the screen of stdout back, where that is a terminal that takes it at once."""
    if not undo or not os.isatty(1):
        return
    poll = select.poll()
    poll.register(1, select.POLLOUT)
    if poll.poll(0):
        try:
            os.write(1, undo)
        except OSError:
            pass  # the terminal is gone


# ── the screen ───────────────────────────────────────────────────────────────────────────────────

PRIVATE_MODES: Final = re.compile(rb"\x1b\[\?([0-9;]{1,64})([hl])")
UNFINISHED: Final = re.compile(rb"\x1b(\[(\?[0-9;]{0,64})?)?\Z")
# Modes of xterm's control sequences that a program sets for itself, and their usual state.
USUALLY: Final = {
    1: False,  # application cursor keys
    9: False,  # mouse
    25: True,  # cursor
    47: False,  # alternate screen, and 1047 and 1049
    1000: False,  # mouse, up to 1016
    1002: False,
    1003: False,
    1004: False,  # focus events
    1005: False,
    1006: False,
    1015: False,
    1016: False,
    1047: False,
    1049: False,
    2004: False,  # bracketed paste
}
ATTRIBUTES_OFF: Final = b"\x1b[0m"


class ScreenModes:
    """Follows what a process does to the screen, to undo it where the process cannot."""

    def __init__(self) -> None:
        self._unusual: set[int] = set()
        self._rest = b""

    def feed(self, output: bytes) -> bool:
        """Look at bytes on their way to the screen. Whether something is to be undone otherwise."""
        data = self._rest + output
        self._rest = b""
        if b"\x1b" not in data:
            return False
        before = set(self._unusual)
        for numbers, how in PRIVATE_MODES.findall(data):
            for mode in map(int, filter(None, numbers.split(b";"))):
                if mode in USUALLY and USUALLY[mode] == (how == b"h"):
                    self._unusual.discard(mode)
                elif mode in USUALLY:
                    self._unusual.add(mode)
        if unfinished := UNFINISHED.search(data):
            self._rest = unfinished[0]
        return self._unusual != before

    @property
    def resets(self) -> bytes:
        """What brings the screen back to its usual state; empty where it is in it."""
        if not self._unusual:
            return b""
        resets = [
            b"\x1b[?%d%s" % (mode, b"h" if USUALLY[mode] else b"l")
            for mode in sorted(self._unusual)
        ]
        return b"".join((ATTRIBUTES_OFF, *resets))

    def undo(self) -> bytes:
        """The same once: from now on the screen counts as usual."""
        resets = self.resets
        self._unusual.clear()
        return resets
