"""A machine's folder is made and written through descriptors: nobody can swap what is between."""

import os
from pathlib import Path

import pytest

from host_client.errors import ImageError, MachineError
from host_client.images.cache import Cache
from host_client.machines.folder import claim

OTHER = 1234  # a user's id

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")


@pytest.fixture(autouse=True)
def sticky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As /tmp is: anybody can make a folder there, and the one of the machines is not there yet."""
    folder = tmp_path / "sticky"
    folder.mkdir()
    folder.chmod(0o1777)
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "race"))
    return folder


def quicker(sticky: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between our look and our first mkdir, another user makes the whole way."""
    mkdir = os.mkdir

    def late(*args: object, **options: object) -> None:
        monkeypatch.setattr(os, "mkdir", mkdir)
        made = sticky / "race"
        for name in ("", "microguest", "machines"):
            made = made / name
            made.mkdir()
            os.chown(made, OTHER, OTHER)
        mkdir(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "mkdir", late)


@needs_root
def test_who_makes_the_folder_first_does_not_get_the_machine(
    sticky: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quicker(sticky, monkeypatch)
    with pytest.raises(MachineError, match="race belongs to user 1234"):
        claim("one")
    assert os.listdir(sticky / "race" / "microguest" / "machines") == []


@needs_root
def test_who_makes_the_cache_first_does_not_get_anything_in_it(
    sticky: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quicker(sticky, monkeypatch)
    with pytest.raises(ImageError, match="race belongs to user 1234"):
        Cache(str(sticky / "race" / "images")).obtain("x", lambda work, content: None)
    assert os.listdir(sticky / "race") == ["microguest"]


def test_a_link_that_waits_for_a_file_is_not_followed(sticky: Path) -> None:
    folder = claim("one")
    victim = sticky / "victim"
    victim.write_text("mine")
    for name in ("token", "token.new", "run/boot.json", "run/boot.json.new"):
        Path(folder.path, name).symlink_to(victim)
    folder.write("token", b"secret")
    folder.write_run("boot.json", b"config")
    assert victim.read_text() == "mine"
    assert Path(folder.path, "token").read_bytes() == b"secret"
    assert Path(folder.run, "boot.json").read_bytes() == b"config"
    folder.remove()


@pytest.mark.parametrize("released", [False, True])
def test_nothing_is_written_into_another_folder(sticky: Path, released: bool) -> None:
    folder = claim("one")
    os.rename(folder.path, sticky / "away")
    os.mkdir(folder.path)
    if released:  # to the monitor
        folder.release()
    with pytest.raises(MachineError, match="is not the folder that was made"):
        folder.write("token", b"secret")
    assert os.listdir(folder.path) == []
    folder.remove()


def test_a_file_that_cannot_be_written_leaves_nothing(sticky: Path) -> None:
    folder = claim("one")
    Path(folder.path, "token").mkdir()
    for _ in range(2):
        with pytest.raises(OSError, match="directory"):
            folder.write("token", b"secret")
    assert sorted(os.listdir(folder.path)) == ["run", "token"]
    folder.remove()
