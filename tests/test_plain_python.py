"""The agent and PID 1 in a plain Python: they can be imported, tested and debugged there."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from agentharness import TOKEN, AgentProcess, Host, Refused, execute
from patience import PATIENCE
from plainpython import needs_guestsys

PROJECT = Path(__file__).parent.parent
PACKAGES = ("agent", "guest", "init_shim")
AGENT = f"{sys.executable} -X dev -m microguest.agent.main"
DEBUGGED = f"{sys.executable} -m pdb -c continue -m microguest.agent.main"

pytestmark = needs_guestsys


# ── importing ────────────────────────────────────────────────────────────────────────────────────

IMPORT = """
import importlib, sys
import _guestsys, _guest_build
for name in sys.argv[1:]:
    importlib.import_module(name)
print(len(sys.argv) - 1)
"""


def modules(package: str) -> list[str]:
    paths = [path.relative_to(PROJECT) for path in sorted((PROJECT / package).rglob("*.py"))]
    return [
        ".".join(("microguest", *path.with_suffix("").parts))
        for path in paths
        if path.stem != "__init__"
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_can_be_imported(package: str) -> None:
    names = modules(package)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT, *names],
        check=False, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == (f"{len(names)}\n", "")


def test_the_module_has_all_that_its_stub_promises() -> None:
    import ast

    import _guestsys

    stub = ast.parse((PROJECT / "build" / "native" / "_guestsys.pyi").read_text())
    promised = {n.name for n in stub.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    assert promised == {name for name in dir(_guestsys) if not name.startswith("_")}


def test_without_a_compiler_it_says_so_and_goes_on(tmp_path: Path) -> None:
    marker = tmp_path / "made"
    done = subprocess.run(
        [sys.executable, "build/host_module.py", str(marker)],
        cwd=PROJECT, env={"PATH": str(tmp_path)},
        check=False, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert "there is no C compiler (cc) in PATH; tests that import the agent" in line
    assert not marker.exists()


# ── the C module ─────────────────────────────────────────────────────────────────────────────────


def test_spawn_in_this_process() -> None:
    import _guestsys

    reader, writer = os.pipe()
    with open(reader, "rb") as output:
        pid, pidfd = _guestsys.spawn(
            [b"sh", b"-c", b"echo $0 $WORD; exit 7", b"name"],
            [b"WORD=word"],
            candidates=[b"/no/such", b"/bin/sh"],
            cwd=b"/",
            fds=(0, writer, writer),
            uid=os.getuid(),
            gid=os.getgid(),
            groups=os.getgroups(),
        )
        os.close(writer)
        os.close(pidfd)
        assert output.read() == b"name word\n"
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_errors_of_spawn_in_this_process() -> None:
    import _guestsys

    options = {"cwd": b"/", "fds": (0, 1, 2), "uid": os.getuid(), "gid": os.getgid()}
    with pytest.raises(_guestsys.SpawnError) as caught:
        _guestsys.spawn([b"x"], [], candidates=[b"/no/such"], **options)  # type: ignore[arg-type]
    assert (caught.value.step, caught.value.filename) == ("exec", "/no/such")
    with pytest.raises(TypeError, match="argv: expected bytes, got str"):
        _guestsys.spawn(["x"], [], candidates=[b"/x"], **options)  # type: ignore[arg-type,list-item]


# ── logic of the agent and of PID 1 ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize("drops", [False, True])
def test_a_ring_has_the_last_bytes_whatever_is_taken_and_whenever_it_is_restored(
    drops: bool,
) -> None:
    from microguest.agent.process.ring import PAGE, Ring

    chance = random.Random(drops)
    ring = Ring.create(2 * PAGE - 1, drops=drops)
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    written, buffer = b"", memoryview(bytearray(4 * PAGE))
    try:
        assert ring.capacity == 2 * PAGE
        for _ in range(400):
            if ring.room:
                piece = chance.randbytes(chance.randint(1, min(PAGE, ring.room)))
                os.write(writer, piece)
                written += piece
                assert ring.fill(reader) == len(piece)
            else:
                assert not drops
                ring.acknowledge(ring.acknowledged + chance.randint(1, ring.capacity))
            assert ring.written == len(written)
            at = chance.randint(ring.oldest, ring.written)
            count = ring.read(at, buffer)
            assert bytes(buffer[:count]) == written[at : at + count]
            assert count or at == ring.written
            if chance.random() < 0.2:
                before = (ring.written, ring.acknowledged, ring.dropped, ring.room)
                ring = Ring.restore(ring.fd, drops=drops)
                assert (ring.written, ring.acknowledged, ring.dropped, ring.room) == before
        assert (ring.dropped > 0) == drops
        assert ring.written > 10 * ring.capacity
    finally:
        ring.close()
        os.close(reader)
        os.close(writer)


def test_paths_of_an_image_stay_in_it(tmp_path: Path) -> None:
    from microguest.init_shim.confined import RootFolder

    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (tmp_path / "secret").write_text("outside")
    (root / "etc" / "real").write_text("inside")
    (root / "out").symlink_to(tmp_path / "secret")
    (root / "up").symlink_to("../../../../secret")
    (root / "absolute").symlink_to("/etc/real")
    (root / "magic").symlink_to(f"/proc/{os.getpid()}/root/etc/passwd")
    with RootFolder(str(root)) as folder:
        assert folder.read("/absolute", 100) == b"inside"
        assert folder.read("/../../etc/../etc/real", 100) == b"inside"
        for name in ("/out", "/up", "/magic"):
            with pytest.raises(FileNotFoundError):
                folder.read(name, 100)
        with pytest.raises(OSError, match="File too large"):
            folder.read("/etc/real", 5)
        with pytest.raises(OSError, match="not a regular file"):
            folder.read("/etc", 100)


@pytest.mark.skipif(os.getuid() != 0, reason="gives links to another user")
def test_only_roots_links_are_followed_for_root(tmp_path: Path) -> None:
    from microguest.init_shim.confined import LinkOfUser, RootFolder

    (tmp_path / "etc").mkdir()
    (tmp_path / "of-root").symlink_to("etc")
    (tmp_path / "of-user").symlink_to("/of-root")
    os.chown(tmp_path / "of-user", 1000, 1000, follow_symlinks=False)
    with RootFolder(str(tmp_path)) as folder:
        with folder.open_trusted("/of-root/new/file", make="file") as made:
            assert not made.is_directory
        assert (tmp_path / "etc" / "new" / "file").is_file()
        with pytest.raises(LinkOfUser) as caught:
            folder.open_trusted("/of-user/file", make="file")
        assert (caught.value.uid, caught.value.filename) == (1000, "/of-user")
        assert not (tmp_path / "etc" / "file").exists()


# ── the whole agent ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture(params=[AGENT, DEBUGGED], ids=["plain", "pdb"])
def agent(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[AgentProcess]:
    monkeypatch.setenv("MICROGUEST_AGENT", request.param)
    with AgentProcess() as process:
        yield process


def test_the_agent_serves_in_a_plain_python(agent: AgentProcess) -> None:
    words = Path(f"/proc/{agent.pid}/cmdline").read_bytes().split(b"\0")
    assert words[0] == sys.executable.encode()
    with Host(agent) as host:
        assert host.ping().uptime > 0
        assert host.info().agent_pid == agent.pid
    result = execute(agent, "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (result.stdout, result.stderr, result.exited.code) == (b"out\n", b"err\n", 3)
    with Host(agent) as host:
        host.start("cat", stdin=True)
        host.write(b"there and back", end=True)
        assert host.collect().stdout == b"there and back"
    with Host(agent) as host:
        host.start("sleep", "1000")
        host.signal(signal.SIGTERM)
        assert host.collect().exited.signal == signal.SIGTERM
    with Host(agent) as host, pytest.raises(Refused, match="not_found"):
        host.start("/no/such")


def test_a_breakpoint_stops_the_agent_of_a_test() -> None:
    """As docs/developing/building.md says it, with a person's words written ahead."""
    source = (PROJECT / "agent" / "system" / "machine.py").read_text().splitlines()
    line = 1 + next(n for n, text in enumerate(source) if "return PingResult" in text)
    where = f"microguest/agent/system/machine.py:{line}"
    commands = f"break {where}\ncontinue\np agent.token\nclear 1\ncontinue\n"
    test = "tests/test_agent_service.py::test_one_connection_answers_many_requests"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-s", "-q", "-p", "no:cacheprovider", test],
        cwd=PROJECT,
        env={**os.environ, "MICROGUEST_AGENT": f"{sys.executable} -m pdb -m microguest.agent.main"},
        input=commands, check=False, capture_output=True, text=True, timeout=3 * PATIENCE,
    )  # fmt: skip
    assert f"agent/system/machine.py({line})ping()" in done.stdout
    assert f"(Pdb) {TOKEN.encode()!r}\n" in done.stdout
    assert "1 passed" in done.stdout
