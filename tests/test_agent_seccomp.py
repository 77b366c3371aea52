"""Processes under a filter of system calls, whatever the filter does to them before their exec."""

import errno
import os
import pathlib
import signal
import struct
from collections.abc import Iterator

import pytest
from agentharness import TOKEN, AgentProcess, Host, Refused, execute
from machinekit import wait_until
from test_agent_spawn import hide_newer_calls

from microguest import seccomp
from microguest.guest import bounds
from microguest.guest.errors import StartError
from microguest.guest.wire.messages import Failure, Keep, Winsize
from microguest.host_client.connecting import connect

RETURN = 0x06
ALLOW = 0x7FFF0000
FAIL = 0x00050000
KILL_PROCESS = 0x80000000
TRAP = 0x00030000
TRACE = 0x7FF00000
NO_MKDIR = seccomp.deny(["mkdir", "mkdirat"], arch=os.uname().machine)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def always(action: int) -> bytes:
    """A program with one answer to every call."""
    return struct.pack("=HBBI", RETURN, 0, 0, action)


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentProcess]:
    with AgentProcess() as process:
        yield process


@pytest.fixture(autouse=True)
def nothing_is_left(agent: AgentProcess) -> Iterator[None]:
    """The same agent goes on, without a filter of its own or for those that ask for none."""
    execute(agent, "true")  # has what is opened once
    before = agent.open_descriptors()
    yield
    assert agent.popen.poll() is None

    def closed() -> bool:
        agent.answer()  # of what is kept it closes its copies after PID 1
        return agent.open_descriptors() <= before

    wait_until("descriptors closed", closed)
    assert agent.children() == []
    text = execute(agent, "cat", f"/proc/{agent.pid}/status", "/proc/self/status").stdout.decode()
    assert text.count("Seccomp:\t0\n") == text.count("NoNewPrivs:\t0\n") == 2


def refusal(agent: AgentProcess, *argv: str, **options: object) -> Failure:
    with Host(agent) as host, pytest.raises(Refused) as caught:
        host.start(*argv, **options)
    return caught.value.failure


def test_a_refused_call_fails_and_others_work(agent: AgentProcess, tmp_path: pathlib.Path) -> None:
    script = f"mkdir {tmp_path}/no; echo $?; echo x > {tmp_path}/yes; cat /proc/self/status"
    result = execute(agent, "sh", "-c", script, seccomp=NO_MKDIR)
    assert b"Operation not permitted" in result.stderr
    assert result.stdout.startswith(b"1\n")
    assert b"Seccomp:\t2\n" in result.stdout
    assert b"NoNewPrivs:\t1\n" in result.stdout
    assert os.listdir(tmp_path) == ["yes"]
    assert execute(agent, "mkdir", f"{tmp_path}/no").exited.code == 0


@needs_root
def test_an_ordinary_user_needs_no_privilege(agent: AgentProcess) -> None:
    found = execute(
        agent, "cat", "/proc/self/status", seccomp=NO_MKDIR, user="1234:1234", capabilities=()
    ).stdout
    assert b"Seccomp:\t2\n" in found
    assert b"CapEff:\t0000000000000000\n" in found


def test_with_a_terminal_and_kept(agent: AgentProcess) -> None:
    with Host(agent) as host:
        host.start(
            "sh", "-c", "tty; mkdir /tmp/no", seccomp=NO_MKDIR, stdin=True,
            tty=Winsize(rows=24, columns=80),
        )  # fmt: skip
        text = host.collect().stdout
    assert text.startswith(b"/dev/pts/")
    assert b"not permitted" in text
    result = execute(agent, "mkdir", "/tmp/no", seccomp=NO_MKDIR, keep=Keep(retain=0.0))
    assert b"not permitted" in result.stderr


def test_the_longest_program(agent: AgentProcess) -> None:
    program = always(ALLOW) * (bounds.SECCOMP_FILTER // 8)
    assert execute(agent, "true", seccomp=program).exited.code == 0


@pytest.mark.parametrize(
    "program", [b"\xff" * 8, bytes(8), struct.pack("=HBBI", 0x15, 200, 200, 0) + always(ALLOW)]
)
def test_a_program_that_the_kernel_refuses(agent: AgentProcess, program: bytes) -> None:
    failure = refusal(agent, "true", seccomp=program)
    assert failure.code == "setup_failed"
    assert (failure.fields["step"], failure.fields["errno"]) == ("seccomp", errno.EINVAL)


def test_an_earlier_failure_is_told_as_ever(agent: AgentProcess) -> None:
    failure = refusal(agent, "true", seccomp=NO_MKDIR, cwd="/no/such/folder")
    assert (failure.code, failure.fields["step"]) == ("bad_cwd", "chdir")
    assert refusal(agent, "no-such-program", seccomp=NO_MKDIR).code == "not_found"


@pytest.mark.parametrize(
    ("action", "error", "code"),
    [
        (FAIL | errno.EPERM, errno.EPERM, "permission_denied"),
        (FAIL | errno.EIO, errno.EIO, "setup_failed"),
        (TRACE, errno.ENOSYS, "setup_failed"),  # nobody traces it
    ],
)
def test_a_filter_that_refuses_exec_and_exit(
    agent: AgentProcess, action: int, error: int, code: str
) -> None:
    for _ in range(3):
        failure = refusal(agent, "true", seccomp=always(action))
        assert failure.code == code
        assert (failure.fields["step"], failure.fields["errno"]) == ("exec", error)


@pytest.mark.parametrize("action", [KILL_PROCESS, 0, TRAP])
def test_a_filter_that_kills_at_exec(agent: AgentProcess, action: int) -> None:
    for _ in range(3):
        assert execute(agent, "true", seccomp=always(action)).exited.signal == signal.SIGSYS


def test_many_in_turn_with_and_without(agent: AgentProcess) -> None:
    for number in range(30):
        program = NO_MKDIR if number % 2 else b""
        found = execute(agent, "grep", "Seccomp:", "/proc/self/status", seccomp=program).stdout
        assert found == b"Seccomp:\t2\n" if number % 2 else b"Seccomp:\t0\n"


def test_kernels_without_the_newer_calls() -> None:
    with AgentProcess(prepare=hide_newer_calls) as agent:
        result = execute(agent, "mkdir", "/tmp/no", seccomp=NO_MKDIR)
        assert b"not permitted" in result.stderr
        assert refusal(agent, "true", seccomp=b"\xff" * 8).fields["step"] == "seccomp"
        assert refusal(agent, "true", seccomp=always(FAIL | 1)).fields["step"] == "exec"
        assert agent.children() == []


def test_from_the_host(agent: AgentProcess) -> None:
    with connect(f"unix://{agent.path}", token=TOKEN) as host:
        assert b"not permitted" in host.exec(["mkdir", "/tmp/no"], seccomp=NO_MKDIR).stderr
        with pytest.raises(StartError) as caught:
            host.exec(["true"], seccomp=b"\xff" * 8)
        assert caught.value.step == "seccomp"
