"""The program's names, and what PID 1 loads before it can be reached."""

import subprocess

import pytest
from init_machine import PROGRAM, require_program
from patience import PATIENCE

# The interpreter's own and those that PID 1 imports; each costs start-up time and memory for good.
PINNED = frozenset(
    """
    __main__ _abc _codecs _collections_abc _frozen_importlib _frozen_importlib_external
    _guest_compile _guestsys _imp _io _json _signal _socket _stat _thread _warnings _weakref abc
    builtins codecs encodings encodings.aliases encodings.utf_8 errno fcntl gc genericpath guest
    guest.bootconfig guest.errors guest.limits guest.netplan guest.plainjson guest.process
    guest.record guest.report guest.rootplan guest.status guest.supervision guest.users
    guest.workload init_shim init_shim.agent_process init_shim.collection init_shim.confined
    init_shim.deposits init_shim.disks init_shim.dispatch init_shim.ending init_shim.failure
    init_shim.hardening init_shim.kind init_shim.last_words init_shim.listener init_shim.main
    init_shim.main_process init_shim.modules init_shim.mounts init_shim.network init_shim.power
    init_shim.protection init_shim.reporter init_shim.root init_shim.server_limits init_shim.signals
    init_shim.supervisor init_shim.timeline init_shim.volumes init_shim.watchdog init_shim.workload
    init_shim.workload_cgroup init_shim.write_out io marshal os os.path posix posixpath resource
    select stat sys time types zipimport
    """.split()  # noqa: SIM905
)


@pytest.fixture(autouse=True)
def program() -> None:
    require_program()


def run(*arguments: str, argv0: str | None = None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [argv0 or str(PROGRAM), *arguments],
        executable=PROGRAM,
        capture_output=True,
        text=True,
        env={},
        timeout=PATIENCE,
        check=False,
    )


def test_imports_of_pid_1_are_pinned() -> None:
    loaded = set(run("self-check", "imports").stdout.split())
    assert loaded - PINNED == set()
    assert PINNED - loaded == set()


def test_version_names_what_is_inside() -> None:
    done = run("--version")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "microguest", "cpython", "trio", "msgpack", "pyroute2", "musl", "zig"
    ]  # fmt: skip


@pytest.mark.parametrize("arguments", [[], ["help"], ["--version", "x"], ["self-check"]])
def test_anything_else_is_wrong_usage(arguments: list[str]) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: microguest namespaces")
