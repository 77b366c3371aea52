"""Control of a machine depends on nothing that its guest says, nor on what others have left."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import machinekit
import pytest
from clikit import microguest
from patience import PATIENCE
from test_machine_monitor import booted

from microguest.errors import ImageError, MachineError
from microguest.host_client.images.cache import Cache
from microguest.host_client.machines import bundle
from microguest.host_client.machines.find import find
from microguest.host_client.machines.folder import KEPT_MACHINES, machines_root, read_state
from microguest.host_client.machines.holder import monitor_of

OTHER = 1234  # a user's id

pytestmark = pytest.mark.usefixtures("machines_home")


@pytest.fixture
def root(tmp_path: Path) -> str:
    (tmp_path / "root").mkdir()
    return f"dir:{tmp_path}/root"


def start(image: str, name: str, *options: str) -> None:
    words = ("--name", name, "--machine", "namespaces", image, "sh", "-c")
    script = "echo the last words; exec sleep 1000"
    assert microguest("run", "-d", *options, *words, script).returncode == 0
    console = Path(machines_root(), name, "console.log")
    machinekit.wait_until("it speaks", lambda: b"last words" in console.read_bytes())


# ── whatever the guest says ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "report",
    [
        "kind='agent_exited', code=1, crashes=HUGE, restart_in=1.0",
        "kind='agent_serves', starts=HUGE, boot_ms=1.0",
        "kind='workload_started', pid=HUGE, boot_ms=1.0",
        "kind='workload_exited', code=1, restart_in=HUGE",
        "kind='oom_killed', pid=-HUGE, name='x', cgroup='', boot_ms=1.0",
        "kind='workload_failed', code='x', message='m', errno=HUGE",
    ],
)
def test_numbers_of_any_size_are_refused(tmp_path: Path, root: str, report: str) -> None:
    script = f"""
HUGE = int("9" * 4000)
r = dial()
ready(r)
try:
    for _ in range(40):
        tell(r, **dict({report}))
        time.sleep(0.001)
except OSError:
    print("refused", flush=True)
time.sleep(60)
"""
    with booted(tmp_path, root, script) as machine:
        machinekit.wait_until("it is refused", lambda: "refused" in machine.console())
        assert machinekit.state_of(machine.name).phase == "running"
        find(machine.name).stop(grace=0.1)
        machinekit.wait_until("it is gone", lambda: read_state(machine.name) is None)


def test_a_flood_of_reports_is_not_as_many_writes(tmp_path: Path, root: str) -> None:
    script = """
r = dial()
ready(r)
for number in range(900):
    tell(r, "agent_exited", code=1, crashes=number, restart_in=1.0, last_words="x" * 2000)
    time.sleep(0.001)
