"""The list of mounts is longer than a page, which is what the kernel gives at a time."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MANY = 150  # mounts; one page of their list has about 60
SCRIPT = """
import sys
from pathlib import Path

from microguest.init_shim import mounts
from microguest.init_shim.network import etcfiles
from microguest.init_shim.root import write_out

folder = Path(sys.argv[1])
for number in range(int(sys.argv[2])):
    place = folder / f"place-{number}"
    place.mkdir()
    mounts.mount("tmpfs", str(place), "tmpfs", 0, "size=4k")
named = {target for _, target in write_out.mounted()}
assert {f"{folder}/place-{number}" for number in range(int(sys.argv[2]))} <= named, len(named)
etcfiles.OWN = str(folder)
assert not etcfiles.has_store()
etcfiles.OWN = f"{folder}/place-{number}"
assert etcfiles.has_store()
"""


def test_every_mount_is_found(tmp_path: Path) -> None:
    """What is mounted last is unmounted first, and a store that is there is not made again."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare")
    command = ["unshare", "--mount", sys.executable, "-c", SCRIPT, str(tmp_path), str(MANY)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, check=False, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
