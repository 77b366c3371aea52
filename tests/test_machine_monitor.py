"""The monitor against guests that misbehave: a bundle whose program is a script of the test.

The script is started as the namespaces launcher would be, so everything between it and the caller
is the real thing: the monitor, the link, the folder.
"""

import json
import os
import shutil
import socket
import stat
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import machinekit
import pytest
from machinekit import nothing_is_left
from patience import PATIENCE, SLACK

from microguest import boot
from microguest.errors import BootFailed, MachineError
from microguest.guest.report import CONSOLE_MARK
from microguest.host_client.event_loop import EventLoop
from microguest.host_client.machines.chart import boot_chart
from microguest.host_client.machines.console import (
    HALF_MAX,
    LogReader,
    RotatingLog,
    printable_lines,
    read_log,
)
from microguest.host_client.machines.folder import claim, is_alive, names, read_state
from microguest.host_client.machines.machine import Machine
from microguest.host_client.machines.plan import AGENT_EXITS_MAX, EVENT_MAX, EVENTS_MAX, cut
from microguest.host_client.monitor.main import FAILED_WAIT
from microguest.host_client.monitor.qmp import Qmp

pytestmark = pytest.mark.usefixtures("machines_home")

GUEST = """#!{python}
import hashlib, json, os, signal, socket, sys, time
run = sys.argv[sys.argv.index("--run") + 1]
config = json.load(open(run + "/boot.json"))
proof = hashlib.sha256(config["agent"]["token"].encode()).hexdigest()

def dial():
    report = socket.socket(socket.AF_UNIX)
    os.chdir(run)  # a relative path is short enough for a socket
    report.connect("host/report.sock")
    return report

def tell(report, kind, **fields):
    report.sendall(json.dumps({{kind: fields}}).encode() + b"\\n")

def ready(report, **fields):
    tell(report, "ready", **{{"steps": [], "token_proof": proof, **fields}})

{script}
"""


@pytest.fixture
def root(tmp_path: Path) -> str:
    (tmp_path / "root").mkdir()
    return f"dir:{tmp_path}/root"


