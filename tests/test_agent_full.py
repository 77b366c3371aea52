"""An agent whose guest gives it no process and no thread any more: it says so, and goes on.

RLIMIT_NPROC stands for a guest that is full: both are EAGAIN of clone(2). Root is exempt from it.
So the agent is a user here.
"""

import ctypes
import errno
import os
import pathlib
import resource
import struct
import subprocess
from collections.abc import Iterator

import pytest
from agentharness import AgentProcess, Host, Refused, execute
from rights import open_to_all

from microguest.guest.wire.messages import Failure, StagedFile
from microguest.guest.wire.renewal import Renew, Renewed

# linux/prctl.h, linux/capability.h
PR_SET_KEEPCAPS = 8
PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE = 47, 2
CAPABILITIES = (6, 7, 18)  # setgid, setuid, sys_chroot
USER = 54_321  # nobody else's, so that only the agent's own processes count

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")


def be_user() -> None:
    """With what an agent enters its root and starts processes by. In a child before its exec."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setresgid(USER, USER, USER)
    os.setresuid(USER, USER, USER)
    header = struct.pack("Ii", 0x20080522, 0)  # version 3 of capset(2), of this process
    sets = struct.pack("6I", *[sum(1 << number for number in CAPABILITIES)] * 3, 0, 0, 0)
    failed = libc.capset(header, sets)
    for number in CAPABILITIES:
        failed |= libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number, 0, 0)
    if failed:
        raise OSError(ctypes.get_errno(), "capabilities")


@pytest.fixture
def full() -> Iterator[AgentProcess]:
    """It has used neither a thread nor a process yet."""
    with AgentProcess(prepare=be_user) as agent:
        fill(agent)
        yield agent


def fill(agent: AgentProcess) -> None:
    limit(agent, 1)


def make_room(agent: AgentProcess) -> None:
    limit(agent, resource.getrlimit(resource.RLIMIT_NPROC)[1])


def limit(agent: AgentProcess, processes: int) -> None:
    """By its own user, who needs no privilege for it."""
    command = ["prlimit", "--pid", str(agent.pid), f"--nproc={processes}:"]
    subprocess.run(command, check=True, user=USER, group=USER, extra_groups=[])


def refusal(agent: AgentProcess, **options: object) -> Failure:
    with Host(agent) as host, pytest.raises(Refused) as caught:
        host.start("true", user=f"{USER}:{USER}", **options)
    return caught.value.failure


def test_no_process_can_be_started(full: AgentProcess) -> None:
    before = full.open_descriptors()
    failure = refusal(full)
    assert (failure.code, failure.fields["step"]) == ("resource_limit", "clone")
    assert failure.fields["errno"] == errno.EAGAIN
    assert "kernel.threads-max" in failure.message
    assert "end other processes or raise it" in failure.message
    assert full.open_descriptors() <= before + 1  # the connection may not be closed yet
    make_room(full)
    assert execute(full, "true", user=f"{USER}:{USER}").exited.code == 0


def test_no_thread_can_be_started_for_files(full: AgentProcess, tmp_path: pathlib.Path) -> None:
    os.chown(tmp_path, USER, USER)
    open_to_all(tmp_path)
    files = (StagedFile(path=str(tmp_path / "new"), data=b"it"),)
    failure = refusal(full, files=files)
    assert (failure.code, failure.fields["step"]) == ("resource_limit", "thread")
    assert failure.fields["errno"] == errno.EAGAIN
    assert "as many processes and threads as it may" in failure.message
    assert os.listdir(tmp_path) == []
    make_room(full)
    assert execute(full, "true", user=f"{USER}:{USER}", files=files).exited.code == 0
    assert os.listdir(tmp_path) == ["new"]


def test_files_are_taken_back_by_the_thread_that_wrote_them(
    full: AgentProcess, tmp_path: pathlib.Path
) -> None:
    """The process does not start after its files were written; no second thread is needed."""
    os.chown(tmp_path, USER, USER)
    open_to_all(tmp_path)
    make_room(full)
    files = (StagedFile(path=str(tmp_path / "new"), data=b"it"),)
    user = f"{USER}:{USER}"
    assert execute(full, "true", user=user, files=files).exited.code == 0
    (tmp_path / "new").unlink()
    fill(full)  # its thread waits for the next work
    assert refusal(full, files=files).fields["step"] == "clone"
    assert os.listdir(tmp_path) == []


def test_no_thread_can_be_started_to_renew(full: AgentProcess) -> None:
    """Each part says why it was not done, and none is the agent's own failure."""
    with Host(full) as host:
        renewed = host.request("renew", Renew(seed=bytes(32), hostname="new", machine_id="random"))
        assert isinstance(renewed, Renewed)
        assert set(renewed.failed) == {"random", "hostname", "machine_id"}
        for reason in renewed.failed.values():
            assert "as many processes and threads as it may" in reason
        assert host.request("renew", Renew()) == Renewed()  # which needs none
