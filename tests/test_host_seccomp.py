"""The compiler of system call filters, and the option of the host that takes what it makes."""

import errno
import pathlib
import re
import struct
from typing import Any

import pytest
from hostkit import Peer, agent_at, serving

from guest import limits
from guest.connection import Response
from guest.errors import OperationError
from guest.messages import PingResult, Start
from guest.record import RecordError
from host_client import seccomp
from host_client.request import start_record

X86_64, I386, AARCH64, ARM = 0xC000003E, 0x40000003, 0xC00000B7, 0x40000028  # linux/audit.h
ALLOWED = 0x7FFF0000
X32 = 0x40000000

HEADERS = {
    0: pathlib.Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    1: pathlib.Path("/usr/include/asm-generic/unistd.h"),
}


def refused(code: int) -> int:
    return 0x00050000 | code


def answer(program: bytes, arch: int, number: int) -> int:
    """What the kernel would get from the program: classic BPF, as far as filters here use it."""
    data = struct.pack("<II", number, arch)
    instructions = list(struct.iter_unpack("<HBBI", program))
    accumulator = at = 0
    while True:
        kind, when_true, when_false, value = instructions[at]
        at += 1
        if kind == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif kind == 0x15:
            at += when_true if accumulator == value else when_false
        elif kind == 0x35:
            at += when_true if accumulator >= value else when_false
        else:
            assert kind == 0x06
            return int(value)


def test_named_calls_fail_and_others_work() -> None:
    program = seccomp.deny(["mkdir", "mount", "ptrace"], errno.ENOSYS, arch="x86_64")
    for number in range(600):
        expected = refused(errno.ENOSYS) if number in (83, 165, 101) else ALLOWED
        assert answer(program, X86_64, number) == expected


def test_other_architectures_are_refused() -> None:
    program = seccomp.deny(["mount"], errno.ENOSYS, arch="x86_64")
    for arch, number in [(I386, 20), (AARCH64, 172), (X86_64, X32 | 39), (X86_64, 0xFFFFFFFF)]:
        assert answer(program, arch, number) == refused(errno.EPERM)
    program = seccomp.deny(["mount"], errno.ENOSYS, arch="aarch64")
    assert answer(program, AARCH64, 40) == refused(errno.ENOSYS)
    assert answer(program, AARCH64, 165) == ALLOWED
    assert answer(program, ARM, 20) == refused(errno.EPERM)


@pytest.mark.parametrize(("arch", "audit"), [("x86_64", X86_64), ("aarch64", AARCH64)])
def test_all_names_at_once(arch: str, audit: int) -> None:
    program = seccomp.deny(seccomp.names(), arch=arch)
    assert len(program) <= limits.SECCOMP_FILTER
    answers = [answer(program, audit, number) for number in range(600)]
    assert 80 < answers.count(refused(errno.EPERM)) <= len(seccomp.names())
    assert answers.count(ALLOWED) + answers.count(refused(errno.EPERM)) == 600
    assert answer(program, I386, 1) == refused(errno.EPERM)


def test_no_names_and_names_of_the_other_architecture() -> None:
    assert seccomp.deny(["mkdir"], arch="aarch64") == seccomp.deny([], arch="aarch64")
    assert answer(seccomp.deny([], arch="aarch64"), AARCH64, 34) == ALLOWED


@pytest.mark.parametrize("column", HEADERS)
def test_numbers_are_the_kernels(column: int) -> None:
    if not HEADERS[column].is_file():
        pytest.skip(f"no kernel header {HEADERS[column]}")
    found = re.findall(r"#define\s+__NR(?:3264)?_(\w+)\s+(\d+)\b", HEADERS[column].read_text())
    numbers = {name: int(number) for name, number in found}
    numbers.setdefault("fchmodat2", 452)  # of Linux 6.6, newer than some headers
    known = {name: pair[column] for name, pair in seccomp.NUMBERS.items()}
    assert known == {name: numbers.get(name) for name in known}


def test_what_cannot_be_compiled() -> None:
    with pytest.raises(ValueError, match=r"'execve'.*libseccomp"):
        seccomp.deny(["mount", "execve"], arch="x86_64")
    with pytest.raises(ValueError, match=r"'riscv64'.*x86_64 or aarch64"):
        seccomp.deny(["mount"], arch="riscv64")
    with pytest.raises(TypeError, match=r"\['mount'\]"):
        seccomp.deny("mount", arch="x86_64")
    for code in (0, 4096):
        with pytest.raises(ValueError, match="errno"):
            seccomp.deny(["mount"], code, arch="x86_64")


def test_the_option_takes_bytes() -> None:
    program = seccomp.deny(["mount"], arch="x86_64")
    for given in (program, bytearray(program), memoryview(program)):
        options: Any = {"seccomp": given}
        assert start_record(["x"], options, stdin=False) == Start(argv=("x",), seccomp=program)
    assert start_record(["x"], {"seccomp": None}, stdin=False).to_map() == {"argv": ["x"]}
    options = {"seccomp": ["mount"]}
    with pytest.raises(TypeError, match="deny"):
        start_record(["x"], options, stdin=False)


@pytest.mark.parametrize("size", [1, 7, 9, limits.SECCOMP_FILTER + 8])
def test_a_program_of_another_length_is_refused(size: int) -> None:
    with pytest.raises(RecordError, match="seccomp"):
        Start(argv=("x",), seccomp=bytes(size))
    with pytest.raises(RecordError, match="seccomp"):
        Start.from_map({"argv": ["x"], "seccomp": bytes(size)}, where="start")


def test_an_agent_that_would_ignore_the_filter_is_not_asked(tmp_path: pathlib.Path) -> None:
    def older(peer: Peer) -> None:
        peer.greet(features=("engine",))
        peer.send(Response(result=PingResult(uptime=1, root_ready=True)))
        peer.next()

    path = tmp_path / "socket"
    with serving(path, older), agent_at(path) as agent:
        with pytest.raises(OperationError, match="ignore: seccomp") as caught:
            agent.exec(["x"], seccomp=seccomp.deny(["mount"], arch="x86_64"), cwd="/", label="x")
        assert caught.value.code == "unknown_operation"
