"""What a machine's workload wrote to its console, without what PID 1 and the kernel say there."""

import io
import os
import re
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Final, NamedTuple

from microguest.host_client.errors import MachineError
from microguest.host_client.machines.console import LogReader, Piece, read_mark
from microguest.host_client.machines.folder import check_name, is_alive, machines_root, read_state
from microguest.host_client.machines.when import Moment, moment, stamp
from microguest.host_client.values import check_count, check_flag

__all__ = ["LINE_MAX", "console_looks"]

FOLLOW_EVERY: Final = 0.1  # seconds between looks at a console that is followed
# Bytes of a line that wait for its end; a longer one comes in pieces of so many.
LINE_MAX: Final = 1024 * 1024
CARRIAGE_RETURN: Final = ord("\r")
# The last words of a virtual machine's kernel, which `quiet` does not silence.
LAST_WORDS: Final = re.compile(rb"\[ *[0-9]+\.[0-9]+\] reboot: [A-Za-z ]{1,64}\r?\n\Z")
RESTARTS: Final = b" reboot: Restarting system"  # another line follows it, which says how


def console_looks(
    name: str,
    *,
    follow: bool = False,
    tail: int | None = None,
    since: Moment | None = None,
    until: Moment | None = None,
    timestamps: bool = False,
) -> Generator[list[bytes], None, None]:
    """Lines with their newlines, the last of them perhaps without one, as each look finds them.

    A look may find none; none of them waits for long.
    tail: only so many of what is there already. follow: those that come, until the machine ends.
    since, until: only lines that began then, both inclusive, before `tail` counts; what is followed
    ends at `until`. timestamps: before each line when it began and a space, as docker's.
    MachineError where there is no such machine, running or kept, or no times are kept of it;
    TypeError, ValueError for what is no time.
    """
    if tail is not None:
        check_count(tail, "tail", of="lines")
    check_flag(follow, "follow")
    check_flag(timestamps, "timestamps")
    span = Span(moment(since, "since"), moment(until, "until"), timestamps)
    path = os.path.join(machines_root(), check_name(name))
    if not is_alive(name) and not os.path.isdir(path):  # the first refuses a folder of others
        raise MachineError(f"no machine named {name}: see microguest ls -a")
    return _looks(name, os.path.join(path, "console.log"), span, follow, tail)


class Span(NamedTuple):
    """Which lines are asked for; nanoseconds since the epoch."""

    since: int | None
    until: int | None
    timestamps: bool

    @property
    def timed(self) -> bool:
        """Whether it takes times at all."""
        return self.timestamps or self.since is not None or self.until is not None

    @property
    def over(self) -> bool:
        """Whether no line that comes now is asked for."""
        return self.until is not None and time.time_ns() > self.until

    def has(self, when: int) -> bool:
        """Whether a line of that time is asked for."""
        if self.since is not None and when < self.since:
            return False
        return self.until is None or when <= self.until


def _looks(
    name: str, path: str, span: Span, follow: bool, tail: int | None
) -> Generator[list[bytes], None, None]:
    # Of a virtual machine the console is a terminal, which writes \r\n for \n (ONLCR); what the
    # program wrote is what is left without that. In namespaces it is a pipe.
    state = read_state(name)
    end = b"\r\n" if state is None or state.machine != "namespaces" else b"\n"
    mark = read_mark(os.path.dirname(path))
    split = Splitter(name, timed=span.timed, mark=mark, kernel=end != b"\n")
    with closing(LogReader(path, timed=span.timed)) as log:
        while True:
            # Before the last look, so that it misses nothing.
            on = follow and is_alive(name) and not span.over
            lines = [line for piece in log.pieces() for line in split.feed(piece)]
            if not on:
                lines += split.end()
            found = [line for line in lines if span.has(line.when)]
            if tail is not None:
                found = last_lines(found, tail)
            yield [shown(line, end, timed=span.timestamps) for line in found]
            if not on:
                return
            tail = None
            time.sleep(FOLLOW_EVERY)


class Line(NamedTuple):
    """One line of the console, or at most LINE_MAX bytes of one."""

    text: bytes
    when: int  # it began, nanoseconds since the epoch; 0: not asked for
    begins: bool  # False: it goes on with what the one before has begun


def last_lines(found: list[Line], count: int) -> list[Line]:
    """So many at the end, each with all of its pieces."""
    beginnings = deque((at for at, line in enumerate(found) if line.begins), maxlen=count)
    return found[beginnings[0] :] if beginnings else []


def shown(line: Line, end: bytes, *, timed: bool) -> bytes:
    """As the program wrote it, and before its beginning when that was."""
    before = stamp(line.when) + b" " if timed and line.begins else b""
    return before + line.text.replace(end, b"\n")


class Splitter:
    """Makes lines of pieces, and pieces of LINE_MAX bytes of a line that is longer.

    mark: what begins PID 1's lines, which no workload knows; they are left out wherever they stand,
    also within a line that the workload had not ended. b"": nothing is known to be PID 1's.
    kernel: it has one of its own, whose last words are left out at the very end.
    """

    def __init__(self, name: str, *, timed: bool, mark: bytes = b"", kernel: bool = False) -> None:
        self._name = name
        self._timed = timed
        self._mark = mark
        self._kernel = kernel
        self._held: list[Line] = []  # what are the kernel's last words, where nothing follows
        self._text = b""
        self._when = 0
        self._begins = True

    def feed(self, piece: Piece) -> Iterator[Line]:
        """The lines that end in it, and what is too long to wait for its end."""
        at = piece.offset
        for part in io.BytesIO(piece.data):
            if self._begins and not self._text:
                self._when = self._moment(piece, at)
            at += len(part)
            self._text += part
            ended = part.endswith(b"\n") and not self._leave_out_pid_1()
            while len(self._text) > LINE_MAX:
                yield from self._pass(self._cut(LINE_MAX))
            if ended:
                yield from self._pass(self._cut(len(self._text)))
                self._begins = True

    def end(self) -> list[Line]:
        """What has no end yet; nothing more comes."""
        self._leave_out_pid_1()
        if self._text:
            return [*self._held, self._cut(len(self._text))]
        lines = [line._replace(text=LAST_WORDS.sub(b"", line.text)) for line in self._held]
        return [line for line in lines if line.text]  # of a line that the workload had not ended

    def _leave_out_pid_1(self) -> bool:
        """Take away what PID 1 has said, to its newline. Whether that was the end of the text."""
        at = self._text.find(self._mark) if self._mark else -1
        if at >= 0:
            self._text = self._text[:at]
        return at >= 0

    def _pass(self, line: Line) -> list[Line]:
        """What may be shown now, as something follows it."""
        if not self._kernel:
            return [line]
        lines, self._held = self._held, []
        if LAST_WORDS.search(line.text):
            if len(lines) == 1 and RESTARTS in lines[0].text:
                self._held, lines = lines, []
            self._held.append(line)
            return lines
        return [*lines, line]

    def _cut(self, size: int) -> Line:
        """The first bytes of what waits."""
        if size < len(self._text) and self._text[size - 1] == CARRIAGE_RETURN:
            size -= 1  # the newline that it may belong to is behind it
        text, self._text = self._text[:size], self._text[size:]
        line = Line(text, self._when, self._begins)
        self._begins = False
        return line

    def _moment(self, piece: Piece, at: int) -> int:
        if not self._timed:
            return 0
        when = None if piece.moments is None else piece.moments.at(at)
        if when is None:
            raise MachineError(
                f"machine {self._name}: no times of its lines are kept, as it was started by an "
                "older version, or its disk was full: ask for its logs without times"
            )
        return when
