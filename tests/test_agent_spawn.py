"""Starting programs on kernels that lack the newer calls, and what starting the agent may cost."""

import ctypes
import errno
import os
import pathlib
import shutil
import signal
import struct
import subprocess
import sys
import tempfile

import pytest
from agentharness import AgentProcess, Host, Refused, execute
from plainpython import needs_guestsys

PROJECT = pathlib.Path(__file__).parent.parent

PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_MODE_FILTER = 2
SECCOMP_RET_ALLOW = 0x7FFF0000
SECCOMP_RET_ERRNO = 0x00050000
LOAD_NUMBER = 0x20  # BPF_LD | BPF_W | BPF_ABS, of seccomp_data.nr at offset 0
JUMP_EQUAL = 0x15
RETURN = 0x06
CLONE3, CLOSE_RANGE = 435, 436  # the same on every architecture

LIBC = ctypes.CDLL(None, use_errno=True)


def hide_newer_calls() -> None:
    """Let clone3 and close_range fail as on a kernel before 5.3 and 5.9, from here on."""
    program = [
        (LOAD_NUMBER, 0, 0, 0),
        (JUMP_EQUAL, 2, 0, CLONE3),
        (JUMP_EQUAL, 1, 0, CLOSE_RANGE),
        (RETURN, 0, 0, SECCOMP_RET_ALLOW),
        (RETURN, 0, 0, SECCOMP_RET_ERRNO | errno.ENOSYS),
    ]
    code = b"".join(struct.pack("=HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    filters = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    for arguments in (
        (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filters, 0, 0),
    ):
        if LIBC.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "prctl")


def test_older_kernels_start_programs_too() -> None:
    with AgentProcess(prepare=hide_newer_calls) as agent:
        result = execute(agent, "sh", "-c", "ls /proc/self/fd; exit 3")
        assert (result.stdout.split(), result.exited.code) == ([b"0", b"1", b"2", b"3"], 3)
        before = agent.open_descriptors()
        with Host(agent) as host, pytest.raises(Refused) as caught:
            host.start("true", cwd="/no/such/folder")
        assert caught.value.failure.code == "bad_cwd"
        assert caught.value.failure.fields["step"] == "chdir"
        assert agent.children() == []
        assert agent.open_descriptors() <= before + 1
        for _ in range(50):
            assert execute(agent, "true").exited.code == 0


def test_older_kernels_have_cgroups_too() -> None:
    found = []
    for prepare in (None, hide_newer_calls):
        with AgentProcess(prepare=prepare) as agent:
            text = execute(agent, "cat", "/proc/self/cgroup").stdout.decode()
            found += [line.split("/") for line in text.splitlines() if line.startswith("0::")]
    if not found or "microguest" not in found[0]:
        pytest.skip("this machine has no cgroup v2 that can be written")
    for path in found:
        assert path[-4] == "microguest"
        assert path[-2:] == ["processes", "1"]


# What the agent may import beyond trio and msgpack; each is start-up time of every machine.
OWN = ("microguest.agent.", "microguest.guest.")
STANDARD_LIBRARY = {"_json", "resource", "termios"}  # all of them C

COUNT = """
import sys
import tempfile
import _guestsys, trio, msgpack
before = set(sys.modules)
import microguest.agent.main
print("\\n".join(set(sys.modules) - before))
"""


@needs_guestsys
def test_agent_imports_next_to_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COUNT], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    foreign = {name for name in done.stdout.split() if not f"{name}.".startswith(OWN)}
    assert foreign == STANDARD_LIBRARY | {"microguest"}


LEASE = """
import fcntl, os, signal, sys, time
signal.signal(signal.SIGIO, signal.SIG_IGN)
os.setgid(1234)
os.setuid(1234)
fd = os.open(sys.argv[1], os.O_RDWR)
fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("taken", flush=True)
time.sleep(1000)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_user_who_holds_up_a_start_is_waited_for_so_long_and_no_longer() -> None:
    """A lease makes exec wait, where the agent stands still: 45 s if nobody ends that."""
    with tempfile.TemporaryDirectory(prefix="lease-") as name, AgentProcess() as agent:
        program = pathlib.Path(name, "program")
        shutil.copy("/bin/true", program)
        for path in (program, program.parent):
            path.chmod(0o755)
            os.chown(path, 1234, 1234)
        command = [sys.executable, "-c", LEASE, str(program)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
            try:
                assert holder.stdout is not None
                assert holder.stdout.readline() == b"taken\n"
                exited = execute(agent, str(program), user="1234").exited
                assert exited.signal == signal.SIGKILL
            finally:
                holder.kill()
        assert execute(agent, str(program), user="1234").exited.code == 0


def test_a_program_may_run_longer_than_its_start() -> None:
    with AgentProcess() as agent:
        assert execute(agent, "sleep", "5.5").exited.code == 0
