"""Who a group belongs to: folders that it may write to are trusted only where it is ours alone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LOOK = """
import sys
from microguest.host_client.ownership import own_folder_problem

print(own_folder_problem(sys.argv[1]))
"""


def problem(folder: Path, tmp_path: Path, *, users: str) -> str:
    """What is wrong with a folder of root's, on a host that has these users."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare")
    (tmp_path / "passwd").write_text(users)
    (tmp_path / "group").write_text("root:x:0:\nteam:x:1234:\n")
    script = 'for name in passwd group; do mount --bind "$1/$name" /etc/$name || exit 1; done; '
    command = ["unshare", "--mount", "sh", "-c", script + 'shift; exec "$@"', "sh", str(tmp_path)]
    done = subprocess.run(
        [*command, sys.executable, "-c", LOOK, str(folder)],
        cwd=Path(__file__).parent.parent,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("users", "is_ours"),
    [
        ("", True),
        ("other:x:1000:1234::/:/bin/sh\n", True),
        ("other:x:1000:0::/:/bin/sh\n", False),
        ("toor:x:0:0::/:/bin/sh\n", True),
    ],
)
def test_a_group_that_is_others_primary_one_is_not_private(
    tmp_path: Path, users: str, *, is_ours: bool
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(0o770)
    found = problem(folder, tmp_path, users=f"root:x:0:0::/root:/bin/sh\n{users}")
    assert found == ("" if is_ours else f"{folder} can be written by other users (mode 0770)")
