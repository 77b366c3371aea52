"""What counts as done by the agent: what the thread of its event loop has done."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from machinekit import wait_until

from microguest.init_shim.life.watchdog import activity
from microguest.init_shim.mounts import proc_folder

HANGING = """
import signal, sys, threading

def look():
    while True:
        pass

threading.Thread(target=look, daemon=True).start()
signal.pause()
"""


@pytest.fixture(scope="module", autouse=True)
def proc() -> int:
    """Opened once, and left open as in PID 1."""
    return proc_folder()


def processor_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_a_second_thread_does_not_make_a_hanging_agent_a_busy_one() -> None:
    process = subprocess.Popen([sys.executable, "-S", "-E", "-c", HANGING])
    try:
        first = Path(f"/proc/{process.pid}/task/{process.pid}/syscall")
        pause = {"x86_64": "34", "aarch64": "73"}[os.uname().machine]  # ppoll there
        wait_until("it hangs", lambda: first.read_text().split()[0] == pause)
        state, _, did = activity(process.pid)
        before = processor_ticks(process.pid)
        wait_until("the other thread has run", lambda: processor_ticks(process.pid) > before + 3)
        assert (state, did) == ("S", activity(process.pid)[2])
    finally:
        process.kill()
        process.wait()
