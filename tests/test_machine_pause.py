"""Machines that stand still for a while: `pause`, `resume`, and what the guest does by itself."""

import itertools
import time
from collections.abc import Iterator

import machinekit
import pytest
from clikit import microguest
from patience import SLACK

import microguest as library
from microguest import Machine
from microguest.errors import ConnectError, ConnectionLost, DeadlineExceeded, MachineError
from microguest.guest.wire.messages import Keep
from microguest.host_client.machines.find import find
from microguest.host_client.machines.plan import Resume

COUNT = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done"
PAUSE = 2.5  # seconds; the guest's real-time clock has whole ones, and two are its least pause


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with library.boot(machinekit.demo_image(), timeout=120) as machine:
        machine.agent.close()  # from here on it keeps no connections, which would be left behind
        yield machine


@pytest.mark.qemu
def test_resumed_machine_has_the_right_time_and_its_kept_processes(machine: Machine) -> None:
    agent = machine.agent
    agent.step_clock()
    kept = agent.start(shell=COUNT, keep=Keep())
    numbers = [int(next(kept.stdout.lines()))]
    began = time.monotonic()
    machine.pause()
    assert machine.state.paused
    machine.pause()  # it is already
    agent.driver.timeout = 0.5
    with pytest.raises((ConnectError, ConnectionLost, DeadlineExceeded)):
        agent.ping()
    agent.driver.timeout = 10.0
    time.sleep(PAUSE)
    found = machine.resume()
    assert not machine.state.paused
    assert began - time.monotonic() - 0.1 < found.offset < -PAUSE
    assert found.stepped == pytest.approx(-found.offset, abs=0.05)
    now = agent.clock()
    assert abs(now.offset) <= now.error + found.error + 0.02
    with kept:  # its connection has stood still as everything else
        numbers += [int(line) for line in itertools.islice(kept.stdout.lines(), 10)]
    with agent.attach(kept.id, offsets=kept.offsets) as again:
        numbers += [int(line) for line in itertools.islice(again.stdout.lines(), 20)]
        again.kill()
    assert numbers == list(range(1, 32))


@pytest.mark.qemu
def test_pause_that_nobody_tells_of_is_found_out(machine: Machine) -> None:
    agent = machine.agent
    agent.step_clock()
    before = agent.clock()
    agent.driver.keeps_clock = False
    try:
        machine.pause()
        time.sleep(PAUSE + 1)
        machine._link.send(Resume())
        machinekit.wait_until("it is noticed", lambda: agent.clock().pauses > before.pauses)
    finally:
        agent.driver.keeps_clock = True
    found = agent.clock()
    assert found.last_pause > PAUSE  # and more, where another one was a moment before
    assert abs(found.offset) < 1.5  # the real-time clock knows no parts of seconds
    assert "the machine stood still for" in machine.console()


@pytest.mark.qemu
def test_new_connection_sets_a_clock_that_is_out(machine: Machine) -> None:
    agent = machine.agent
    wrong = agent.clock()
    agent.exec(["date", "-s", "@1000000000"], check=True)
    assert agent.clock().offset < -1e6
    with library.connect(machine.name, step_clock=False) as careless:
        assert careless.clock().offset < -1e6
    with library.connect(machine.name) as careful:
        assert abs(careful.clock().offset) < SLACK
    assert wrong.boottime < agent.clock().boottime  # which no step changes


@pytest.mark.qemu
def test_command_line(machine: Machine) -> None:
    name = f"{machine.name}\n".encode()
    done = microguest("pause", machine.name)
    assert (done.returncode, done.stdout) == (0, name)
    assert b"(paused)" in microguest("ls").stdout
    done = microguest("exec", machine.name, "true")
    assert done.returncode == 125
    assert f"microguest unpause {machine.name}".encode() in done.stderr
    time.sleep(PAUSE)
    done = microguest("unpause", machine.name)
    assert (done.returncode, done.stdout) == (0, name)
    done = microguest("ls")
    assert done.returncode == 0
    assert b"(paused)" not in done.stdout
    clock = machine.agent.clock()
    assert abs(clock.offset) < PAUSE / 2 + clock.error


def test_namespaces_cannot_be_paused() -> None:
    with library.boot(machinekit.demo_image(), machine="namespaces") as machine:
        with pytest.raises(MachineError, match="no processors of its own"):
            machine.pause()
        done = microguest("pause", machine.name)
        assert done.returncode == 1
        assert b"no processors of its own" in done.stderr
        renewed = machine.agent.renew(
            clock=True, random=True, machine_id="random", hostname="other"
        )
        assert renewed.failed.keys() == {"clock", "random"}
        assert "its host's kernel" in renewed.failed["clock"]
        said = machine.agent.exec(["cat", "/proc/sys/kernel/hostname", "/etc/machine-id"]).stdout
        assert said.decode() == f"other\n{renewed.machine_id}\n"
        clock = machine.agent.clock()
        assert abs(clock.offset) <= clock.error + 0.02


@pytest.mark.qemu
def test_paused_machine_can_be_stopped(machine: Machine) -> None:
    """The last one with this machine."""
    find(machine.name).pause()
    assert machine.stop().status == "shutdown"
