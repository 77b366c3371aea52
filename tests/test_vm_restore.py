"""Machines saved to a file and restored: what the copies share, and what makes them differ."""

import itertools
import time
from pathlib import Path

import pytest
from patience import PATIENCE
from vm_snapshot import SnapshotMachine, make_disk_and_initramfs

from microguest.errors import ConnectionLost, DeadlineExceeded
from microguest.guest.boot.network import Interface
from microguest.guest.wire.messages import Keep
from microguest.host_client.client.agent import Agent

pytestmark = pytest.mark.qemu

# Counts, and gives what the kernel's random numbers are, five times a second.
STORY = (
    "i=0; while :; do i=$((i+1)); "
    "echo $i $(hexdump -vn 16 -e '16/1 \"%02x\"' /dev/urandom); sleep 0.2; done"
)


@pytest.mark.timeout(240)
def test_copies_of_one_machine(tmp_path: Path) -> None:
    disk, initramfs = make_disk_and_initramfs(tmp_path)
    state = tmp_path / "state"
    with SnapshotMachine(tmp_path, disk, initramfs) as original:
        agent = original.agent(keeps_clock=True)
        kept = agent.start(shell=STORY, keep=Keep())
        assert next(kept.stdout.lines()).startswith(b"1 ")
        lost = agent.start(["sleep", "1000"], stdin=True)
        with pytest.raises(AssertionError, match=r"non-migratable device .*vhost-user-vsock"):
            original.qmp("migrate", uri=f"exec:cat>{state}")
        first = agent.renew(machine_id="random", hostname="original", check=True)
        began = time.time()
        original.save(state)
        offset = kept.offsets["stdout"]
        agent.driver.timeout = 1.0  # nobody is there to be waited for
        with pytest.raises((ConnectionLost, DeadlineExceeded)):
            kept.wait(timeout=PATIENCE)  # its connection has gone with the device
        kept.close()
        lost.close()
    stories = []
    identities = [first.machine_id]
    for name in ("one", "two"):
        with SnapshotMachine(tmp_path, disk, initramfs, state) as copy:
            copy.go_on()
            went_on = time.monotonic()
            agent = copy.agent(keeps_clock=False)
            print(f"first answer {1000 * (time.monotonic() - went_on):.0f} ms after it went on")
            assert agent.info().hostname == "original"
            check_clock(agent, time.time() - began)
            shared = follow(agent, kept.id, offset, lines=5)
            renewed = agent.renew(machine_id="random", hostname=name, check=True)
            assert (renewed.seeded, renewed.reseeded) == (True, True)
            own = follow(agent, kept.id, offset + sum(map(len, shared)), lines=8)[-5:]
            stories.append((shared, own))
            check_identity(agent, name, renewed.machine_id or "")
            identities.append(renewed.machine_id)
            readdress(agent)
    (shared_one, own_one), (shared_two, own_two) = stories
    # What one copy gives, the other one gives too, until both are given something of their own.
    assert set(shared_one) & set(shared_two), stories
    assert not set(own_one) & set(own_two), stories
    assert len(set(identities)) == 3, identities


def check_clock(agent: Agent, since: float) -> None:
    """It is as far behind as the machine did not run, until it is set."""
    found = agent.clock()
    assert -since - 1 < found.offset < -0.1, (found, since)
    stepped = agent.step_clock()
    assert stepped.stepped == pytest.approx(-stepped.offset, abs=0.05)
    now = agent.clock()
    assert abs(now.offset) <= now.error + stepped.error + 0.02, (stepped, now)


def follow(agent: Agent, process: str, offset: int, *, lines: int) -> list[bytes]:
    """The next lines of a kept process, to which a new connection is made."""
    with agent.attach(process, offsets={"stdout": offset}, acknowledge=False) as kept:
        assert not kept.dropped.get("stdout")
        found = list(itertools.islice(kept.stdout.lines(), lines))
    numbers = [int(line.split()[0]) for line in found]
    assert numbers == list(range(numbers[0], numbers[0] + lines))
    return found


def check_identity(agent: Agent, name: str, machine_id: str) -> None:
    said = agent.exec(["cat", "/proc/sys/kernel/hostname", "/etc/machine-id"]).stdout.decode()
    assert said == f"{name}\n{machine_id}\n"
    assert int(machine_id, 16)
    assert len(machine_id) == 32


def readdress(agent: Agent) -> None:
    """There is no card in this machine; its loopback takes addresses all the same."""
    lo = Interface(name="lo", addresses=("127.0.0.1/8", "10.99.0.7/24"))
    renewed = agent.renew(clock=False, random=False, interfaces=[lo], check=True)
    assert renewed.interfaces == ("lo",)
    assert b"10.99.0.7/24" in agent.exec(["ip", "addr", "show", "lo"]).stdout
