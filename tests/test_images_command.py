"""External commands: deadlines, errors to paste into a shell, and nothing left running."""

import itertools
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest
from machinekit import runs, wait_until
from patience import SLACK
from sleepers import Sleeper

from microguest.errors import ImageError
from microguest.host_client.images.tools import filtered, run_command


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
    """Nor read: both of its pipes are waited for."""

    def exchange(stdin: IO[bytes], stdout: IO[bytes]) -> None:
        assert list(filtered(itertools.repeat(bytes(1 << 20)), stdin, stdout)) == []

    with pytest.raises(ImageError, match="not done after"):
        run_command(["sleep", "60"], exchange=exchange, seconds=0.2)


def test_deadline_of_a_filter_whose_output_another_process_holds(sleeper: Sleeper) -> None:
    def exchange(stdin: IO[bytes], stdout: IO[bytes]) -> None:
        assert list(filtered(iter([b"x"]), stdin, stdout, seconds=1)) == []

    begin = time.monotonic()
    script = f"setsid sleep {sleeper.argument} & exec sleep 60"
    with pytest.raises(ImageError, match=r"not done after 0\.5 s"):
        run_command(["sh", "-c", script], exchange=exchange, seconds=0.5)
    assert time.monotonic() - begin < 2 * SLACK


def test_filter_gets_all_and_gives_all() -> None:
    given = [bytes([number]) * (1 << 20) for number in range(8)]
    got: list[bytes] = []

    def exchange(stdin: IO[bytes], stdout: IO[bytes]) -> None:
        got.extend(filtered(iter(given), stdin, stdout))

    run_command(["cat"], exchange=exchange)
    assert b"".join(got) == b"".join(given)


def test_filter_that_stops_reading_did_not_take_all() -> None:
    """What it wrote is there all the same."""
    got: list[bytes] = []

    def exchange(stdin: IO[bytes], stdout: IO[bytes]) -> None:
        got.extend(filtered(itertools.repeat(bytes(1 << 20), 4), stdin, stdout))

    with pytest.raises(ImageError, match="stopped reading its input too early"):
        run_command(["head", "-c", "5"], exchange=exchange)
    assert b"".join(got) == bytes(5)


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


def test_command_ends_also_where_its_caller_was_killed(tmp_path: Path) -> None:
    busy = f"echo $$ >{tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; while :; do :; done"
    program = (
        "from microguest.host_client.images.tools import filtered, run_command\n"
        f"run_command(['sh', '-c', {busy!r}], seconds=1)"
    )
    with subprocess.Popen([sys.executable, "-c", program], start_new_session=True) as caller:
        wait_until("the command runs", (tmp_path / "pid").exists)
        caller.kill()
    pid = int((tmp_path / "pid").read_text())
    wait_until("it has ended", lambda: not runs(pid))


@pytest.mark.parametrize("start", ["", "setsid "])
def test_what_a_command_has_started_holds_nobody_up(start: str, sleeper: Sleeper) -> None:
    """A wrapper's own command has its pipes, in its group or, as a daemon, in none of ours."""
    begin = time.monotonic()
    script = f"{start}sleep {sleeper.argument} & echo said >&2"
    assert run_command(["sh", "-c", script]) == "said\n"
    assert time.monotonic() - begin < 2 * SLACK


def test_deadline_ends_also_what_a_wrapper_has_started() -> None:
    def feed(pipe: IO[bytes]) -> None:
        pipe.write(bytes(1 << 20))

    begin = time.monotonic()
    with pytest.raises(ImageError, match="not done after"):
        run_command(["sh", "-c", "sleep 61 <&0; true"], feed=feed, seconds=0.2)
    assert time.monotonic() - begin < 2 * SLACK
