"""The compiler of system call filters, and the option of the host that takes what it makes."""

import errno
import json
import pathlib
import platform
import re
import struct
import subprocess
from typing import Any

import pytest
from hostkit import Peer, agent_at, serving

from microguest import seccomp
from microguest.guest import bounds
from microguest.guest.errors import OperationError
from microguest.guest.record import RecordError
from microguest.guest.wire.connection import Response
from microguest.guest.wire.messages import PingResult, Start
from microguest.host_client.client.request import start_record
from microguest.host_client.seccomp.numbers import ELSEWHERE, NUMBERS
from microguest.host_client.seccomp.program import INSTRUCTIONS

X86_64, I386, AARCH64, ARM = 0xC000003E, 0x40000003, 0xC00000B7, 0x40000028  # linux/audit.h
ALLOWED = 0x7FFF0000
X32 = 0x40000000

HEADERS = {
    0: pathlib.Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    1: pathlib.Path("/usr/include/asm-generic/unistd.h"),
}


NO_CALLS = {"syscalls", "arch_specific_syscall"}
LINUX_6_17 = (469,)  # file_setattr: where the table ends
LATER = {"uretprobe"}  # of Linux 6.11, in a gap
# What asm-generic/unistd.h calls otherwise, or has for 32 bits only.
SPELLED_OTHERWISE = {"llseek", "fstatat", "fstatat64", "sync_file_range2"}


def refused(code: int) -> int:
    return 0x00050000 | code


def answer(program: bytes, arch: int, number: int, *arguments: int) -> int:
    """What the kernel would get from the program: classic BPF, as far as filters here use it."""
    given = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    data = struct.pack("<IIQ6Q", number, arch, 0, *given)
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
        elif kind == 0x25:
            at += when_true if accumulator > value else when_false
        elif kind == 0x54:
            accumulator &= value
        elif kind == 0x05:
            at += value
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
    assert len(program) <= bounds.SECCOMP_FILTER
    answers = [answer(program, audit, number) for number in range(600)]
    assert 300 < answers.count(refused(errno.EPERM)) <= len(seccomp.names())
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
    numbers = {name: int(number) for name, number in found if name not in NO_CALLS}
    numbers.setdefault("newfstatat", 79)  # asm-generic/unistd.h names it by way of another
    known = {name: pair[column] for name, pair in NUMBERS.items()}
    newest = max(numbers.values())
    assert {name: number for name, number in known.items() if number is not None} == {
        name: numbers.get(name, number)
        for name, number in known.items()
        if number is not None and (name in numbers or number > newest or name in LATER)
    }
    absent = set(numbers) - set(known)
    assert {
        name for name in absent if numbers[name] <= max(LINUX_6_17)
    } <= SPELLED_OTHERWISE | ELSEWHERE


def test_what_cannot_be_compiled() -> None:
    with pytest.raises(ValueError, match=r"'exec'.*libseccomp"):
        seccomp.deny(["mount", "exec"], arch="x86_64")
    with pytest.raises(ValueError, match=r"'riscv64'.*x86_64 or aarch64"):
        seccomp.deny(["mount"], arch="riscv64")
    with pytest.raises(TypeError, match=r"\['mount'\]"):
        seccomp.deny("mount", arch="x86_64")
    for code in (0, 4096):
        with pytest.raises(ValueError, match="errno"):
            seccomp.deny(["mount"], code, arch="x86_64")


# ── profiles ─────────────────────────────────────────────────────────────────────────────────────

NOT_FOR_ALL = {
    "chroot", "clone", "clone3", "ioprio_set", "kcmp", "name_to_handle_at", "personality", "prctl",
    "process_vm_readv", "process_vm_writev", "ptrace", "socket", "sysinfo", *seccomp.PRIVILEGED,
}  # fmt: skip
ALLOWED_CALLS = [name for name in NUMBERS if name not in NOT_FOR_ALL]
NAMESPACES = 0x7E020000  # CLONE_NEWNS and its like
MASKED, EQUAL = "SCMP_CMP_MASKED_EQ", "SCMP_CMP_EQ"


def allow(*names: str, **more: Any) -> dict[str, Any]:
    return {"names": [*names], "action": "SCMP_ACT_ALLOW", **more}


