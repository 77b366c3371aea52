"""Whom the guard leaves alone, and who is somebody else by the time that it acts."""

import pathlib
import subprocess
import sys
import textwrap

import pytest
from test_pid_reuse import in_namespace

ROOT = pathlib.Path(__file__).parent.parent

# This program's first thread is the event loop that the guard looks at, at a process's stdin.
LOOP = """
    import os, threading, time
    from microguest.agent.process.guard import Guard
    from microguest.agent.registry import Process
    from microguest.guest import bounds as limits

    class Watched(Process):
        killed = 0

        def put_down(self):
            self.killed += 1

    class Watching(Guard):
        looks = 0

        def _look(self, now, seconds):
            super()._look(now, seconds)
            self.looks += 1
            if self.looks == 5 or process.killed:
                os.write(writer, b"x")

    class OfOne:
        def __init__(self, process):
            self.processes = {process.id: process}

    limits.LOCK_HELD = 0.5
    reader, writer = os.pipe()
    process = Watched("p1", 0, exit_fd=-1, stdin=reader, outputs={})
    Watching(OfOne(process)).start()
"""
# Asleep in a call on that stream, as who waits for data: it has let go of the lock.
ASLEEP = "os.read(reader, 1)"
# It is to be closed, but the loop is not at that: it waits for something else.
ELSEWHERE = """
    other, writer = os.pipe()
    close = os.close
    os.close = lambda fd: os.read(other, 1) and close(fd)
    process.stdin = -1
    process.close(reader)
"""


@pytest.mark.parametrize("waits", [ASLEEP, ELSEWHERE], ids=["asleep", "elsewhere"])
def test_a_loop_that_waits_for_no_lock_kills_nobody(waits: str) -> None:
    source = textwrap.dedent(LOOP) + textwrap.dedent(waits) + "\nassert process.killed == 0"
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()


def test_who_has_a_dead_workloads_id_is_not_killed() -> None:
    """PID 1 has reaped it while the event loop stood, which so has not heard of it."""
    in_namespace("""
        from microguest.agent.process.adopted import Adopted

        begin(300, {})
        workload = Adopted("main", 300, os.pidfd_open(300), (-1, {}))
        end(300)
        begin(300, {})
        workload.put_down()
        assert lives(300)
        begin(301, {})
        Adopted("main", 301, os.pidfd_open(301), (-1, {})).put_down()
        assert os.waitpid(301, 0)[1] == signal.SIGKILL and lives(300)
    """)
