"""An agent's own part of the cgroup hierarchy, which other agents may share."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from patience import PATIENCE

# In a process of its own: one that closes its cgroups goes to the hierarchy's root. The other agent
# comes at each line of what an agent does to have a directory, once for each.
AT_EACH_MOMENT = """
import fcntl, os, sys
from microguest.agent.process import cgroups

folder, comes = sys.argv[1:]
parent = f"{folder}/microguest"

def remove():
    cgroups.remove_abandoned(parent)

held = []
def hold():
    # As `remove`, but not done yet when the first agent goes on.
    for name in os.listdir(parent):
        if os.path.isdir(f"{parent}/{name}"):
            fd = os.open(f"{parent}/{name}", os.O_RDONLY)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held.append(fd)
            except BlockingIOError:
                os.close(fd)

def moments(number):
    left = number
    def tracer(frame, event, argument):
        nonlocal left
        if frame.f_code.co_filename != cgroups.__file__:
            return None
        if event == "line":
            left -= 1
            if left == 0 and os.path.isdir(parent):
                sys.settrace(None)
                {"remove": remove, "hold": hold}[comes]()
        return tracer
    sys.settrace(tracer)
    try:
        ours = cgroups.Cgroups(folder, None)
    finally:
        sys.settrace(None)
    remove()  # of a living agent there is nothing to clear away
    leaf = ours.take()
    assert leaf is not None and os.path.isdir(leaf.path), number
    ours.give_back(leaf)
    ours.close()
    assert not os.path.exists(ours.path), ours.path
    while held:
        os.close(held.pop())
    return left > 0

number = 1
while not moments(number):
    number += 1
remove()
print(number, *(name for name in os.listdir(parent) if os.path.isdir(f"{parent}/{name}")))
"""


@pytest.fixture
def hierarchy(tmp_path: Path) -> Iterator[Path]:
    """A cgroup of the test's own, in which agents find theirs as in a whole hierarchy."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a cgroup hierarchy")
    subprocess.run(["mount", "-t", "cgroup2", "none", tmp_path], check=True)
    folder = tmp_path / f"test-{os.getpid()}"
    try:
        folder.mkdir()
        yield folder
        for path, _, _ in os.walk(folder, topdown=False):
            os.rmdir(path)
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


@pytest.mark.parametrize("comes", ["remove", "hold"])
def test_no_other_agent_takes_a_new_agents_cgroups(hierarchy: Path, comes: str) -> None:
    """Whenever it clears away what dead agents have left."""
    done = subprocess.run(
        [sys.executable, "-c", AT_EACH_MOMENT, hierarchy, comes],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    moments, *left = done.stdout.split()
    assert int(moments) > 20
    assert left == []
