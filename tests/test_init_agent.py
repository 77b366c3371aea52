"""PID 1 and its agent: a crash is an event that neither listener nor workload notices."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from init_machine import (
    TOKEN,
    Machine,
    agents_that_keep_dying,
    boot_config,
    command_of,
    make_root,
    require_program,
    wait_for,
)
from patience import PATIENCE

from microguest.guest import bounds
from microguest.guest.wire.connection import Connection, Data, Event, Request, Role
from microguest.guest.wire.messages import Attach, Exited, Hello, Welcome
from microguest.host_client.client.address import UnixAddress
from microguest.host_client.client.agent import Agent


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_program()
    return make_root(tmp_path_factory.mktemp("image"))


def call_agent(machine: Machine) -> socket.socket:
    """A connection to the agent's socket, with a hello sent on it."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(PATIENCE)
    connection.connect(str(machine.host / "agent.sock"))
    connection.sendall(Connection(Role.HOST).send(Hello(token=TOKEN)))
    return connection


def assert_welcomed(connection: socket.socket) -> None:
    protocol = Connection(Role.HOST)
    protocol.send(Hello(token=TOKEN))
    events: list[Event] = []
    while not events:
        data = connection.recv(65536)
        assert data, "closed without a welcome"
        events = protocol.receive(data)
    assert isinstance(events[0], Welcome)


def test_a_host_that_is_early_waits_in_the_backlog(root: Path) -> None:
    with Machine(root, boot_config()) as machine:
        wait_for((machine.host / "agent.sock").exists, "the listener")
        wait_for(lambda: _connects(machine), "a backlog")
        with call_agent(machine) as connection:
            assert_welcomed(connection)


def _connects(machine: Machine) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(machine.host / "agent.sock")) == 0


def test_socket_is_for_its_user_only(root: Path) -> None:
    with Machine(root, boot_config()) as machine:
        machine.report("ready")
        assert (machine.host / "agent.sock").stat().st_mode & 0o777 == 0o600


def test_a_killed_agent_is_reported_and_started_again(root: Path) -> None:
    with Machine(root, boot_config(["sleep", "1000"])) as machine:
        machine.report("ready")
        machine.report("workload_started")
        for crashes, restart_in in ((1, 0.0), (2, 0.1)):
            first = machine.agent_pid()
            os.kill(first, signal.SIGSTOP)  # it cannot answer what comes now
            with call_agent(machine) as connection:
                os.kill(first, signal.SIGKILL)
                exited = machine.report("agent_exited")
                assert exited["signal"] == signal.SIGKILL
                assert exited["crashes"] == crashes
                assert exited["restart_in"] == pytest.approx(restart_in, abs=0.05)
                assert_welcomed(connection)
            assert machine.report("agent_serves")["starts"] == crashes + 1
            assert machine.agent_pid() != first
        machine.process.terminate()
        assert machine.report("workload_exited")["signal"] == signal.SIGTERM
        assert machine.report("stopping")["status"] == "shutdown"
        assert machine.wait() == 0


def test_an_attached_workload_outlives_the_agent(root: Path) -> None:
    script = "while :; do echo line; sleep 0.02; done"
    config = boot_config(["sh", "-c", script], stdio="attached")
    with Machine(root, config) as machine:
        machine.report("ready")
        machine.report("workload_started")
        first = machine.agent_pid()
        os.kill(first, signal.SIGKILL)
        machine.report("agent_exited")
        second = wait_for(lambda: (pid := machine.agent_pid()) != first and pid, "another agent")
        wait_for(lambda: _script_runs(machine), "the workload")
        with call_agent(machine) as connection:
            assert_welcomed(connection)
        assert machine.report("agent_serves")["starts"] == 2
        assert machine.agent_pid() == second
        assert _script_runs(machine)
        machine.process.terminate()
        assert machine.report("workload_exited")["signal"] == signal.SIGTERM
        assert machine.report("stopping")["status"] == "shutdown"
        assert machine.wait() == 0


def _script_runs(machine: Machine) -> bool:
    return any("echo line" in " ".join(command_of(pid)) for pid in machine.everybody())


def test_agent_is_named_and_has_no_environment(root: Path) -> None:
    with Machine(root, boot_config()) as machine:
        machine.report("ready")
        process = Path(f"/proc/{machine.agent_pid()}")
        assert (process / "cmdline").read_bytes() == b"agent\0"
        assert (process / "comm").read_text() == "agent\n"
        assert (process / "environ").read_bytes() == b""


def test_an_agent_that_keeps_dying_fails_the_boot(root: Path) -> None:
    reports, _ = agents_that_keep_dying(root, boot_config(["true"]))
    crashes = [fields["crashes"] for name, fields in reports if name == "agent_exited"]
    assert crashes == [1, 2, 3, 4]
    (failed,) = [fields for name, fields in reports if name == "boot_failed"]
    assert failed["step"] == "agent-ready"
    assert "4 crashes" in failed["message"]
    assert reports[-1][1]["status"] == "boot-failed"