def bundle_of(folder: Path, script: str) -> str:
    """A bundle whose program is this script."""
    folder.mkdir()
    program = folder / "microguest"
    program.write_text(GUEST.format(python=sys.executable, script=script))
    program.chmod(0o755)
    files = {}
    for name in ("vmlinuz", "initramfs.cpio", "microguest"):
        path = folder / name
        path.touch()
        files[name] = {"size": path.stat().st_size, "sha256": "0" * 64}
    manifest = {
        "schema": 1, "arch": "x86_64", "kernel_release": "0", "kernel_source": "none",
        "versions": {}, "files": files, "modules": [],
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return str(folder)


def booted(tmp_path: Path, root: str, script: str, **options: object) -> Machine:
    bundle = bundle_of(tmp_path / "bundle", script)
    return boot(root, machine="namespaces", bundle=bundle, timeout=PATIENCE, **options)  # type: ignore[arg-type]


def refused(tmp_path: Path, root: str, script: str) -> BootFailed:
    with pytest.raises(BootFailed) as caught:
        booted(tmp_path, root, script)
    assert names() == []
    return caught.value


# ── guests that do not come up ───────────────────────────────────────────────────────────────────


def test_last_words_are_in_the_error(tmp_path: Path, root: str) -> None:
    error = refused(tmp_path, root, "print('no memory for you', file=sys.stderr); sys.exit(4)")
    assert "exit code 4" in str(error)
    assert "no memory for you" in error.console


def test_program_that_cannot_be_executed(tmp_path: Path, root: str) -> None:
    bundle = bundle_of(tmp_path / "bundle", "")
    os.chmod(f"{bundle}/microguest", 0o644)
    with pytest.raises(BootFailed, match=r"cannot start .*: Permission denied"):
        boot(root, machine="namespaces", bundle=bundle)
    assert names() == []


def test_busy_caller_still_gets_the_last_lines(tmp_path: Path, root: str) -> None:
    script = "r = dial(); ready(r); time.sleep(0.5); print('last', flush=True)"
    with booted(tmp_path, root, script) as machine:
        monitor = machine.state.monitor
        machinekit.wait_until("all is gone", lambda: not machinekit.runs(monitor))
        assert "last" in machine.console()
        assert machine.wait().status == "crashed"
        assert "last" in machine.console()


def test_killed_before_ready(tmp_path: Path, root: str) -> None:
    error = refused(tmp_path, root, "os.kill(os.getpid(), signal.SIGSEGV)")
    assert "microguest was killed (signal 11) before the guest was ready" in str(error)


def test_failure_that_is_only_on_the_console(tmp_path: Path, root: str) -> None:
    report = {"boot_failed": {"step": "report", "message": "nobody listens", "errno": 111}}
    error = refused(tmp_path, root, f"print({CONSOLE_MARK + json.dumps(report)!r}); sys.exit(0)")
    assert (error.step, error.errno) == ("report", 111)
    assert "nobody listens" in str(error)


def test_failed_boot_that_does_not_power_off(
    tmp_path: Path, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = time.monotonic()
    script = "r = dial(); tell(r, 'boot_failed', step='config', message='bad'); time.sleep(60)"
    assert refused(tmp_path, root, script).step == "config"
    assert time.monotonic() - began < FAILED_WAIT + SLACK


def test_other_token(tmp_path: Path, root: str) -> None:
    error = refused(tmp_path, root, "ready(dial(), token_proof='0' * 64); time.sleep(60)")
    assert "another token" in str(error)


@pytest.mark.parametrize(
    "garbage",
    [
        "b'not json\\n'",
        "b'{}\\n'",
        "b'[1]\\n'",
        "b'{\"unknown\": {}}\\n'",
        'b\'{"ready": {"steps": 5}}\\n\'',
        "b'x' * 1000000",
        "bytes(range(256)) * 10 + b'\\n'",
        "b'[' * 60000 + b'\\n'",
        'b\'{"stopping": {"status": "x", "boot_ms": 1\' + b\'0\' * 400 + b\'}}\\n\'',
    ],
)
def test_garbage_instead_of_a_report(tmp_path: Path, root: str, garbage: str) -> None:
    """The connection is dropped; a machine that then says no more does not count as ready."""
    script = f"""
r = dial()
try:
    r.sendall({garbage})
    r.settimeout(60)
    assert r.recv(1) == b""
except ConnectionError:
    pass
try:
    ready(r)
except OSError:
    pass
sys.exit(9)
"""
    assert "exit code 9" in str(refused(tmp_path, root, script))


# ── guests that misbehave later ──────────────────────────────────────────────────────────────────


def test_second_report_connection_is_refused(tmp_path: Path, root: str) -> None:
    script = """
r = dial()
ready(r)
try:
    answer = dial().recv(1)
except OSError:
    answer = b""
print("refused" if answer == b"" else "served", flush=True)
time.sleep(60)
"""
    with booted(tmp_path, root, script) as machine:
        machinekit.wait_until("it tried", lambda: "refused" in machine.console())
        machine.kill()


def test_flood_of_reports(tmp_path: Path, root: str) -> None:
    script = """
r = dial()
ready(r)
try:
    for number in range(1, 100000):
        tell(r, "agent_exited", code=1, crashes=number, restart_in=0.0)
except OSError:
    print("enough", flush=True)
time.sleep(60)
"""
    with booted(tmp_path, root, script) as machine:
        machinekit.wait_until("the monitor has had enough", lambda: "enough" in machine.console())
        machinekit.wait_until("all is told", lambda: len(machine.state.events) == EVENTS_MAX)
        assert len(machine.state.agent_exits) == AGENT_EXITS_MAX
        assert machine.state.phase == "running"
        machine.kill()


def test_flood_on_the_console(tmp_path: Path, root: str) -> None:
    script = """
r = dial()
ready(r)
line = b"x" * 1023 + b"\\n"
for _ in range(20 * 1024):
    os.write(1, line)
os.write(1, b"the end\\n")
time.sleep(60)
"""
    with booted(tmp_path, root, script) as machine:
        machinekit.wait_until("all is written", lambda: "the end" in machine.console())
        assert HALF_MAX <= len(machine.console()) <= 2 * HALF_MAX
        machine.kill()


def test_hostile_strings_do_not_reach_the_terminal(tmp_path: Path, root: str) -> None:
    script = r"""
print("\x1b[2Jgone\x07", flush=True)
tell(dial(), "boot_failed", step="x" * 9000, message="\x1b]0;title\x07 bad", path="p" * 9000)
"""
    error = refused(tmp_path, root, script)
    assert "\x1b" not in error.console
    assert "\x1b" not in str(error)
    assert len(str(error)) < 5000


def test_largest_state_still_reaches_the_caller(tmp_path: Path, root: str) -> None:
    script = r"""
text = "\U0001f600" * 3000
r = dial()
steps = [dict(name=text[:500], start_ms=1.0, end_ms=2.0)] * 8
ready(r, steps=steps)
tell(r, "workload_failed", code=text[:1500], message=text, step=text[:500])
for number in range(70):
    tell(r, "oom_killed", pid=2**31 - 1, name=text[:1000], cgroup=text[:1000], boot_ms=1.0)
    tell(r, "agent_exited", code=1, crashes=number, restart_in=1e-300, last_words=text)
print(text, flush=True)
tell(r, "boot_failed", step=text[:500], message=text[:2000], path=text[:1500], syscall=text[:900])
sys.exit(1)
"""
    with booted(tmp_path, root, script) as machine:
        state = machine.wait(timeout=PATIENCE)
    assert state.workload_failed is not None
    assert state.boot_failed is not None
    assert (len(state.agent_exits), len(state.events)) == (AGENT_EXITS_MAX, EVENTS_MAX)
    assert state.status == "boot-failed"


@pytest.mark.parametrize("moment", [9.2e18, -9.2e18, 5e-324])
def test_a_clock_that_no_guest_has_harms_nobody(tmp_path: Path, root: str, moment: float) -> None:
    """Every report with a moment: the machine, its state, its list and its chart are as ever."""
    script = f"""
r = dial()
at = {moment!r}
tell(r, "workload_started", pid=7, boot_ms=at)
ready(r, steps=[dict(name="a", start_ms=at, end_ms=at), dict(name="b", start_ms=-at, end_ms=-at)])
tell(r, "agent_exited", signal=9, crashes=1, restart_in=abs(at))
tell(r, "agent_serves", starts=2, boot_ms=-at)
tell(r, "first_exec", boot_ms=at)
tell(r, "oom_killed", pid=9, name="x", cgroup="/x", boot_ms=at)
tell(r, "handed_off", boot_ms=-at)
tell(r, "workload_exited", code=5, restart_in=abs(at), boot_ms=at)
time.sleep(60)
"""
    with booted(tmp_path, root, script) as machine:
        name = machine.name
        machinekit.wait_until("it is written", lambda: len(machinekit.state_of(name).events) == 5)
        state = machinekit.state_of(name)
        assert state == machine.state
        assert state.workload_exited is not None
        starts = [step.start_ms for step in state.timeline[1:]]
        assert starts == sorted(starts)
        chart = boot_chart(state.timeline, title="Boot")
        ET.fromstring(chart)
        assert len(chart) < 100_000
        machine.kill()


def test_what_a_boot_did_without_is_told(tmp_path: Path, root: str) -> None:
    script = r"""
r = dial()
ready(r, left_out=["/etc/hosts is not as the machine was told", "\x1b[2J" * 60])
time.sleep(60)
"""
    with booted(tmp_path, root, script) as machine:
        hosts, hostile = machine.state.events
        assert (hosts.kind, hosts.message) == (
            "left-out",
            "/etc/hosts is not as the machine was told",
        )
        assert len(hostile.message) <= EVENT_MAX
        machine.kill()


def test_too_much_that_a_boot_did_without_is_no_report(tmp_path: Path, root: str) -> None:
    script = "r = dial(); ready(r, left_out=['x'] * 17); time.sleep(60)"
    bundle = bundle_of(tmp_path / "bundle", script)
    with pytest.raises(BootFailed):
        boot(root, machine="namespaces", bundle=bundle, timeout=2.0)


def test_what_happens_is_told(tmp_path: Path, root: str) -> None:
    script = r"""
r = dial()
tell(r, "workload_started", pid=7, boot_ms=1.0)
tell(r, "workload_exited", code=5, restart_in=0.5)
ready(r)
tell(r, "workload_started", pid=8, boot_ms=2.0, starts=2)
tell(r, "agent_exited", signal=9, crashes=1, restart_in=0.25)
tell(r, "agent_serves", starts=2, boot_ms=2.5)
tell(r, "first_exec", boot_ms=3.0)
tell(r, "oom_killed", pid=9, name="\x1b[2Jgreedy", cgroup="/x", boot_ms=3.0, limit=True)
tell(r, "handed_off", boot_ms=4.0)
tell(r, "agent_exited", code=1, crashes=20, restart_in=None, hung=True, last_words="oh")
time.sleep(60)
"""
    with booted(tmp_path, root, script) as machine:
        machinekit.wait_until("all is told", lambda: machine.state.agent == "down")
        state = machine.state
        assert (state.workload_pid, state.workload_starts) == (8, 2)
        assert state.workload_exited is None
        assert state.handed_off
        assert [event.kind for event in state.events] == [
            *("workload-restarts", "agent-exited", "agent-serves"),
            *("oom-killed", "handed-off", "agent-exited"),
        ]
        messages = [event.message for event in state.events]
        assert "(5); again in 0.5 s" in messages[0]
        assert "greedy' (pid 9)" in messages[3]
        assert "\x1b" not in messages[3]
        assert "hung" in messages[5]
        assert "stays down" in messages[5]
        assert state.agent_exits[1].last_words == "oh"
        moments = {"workload-runs", "ready", "first-exec", "handed-off"}
        assert moments <= {step.name for step in state.timeline}
        machine.kill()


@pytest.mark.parametrize("goodbye", ["tell(r, 'stopping', status='reboot', boot_ms=1.0)", "pass"])
def test_restart_is_an_end(tmp_path: Path, root: str, goodbye: str) -> None:
    script = f"r = dial(); ready(r)\n{goodbye}\nsys.exit(3)"
    with booted(tmp_path, root, script) as machine:
        state = machine.wait(timeout=PATIENCE)
    assert (state.status, state.error) == ("reboot", "")
    assert "asked to be started again" in state.describe_end()


def test_machine_that_says_goodbye_and_stays(tmp_path: Path, root: str) -> None:
    """PID 1's last report without a power-off: `stop` does not wait for ever."""
    script = "r = dial(); ready(r); tell(r, 'stopping', status='done', boot_ms=1.0); time.sleep(60)"
    with booted(tmp_path, root, script) as machine:
        pids = machinekit.family(machine.state.monitor)
        began = time.monotonic()
        machine.stop(grace=0.1)
        assert time.monotonic() - began < 12 + SLACK
    nothing_is_left(machine.name, pids, within=PATIENCE)


def test_boot_config_and_its_token_are_gone_when_ready(tmp_path: Path, root: str) -> None:
    with booted(tmp_path, root, "r = dial(); ready(r); time.sleep(60)") as machine:
        folder = Path(os.environ["XDG_STATE_HOME"], "microguest", "machines", machine.name)
        assert sorted(os.listdir(folder / "run")) == ["host"]
        assert stat.S_IMODE((folder / "state.json").stat().st_mode) == 0o600
        machine.kill()


# ── no room ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_no_space(tmp_path: Path, elf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], check=True)
    monkeypatch.setenv("XDG_STATE_HOME", str(small))
    try:
        with pytest.raises(MachineError, match="No space left"):
            boot(machinekit.demo_image())
        assert names() == []
    finally:
        subprocess.run(["umount", "-l", small], check=True)


# ── parts ────────────────────────────────────────────────────────────────────────────────────────


def test_log_rotates(tmp_path: Path) -> None:
    path = str(tmp_path / "log")
    log = RotatingLog(path, half_max=1000)
    for number in range(1000):
        log.write(b"%05d\n" % number)
    log.close()
    kept = read_log(path)
    assert kept.endswith(b"00999\n")
    assert 1000 <= len(kept) <= 2000
    assert kept == b"".join(b"%05d\n" % n for n in range(1000 - len(kept) // 6, 1000))
    assert log.tail().endswith("00999\n")


def test_console_text_is_for_people() -> None:
    assert printable_lines("a\r\nb\x1b[1mc\td\x00") == "a\nb\\x1b[1mc\td\\x00"


def test_claims() -> None:
    folder = claim("one")
    assert is_alive("one")
    with pytest.raises(MachineError, match="exists already"):
        claim("one")
    folder.release()
    assert not is_alive("one")
    again = claim("one")
    again.remove()
    assert names() == []
    assert read_state("one") is None
    shutil.rmtree(os.environ["XDG_STATE_HOME"])
    assert names() == []


@pytest.mark.parametrize("text", ['"' * 5000, "\x01" * 5000, "\U0001f600" * 5000, "\\" * 5000])
def test_a_text_is_cut_to_what_it_takes_as_json(text: str) -> None:
    assert 100 < len(json.dumps(cut(text, 1000))) <= 1002
    assert 100 < len(json.dumps(cut(text, 1000, tail=True))) <= 1002


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b'{"error": {"desc": "no"}}', "no"),
        (b'{"error": "no"}', "no"),
        (b'{"error": {}}', "{}"),
        (b"[" * 200_000 + b'\n{"return": 1}', ""),
    ],
    ids=["an-error", "a-text", "nothing", "nested"],
)
def test_whatever_a_vmm_answers_the_monitor_lives(answer: bytes, said: str) -> None:
    loop = EventLoop()
    ours, theirs = socket.socketpair()
    qmp = Qmp(loop, ours, lambda _name, _reason: None)
    heard: list[str] = []

    def answered(error: str) -> None:
        heard.append(error)
        loop.stop()

    qmp.execute("stop", answered)
    theirs.sendall(b'{"return": {}}\n')
    with theirs:
        loop.call_later(PATIENCE, loop.stop)
        loop.defer(lambda: theirs.sendall(answer + b"\n"))
        loop.run()
    qmp.close()
    assert heard == [said]


def test_a_log_that_is_followed_is_read_once_however_often_it_rotates(tmp_path: Path) -> None:
    log = RotatingLog(str(tmp_path / "log"), half_max=1000)
    reader = LogReader(str(tmp_path / "log"))
    written, read = b"", b""
    for number, looks in enumerate([1, 1, 3, 1, 2, 12, 1, 9, 1]):
        for part in range(looks):
            line = f"{number}.{part} ".encode() * 20
            log.write(line)
            written += line
        read += reader.read()
        read += reader.read()
    reader.close()
    log.close()
    assert read == written
