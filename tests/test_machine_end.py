"""How machines end, by whatever hand, and that nothing of them stays."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import imagefactory
import machinekit
import pytest
from machinekit import family, kill, nothing_is_left, state_of, wait_until
from patience import PATIENCE, SLACK

from microguest import Mount, boot, connect
from microguest.errors import BootFailed, ConnectionLost, ImageError, MachineError
from microguest.guest.bundle.manifest import MANIFEST
from microguest.host_client.machines import folder
from microguest.host_client.machines.folder import is_alive, machines_root, names, sweep

pytestmark = pytest.mark.usefixtures("machines_home")

KIND = pytest.mark.parametrize("kind", machinekit.KINDS)

BOOTS = """
import sys
from microguest import boot
machine = boot(sys.argv[1], machine=sys.argv[2], name=sys.argv[3])
print("up", flush=True)
sys.stdin.readline()
machine.stop()
"""


def started(image: str, kind: str, name: str) -> "subprocess.Popen[bytes]":
    program = machinekit.python(BOOTS, image, kind, name)
    assert program.stdout is not None
    assert program.stdout.readline() == b"up\n", program.communicate()
    return program


def reap(program: "subprocess.Popen[bytes]") -> tuple[bytes, bytes]:
    return program.communicate(timeout=PATIENCE)


# ── by itself ────────────────────────────────────────────────────────────────────────────────────


@KIND
def test_workload_ends_the_machine(image: str, kind: str) -> None:
    with boot(image, machine=kind, command=["sh", "-c", "echo says hello; exit 5"]) as machine:
        pids = family(machine.state.monitor)
        state = machine.wait(timeout=PATIENCE)
    assert (state.status, state.vmm_code, state.phase) == ("done", 0, "ended")
    assert state.workload_exited is not None
    assert state.workload_exited.code == 5
    assert "says hello\n" in machine.console()
    nothing_is_left(machine.name, pids, within=PATIENCE)


def test_workload_that_does_not_start(image: str) -> None:
    with boot(image, machine="namespaces", command=["/no/such"]) as machine:
        state = machine.wait(timeout=PATIENCE)
    assert state.status == "workload-failed"
    assert state.workload_failed is not None
    assert state.workload_failed.code == "not_found"


def test_idle_machine_stays_until_it_is_stopped(image: str) -> None:
    machine = boot(image, machine="namespaces")
    pids = family(machine.state.monitor)
    with pytest.raises(TimeoutError):
        machine.wait(timeout=0.3)
    state = machine.stop()
    assert (state.status, state.vmm_code) == ("shutdown", 0)
    assert machine.stop().ended
    nothing_is_left(machine.name, pids, within=PATIENCE)
    with pytest.raises(ConnectionLost, match=machine.name):
        machine.agent.exec(["true"])


def test_a_machine_whose_agent_cannot_be_reached_ends_well(image: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    trap = "trap 'echo last > /data/file; exit' TERM; touch /data/armed"
    last = ["sh", "-c", f"{trap}; while :; do sleep 0.05; done"]
    mounts = [Mount(source=str(tmp_path / "data"), target="/data")]
    with boot(image, machine="namespaces", command=last, mounts=mounts) as machine:
        wait_until("it is armed", (tmp_path / "data" / "armed").exists)
        os.unlink(os.path.join(machines_root(), machine.name, "run", "host", "agent.sock"))
        assert machine.stop().status == "shutdown"
    assert (tmp_path / "data" / "file").read_text() == "last\n"


def test_stop_is_bounded_by_its_grace(image: str) -> None:
    stubborn = ["sh", "-c", "trap '' TERM; touch /armed; while :; do sleep 1; done"]
    armed = ["test", "-e", "/armed"]
    with boot(image, machine="namespaces", command=stubborn) as machine:
        wait_until("it is armed", lambda: machine.agent.exec(armed).returncode == 0)
        began = time.monotonic()
        assert machine.stop(grace=0.5).status == "shutdown"
        assert 0.4 < time.monotonic() - began < 5 + SLACK


# ── by violence ──────────────────────────────────────────────────────────────────────────────────


@KIND
def test_killed_host_process(image: str, kind: str) -> None:
    program = started(image, kind, "orphan")
    pids = family(state_of("orphan").monitor)
    assert len(pids) >= 2
    program.kill()
    nothing_is_left("orphan", pids, within=PATIENCE)
    reap(program)


@KIND
def test_killed_monitor(image: str, kind: str) -> None:
    with boot(image, machine=kind) as machine:
        pids = family(machine.state.monitor)
        kill(machine.state.monitor)
        wait_until("its processes end", lambda: not any(map(machinekit.runs, pids)))
        with pytest.raises(ConnectionLost, match="monitor died"):
            machine.agent.exec(["true"])
    assert machine.name in names()
    assert not is_alive(machine.name)
    sweep()
    nothing_is_left(machine.name, pids, within=PATIENCE)


@KIND
def test_killed_vmm_is_an_error_that_names_it(image: str, kind: str) -> None:
    with boot(image, machine=kind) as machine:
        pids = family(machine.state.monitor)
        vmm = machine.state.vmm
        killed_at: list[float] = []

        def kill_while_it_sleeps() -> None:
            with connect(machine.name) as other:
                wait_until(
                    "it sleeps",
                    lambda: any(each.argv[:1] == ("sleep",) for each in other.processes()),
                )
            killed_at.append(time.monotonic())
            kill(vmm)

        killer = threading.Thread(target=kill_while_it_sleeps)
        killer.start()
        with pytest.raises(ConnectionLost, match=rf"machine {machine.name} has ended.*signal 9"):
            machine.agent.exec(["sleep", "600"])
        ended_at = time.monotonic()
        killer.join()
        assert ended_at - killed_at[0] < 4 + SLACK
        assert machine.state.status == "crashed"
    nothing_is_left(machine.name, pids, within=PATIENCE)


EARLY = pytest.mark.parametrize("moment", machinekit.MOMENTS)


@EARLY
def test_interrupted_boot(image: str, moment: Callable[[str], bool]) -> None:
    """Ctrl-C between nothing and ready, and a little later."""
    for delay in (0.0, 0.05, 0.1):
        program = machinekit.python(BOOTS, image, "namespaces", "early")
        wait_until("it has come so far", lambda: moment("early"))
        time.sleep(delay)
        pids = {pid for pid in family(program.pid) if pid != program.pid}
        program.send_signal(signal.SIGINT)
        assert program.stdin is not None
        program.stdin.close()
        program.wait(PATIENCE)
        nothing_is_left("early", pids, within=PATIENCE)
        for pipe in (program.stdout, program.stderr):
            assert pipe is not None
            pipe.close()


@pytest.mark.parametrize("taken_by", ["the main thread", "another thread"])
def test_interrupted_as_soon_as_there_is_a_folder(
    image: str, monkeypatch: pytest.MonkeyPatch, taken_by: str
) -> None:
    """Whichever thread the kernel gives the signal to, its handler runs in the main one."""
    over = threading.Event()
    other = threading.Thread(target=over.wait)
    other.start()
    taker = (other if taken_by == "another thread" else threading.main_thread()).ident
    assert taker is not None

    def interrupted(name: str | None) -> folder.Folder:
        claimed = folder.claim(name)
        signal.pthread_kill(taker, signal.SIGINT)
        for _ in range(1000):  # moments at which the handler runs
            time.sleep(0)
        return claimed

    monkeypatch.setattr("microguest.host_client.machines.boot.claim", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            boot(image, machine="namespaces", name="early")
    finally:
        over.set()
        other.join()
    wait_until("its folder goes", lambda: names() == [])


@EARLY
def test_killed_during_boot(image: str, moment: Callable[[str], bool]) -> None:
    for delay in (0.0, 0.05, 0.1):
        program = machinekit.python(BOOTS, image, "namespaces", "early")
        wait_until("it has come so far", lambda: moment("early"))
        time.sleep(delay)
        pids = {pid for pid in family(program.pid) if pid != program.pid}
        program.kill()
        reap(program)
        wait_until("its processes end", lambda pids=pids: not any(map(machinekit.runs, pids)))
        sweep()
        nothing_is_left("early", pids, within=PATIENCE)


# ── by failing to come up ────────────────────────────────────────────────────────────────────────


def nothing_was_made() -> None:
    assert names() == []


def test_image_that_is_missing(tmp_path: Path, elf: Path) -> None:
    with pytest.raises(ImageError, match="nowhere"):
        boot(f"oci:{tmp_path}/nowhere", machine="namespaces")
    nothing_was_made()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"machine": "cloud"}, "none of: qemu, namespaces"),
        ({"name": "Bad Name"}, "cannot name a machine"),
        ({"name": "a" * 64}, "cannot name a machine"),
        ({"memory": "lots"}, "not a size"),
        ({"memory": "1M"}, "too little"),
        ({"cpus": 0}, "cpus"),
        ({"kernel": "/no/such/kernel"}, "cannot read the kernel"),
        ({"kernel": "/etc/passwd"}, "not a Linux kernel"),
        ({"machine": "namespaces", "kernel": "/vmlinuz"}, "leave kernel out"),
        ({"env": {"A=B": "x"}}, "environment variable"),
        ({"bundle": "/no/bundle"}, "make guest"),
        ({"machine": "namespaces", "hostname": "x" * 65}, "hostname"),
        ({"machine": "namespaces", "upper_size": "much"}, "upper_size: .* is not a size"),
    ],
)
def test_bad_settings(image: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(MachineError, match=message):
        boot(image, **options)  # type: ignore[arg-type]
    nothing_was_made()


def test_no_qemu(image: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineError, match="not on PATH"):
        boot(image)
    nothing_was_made()


def test_state_folder_that_cannot_be_written(
    image: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(MachineError, match="XDG_STATE_HOME"):
        boot(image, machine="namespaces")


def test_broken_bundle(image: str, tmp_path: Path, elf: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for path in elf.parent.iterdir():
        (bundle / path.name).symlink_to(path)
    manifest = json.loads((elf.parent / MANIFEST).read_text())
    manifest["files"]["vmlinuz"]["size"] += 1
    (bundle / MANIFEST).unlink()
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(MachineError, match=r"vmlinuz has .* bytes"):
        boot(image, bundle=str(bundle))
    (bundle / MANIFEST).write_text("{}")
    with pytest.raises(MachineError, match=r"manifest\.json"):
        boot(image, bundle=str(bundle))
    nothing_was_made()


@KIND
def test_boot_that_takes_too_long(image: str, kind: str) -> None:
    with pytest.raises(BootFailed, match=r"not ready 0\.03 s after its launch"):
        boot(image, machine=kind, timeout=0.03)
    nothing_was_made()


def test_failed_boot_says_which_step(image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A boot config with a layer that is not where it says."""
    monkeypatch.setattr("microguest.host_client.machines.namespaces.LOWER", "/microguest/elsewhere")
    with pytest.raises(BootFailed, match=r"root-lower: .*/microguest/elsewhere") as caught:
        boot(image, machine="namespaces")
    error = caught.value
    assert (error.step, error.path, error.errno) == ("root-lower", "/microguest/elsewhere", 2)
    assert error.syscall
    assert "microguest-report" in error.console
    nothing_was_made()


