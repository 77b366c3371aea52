"""Boot after boot on a busy machine: each must reach a command's result, and none may hang.

`make soak` runs a thousand in namespaces and a hundred in QEMU; `make test` a fifth of that.
"""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from machinekit import family, wait_until
from patience import PATIENCE

import microguest
from microguest.host_client.machines.folder import machines_root

DEMO_IMAGE = f"oci:{Path(__file__).parent.parent / 'dist' / 'demo'}:busybox"
TIMES = int(os.environ.get("MICROGUEST_SOAK", "1"))


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


def on_the_host(names: set[str]) -> set[str]:
    """What machines could leave behind: processes of ours, mounts, loop devices, folders."""
    folders = [f"{machines_root()}/{name}" for name in names]
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    return {
        *(f"process {pid}" for pid in family(os.getpid())),
        *(f"mount {line}" for line in mounts if any(folder in line for folder in folders)),
        *(f"loop device of {file}" for file in looped() if file.startswith(tuple(folders))),
        *(f"folder {folder}" for folder in folders if os.path.exists(folder)),
    }


def looped() -> Iterator[str]:
    """The files behind the loop devices of this host."""
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            yield path.read_text().strip()


@pytest.mark.slow
@pytest.mark.timeout(1200 * TIMES)
@pytest.mark.parametrize(
    ("machine", "boots"),
    [("namespaces", 200 * TIMES), pytest.param("qemu", 20 * TIMES, marks=pytest.mark.qemu)],
)
def test_every_boot_of_many_reaches_a_command(machine: str, boots: int) -> None:
    seconds = []
    names: set[str] = set()
    before = on_the_host(names)
    with busy_processors():
        for number in range(boots):
            start = time.monotonic()
            with microguest.boot(DEMO_IMAGE, machine=machine) as vm:
                names.add(vm.name)
                result = vm.agent.exec(["echo", str(number)], timeout=PATIENCE)
            assert result.stdout == f"{number}\n".encode()
            seconds.append(time.monotonic() - start)
    seconds.sort()
    middle = seconds[boots // 2]
    print(f"{boots} boots on {machine}: median {middle:.2f} s, slowest {seconds[-1]:.2f} s")
    wait_until("nothing is left", lambda: on_the_host(names) <= before)