print("all said", flush=True)
time.sleep(60)
"""
    seen: set[tuple[int, int]] = set()
    with booted(tmp_path, root, script) as machine:
        path = Path(machines_root(), machine.name, "state.json")

        def over() -> bool:
            status = path.stat()
            seen.add((status.st_ino, status.st_mtime_ns))
            state = read_state(machine.name)
            return bool(state and state.agent_exits and state.agent_exits[-1].crashes == 899)

        seconds = machinekit.wait_until("the last one is on disk", over, 60)
        machine.kill()
    assert len(seen) < 10 + 6 * seconds


def as_garbage(path: Path) -> None:
    path.write_bytes(b"\xff{")


def as_huge(path: Path) -> None:
    path.write_text('{"name": "ctl", "image": "' + "x" * 10_000_000 + '"}')


def as_nothing(path: Path) -> None:
    path.unlink()


def as_another_version(path: Path) -> None:
    path.write_text('{"name": "ctl", "schema": 0, "process": 12, "monitor": "12", "phase": 3}')


def as_another_kind(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_anothers(path: Path) -> None:
    path.write_text(path.read_text().replace('"name":"ctl"', '"name":"someone"'))


SPOILERS = [as_garbage, as_huge, as_nothing, as_another_version, as_another_kind, as_anothers]


@pytest.mark.parametrize("spoil", SPOILERS)
def test_a_machine_whose_state_cannot_be_read_can_be_stopped(
    image: str, spoil: Callable[[Path], None]
) -> None:
    start(image, "ctl", "--rm")
    pids = machinekit.family(machinekit.state_of("ctl").monitor)
    spoil(Path(machines_root(), "ctl", "state.json"))
    listed = microguest("ls")
    assert listed.returncode == 0
    assert b"ctl" in listed.stdout
    refused = microguest("exec", "ctl", "true")
    assert refused.returncode == 125
    assert b"microguest stop ctl" in refused.stderr
    assert microguest("stop", "ctl").stdout == b"ctl\n"
    machinekit.nothing_is_left("ctl", pids, within=PATIENCE)


# ── who is signalled ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def bystander() -> Iterator["subprocess.Popen[bytes]"]:
    """Dies of any signal that a command might send."""
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process
        process.kill()


def plant(folder: Path, pid: int) -> int:
    """A machine's folder with that monitor; a descriptor that holds it."""
    folder.mkdir(parents=True)
    for each in (folder, folder.parent, folder.parent.parent):
        each.chmod(0o700)
    (folder / "state.json").write_text(
        f'{{"name": "{folder.name}", "monitor": {pid}, "phase": "running", "url": "unix:///no"}}'
    )
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


@pytest.mark.parametrize("command", ["stop", "pause"])
def test_no_process_is_signalled_that_is_not_the_monitor(
    machines_home: Path, bystander: "subprocess.Popen[bytes]", command: str
) -> None:
    """As where its number was given to another process since."""
    lock = plant(machines_home / "web", bystander.pid)
    done = microguest(command, "web")
    os.close(lock)
    assert done.returncode == 1  # one of the names that were given failed
    assert bystander.poll() is None


def test_a_process_that_only_looks_like_a_monitor(machines_home: Path) -> None:
    lock = plant(machines_home / "web", 0)
    folder = str(machines_home / "web")
    words = (sys.executable, "-c", "import time; time.sleep(1000)")
    with subprocess.Popen(
        [*words, "microguest.host_client.monitor.main", folder, "0", "0"],
        stdin=subprocess.DEVNULL,
    ) as other:
        assert monitor_of("web", other.pid) == -1
        other.kill()
    os.close(lock)


# ── whose folders ────────────────────────────────────────────────────────────────────────────────


def given_to_another(path: Path) -> None:
    os.chown(path, OTHER, OTHER)


def open_to_all(path: Path) -> None:
    path.chmod(0o777)


def open_to_a_group(path: Path) -> None:
    os.chown(path, -1, OTHER)
    path.chmod(0o770)


@pytest.mark.parametrize("spoil", [given_to_another, open_to_all, open_to_a_group])
@pytest.mark.parametrize("where", ["web", "machines", "microguest", "state"])
@pytest.mark.parametrize("command", ["stop", "pause", "ls", "exec", "logs"])
def test_folders_that_others_have_made_are_refused(
    machines_home: Path,
    bystander: "subprocess.Popen[bytes]",
    where: str,
    spoil: Callable[[Path], None],
    command: str,
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    lock = plant(machines_home / "web", bystander.pid)
    parts = (machines_home / "web", *(machines_home / "web").parents)
    spoil(next(path for path in parts if path.name == where))
    words = {"exec": ("web", "true"), "ls": ()}.get(command, ("web",))
    done = microguest(command, *words)
    os.close(lock)
    assert done.returncode == (1 if command in ("stop", "pause") else 125), done
    assert b"XDG_STATE_HOME" in done.stderr
    assert b"another" in done.stderr or b"belongs to" in done.stderr or b"written" in done.stderr
    assert bystander.poll() is None


def test_nothing_is_made_below_a_folder_of_others(
    machines_home: Path, image: str, tmp_path: Path
) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(0o777)
    done = microguest("run", "--rm", "--machine", "namespaces", image, "true")
    assert done.returncode == 125
    assert b"can be written by other users" in done.stderr
    assert not machines_home.exists()


def test_a_link_is_followed_before_anything_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs").chmod(0o777)
    (tmp_path / "link").symlink_to("theirs")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "link"))
    with pytest.raises(MachineError, match="theirs can be written by other users"):
        machines_root()


