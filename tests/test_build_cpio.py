"""The cpio writer against the real reader: GNU cpio lists and unpacks what it wrote."""

import os
import shutil
import stat
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st
from patience import PATIENCE

from microguest.guest.bundle import cpio

needs_cpio = pytest.mark.skipif(shutil.which("cpio") is None, reason="no cpio: install cpio")

ENTRIES = [
    cpio.directory("dev"),
    cpio.device("dev/console", 5, 1, 0o600),
    cpio.directory("microguest", 0o700),
    cpio.regular("microguest/boot.json", b'{"token":"x"}', 0o600),
    cpio.regular("odd", b"abc"),
    cpio.regular("empty", b""),
    cpio.symlink("link", "microguest/boot.json"),
    cpio.regular("init", bytes(range(256)) * 33, 0o755),
]


@needs_cpio
def test_cpio_lists_names_modes_and_times():
    done = subprocess.run(
        ["cpio", "-itv", "--numeric-uid-gid"],
        input=cpio.segment(ENTRIES),
        capture_output=True,
        check=True,
        env={"TZ": "UTC", "LC_ALL": "C", "PATH": os.environ["PATH"]},
        timeout=PATIENCE,
    )
    lines = [line.split() for line in done.stdout.decode().splitlines()]
    assert [line[0] for line in lines] == [stat.filemode(entry.mode) for entry in ENTRIES]
    assert all(line[2:4] == ["0", "0"] for line in lines)
    assert all("1970" in line for line in lines)
    assert lines[1][4:6] == ["5,", "1"]


@needs_cpio
def test_cpio_unpacks_contents_and_modes(tmp_path):
    archive = cpio.segment([entry for entry in ENTRIES if entry.path != "dev/console"])
    command = ["cpio", "-id", "--no-preserve-owner"]
    subprocess.run(
        command, input=archive, capture_output=True, check=True, cwd=tmp_path, timeout=PATIENCE
    )
    for entry in ENTRIES:
        path = tmp_path / entry.path
        if stat.S_ISREG(entry.mode):
            assert path.read_bytes() == entry.data
            assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(entry.mode)
    assert os.readlink(tmp_path / "link") == "microguest/boot.json"


def read_back(archive):
    """A strict reader of the newc form: (path, mode, data, inode) of each entry."""
    entries = []
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        name_end = at + 110 + fields[11]
        assert archive[name_end - 1] == 0
        name = archive[at + 110 : name_end - 1].decode()
        start = -(-name_end // 4) * 4
        end = start + fields[6]
        at = -(-end // 4) * 4
        if name == "TRAILER!!!":
            assert not any(archive[at:])
            return entries
        entries.append((name, fields[1], archive[start:end], fields[0]))


names = st.text(st.characters(blacklist_characters="/\0", codec="utf-8"), min_size=1, max_size=20)
paths = names.filter(lambda name: name not in {".", "..", "TRAILER!!!"})


@given(st.lists(st.tuples(paths, st.binary(max_size=50), st.integers(0, 0o7777)), max_size=8))
def test_what_is_written_can_be_read(files):
    entries = [cpio.regular(path, data, mode) for path, data, mode in files]
    archive = cpio.segment(entries)
    assert len(archive) % cpio.ALIGNMENT == 0
    assert archive == cpio.segment(entries)
    found = read_back(archive)
    assert [(path, data, mode & 0o7777) for path, mode, data, _ in found] == files
    assert [inode for *_, inode in found] == list(range(1, len(files) + 1))


@pytest.mark.parametrize(
    "path", ["", "/etc", "a//b", "a/", "../a", "a/./b", "a\0b", "TRAILER!!!", "x" * 4096]
)
def test_paths_that_the_kernel_would_misread_are_refused(path):
    with pytest.raises(ValueError, match=r"path"):
        cpio.segment([cpio.regular(path, b"")])
