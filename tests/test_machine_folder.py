"""A machine's folder is made and written through descriptors: nobody can swap what is between."""

import contextlib
import os
import resource
from pathlib import Path

import machinekit
import pytest

from microguest import boot, list_machines
from microguest.errors import ImageError, MachineError, MicroguestError
from microguest.host_client.images.cache import Cache
from microguest.host_client.machines.folder import claim
from microguest.host_client.machines.qemu import write_initramfs

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


def test_what_is_in_the_place_of_a_folder_is_not_removed(sticky: Path) -> None:
    folder = claim("one")
    os.rename(folder.path, sticky / "away")
    os.mkdir(folder.path)
    Path(folder.path, "theirs").touch()
    folder.remove()
    assert os.listdir(folder.path) == ["theirs"]
    assert os.listdir(sticky / "away") == []


def test_nothing_is_written_into_the_run_folder_of_another(sticky: Path) -> None:
    folder = claim("one")
    os.rename(folder.path, sticky / "away")
    os.makedirs(folder.run)
    with pytest.raises(MachineError, match="is not the folder that was made"):
        folder.write_run("boot.json", b"config")
    assert os.listdir(folder.run) == []
    folder.remove()


@pytest.mark.parametrize("kind", ["file", "initramfs"])
def test_a_file_that_gets_no_room_in_the_middle_is_an_error(sticky: Path, kind: str) -> None:
    """As on a disk that gets full: one write(2) takes what there is room for."""
    folder = claim("one")
    base = sticky / "base"
    base.write_bytes(bytes(4096))

    def write() -> None:
        if kind == "file":
            folder.write("state.json", b"x" * 8192)
        else:
            write_initramfs(str(base), f"{folder.run}/initramfs", b"x" * 8192)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
    try:
        with pytest.raises(OSError, match="large"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(folder.path) == ["run"]
    folder.remove()


def test_a_boot_without_descriptors_leaves_none_and_no_name(elf: Path, sticky: Path) -> None:
    """However many are left: each boot fails with an error of ours, until one succeeds."""
    image = machinekit.demo_image()
    with boot(image, machine="namespaces", name="one"):
        pass  # what is kept open for later, and the image's directory
    before = descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before) + 100, hard))
    failed = 0
    try:
        for free in range(100):
            hogs = []
            with contextlib.suppress(OSError):
                while True:
                    hogs.append(os.open("/", os.O_PATH))
            for fd in hogs[len(hogs) - free :]:
                os.close(fd)
            del hogs[len(hogs) - free :]
            try:
                machine = boot(image, machine="namespaces", name="one")
            except MicroguestError:
                failed += 1
                machine = None
            finally:
                for fd in hogs:
                    os.close(fd)
            if machine is not None:
                machine.kill()
                break
            assert descriptors() == before
            assert list_machines(all=True) == []  # puts in order what no descriptor was left for
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert failed > 5


def descriptors() -> set[int]:
    return {
        int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")
    }