def when(index: int, op: str, value: int, second: int = 0) -> dict[str, Any]:
    return {"index": index, "op": op, "value": value, "valueTwo": second}


# In the shape of the profiles that container engines have: nothing but what is listed.
ENGINES: dict[str, Any] = {
    "defaultAction": "SCMP_ACT_ERRNO",
    "defaultErrnoRet": errno.EPERM,
    "archMap": [
        {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]},
        {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": ["SCMP_ARCH_ARM"]},
    ],
    "syscalls": [
        allow(*ALLOWED_CALLS, "chown32", "socketcall", "not_a_call_of_today"),
        allow("ptrace", "kcmp", includes={"minKernel": "4.8"}, comment="not before"),
        allow("process_vm_readv", includes={"minKernel": "99.1"}),
        allow("socket", args=[when(0, "SCMP_CMP_NE", 40)]),
        *(allow("personality", args=[when(0, EQUAL, value)]) for value in (0, 8, 0xFFFFFFFF)),
        allow("clone", args=[when(0, MASKED, NAMESPACES)], excludes={"caps": ["CAP_SYS_ADMIN"]}),
        allow("clone", "clone3", "mount", "unshare", includes={"caps": ["CAP_SYS_ADMIN"]}),
        {
            "names": ["clone3"],
            "action": "SCMP_ACT_ERRNO",
            "errnoRet": errno.ENOSYS,
            "excludes": {"caps": ["CAP_SYS_ADMIN"]},
        },
        allow("chroot", includes={"caps": ["CAP_SYS_CHROOT"]}),
        allow("arch_prctl", includes={"arches": ["amd64", "x32"]}),
        allow("sysinfo", includes={"arches": ["s390x"]}),
        allow("prctl", args=[when(0, "SCMP_CMP_GE", 3), when(1, "SCMP_CMP_LT", 1 << 40)]),
        {
            "names": ["prctl"],
            "action": "SCMP_ACT_KILL_PROCESS",
            "args": [when(0, EQUAL, 1), when(2, "SCMP_CMP_GT", 5), when(3, "SCMP_CMP_LE", 1 << 33)],
        },
    ],
}


def number(name: str) -> int:
    found = NUMBERS[name][0]
    assert found is not None
    return found


def test_a_profile_allows_what_it_lists() -> None:
    program = seccomp.profile(ENGINES, arch="x86_64")
    assert len(program) // 8 < INSTRUCTIONS

    def gives(name: str, *arguments: int) -> int:
        return answer(program, X86_64, number(name), *arguments)

    eperm = refused(errno.EPERM)
    for name in ("read", "execve", "openat", "ptrace", "kcmp", "arch_prctl", "file_setattr"):
        assert gives(name) == ALLOWED, name
    for name in (*seccomp.PRIVILEGED, "chroot", "process_vm_readv", "sysinfo"):
        assert gives(name) == eperm, name
    assert gives("clone3") == refused(errno.ENOSYS)
    assert gives("clone", 0x01200011) == ALLOWED
    assert gives("clone", 0x10000000) == gives("clone", NAMESPACES) == eperm
    assert gives("socket", 40) == eperm
    assert gives("socket", 1) == gives("socket", 40 << 32) == ALLOWED
    assert gives("personality", 0xFFFFFFFF) == gives("personality", 8) == ALLOWED
    assert gives("personality", 0xFFFFFFFF_FFFFFFFF) == gives("personality", 4) == eperm
    assert gives("prctl", 3, (1 << 40) - 1) == gives("prctl", 1 << 35) == ALLOWED
    assert gives("prctl", 3, 1 << 40) == gives("prctl", 2) == eperm
    assert gives("prctl", 1, 0, 6, 1 << 33) == 0x80000000
    assert gives("prctl", 1, 0, 5, 0) == gives("prctl", 1, 0, 6, (1 << 33) + 1) == eperm
    for arch, foreign in ((I386, 3), (AARCH64, 63), (X86_64, X32 | 0)):
        assert answer(program, arch, foreign) == eperm


