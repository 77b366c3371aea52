"""The image cache: made once, shared, bounded, and whole whatever dies or fills up."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import imagefactory as factory
import pytest
from patience import PATIENCE

from microguest.errors import ImageError
from microguest.host_client import images

SMALL = factory.layer([factory.directory("etc"), factory.member("etc/name", b"guest\n")])
PREPARE = """\
import sys
from microguest.host_client import images
with images.open_image(sys.argv[1]) as image:
    images.as_directory(image, "/", cache=images.Cache(sys.argv[2]))
    images.as_disk(image, "/", cache=images.Cache(sys.argv[2]))
"""


@pytest.fixture
def cache(tmp_path: Path) -> images.Cache:
    return images.Cache(str(tmp_path / "cache"))


def entries(cache: images.Cache) -> list[str]:
    return sorted(os.listdir(os.path.join(cache.directory, "entries")))


def leftovers(cache: images.Cache) -> list[str]:
    return [name for place in ("tmp", "locks") for name in os.listdir(Path(cache.directory, place))]


def prepare(reference: str, cache: images.Cache) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE, reference, cache.directory], cwd=factory.PROJECT
    )


def distinct_image(path: Path, number: int, size: int = 0) -> images.Image:
    content = factory.layer([factory.member("number", b"%d" % number + os.urandom(size))])
    return images.open_image(factory.make_layout(path / f"i{number}", [content]))


def test_second_use_is_the_same_file(tmp_path: Path, cache: images.Cache) -> None:
    factory.require("sqfstar", "tar")
    reference = factory.make_layout(tmp_path / "i", [SMALL])
    with images.open_image(reference) as image:
        disk = images.as_disk(image, tmp_path, cache=cache)
        made = disk.path.stat().st_ino
        root = images.as_directory(image, tmp_path, cache=cache)
    with images.open_image(reference) as image:
        assert images.as_disk(image, tmp_path, cache=cache).path.stat().st_ino == made
        assert images.as_directory(image, tmp_path, cache=cache) == root
    assert len(entries(cache)) == 2
    assert leftovers(cache) == []


def test_disks_are_reproducible(tmp_path: Path) -> None:
    factory.require("sqfstar")
    with images.open_image(factory.make_layout(tmp_path / "i", [SMALL])) as image:
        disks = [
            images.as_disk(
                image, tmp_path, fstype="squashfs", cache=images.Cache(str(tmp_path / name))
            )
            for name in ("a", "b")
        ]
        assert disks[0].path.read_bytes() == disks[1].path.read_bytes()


def test_default_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    factory.require("tar")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    with images.open_image(factory.make_layout(tmp_path / "i", [SMALL])) as image:
        root = images.as_directory(image, tmp_path)
    assert root.is_relative_to(tmp_path / "xdg" / "microguest" / "images")
    assert (tmp_path / "xdg" / "microguest" / "images").stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with images.open_image(factory.make_layout(tmp_path / "j", [SMALL])) as image:
        assert images.as_directory(image, tmp_path).is_relative_to(tmp_path / "home" / ".cache")


def test_least_recently_used_goes_first(tmp_path: Path, cache: images.Cache) -> None:
    factory.require("tar")
    cache.max_bytes = 250_000
    paths = []
    for number in range(2):
        with distinct_image(tmp_path, number, 100_000) as image:
            paths.append(images.as_directory(image, tmp_path, cache=cache))
            time.sleep(0.02)
    with images.open_image(f"oci:{tmp_path / 'i0'}") as image:
        images.as_directory(image, tmp_path, cache=cache)  # now the second is the older one
    with distinct_image(tmp_path, 2, 100_000) as image:
        paths.append(images.as_directory(image, tmp_path, cache=cache))
    assert [path.exists() for path in paths] == [True, False, True]
    assert leftovers(cache) == []


def test_what_is_in_use_is_never_evicted(tmp_path: Path, cache: images.Cache) -> None:
    factory.require("sqfstar", "tar")
    cache.max_bytes = 0
    first, second = distinct_image(tmp_path, 1), distinct_image(tmp_path, 2)
    disk = images.as_disk(first, tmp_path, cache=cache)
    root = images.as_directory(second, tmp_path, cache=cache)
    assert disk.path.exists()
    second.close()
    with distinct_image(tmp_path, 3) as third:
        images.as_directory(third, tmp_path, cache=cache)
    assert disk.path.exists()
    assert not root.exists()
    first.close()
    with distinct_image(tmp_path, 4) as fourth:
        images.as_directory(fourth, tmp_path, cache=cache)
    assert not disk.path.exists()
    assert len(entries(cache)) == 1


def test_processes_that_want_the_same_at_once(tmp_path: Path, cache: images.Cache) -> None:
    factory.require("sqfstar", "tar")
    content = factory.layer([factory.member("f", os.urandom(1 << 20)), factory.member("g", b"")])
    reference = factory.make_layout(tmp_path / "i", [content])
    processes = [prepare(reference, cache) for _ in range(4)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0, 0]
    assert len(entries(cache)) == 2
    assert leftovers(cache) == []


def test_killed_builder_leaves_nothing_in_use(tmp_path: Path, cache: images.Cache) -> None:
    factory.require("sqfstar", "tar")
    content = factory.layer([factory.member("f", os.urandom(48 << 20))])
    reference = factory.make_layout(tmp_path / "i", [content])
    areas = Path(cache.directory, "tmp")
    killed_at_work = 0
    for delay in (0.0, 0.05, 0.15, 0.3):
        process = prepare(reference, cache)
        while process.poll() is None and not (areas.exists() and os.listdir(areas)):
            time.sleep(0.005)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=PATIENCE)
        killed_at_work += bool(os.listdir(areas))
        shutil.rmtree(Path(cache.directory, "entries"), ignore_errors=True)
    assert killed_at_work
    with images.open_image(reference) as image:
        root = images.as_directory(image, tmp_path, cache=cache)
        assert (root / "f").stat().st_size == 48 << 20
    assert leftovers(cache) == []
    assert len(entries(cache)) == 1


@pytest.fixture
def full_disk() -> Iterator[Path]:
    """A file system of 3 MiB."""
    factory.require("mount", root=True)
    where = Path(tempfile.mkdtemp())
    command = ["mount", "-t", "tmpfs", "-o", "size=3M,mode=0700", "tmpfs", str(where)]
    subprocess.run(command, check=True, timeout=PATIENCE)
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True, timeout=PATIENCE)
    where.rmdir()


@pytest.mark.parametrize(("size", "what"), [(8 << 20, "oci:"), (2 << 20, r"tar|sqfstar|mkfs")])
def test_no_space_is_one_clear_error(tmp_path: Path, full_disk: Path, size: int, what: str) -> None:
    """Space ends while a layer is unpacked, and while an external command writes."""
    factory.require("sqfstar", "tar")
    cache = images.Cache(str(full_disk / "cache"))
    with distinct_image(tmp_path, 1, size) as image:
        for make in (images.as_directory, images.as_disk):
            with pytest.raises(ImageError, match=rf"no space left .*({what}).*XDG_CACHE_HOME"):
                make(image, tmp_path, cache=cache)
            assert entries(cache) == []
            assert leftovers(cache) == []


def test_no_space_for_the_disk_of_a_directory(full_disk: Path, tmp_path: Path) -> None:
    factory.require("mkfs.erofs")
    (tmp_path / "f").write_bytes(os.urandom(8 << 20))
    with pytest.raises(ImageError, match="no space left"):
        images.as_disk(images.open_image(f"dir:{tmp_path}"), full_disk)
    assert os.listdir(full_disk) == []


def test_cache_that_others_can_write_to_is_refused(tmp_path: Path, cache: images.Cache) -> None:
    os.mkdir(cache.directory)
    os.chmod(cache.directory, 0o777)
    with (
        images.open_image(factory.make_layout(tmp_path / "i", [SMALL])) as image,
        pytest.raises(ImageError, match=r"belongs to user|can be written by other users"),
    ):
        images.as_disk(image, tmp_path, cache=cache)


def test_cache_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with (
        images.open_image(factory.make_layout(tmp_path / "i", [SMALL])) as image,
        pytest.raises(ImageError, match="set XDG_CACHE_HOME"),
    ):
        images.as_disk(image, tmp_path, cache=images.Cache(str(tmp_path / "file" / "cache")))


def test_missing_command_names_its_package(
    tmp_path: Path, cache: images.Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with (
        images.open_image(factory.make_layout(tmp_path / "i", [SMALL])) as image,
        pytest.raises(ImageError, match="install the package squashfs-tools"),
    ):
        images.as_disk(image, tmp_path, fstype="squashfs", cache=cache)
    assert leftovers(cache) == []


def test_a_directory_is_on_its_disk_before_it_is_in_the_cache(
    tmp_path: Path, cache: images.Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the real sync, in a wrapper that writes down what is there at that moment."""
    factory.require("tar", "sync")
    (tmp_path / "bin").mkdir()
    wrapper = tmp_path / "bin" / "sync"
    wrapper.write_text(
        f"#!/bin/sh\n{{ cat $2/etc/name; ls {cache.directory}/entries; }} >{tmp_path}/seen\n"
        f'exec {shutil.which("sync")} "$@"\n'
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    with images.open_image(factory.make_layout(tmp_path / "i", [SMALL])) as image:
        images.as_directory(image, tmp_path, cache=cache)
    assert (tmp_path / "seen").read_text() == "guest\n"
