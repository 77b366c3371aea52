"""A process id that is another's by the time of the kill, and marks that anybody can have."""

import os
import pathlib
import shutil
import subprocess
import sys
import textwrap

import pytest
from sleepers import Sleeper

from microguest.agent.process import tree

ROOT = pathlib.Path(__file__).parent.parent

BEGIN = """
    import os, signal, time
    from microguest.agent.process import tree

    MARK = tree.MARKER + b"1"

    def begin(number, env):
        with open("/proc/sys/kernel/ns_last_pid", "w") as file:
            file.write(str(number - 1))
        pid = os.posix_spawn("/bin/sleep", ["sleep", "600"], env)
        assert pid == number
        return pid

    def end(pid):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        time.sleep(0.05)  # beyond the kernel's tick: no guest makes 32,768 processes within one

    def lives(pid):
        return os.waitpid(pid, os.WNOHANG) == (0, 0)

    def turn(hunt):
        for _ in tree.passes([hunt]):
            pass
"""


def in_namespace(script: str) -> None:
    """Run it where this test alone says which process id is next."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare")
    source = textwrap.dedent(BEGIN) + textwrap.dedent(script)
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable]
    done = subprocess.run(
        [*command, "-c", source], check=False, cwd=ROOT, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr.decode()


def test_a_hunt_does_not_kill_who_has_a_dead_ones_id() -> None:
    in_namespace("""
        begin(300, {b"MICROGUEST_PROCESS": b"1"})
        hunt = tree.Hunt(200, MARK)
        turn(hunt)  # which stops it, to kill it in the next one
        end(300)
        begin(300, {})
        while not hunt.over:
            turn(hunt)
        assert not hunt.delivered and lives(300)
    """)


def test_an_unheld_process_is_known_by_its_mark_alone() -> None:
    """The id of one that nobody waits for may be another's, who may lead a session."""
    in_namespace("""
        begin(300, {b"MICROGUEST_PROCESS": b"1"})
        steps = tree.marked()
        while True:
            try:
                time.sleep(next(steps))
            except StopIteration as stop:
                assert MARK in stop.value
                break
        end(300)
        begin(300, {})
        hunt = tree.Hunt(tree.NOBODY, MARK)
        while not hunt.over:
            turn(hunt)
        assert not hunt.delivered and lives(300)
        begin(301, {b"MICROGUEST_PROCESS": b"1"})
        tree.run([tree.Hunt(tree.NOBODY, MARK), tree.Hunt(tree.NOBODY, MARK + b"2")])
        assert os.waitpid(301, 0)[1] == signal.SIGKILL and lives(300)
    """)


def test_who_is_born_after_a_listing_is_in_the_next() -> None:
    in_namespace("""
        begin(300, {"MICROGUEST_PROCESS": "1"})
        hunt = tree.Hunt(tree.NOBODY, MARK)
        steps = tree.passes([hunt])
        next(steps)  # it is listed
        begin(301, {"MICROGUEST_PROCESS": "1"})
        end(300)
        for _ in steps:
            pass
        while not hunt.over:
            turn(hunt)
        assert os.waitpid(301, 0)[1] == signal.SIGKILL
    """)


def test_a_thread_whose_process_seems_to_have_ended_is_found() -> None:
    in_namespace("""
        import ctypes, threading

        pid = os.fork()
        if not pid:
            threading.Thread(target=time.sleep, args=(600,)).start()
            number = {"x86_64": 60, "aarch64": 93}[os.uname().machine]
            ctypes.CDLL(None).syscall(number, 0)  # exit(2), of the first thread alone
        while tree.stat_fields(str(pid))[0] != b"Z":
            time.sleep(0.01)
        tree.run([tree.Hunt(pid, MARK)])
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    """)


def test_no_environment_has_the_mark_of_who_has_none(sleeper: Sleeper) -> None:
    """What would be killed by it is whoever calls itself so."""
    name, _, value = os.fsdecode(tree.UNMARKED).replace("\0", "").partition("=")
    process = subprocess.Popen(["sleep", sleeper.argument], env={name or "none": value})
    try:
        sleeper.wait_for(1)
        hunt = tree.Hunt(tree.NOBODY, tree.UNMARKED)
        tree.run([hunt])
        assert not hunt.delivered
    finally:
        process.kill()
        process.wait()
