"""What a person sees, and a program is told, while an image that is new here is prepared."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import imagefactory as factory
import machinekit
import pytest
from clikit import PROGRAM
from machinekit import wait_until
from patience import PATIENCE
from terminalkit import Person

from microguest import boot
from microguest.host_client import images
from microguest.host_client.images import recipes

LARGE = factory.layer([factory.member("zeros", bytes(5 << 20)), factory.member("end", b"!")])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> images.Cache:
    """Where the command line looks, too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return images.Cache(str(tmp_path / "cache" / "microguest" / "images"))


# -- a program -------------------------------------------------------------------------------


def test_each_step_is_told_and_nothing_of_what_is_there(
    tmp_path: Path, cache: images.Cache
) -> None:
    reference = factory.make_layout(tmp_path / "i", [LARGE], compression="")
    told: list[images.Progress] = []
    with images.open_image(reference) as image:
        images.as_disk(image, tmp_path, cache=cache, progress=told.append)
        assert {one.image for one in told} == {reference}
        for step in ("unpacking", "making"):
            (total,) = {one.total for one in told if one.step == step}
            done = [one.done for one in told if one.step == step]
            assert done == sorted(done)
            assert done[0] == 0
            assert len(LARGE) - (1 << 20) <= done[-1] <= total == len(LARGE)
        told.clear()
        images.as_disk(image, tmp_path, cache=cache, progress=told.append)
        assert told == []


def test_what_the_callable_raises_ends_the_making(tmp_path: Path, cache: images.Cache) -> None:
    class EnoughError(Exception):
        pass

    def refuse(progress: images.Progress) -> None:
        if progress.step == "making" and progress.done:
            raise EnoughError

    image = images.open_image(factory.make_layout(tmp_path / "i", [LARGE]))
    with pytest.raises(EnoughError):
        images.as_disk(image, tmp_path, cache=cache, progress=refuse)
    for place in ("entries", "tmp", "locks"):
        assert os.listdir(os.path.join(cache.directory, place)) == []


def test_disk_of_a_directory_is_told_too(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "work").mkdir()
    told: list[images.Progress] = []
    image = images.open_image(f"dir:{tmp_path / 'root'}")
    images.as_disk(image, tmp_path / "work", progress=told.append)
    assert told[0] == images.Progress("making", f"dir:{tmp_path / 'root'}", 0, 0)


@pytest.mark.usefixtures("machines_home", "elf")
def test_boot_tells(cache: images.Cache) -> None:
    told: list[images.Progress] = []
    with boot(machinekit.demo_image(), machine="namespaces", progress=told.append):
        assert {one.step for one in told} == {"unpacking", "making"}
    assert os.listdir(cache.directory)


# -- a person --------------------------------------------------------------------------------

SCRIPT = """\
import signal, sys, time
from microguest.host_client.cli.progress import MOMENT, REDRAWN_EVERY, Display
from microguest.host_client.images import Progress
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
with Display(quiet=sys.argv[1] == "quiet") as display:
    display(Progress("unpacking", "oci:x:y", 0, 700_000_000))
    time.sleep(MOMENT)
    display(Progress("unpacking", "oci:x:y", 350_000_000, 700_000_000))
    signal.sigwait([signal.SIGUSR1])
    time.sleep(REDRAWN_EVERY)
    display(Progress("making", "oci:x:y", 700_000_000, 700_000_000))
    signal.sigwait([signal.SIGUSR1])
print("over")
"""
LINE = "microguest: preparing oci:x:y (700 MB), which is new here..."


@pytest.mark.parametrize("columns", [80, 64, 45])
def test_bar_on_a_terminal(columns: int) -> None:
    with Person([sys.executable, "-c", SCRIPT, "loud"], columns=columns) as person:
        person.see("350/700 MB")
        lines = [line for line in person.screen.splitlines() if line]
        assert "".join(lines[:-1]).replace("\n", "") == LINE
        bar = lines[-1]
        assert bar.startswith("unpacking [")
        inside = bar[bar.index("[") + 1 : bar.index("]")]
        assert inside.count("#") == len(inside) // 2
        assert len(bar) == columns - 1
        person.send(signal.SIGUSR1)
        person.see("700/700 MB")
        person.send(signal.SIGUSR1)
        person.see("over")
        assert person.end() == 0
        assert "MB" not in person.screen.replace(LINE, "").replace("(700 MB)", "")
        assert person.is_as_before


def test_narrow_terminal() -> None:
    with Person([sys.executable, "-c", SCRIPT, "loud"], columns=20) as person:
        person.see(" 50%")
        person.send(signal.SIGUSR1)
        person.see("100%")
        person.send(signal.SIGUSR1)
        assert person.end() == 0


UNATTENDED = SCRIPT.replace("signal.sigwait([signal.SIGUSR1])", "pass")


def test_nothing_when_quiet() -> None:
    with Person([sys.executable, "-c", UNATTENDED, "quiet"]) as person:
        assert person.end() == 0
        assert person.raw == b"over\r\n"


def test_terminal_without_a_cursor() -> None:
    with Person([sys.executable, "-c", UNATTENDED, "loud"], env={"TERM": "dumb"}) as person:
        assert person.end() == 0
        assert person.raw.decode() == f"{LINE}\r\nover\r\n"


@pytest.mark.usefixtures("machines_home", "elf")
@pytest.mark.parametrize("quiet", [False, True])
def test_run_says_what_it_waits_for(cache: images.Cache, tmp_path: Path, quiet: bool) -> None:
    """One line where stderr is no terminal; here for an image that somebody else has in hand."""
    reference = machinekit.demo_image()
    said = tmp_path / "said"
    command = [PROGRAM, "run", "--rm", "--machine", "namespaces", *(["-q"] if quiet else [])]
    with images.open_image(reference) as image:
        assert image.digest is not None
        key = f"{image.digest.replace(':', '-')}-directory-{recipes.VERSION}"
    os.makedirs(os.path.join(cache.directory, "locks"), mode=0o700)
    with open(os.path.join(cache.directory, "locks", key), "w", encoding="utf-8") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with said.open("wb") as errors:
            program = subprocess.Popen(
                [*command, reference, "echo", "ran"], stdout=subprocess.PIPE, stderr=errors
            )
        with program:
            if not quiet:
                wait_until("it says so", lambda: said.read_bytes().endswith(b"\n"))
                assert program.poll() is None
            os.unlink(held.name)
            held.close()
            output, _ = program.communicate(timeout=PATIENCE)
    assert output == b"ran\n"
    line = f"microguest: waiting for another process that is preparing {reference}...\n"
    assert said.read_text() == ("" if quiet else line)
