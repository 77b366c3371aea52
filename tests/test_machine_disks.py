"""Files that are disks: what is said of one that is not there."""

import os
from pathlib import Path

import pytest

from microguest.errors import MachineError
from microguest.host_client.machines.disks import image_disk


@pytest.mark.parametrize("size", ["", "64M"])
@pytest.mark.parametrize("read_only", [False, True])
def test_directory_of_a_disk_is_missing(tmp_path: Path, size: str, read_only: bool) -> None:
    path = tmp_path / "none" / "d.img"
    with pytest.raises(MachineError, match=f"no directory {path.parent}:") as caught:
        image_disk(str(path), "one", size=size, read_only=read_only)
    assert "size=" not in str(caught.value)


@pytest.mark.parametrize(
    ("size", "read_only", "message"),
    [
        ("", False, "there is no disk .*: give size=2G to have one made"),
        ("64M", True, "there is no disk .*, and none is made that is only read"),
        ("", True, "there is no disk .*, and none is made that is only read"),
    ],
)
def test_disk_is_missing(tmp_path: Path, size: str, read_only: bool, message: str) -> None:
    with pytest.raises(MachineError, match=message):
        image_disk(str(tmp_path / "d.img"), "one", size=size, read_only=read_only)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("size", ["", "64M"])
def test_disk_is_a_link_to_nothing(tmp_path: Path, size: str) -> None:
    """Nothing is made where it leads to."""
    (tmp_path / "d.img").symlink_to(tmp_path / "none")
    with pytest.raises(MachineError, match="is a link to a file that does not exist"):
        image_disk(str(tmp_path / "d.img"), "one", size=size)
    assert os.listdir(tmp_path) == ["d.img"]
