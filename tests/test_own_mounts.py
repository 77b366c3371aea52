"""What a test mounts is this run's own: nobody else sees it, and it goes when the run is over."""

import os
import subprocess
from pathlib import Path

import pytest
from patience import PATIENCE


def mounted(pid: int | str, path: Path) -> bool:
    """Whether that process sees a mount there: field 5 of proc_pid_mountinfo(5)."""
    lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    return str(path) in {line.split()[4] for line in lines}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_no_mount_of_a_test_is_seen_outside(tmp_path: Path) -> None:
    """Else one that a killed run has left would be in the way of those who clean up behind it."""
    subprocess.run(["mount", "-t", "tmpfs", "none", tmp_path], check=True, timeout=PATIENCE)
    try:
        assert mounted("self", tmp_path)
        assert not mounted(1, tmp_path)
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True, timeout=PATIENCE)