def test_a_cache_that_others_can_replace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(ImageError, match="can be written by other users"):
        Cache(str(tmp_path / "cache" / "images")).obtain("x", lambda work, content: None)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_bundle_that_another_user_has_made_is_refused(
    elf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its program would run with our rights."""
    monkeypatch.setattr(bundle, "checkout", lambda: None)  # as from a wheel
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    folder = Path(bundle.data_folder(os.uname().machine))
    folder.parent.mkdir(parents=True)
    shutil.copytree(elf.parent, folder)
    assert bundle.find_bundle().folder == str(folder)
    os.chown(folder.parent, 1234, 1234)
    with pytest.raises(MachineError, match="belongs to user 1234"):
        bundle.find_bundle()
    assert bundle.find_bundle(str(folder)).folder == str(folder)  # who names it has chosen


# ── monitors that were killed ────────────────────────────────────────────────────────────────────


def killed(name: str) -> None:
    state = machinekit.state_of(name)
    pids = machinekit.family(state.monitor)
    os.kill(state.monitor, signal.SIGKILL)
    machinekit.wait_until("all is dead", lambda: not any(map(machinekit.runs, pids)))


def test_what_a_killed_monitor_knew_stays(image: str, machines_home: Path) -> None:
    start(image, "victim")
    killed("victim")
    for _ in range(2):  # each of them sweeps
        assert b"its monitor was killed" in microguest("ls", "-a").stdout
    assert b"the last words" in microguest("logs", "victim").stdout
    state = read_state("victim")
    assert state is not None
    assert (state.phase, state.status) == ("ended", "crashed")
    assert "the last words" in state.console
    assert sorted(os.listdir(machines_home / "victim")) == [
        "console.log",
        "console.mark",
        "console.times",
        "state.json",
        "vmm.log",
    ]
    stopped = microguest("stop", "victim")  # has ended: fine
    assert stopped.returncode == 0


def test_nothing_stays_of_a_killed_monitor_with_rm(image: str, machines_home: Path) -> None:
    start(image, "victim", "--rm")
    killed("victim")
    microguest("ls")
    assert not (machines_home / "victim").exists()


def test_a_killed_monitor_whose_state_is_garbage(image: str) -> None:
    start(image, "victim")
    killed("victim")
    as_garbage(Path(machines_root(), "victim", "state.json"))
    assert b"its monitor was killed" in microguest("ls", "-a").stdout
    assert b"the last words" in microguest("logs", "victim").stdout


def test_of_ended_machines_only_the_newest_stay(machines_home: Path) -> None:
    for number in range(KEPT_MACHINES + 3):
        name = f"m{number}"
        os.close(plant(machines_home / name, 1))
        (machines_home / name / "state.json").write_text(
            f'{{"name": "{name}", "created": {number}, "kept": true}}'
        )
    microguest("ls")
    left = sorted(os.listdir(machines_home), key=lambda name: int(name[1:]))
    assert left == [f"m{number}" for number in range(3, KEPT_MACHINES + 3)]


def test_stopping_a_monitor_that_hangs_keeps_its_console(
    image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("microguest.host_client.machines.control.POWER_OFF_WAIT", 0.1)
    monkeypatch.setattr("microguest.host_client.machines.control.KILL_WAIT", 1.0)
    start(image, "victim")
    os.kill(machinekit.state_of("victim").monitor, signal.SIGSTOP)
    machine = find("victim")
    Path(machines_root(), "victim", "token").write_text("x" * 64)  # its agent refuses us
    machine.stop(grace=0.1)
    assert b"the last words" in microguest("logs", "victim").stdout
