"""Boot after boot on a busy machine: each must reach a command's result, and none may hang."""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import host_client

DEMO_IMAGE = f"oci:{Path(__file__).parent.parent / 'dist' / 'demo'}:busybox"


@contextlib.contextmanager
def busy_processors() -> Iterator[None]:
    """One process that never rests for each processor."""
    endless = ["sh", "-c", "while :; do :; done"]
    burners = [subprocess.Popen(endless) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("machine", "boots"),
    [("namespaces", 200), pytest.param("qemu", 20, marks=pytest.mark.qemu)],
)
def test_every_boot_of_many_reaches_a_command(machine: str, boots: int) -> None:
    seconds = []
    with busy_processors():
        for number in range(boots):
            start = time.monotonic()
            with host_client.boot(DEMO_IMAGE, machine=machine) as vm:
                result = vm.agent.exec(["echo", str(number)], timeout=30)
            assert result.stdout == f"{number}\n".encode()
            seconds.append(time.monotonic() - start)
    seconds.sort()
    middle = seconds[boots // 2]
    print(f"{boots} boots on {machine}: median {middle:.2f} s, slowest {seconds[-1]:.2f} s")
