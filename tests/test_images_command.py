"""External commands: deadlines, errors to paste into a shell, and nothing left running."""

import sys
import time
from typing import IO

import pytest
from patience import SLACK

from host_client.errors import ImageError
from host_client.images.command import run_command


def test_failure_says_what_was_run_and_what_it_said() -> None:
    argv = ["sh", "-c", "echo 'it broke' >&2; exit 3"]
    with pytest.raises(ImageError, match=r"status 3: sh -c 'echo '.*\nit broke"):
        run_command(argv)


def test_terminal_codes_are_not_passed_on() -> None:
    assert run_command(["sh", "-c", "printf '\\033[2Jx\\n' >&2"]) == "?[2Jx\n"


def test_only_the_last_words_are_kept() -> None:
    said = run_command(["sh", "-c", "seq 1 100000 >&2"])
    assert len(said) <= 8 << 10
    assert said.endswith("100000\n")


def test_deadline_ends_a_command_that_hangs() -> None:
    begin = time.monotonic()
    with pytest.raises(ImageError, match=r"not done after 0.2 s and was killed: sleep 60"):
        run_command(["sleep", "60"], seconds=0.2)
    assert time.monotonic() - begin < 2 * SLACK


def test_deadline_ends_a_command_that_does_not_read() -> None:
    def feed(pipe: IO[bytes]) -> None:
        pipe.write(bytes(1 << 20))

    with pytest.raises(ImageError, match="not done after"):
        run_command(["sleep", "60"], feed=feed, seconds=0.2)


def test_deadline_ends_a_command_that_does_not_write() -> None:
    def drain(pipe: IO[bytes]) -> None:
        pipe.read(1)

    with pytest.raises(ImageError, match="not done after"):
        run_command(["sleep", "60"], drain=drain, seconds=0.2)


def test_command_that_stops_reading_did_not_take_all() -> None:
    def feed(pipe: IO[bytes]) -> None:
        pipe.write(bytes(1 << 20))

    with pytest.raises(ImageError, match="stopped reading"):
        run_command([sys.executable, "-c", ""], feed=feed)


def test_error_of_the_feed_passes_and_the_command_ends() -> None:
    def feed(_: IO[bytes]) -> None:
        raise ImageError("damaged layer")

    begin = time.monotonic()
    with pytest.raises(ImageError, match="damaged layer"):
        run_command(["sleep", "60"], feed=feed)
    assert time.monotonic() - begin < 2 * SLACK


def test_command_that_cannot_start() -> None:
    with pytest.raises(ImageError, match="cannot start /nonexistent/tool"):
        run_command(["/nonexistent/tool"])
