"""Where the system runs out of something, one line says of what, where, and what to do."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import imagefactory
import machinekit
import pytest
from clikit import PROGRAM
from patience import PATIENCE

from microguest import ImageError, boot
from microguest.host_client.shortage import cannot_start, explain

LEAST = 5  # open files with which this Python starts and can say anything
ENOUGH = 64


def microguest(state: Path, *words: str, files: int = 1024) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [PROGRAM, *words],
        env={**os.environ, "XDG_STATE_HOME": str(state)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files)),
    )


def the_line(done: "subprocess.CompletedProcess[str]") -> str:
    assert done.returncode == 125, done
    assert done.stderr.count("\n") == 1, done
    return done.stderr


def test_no_descriptor_left_for_a_boot(elf: Path, tmp_path: Path) -> None:
    """Wherever it is that the limit is met: in the command, its monitor, what those start."""
    image = machinekit.demo_image()
    words = ("run", "--rm", "--machine", "namespaces", image, "true")
    assert microguest(tmp_path, *words).returncode == 0  # it is in the cache now
    said = []
    for files in range(LEAST, ENOUGH):
        done = microguest(tmp_path, *words, files=files)
        if done.returncode == 0 or "the agent failed" in done.stderr:  # it is up: its guest's limit
            break
        said.append(the_line(done))
    for line in said:
        assert "too many open files" in line.lower()
        assert "ulimit -n" in line
        assert "[Errno" not in line
    for where in ("cannot start a monitor process", "cannot prepare the machine", "did not come"):
        assert any(where in line for line in said), where
    assert os.listdir(tmp_path / "microguest" / "machines") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
@pytest.mark.parametrize("options", ["size=8k", *(f"nr_inodes={n}" for n in (4, 6, 8, 10, 12))])
def test_no_room_for_a_machine(elf: Path, tmp_path: Path, options: str) -> None:
    """Whichever of its files is the first that cannot be made."""
    image = machinekit.demo_image()
    words = ("run", "--rm", "--machine", "namespaces", image, "true")
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", tmp_path], check=True)
    try:
        line = the_line(microguest(tmp_path, *words))
        left = list(tmp_path.glob("microguest/machines/*"))
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)
    assert f"{tmp_path}/microguest/machines/" in line
    assert "No space left on device: " in line
    assert "free some, or set XDG_STATE_HOME" in line
    assert ".new" not in line  # the name of no file that anybody knows
    assert left == []


@pytest.mark.parametrize("image", ["busybox", "oci:/no/such/place", "oci:", "dir:/no/such/place"])
def test_image_that_is_none_makes_nothing(
    elf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: str
) -> None:
    """No folder, so no monitor either, which would be started in there."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(ImageError):
        boot(image, machine="namespaces")
    assert os.listdir(tmp_path) == []


def test_tag_that_is_none_makes_nothing(
    elf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    imagefactory.busybox_layout(tmp_path / "image")
    with pytest.raises(ImageError, match="none-such"):
        boot(f"oci:{tmp_path}/image:none-such", machine="namespaces")
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EMFILE, "ulimit -n"),
        (errno.ENFILE, "fs.file-max"),
        (errno.ENOSPC, "or set VARIABLE to a directory on another one"),
        (errno.EDQUOT, "or set VARIABLE to a directory on another one"),
        (errno.ENOMEM, "end programs"),
    ],
)
def test_what_to_do(number: int, advice: str) -> None:
    error = OSError(number, os.strerror(number), "made")
    line = explain(error, "/the/folder", move="VARIABLE")
    assert line.startswith(f"/the/folder/made: {os.strerror(number)}: ")
    assert advice in line
    assert advice.replace("VARIABLE", "") in cannot_start("x", error) or "VARIABLE" in advice


def test_what_nothing_is_known_of_is_said_alone() -> None:
    error = OSError(errno.EACCES, os.strerror(errno.EACCES), b"/a/place")
    assert explain(error, "/elsewhere") == "/a/place: Permission denied"
    assert explain(OSError(errno.EACCES, "Permission denied", 7)) == "Permission denied"
    assert explain(OSError("odd")) == "odd"


def test_no_process_left() -> None:
    error = BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    assert "ulimit -u" in cannot_start("qemu", error)
    assert "ulimit -u" not in explain(error)


# No thread's stack fits any more. Prints what the code of a test raises.
NO_THREAD = """
import resource, sys, threading
import anyio
from microguest import MachineError, ImageError, aio
from microguest.host_client.images.tools import run_command

async def found():
    await aio.find("nobody")

async def booted():
    await aio.boot("dir:/nowhere")

def asked():
    run_command(["true"])

calls = (lambda: anyio.run(found), lambda: anyio.run(booted), asked)
anyio.run(anyio.sleep, 0)  # what it imports
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
threading.stack_size(2 << 30)
for call in calls:
    try:
        call()
    except (MachineError, ImageError) as error:
        print(error)
"""


def test_no_thread_left(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_THREAD],
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "cannot start a worker thread",
        "cannot start a worker thread",
        "cannot start true",
    ], done
    assert all("ulimit -u" in line for line in lines)
