"""Runs a command on a fraction of this machine, for what holds on quiet machines only.

    python tests/slowed.py 0.2 COMMAND...

All that the command starts shares that part of the processors' time, by a quota of a control group
(cgroup v2, or the cpu controller of v1). Needs root. The group is removed in the end.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

PERIOD = 100_000  # microseconds
GONE = 60.0  # seconds for what the command has left to end by itself, before the group is given up


def main(arguments: list[str]) -> int:
    """The command's exit code; 125 where it cannot be slowed down."""
    fraction, *command = arguments
    quota = int(PERIOD * float(fraction) * len(os.sched_getaffinity(0)))
    try:
        group = make_group(quota)
    except OSError as error:
        sys.stderr.write(f"slowed: no control group with a quota: {error}; needs root\n")
        return 125
    try:
        return subprocess.run(
            ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', group, *command], check=False
        ).returncode
    finally:
        remove(group)


def make_group(quota: int) -> Path:
    """A group of our own that gets `quota` microseconds of each PERIOD."""
    name = f"microguest-slowed-{os.getpid()}"
    old = Path("/sys/fs/cgroup/cpu")
    if old.is_dir():
        group = old / name
        group.mkdir()
        (group / "cpu.cfs_period_us").write_text(str(PERIOD))
        (group / "cpu.cfs_quota_us").write_text(str(quota))
        return group
    group = Path("/sys/fs/cgroup", name)
    group.mkdir()
    (group / "cpu.max").write_text(f"{quota} {PERIOD}")
    return group


def remove(group: Path) -> None:
    deadline = time.monotonic() + GONE
    while True:
        try:
            return group.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
