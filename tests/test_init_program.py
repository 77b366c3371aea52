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
    builtins codecs encodings encodings.aliases encodings.utf_8 errno fcntl gc genericpath io
    marshal microguest microguest.guest microguest.guest.boot microguest.guest.boot.config
    microguest.guest.boot.network microguest.guest.boot.root microguest.guest.boot.workload
    microguest.guest.bounds microguest.guest.errors microguest.guest.launch
    microguest.guest.plainjson microguest.guest.record microguest.guest.report
    microguest.guest.status microguest.guest.supervision microguest.guest.users microguest.init_shim
    microguest.init_shim.confined microguest.init_shim.dispatch microguest.init_shim.ending
    microguest.init_shim.failure microguest.init_shim.hardening
    microguest.init_shim.hardening.modules microguest.init_shim.hardening.profile
    microguest.init_shim.kind microguest.init_shim.life microguest.init_shim.life.agent_child
    microguest.init_shim.life.collection microguest.init_shim.life.deposits
    microguest.init_shim.life.last_words microguest.init_shim.life.power
    microguest.init_shim.life.protection microguest.init_shim.life.server_limits
    microguest.init_shim.life.supervisor microguest.init_shim.life.watchdog
    microguest.init_shim.life.workload microguest.init_shim.life.workload_cgroup
    microguest.init_shim.life.workload_lives microguest.init_shim.listener microguest.init_shim.main
    microguest.init_shim.mounts microguest.init_shim.network
    microguest.init_shim.network.configuring microguest.init_shim.reporter microguest.init_shim.root
    microguest.init_shim.root.assembling microguest.init_shim.root.disks
    microguest.init_shim.root.volumes microguest.init_shim.root.write_out
    microguest.init_shim.signals microguest.init_shim.timeline os os.path posix posixpath resource
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
