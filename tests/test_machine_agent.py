"""What a caller does with a machine that runs: one suite for every kind of machine."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import machinekit
import pytest
from patience import PATIENCE

from microguest import boot, connect
from microguest.errors import DeadlineExceeded, MachineError, OutputTooLarge
from microguest.guest.errors import OperationError, StartError
from microguest.host_client.client.result import CommandFailed
from microguest.host_client.machines.machine import Machine

ENV = {"COLOUR": "green", "ODD": "a=b \u00e9"}


@pytest.fixture(scope="module", params=machinekit.KINDS)
def machine(
    request: pytest.FixtureRequest, module_machines_home: Path, elf: Path
) -> Iterator[Machine]:
    with boot(machinekit.demo_image(), machine=request.param, env=ENV, hostname="demo") as machine:
        machine.agent.ping()  # makes the connection that is kept for small requests
        yield machine


def test_exec(machine: Machine) -> None:
    result = machine.agent.exec(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (result.returncode, result.stdout, result.stderr) == (3, b"out\n", b"err\n")
    assert result.argv == ("sh", "-c", "echo out; echo err >&2; exit 3")
    assert 0 <= result.duration < 60
    assert not result.open_streams


def test_input(machine: Machine) -> None:
    data = os.urandom(2 * 1024 * 1024)
    assert machine.agent.exec(["cat"], input=data).stdout == data
    assert machine.agent.exec(["cat"], input=b"").stdout == b""
    assert machine.agent.exec(["cat"]).stdout == b""


def test_environment_directory_and_user(machine: Machine) -> None:
    agent = machine.agent
    shown = agent.exec(["env"], env={"COLOUR": "red"}).stdout.decode()
    assert "COLOUR=red\n" in shown
    assert f"ODD={ENV['ODD']}\n" in shown
    assert agent.exec(["pwd"], cwd="/etc").stdout == b"/etc\n"
    assert agent.exec(["id", "-un"], user="nobody").stdout == b"nobody\n"
    assert agent.exec(["hostname"]).stdout == b"demo\n"


def test_signal(machine: Machine) -> None:
    result = machine.agent.exec(["sh", "-c", "kill -TERM $$"])
    assert (result.returncode, result.signal, result.shell_code) == (-15, 15, 143)


def test_check(machine: Machine) -> None:
    with pytest.raises(CommandFailed) as caught:
        machine.agent.exec(["sh", "-c", "echo why >&2; exit 9"], check=True)
    assert caught.value.result.stderr == b"why\n"


@pytest.mark.parametrize(
    ("argv", "options", "code"),
    [
        (["/no/such"], {}, "not_found"),
        (["no-such"], {}, "not_found"),
        (["/etc/passwd"], {}, "permission_denied"),
        (["true"], {"cwd": "/no/such"}, "bad_cwd"),
        (["true"], {"user": "nobody-here"}, "bad_user"),
    ],
)
def test_command_that_does_not_start(
    machine: Machine, argv: list[str], options: dict[str, str], code: str
) -> None:
    with pytest.raises(StartError) as caught:
        machine.agent.exec(argv, **options)  # type: ignore[arg-type]
    assert caught.value.code == code


def test_timeout(machine: Machine) -> None:
    for timeout in (1.0, 10.0, 60.0):  # the next one where it had not begun by then
        with pytest.raises(DeadlineExceeded, match="longer than") as caught:
            machine.agent.exec(["sh", "-c", "echo begun; sleep 1234"], timeout=timeout)
        if caught.value.stdout:
            break
    assert caught.value.stdout == b"begun\n"
    machinekit.wait_until(
        "all of it ends", lambda: b"sleep 1234" not in machine.agent.exec(["ps"]).stdout
    )


def test_too_much_output(machine: Machine) -> None:
    with pytest.raises(OutputTooLarge):
        machine.agent.exec(["cat", "/dev/zero"], max_output=1024 * 1024)
    machine.agent.ping()


def test_threads_share_an_agent(machine: Machine) -> None:
    results: list[bytes] = []

    def call(number: int) -> None:
        results.append(agent.exec(["echo", str(number)]).stdout)
        agent.ping()

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    with connect(machine.name) as agent:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    assert sorted(results) == [b"%d\n" % number for number in range(8)]


def test_info(machine: Machine) -> None:
    info = machine.agent.info()
    assert info.hostname == "demo"
    assert info.agent_starts == 1
    assert info.versions["microguest"]


def test_timeline(machine: Machine) -> None:
    machine.agent.exec(["true"])
    steps = machine.timeline()
    names = [step.name for step in steps]
    assert names[0] == "launch"
    assert names.index("ready") < names.index("first-result") == len(names) - 1
    assert {"api-mounts", "listener", "root-overlay", "agent-ready"} <= set(names)
    assert ("kernel" in names) == (machine.state.machine == "qemu")
    starts = [step.start_ms for step in steps]
    assert starts == sorted(starts)
    assert starts[0] == 0


def test_connect_by_name_and_by_url(machine: Machine) -> None:
    with connect(machine.name) as agent:
        assert agent.exec(["hostname"]).stdout == b"demo\n"
    with pytest.raises(OperationError) as caught:
        connect(machine.url, token="0" * 64)
    assert caught.value.code == "unauthorized"
    machine.agent.ping()


def test_name_is_taken(machine: Machine) -> None:
    with pytest.raises(MachineError, match="exists already"):
        boot(machinekit.demo_image(), machine="namespaces", name=machine.name)
    machine.agent.ping()


def test_secrets_stay_private(machine: Machine, module_machines_home: Path) -> None:
    folder = module_machines_home / machine.name
    assert folder.stat().st_mode & 0o777 == 0o700
    token_file = folder / "token"
    assert token_file.stat().st_mode & 0o777 == 0o600
    token = token_file.read_bytes()
    for pid in machinekit.family(machine.state.monitor):
        for name in ("cmdline", "environ"):
            assert token not in Path(f"/proc/{pid}/{name}").read_bytes()
    holders = [path for path in folder.rglob("*") if path.is_file() and token in path.read_bytes()]
    assert holders == [token_file]
