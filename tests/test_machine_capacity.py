"""Memory and processors that a machine cannot have are refused; the least is enough."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import machinekit
import pytest
from patience import PATIENCE

from microguest import boot
from microguest.errors import MachineError
from microguest.host_client.machines.bundle import find_bundle
from microguest.host_client.machines.capacity import host_memory, least_memory
from microguest.host_client.machines.folder import names
from microguest.host_client.machines.settings import mebibytes

pytestmark = pytest.mark.usefixtures("machines_home", "elf")


def least(cpus: int) -> int:
    return least_memory(os.stat(find_bundle(None).initramfs).st_size, cpus)


@pytest.mark.parametrize(
    ("text", "mib"),
    [("512M", 512), ("512m", 512), ("512MB", 512), ("512MiB", 512), ("2g", 2048), ("1T", 1 << 20),
     ("536870912", 512), ("524288k", 512)],
)  # fmt: skip
def test_sizes_as_docker_writes_them(text: str, mib: int) -> None:
    assert mebibytes(text) == mib


@pytest.mark.parametrize("text", ["", "0", "-1", "x", "512MM", "5 12M", "0x10", "٣M", "1e9", "-5G"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(MachineError, match=r"^memory: .* is not a size: write 512M or 2G"):
        mebibytes(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "64M"}, "memory 64M is too little: with 1 processor"),
        ({"memory": "1"}, "memory 1 is too little"),
        ({"memory": f"{host_memory() + 1}M"}, "is more than this host has"),
        ({"memory": "999999T"}, "is more than this host has"),
        ({"cpus": 0}, "cpus must be 1 to"),
        ({"cpus": -1}, "cpus must be 1 to"),
        ({"cpus": 10**9}, "cpus must be 1 to"),
        ({"cpus": (os.cpu_count() or 1) + 1}, "is more than this host has: give 1 to"),
    ],
)
def test_what_would_never_boot_is_refused_with_a_reason(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(MachineError, match=message) as caught:
        boot(machinekit.demo_image(), **options)  # type: ignore[arg-type]
    if "too little" in message:
        assert f"a machine needs {least(1)}M" in str(caught.value)
    assert list(names()) == []


@pytest.mark.parametrize("options", [{"memory": "1G"}, {"cpus": 2}])
def test_a_machine_in_namespaces_says_that_it_has_none_of_its_own(
    options: dict[str, object],
) -> None:
    told = r"has this host's memory and processors, and limits neither: leave memory \(-m\)"
    with pytest.raises(MachineError, match=told):
        boot(machinekit.demo_image(), machine="namespaces", **options)  # type: ignore[arg-type]


def test_a_disk_that_could_never_be_formatted_is_not_made(tmp_path: Path) -> None:
    upper = tmp_path / "upper.img"
    with pytest.raises(MachineError, match="1M is too small for an ext4: give 64M or more"):
        boot(machinekit.demo_image(), upper=str(upper), upper_size="1M")
    assert not upper.exists()


@pytest.mark.qemu
@pytest.mark.parametrize("cpus", sorted({1, min(os.cpu_count() or 1, 4)}))
def test_the_least_memory_is_enough(cpus: int) -> None:
    """The guard above is no guess: a machine just above it runs a program and keeps a file."""
    with boot(machinekit.demo_image(), memory=f"{least(cpus)}M", cpus=cpus) as machine:
        script = "nproc; head -c 1000000 /dev/zero > /file; wc -c < /file"
        assert machine.agent.exec(shell=script).stdout.split() == [b"%d" % cpus, b"1000000"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder of this host with room for 100 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100m", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs to mount: root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.qemu
def test_a_full_disk_of_the_host_is_an_error_in_the_machine(small_disk: Path) -> None:
    """And no pause without end: whoever is in it can read, and stop what writes."""
    upper = str(small_disk / "upper.img")
    with boot(machinekit.demo_image(), upper=upper, upper_size="256M") as machine:
        script = "dd if=/dev/zero of=/full bs=1M count=150 conv=fsync 2>&1"
        written = machine.agent.exec(shell=script, timeout=PATIENCE)
        assert written.returncode == 1
        assert b"Input/output error" in written.stdout
        assert machine.agent.exec(["echo", "alive"], timeout=PATIENCE).stdout == b"alive\n"
        assert not machine.state.paused
