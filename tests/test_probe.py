"""Programs that are asked what they are, and leave others behind that have their output."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from patience import SLACK
from sleepers import Sleeper

from microguest.errors import MachineError
from microguest.host_client.images import recipes
from microguest.host_client.machines.host import accelerator, qemu_version
from microguest.host_client.machines.virtiofsd import is_successor
from microguest.host_client.probe import probe


@pytest.fixture
def sleeper() -> Iterator[Sleeper]:
    sleeper = Sleeper()
    yield sleeper
    sleeper.end()


@pytest.fixture
def leaves(tmp_path: Path, sleeper: Sleeper) -> Callable[[str], str]:
    """Makes a program that starts another one, says something, and ends."""

    def made(says: str) -> str:
        program = tmp_path / "mkfs.erofs"
        program.write_text(f"#!/bin/sh\nsleep {sleeper.argument} &\necho '{says}'\n")
        program.chmod(0o755)
        return str(program)

    return made


def test_a_version_of_a_program_that_leaves_another(
    leaves: Callable[[str], str], sleeper: Sleeper
) -> None:
    assert qemu_version(leaves("QEMU 99")) == "QEMU 99"
    sleeper.wait_until_gone()


def test_a_virtiofsd_that_leaves_another(leaves: Callable[[str], str], sleeper: Sleeper) -> None:
    assert is_successor(leaves("--shared-dir"))
    sleeper.wait_until_gone()


def test_a_maker_of_file_systems_that_leaves_another(
    leaves: Callable[[str], str], sleeper: Sleeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", os.path.dirname(leaves("--tar")), prepend=os.pathsep)
    recipes._erofs_options.cache_clear()
    try:
        assert recipes._erofs_options() == "--tar\n"
    finally:
        recipes._erofs_options.cache_clear()
    sleeper.wait_until_gone()


@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="needs /dev/kvm")
def test_an_emulator_that_leaves_another(leaves: Callable[[str], str], sleeper: Sleeper) -> None:
    assert accelerator(leaves("")).name == "kvm"
    sleeper.wait_until_gone()


def test_a_program_that_does_not_end_is_killed_with_all_that_it_started(sleeper: Sleeper) -> None:
    begin = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        probe(["sh", "-c", f"sleep {sleeper.argument} & sleep {sleeper.argument}"], seconds=0.5)
    assert time.monotonic() - begin < SLACK
    sleeper.wait_until_gone()


def test_what_a_program_gets_and_says() -> None:
    said = probe(["sh", "-c", "cat; echo err >&2; exit 3"], given=b"in")
    assert said == (3, b"in", b"err\n")
    said = probe(["sh", "-c", "exec head -c 9000000 /dev/zero"])
    assert len(said.stdout) <= 1 << 20


def test_a_version_that_is_none() -> None:
    with pytest.raises(MachineError, match=r"false --version fails \(1\)"):
        qemu_version("false")