def test_capabilities_kernel_and_architecture_choose_rules() -> None:
    program = seccomp.profile(
        ENGINES, arch="x86_64", capabilities=["CAP_SYS_ADMIN", "sys_chroot"], kernel="4.4.0-1"
    )
    for name in ("clone", "clone3", "mount", "unshare", "chroot"):
        assert answer(program, X86_64, number(name), NAMESPACES) == ALLOWED, name
    assert answer(program, X86_64, number("ptrace")) == refused(errno.EPERM)
    program = seccomp.profile(json.dumps(ENGINES), arch="aarch64")
    assert answer(program, AARCH64, 63) == ALLOWED  # read
    assert answer(program, X86_64, 0) == refused(errno.EPERM)


@pytest.mark.parametrize("action", ["KILL", "KILL_THREAD", "KILL_PROCESS", "TRAP", "TRACE", "LOG"])
def test_every_action(action: str) -> None:
    expected = {
        "KILL": 0, "KILL_THREAD": 0, "KILL_PROCESS": 0x80000000, "TRAP": 0x00030000,
        "TRACE": 0x7FF00001, "LOG": 0x7FFC0000,
    }[action]  # fmt: skip
    document = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"name": "acct", "action": f"SCMP_ACT_{action}"}],
    }
    program = seccomp.profile(document, arch="x86_64")
    assert answer(program, X86_64, number("acct")) == expected
    assert answer(program, X86_64, number("read")) == ALLOWED


def test_an_argument_that_comes_twice_makes_two_rules() -> None:
    rule = allow("read", args=[when(0, EQUAL, 3), when(0, EQUAL, 4), when(1, EQUAL, 5)])
    document = {"defaultAction": "SCMP_ACT_TRAP", "syscalls": [rule]}
    program = seccomp.profile(document, arch="x86_64")
    for arguments in ((3, 0), (4, 0), (0, 5)):
        assert answer(program, X86_64, 0, *arguments) == ALLOWED
    assert answer(program, X86_64, 0, 1, 1) == 0x00030000


def test_rules_with_conditions_come_before_one_without() -> None:
    refusal = {"names": ["read"], "action": "SCMP_ACT_ERRNO", "args": [when(2, EQUAL, 9)]}
    document = {"defaultAction": "SCMP_ACT_TRAP", "syscalls": [allow("read"), refusal]}
    program = seccomp.profile(document, arch="x86_64")
    assert answer(program, X86_64, 0, 0, 0, 9) == refused(errno.EPERM)
    assert answer(program, X86_64, 0, 0, 0, 8) == ALLOWED