@pytest.mark.qemu
def test_kernel_that_is_none(image: str, tmp_path: Path) -> None:
    """The right magic, nothing behind it: QEMU refuses it or runs into the void."""
    fake = tmp_path / "vmlinuz"
    fake.write_bytes(bytes(0x202) + b"HdrS" + bytes(4096))
    with pytest.raises(BootFailed):
        boot(image, kernel=str(fake), timeout=3)
    nothing_was_made()


# ── names ────────────────────────────────────────────────────────────────────────────────────────


def test_long_state_path(image: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Longer than a Unix socket's path may be."""
    home = tmp_path / ("long" * 20) / ("longer" * 12)
    monkeypatch.setenv("XDG_STATE_HOME", str(home))
    with boot(image, machine="namespaces", name="n" * 63) as machine:
        assert machine.agent.exec(["echo", "hi"]).stdout == b"hi\n"


def test_names_that_do_not_run(elf: Path) -> None:
    with pytest.raises(MachineError, match="no machine named ghost"):
        connect("ghost")
    with pytest.raises(MachineError, match="cannot name"):
        connect("../etc")


def test_folder_of_a_dead_machine_is_reused(image: str) -> None:
    program = started(image, "namespaces", "again")
    monitor = state_of("again").monitor
    kill(monitor)
    assert program.stdin is not None
    program.stdin.write(b"\n")
    reap(program)
    assert os.path.isdir(os.path.join(machines_root(), "again"))
    with boot(image, machine="namespaces", name="again") as machine:
        machine.agent.ping()


def test_directory_image(tmp_path: Path, elf: Path) -> None:
    imagefactory.require("tar")
    root = tmp_path / "root"
    root.mkdir()
    (root / "hello").write_bytes(elf.read_bytes())
    (root / "hello").chmod(0o755)
    with boot(f"dir:{root}", machine="namespaces") as machine:
        assert b"microguest" in machine.agent.exec(["/hello", "--version"]).stdout
    assert sorted(os.listdir(root)) == ["hello"]
