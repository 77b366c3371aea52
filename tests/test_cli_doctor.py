"""`microguest doctor` says of each thing whether it can be used: here, now, and by whom it runs."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import imagefactory as factory
import pytest

from microguest.host_client.images.tools import PACKAGES
from microguest.host_client.machines import virtiofsd as daemons

DOCTOR = [sys.executable, "-m", "microguest", "doctor"]


pytestmark = pytest.mark.usefixtures("image")  # on a host where machines can run


def doctor(*before: str, env: dict[str, str] | None = None, cwd: Path = factory.PROJECT) -> "Said":
    return Said(
        subprocess.run(
            [*before, *DOCTOR],
            cwd=cwd,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    )


class Said:
    """What it said, and by which exit code."""

    def __init__(self, done: "subprocess.CompletedProcess[str]") -> None:
        assert not done.stderr, done.stderr
        self.code = done.returncode
        self.text = done.stdout

    def of(self, what: str) -> str:
        """The one line about it."""
        (line,) = [line for line in self.text.splitlines() if line[4:].startswith(f"{what} ")]
        return line


@pytest.mark.parametrize(
    ("what", "variable"), [("state", "XDG_STATE_HOME"), ("image cache", "XDG_CACHE_HOME")]
)
@pytest.mark.parametrize(
    ("options", "said"), [("size=1m", "1 MiB free"), ("size=128m,nr_inodes=8", "more files")]
)
def test_folder_without_room(
    tmp_path: Path, what: str, variable: str, options: str, said: str
) -> None:
    """In a mount namespace of its own, which ends with the command."""
    factory.require("unshare", "mount", root=True)
    script = f'mount -t tmpfs -o {options} none {tmp_path} && exec "$@"'
    found = doctor("unshare", "--mount", "sh", "-c", script, "sh", env={variable: str(tmp_path)})
    line = found.of(what)
    assert line.startswith("no ")
    assert said in line
    assert f"set {variable}" in line
    assert found.code == 1
    assert found.text.endswith("no virtual machine can run here yet\n")  # others can
    assert doctor(env={variable: str(tmp_path)}).code == 0


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    found = doctor(env={"XDG_CACHE_HOME": str(tmp_path / "cache")})
    assert found.of("image cache").startswith("no ")
    assert found.code == 1


@pytest.mark.parametrize(
    ("what", "variable"), [("state", "XDG_STATE_HOME"), ("image cache", "XDG_CACHE_HOME")]
)
def test_folder_that_others_could_have_made(tmp_path: Path, what: str, variable: str) -> None:
    """`run` refuses it, so it is a finding: neither an error that ends the list, nor "ok"."""
    factory.require(root=True)
    os.chown(tmp_path, 1234, 1234)
    found = doctor(env={variable: str(tmp_path)})
    line = found.of(what)
    assert line.startswith("no ")
    assert f"{tmp_path} belongs to user 1234" in line
    assert f"set {variable}" in line
    assert found.code == 1
    os.chown(tmp_path, 0, 0)
    tmp_path.chmod(0o777)
    assert "can be written by other users" in doctor(env={variable: str(tmp_path)}).of(what)
    tmp_path.chmod(0o700)
    assert doctor(env={variable: str(tmp_path)}).of(what).startswith("ok ")


def test_shares_as_the_user_that_runs_it() -> None:
    """QEMU's own virtiofsd (7.2) needs root, its successor does not."""
    factory.require("setpriv", root=True)
    program = daemons.virtiofsd()
    place = tempfile.mkdtemp()  # which that user can reach, unlike pytest's own
    try:
        os.chown(place, 1234, 1234)
        home = {"XDG_STATE_HOME": place, "XDG_CACHE_HOME": place, "HOME": place}
        found = doctor("setpriv", "--reuid=1234", "--regid=1234", "--clear-groups", env=home)
    finally:
        shutil.rmtree(place)
    if daemons.is_successor(program):
        assert found.of("shares").startswith("ok ")
    else:
        assert found.of("shares").startswith("-- ")
        assert "needs root" in found.of("shares")
        assert "ok  shares" in doctor().text


def test_installed_without_a_checkout(tmp_path: Path) -> None:
    """A wheel's user has no Makefile: the advice is where a bundle comes from, and where to."""
    shutil.copytree(factory.PROJECT / "src", tmp_path / "site")  # and what its links lead to
    data = tmp_path / "data"
    where = {"PYTHONPATH": str(tmp_path / "site"), "XDG_DATA_HOME": str(data)}
    found = doctor(env=where, cwd=tmp_path / "site")
    folder = data / "microguest" / "guest" / os.uname().machine
    assert f"no guest bundle in {folder}: copy one to {folder}, or set MICROGUEST_BUNDLE" in (
        found.of("guest")
    )
    assert found.code == 1
    shutil.copytree(factory.PROJECT / "dist" / "guest" / os.uname().machine, folder)
    assert doctor(env=where, cwd=tmp_path / "site").of("guest").startswith("ok ")
    kernel = folder / "vmlinuz"
    kernel.write_bytes(kernel.read_bytes()[:-1])
    assert f"copy one to {folder}" in doctor(env=where, cwd=tmp_path / "site").of("guest")


def test_every_tool_that_an_image_takes_is_named() -> None:
    words = re.findall(r"[\w.]+", doctor().of("image tools"))
    assert sorted(PACKAGES.keys() - set(words)) == []
    assert "sync" in words
