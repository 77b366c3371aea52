"""A person at a terminal, for tests: a program on a real pty, its screen, what is typed.

The screen is interpreted by pyte, which also answers what programs ask terminals. Nothing runs in
the background: the screen moves on while something is waited for.
"""

import fcntl
import itertools
import os
import select
import shutil
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import pyte
from patience import PATIENCE

READ = 65536


class _Screen(pyte.Screen):
    """Answers questions, and takes what vim sends and pyte does not know: key modifier options."""

    def __init__(self, columns: int, rows: int, answer: Callable[[str], None]) -> None:
        super().__init__(columns, rows)
        self._answer = answer

    def write_process_input(self, data: str) -> None:
        self._answer(data)

    def select_graphic_rendition(self, *attributes: int, private: bool = False) -> None:
        if not private:
            super().select_graphic_rendition(*attributes)


class Person:
    """Starts `argv` as the leader of a session on a new terminal."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        rows: int = 24,
        columns: int = 80,
        env: dict[str, str] | None = None,
    ) -> None:
        self._master, self._slave = os.openpty()
        self._set_size(rows, columns)
        self.modes_before = self.modes
        self.raw = bytearray()  # all that was ever shown
        self._screen = _Screen(columns, rows, self._answer)
        self._stream = pyte.ByteStream(self._screen)
        self.program = subprocess.Popen(
            argv,
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            env={**os.environ, "TERM": "xterm", "PS1": "host$ ", **(env or {})},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.program.kill()
        self.program.wait()
        for fd in (self._master, self._slave):
            if fd >= 0:
                os.close(fd)

    # ── hands ────────────────────────────────────────────────────────────────────────────────────

    def type(self, text: str | bytes) -> None:
        """Press keys; what the screen shows meanwhile is looked at."""
        data = text.encode() if isinstance(text, str) else text
        while data:
            _, writable, _ = select.select([], [self._master], [], PATIENCE)
            assert writable, "the terminal takes no keys"
            data = data[os.write(self._master, data[:512]) :]
            self.look()

    def resize(self, rows: int, columns: int) -> None:
        """Pull at the window's corner."""
        self._screen.resize(rows, columns)
        self._set_size(rows, columns)

    def hang_up(self) -> None:
        """Close the window."""
        for fd in (self._slave, self._master):
            os.close(fd)
        self._master = self._slave = -1

    def send(self, number: int) -> None:
        """A signal from somewhere else."""
        self.program.send_signal(number)

    # ── eyes ─────────────────────────────────────────────────────────────────────────────────────

    @property
    def screen(self) -> str:
        """What it shows, without blanks at the ends of lines."""
        return "\n".join(line.rstrip() for line in self._screen.display)

    def line(self, number: int) -> str:
        """One line of it, from 0; negative ones from below."""
        return str(self._screen.display[number]).rstrip()

    def look(self, seconds: float = 0.0) -> bool:
        """Take in what has come, waiting for some; whether something has."""
        readable, _, _ = select.select([self._master], [], [], seconds)
        if not readable:
            return False
        try:
            data = os.read(self._master, READ)
        except OSError:  # EIO: nobody has the terminal open
            return False
        self.raw += data
        self._stream.feed(data)
        return True

    def see(self, text: str, seconds: float = PATIENCE) -> None:
        """Wait until the screen shows it."""
        self.wait_until(f"{text!r} on the screen", lambda: text in self.screen, seconds)

    def wait_until(self, what: str, check: Callable[[], bool], seconds: float = PATIENCE) -> None:
        """Look until it is so."""
        deadline = time.monotonic() + seconds
        while not check():
            left = deadline - time.monotonic()
            assert left > 0, f"not within {seconds} s: {what}; the screen shows\n{self.screen}"
            self.look(min(left, 0.05))

    def end(self, seconds: float = PATIENCE) -> int:
        """Wait until the program has ended; its exit code, or minus a signal's number."""
        self.wait_until("the program ends", lambda: self.program.poll() is not None, seconds)
        while self.look():
            pass
        return int(self.program.returncode)

    # ── the terminal itself ──────────────────────────────────────────────────────────────────────

    @property
    def modes(self) -> list[Any]:
        """Its modes, as tcgetattr(3) has them."""
        return termios.tcgetattr(self._slave)

    @property
    def is_raw(self) -> bool:
        """Whether it neither echoes, nor edits lines, nor makes signals of keys."""
        return not self.modes[3] & (termios.ECHO | termios.ICANON | termios.ISIG)

    @property
    def is_as_before(self) -> bool:
        """Whether it has the modes that it had before the program."""
        return self.modes == self.modes_before

    def _set_size(self, rows: int, columns: int) -> None:
        size = struct.pack("HHHH", rows, columns, 0, 0)
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, size)

    def _answer(self, text: str) -> None:
        os.write(self._master, text.encode())


# ── what people use at terminals ─────────────────────────────────────────────────────────────────

TERMINFO = ("/usr/share/terminfo", "/lib/terminfo", "/etc/terminfo")
TERMINALS = ("xterm", "screen", "tmux-256color", "screen-256color")


def root_of_programs(root: Path, *programs: str) -> None:
    """A root with busybox, and with programs of this host and the libraries that they need."""
    for folder in ("bin", "tmp", "root", "proc", "sys", "dev", "etc", "run"):
        (root / folder).mkdir()
    (root / "tmp").chmod(0o1777)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/bash\n")
    (root / "etc/group").write_text("root:x:0:\n")
    shutil.copy(found("busybox"), root / "bin/busybox")
    for name in ("sh", "cat", "stty", "seq", "tty", "ps", "env"):
        (root / "bin" / name).symlink_to("busybox")
    for program in programs:
        shutil.copy(found(program), root / "bin" / program)
        for library in libraries(found(program)):
            (root / library[1:]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, root / library[1:])
    for folder, terminal in itertools.product(TERMINFO, TERMINALS):
        entry = Path(folder, terminal[0], terminal)
        if entry.exists():
            copy = root / str(entry)[1:]
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(entry, copy)
    locale = Path("/usr/lib/locale/C.utf8")
    if locale.is_dir():
        shutil.copytree(locale, root / str(locale)[1:])


def found(program: str) -> str:
    path = shutil.which(program)
    assert path is not None, program
    return path


def libraries(program: str) -> list[str]:
    """Absolute paths of what ldd(1) names; none for a static program."""
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    return [word for word in listed.split() if word.startswith("/")]
