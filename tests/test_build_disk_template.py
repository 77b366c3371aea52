"""The empty ext4 for blank disks: small, the same in every build, whole when it is unpacked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microguest.guest.bundle import disk_template

BUILD = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "build")
sys.path.insert(0, BUILD)  # the build's modules import each other by bare name

from disk_template import make_template  # noqa: E402

ENVIRONMENT = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}


def unpacked(template: bytes) -> bytes:
    size, pieces = disk_template.unpack(template)
    image = bytearray(size)
    for offset, data in pieces:
        assert offset // disk_template.BLOCK == (offset + len(data) - 1) // disk_template.BLOCK
        image[offset : offset + len(data)] = data
    return bytes(image)


def test_the_template_is_a_sound_ext4_of_few_bytes(tmp_path: Path) -> None:
    template = make_template()
    assert template == make_template()
    assert len(template) < 32 * 1024
    image = tmp_path / "ext4"
    image.write_bytes(unpacked(template))
    for command in (["e2fsck", "-fn"], ["dumpe2fs", "-h"]):
        done = subprocess.run(
            [*command, image], capture_output=True, text=True, env=ENVIRONMENT, check=True
        )
    described = dict(line.split(":", 1) for line in done.stdout.splitlines() if ":" in line)
    assert described["Filesystem volume name"].strip() == disk_template.LABEL
    assert {"has_journal", "metadata_csum_seed", "resize_inode"} <= set(
        described["Filesystem features"].split()
    )


@given(st.lists(st.sampled_from([0, 1]), min_size=8, max_size=40))
def test_packing_loses_nothing(bits: list[int]) -> None:
    bits += [0] * (-len(bits) % 8)
    image = b"".join(bytes([bit]) * disk_template.UNIT for bit in bits)
    assert unpacked(disk_template.pack(image)) == image


def test_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="no disk template"):
        disk_template.unpack(b"\0" * 100)