def test_an_attached_workload_is_collected_and_ends_the_machine(root: Path) -> None:
    script = "read line; echo got $line; echo wrong >&2; exit 3"
    config = boot_config(["sh", "-c", script], stdio="attached")
    with Machine(root, config) as machine:
        machine.report("ready")
        machine.report("workload_started")
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE)
            connection.connect(str(machine.host / "agent.sock"))
            protocol = Connection(Role.HOST)
            for event in (
                Hello(token=TOKEN),
                Request(op="attach", args=Attach(id="main")),
                Data(stream=0, data=b"hello\n"),
            ):
                connection.sendall(protocol.send(event))
            events: list[Event] = []
            while not (events and isinstance(events[-1], Exited)):
                data = connection.recv(65536)
                assert data, f"closed after {events}"
                events += protocol.receive(data)
        output = {1: b"", 2: b""}
        for event in events:
            if isinstance(event, Data):
                output[event.stream] += event.data
        assert output == {1: b"got hello\n", 2: b"wrong\n"}
        assert isinstance(events[-1], Exited)
        assert events[-1].code == 3
        assert machine.report("workload_exited")["code"] == 3
        assert machine.report("stopping")["status"] == "done"
        assert machine.wait() == 0


# ── last words, the watchdog, a crash loop ───────────────────────────────────────────────────────


def test_last_words_are_on_the_console_and_in_the_report(root: Path) -> None:
    with Machine(root, boot_config()) as machine:
        machine.report("ready")
        pid = machine.agent_pid()
        with Path(f"/proc/{pid}/fd/2").open("wb", buffering=0) as stderr:  # its pipe to PID 1
            stderr.write(b"early\n" + b"x" * 30000 + b"\nthe reason \xff, and where\n")
            wait_for(lambda: "the reason" in machine.console, "the console")
            os.kill(pid, signal.SIGKILL)
        exited = machine.report("agent_exited")
        assert exited["last_words"] == "the reason \ufffd, and where"
        assert "early" in machine.console
        os.kill(machine.agent_pid(), signal.SIGKILL)
        assert machine.report("agent_exited").get("last_words", "") == ""


def test_a_stopped_agent_is_revived(root: Path) -> None:
    config = boot_config()
    config["agent"]["watchdog"] = 0.2
    with Machine(root, config) as machine:
        machine.report("ready")
        pid = machine.agent_pid()
        os.kill(pid, signal.SIGSTOP)
        with call_agent(machine) as connection:
            assert_welcomed(connection)
        assert machine.agent_pid() == pid


def test_a_hanging_agent_is_replaced(root: Path, frozen: Path) -> None:
    config = boot_config(["sleep", "1000"])
    config["agent"]["watchdog"] = 0.1
    with Machine(root, config) as machine:
        machine.report("ready")
        machine.report("workload_started")
        pid = machine.agent_pid()
        (frozen / "cgroup.procs").write_text(str(pid))
        with call_agent(machine) as connection:
            exited = machine.report("agent_exited")
            assert (exited["signal"], exited["hung"]) == (signal.SIGKILL, True)
            assert_welcomed(connection)
        assert machine.report("agent_serves")["starts"] == 2
        assert "agent 2 hangs; it is replaced" in machine.console  # as the machine numbers it


@pytest.fixture
def frozen() -> Iterator[Path]:
    """A cgroup whose processes neither run nor want to: they sleep and do not wake up."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    hierarchy = next((Path(fields[1]) for fields in mounts if fields[2] == "cgroup2"), None)
    if hierarchy is None or not os.access(hierarchy, os.W_OK):
        pytest.skip("needs a cgroup v2 hierarchy to write to")
    folder = hierarchy / f"mg-frozen-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / "cgroup.freeze").write_text("1")
        yield folder
    finally:
        wait_for(lambda: not (folder / "cgroup.procs").read_text(), "the frozen to be gone")
        folder.rmdir()


def test_a_busy_agent_is_never_taken_for_a_hanging_one(root: Path) -> None:
    """At the lowest priority, among neighbours that want all processors, and with work to do."""
    config = boot_config(["sh", "-c", "for i in 1 2 3 4; do while :; do :; done & done; wait"])
    config["agent"]["watchdog"] = 0.1
    with Machine(root, config) as machine:
        machine.report("ready")
        pid = machine.agent_pid()
        os.setpriority(os.PRIO_PROCESS, pid, 19)
        os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
        with Agent(UnixAddress(str(machine.host / "agent.sock")), TOKEN, timeout=60) as agent:
            until = time.monotonic() + 4
            while time.monotonic() < until:
                assert agent.exec(["sh", "-c", "exit 3"]).returncode == 3
        assert machine.agent_pid() == pid


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_crash_loop_ends_in_a_state_that_can_be_read(root: Path) -> None:
    """The delays grow to 5 s. In the end who dials is refused, and the workload goes on."""
    with Machine(root, boot_config(["sleep", "1000"])) as machine:
        machine.report("ready")
        machine.report("workload_started")
        for crashes in range(1, bounds.AGENT_CRASH_LIMIT + 1):
            os.kill(machine.agent_pid(), signal.SIGKILL)
            exited = machine.report("agent_exited")
            assert exited["crashes"] == crashes
            if crashes < bounds.AGENT_CRASH_LIMIT:
                machine.report("agent_serves")
        assert exited["restart_in"] is None
        assert not _connects(machine)
        assert machine.process.poll() is None
        machine.process.terminate()
        assert machine.report("workload_exited")["signal"] == signal.SIGTERM
        assert machine.wait() == 0