def test_all_calls_with_six_conditions_do_not_fit() -> None:
    rules = [
        allow(name, args=[when(index, "SCMP_CMP_GE", value) for index in range(6)])
        for value, name in enumerate(NUMBERS)
    ]
    document = {"defaultAction": "SCMP_ACT_TRAP", "syscalls": rules}
    with pytest.raises(ValueError, match="4096"):
        seccomp.profile(document, arch="x86_64")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"defaultAction": "ALLOW"}, "profile.defaultAction: 'ALLOW' is not one of"),
        ({"defaultErrnoRet": 4096}, "profile.defaultErrnoRet: errno: 4096"),
        ({"listenerPath": "/run/x"}, "profile: listenerPath"),
        ({"syscalls": {}}, "profile.syscalls: expected a list"),
        ({"syscalls": ["read"]}, r"syscalls\[0\]: expected an object"),
        ({"syscalls": [{"names": ["read"], "action": "SCMP_ACT_NOTIFY"}]}, "SCMP_ACT_NOTIFY"),
        ({"syscalls": [allow("read", args=[when(6, EQUAL, 0)])]}, r"args\[0\]: index is"),
        ({"syscalls": [allow("read", args=[when(0, EQUAL, -1)])]}, "64 bits"),
        ({"syscalls": [allow("read", args=[when(0, "EQ", 1)])]}, r"args\[0\].op: 'EQ'"),
        ({"syscalls": [allow("read", args=[{"index": "0", "op": EQUAL}])]}, "whole numbers"),
        ({"syscalls": [allow("read", includes={"minKernel": "new"})]}, "'new' is not a version"),
        ({"syscalls": [allow("read", includes={"cpu": 1})]}, r"syscalls\[0\].includes: cpu"),
    ],
)
def test_what_is_wrong_with_a_profile_is_said(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        seccomp.profile({"defaultAction": "SCMP_ACT_ERRNO", **change}, arch="x86_64")


def test_a_misspelt_refusal_is_not_forgotten() -> None:
    rule = {"names": ["chown32", "munt"], "action": "SCMP_ACT_ERRNO"}
    with pytest.raises(ValueError, match="'munt'"):
        seccomp.profile({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}, arch="x86_64")
    assert not ELSEWHERE & set(NUMBERS)


LIBSECCOMP = """
import json, sys, seccomp, tempfile
given = json.load(sys.stdin)
act = {"ALLOW": seccomp.ALLOW, "KILL_PROCESS": seccomp.KILL_PROCESS}
def action(name, errno):
    word = name.removeprefix("SCMP_ACT_")
    return seccomp.ERRNO(errno) if word == "ERRNO" else act[word]
ops = {"NE": seccomp.NE, "EQ": seccomp.EQ, "MASKED_EQ": seccomp.MASKED_EQ, "GE": seccomp.GE,
       "GT": seccomp.GT, "LE": seccomp.LE, "LT": seccomp.LT}
program = seccomp.SyscallFilter(action(given["defaultAction"], given["defaultErrnoRet"]))
for rule in given["syscalls"]:
    if rule["action"] == given["defaultAction"] and not rule.get("errnoRet"):
        continue
    args = []
    for one in rule.get("args", ()):
        values = (one["value"], one["valueTwo"]) if "MASKED" in one["op"] else (one["value"],)
        args.append(seccomp.Arg(one["index"], ops[one["op"].removeprefix("SCMP_CMP_")], *values))
    for name in rule["names"]:
        try:
            seccomp.resolve_syscall(seccomp.Arch(), name)
            program.add_rule(action(rule["action"], rule.get("errnoRet", 1)), name, *args)
        except (RuntimeError, ValueError):
            print(name, file=sys.stderr)
with tempfile.TemporaryFile() as file:
    program.export_bpf(file)
    file.seek(0)
    sys.stdout.buffer.write(file.read())
"""


def test_libseccomp_makes_programs_that_answer_the_same() -> None:
    """Its rules without what only engines know of: includes, excludes."""
    rules = [
        {key: value for key, value in rule.items() if key not in ("includes", "excludes")}
        for rule in ENGINES["syscalls"]
        if "includes" not in rule
    ]
    document = {**ENGINES, "syscalls": rules}
    done = subprocess.run(
        ["/usr/bin/python3", "-c", LIBSECCOMP],
        input=json.dumps({**document, "archMap": None}).encode(),
        capture_output=True,
        check=False,
    )
    if b"No module named" in done.stderr or platform.machine() != "x86_64":
        pytest.skip("needs libseccomp's Python: apt install python3-seccomp")
    assert done.returncode == 0, done.stderr.decode()
    unknown = set(done.stderr.decode().split())
    assert "read" not in unknown
    ours, theirs = seccomp.profile(document, arch="x86_64"), done.stdout
    samples = (0, 1, 2, 3, 5, 6, 8, 40, 1 << 33, 1 << 40, NAMESPACES, 0x10000, 2**64 - 1)
    for name, (call, _) in NUMBERS.items():
        if call is None or name in unknown:
            continue
        for first in samples:
            for other in (0, 6, 1 << 33, 1 << 40):
                arguments = (first, other, other, other)
                assert answer(ours, X86_64, call, *arguments) == answer(
                    theirs, X86_64, call, *arguments
                ), (name, arguments)


def test_the_option_takes_bytes() -> None:
    program = seccomp.deny(["mount"], arch="x86_64")
    for given in (program, bytearray(program), memoryview(program)):
        options: Any = {"seccomp": given}
        assert start_record(["x"], options, stdin=False) == Start(argv=("x",), seccomp=program)
    assert start_record(["x"], {"seccomp": None}, stdin=False).to_map() == {"argv": ["x"]}
    options = {"seccomp": ["mount"]}
    with pytest.raises(TypeError, match="deny"):
        start_record(["x"], options, stdin=False)


@pytest.mark.parametrize("size", [1, 7, 9, bounds.SECCOMP_FILTER + 8])
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
