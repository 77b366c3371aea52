"""The same in a QEMU machine: execs over vsock, and output against a plain sender on that device.

The floors run in the guest, started by the agent: under emulation the host's own say nothing.
"""

import shutil
import statistics
from pathlib import Path

from floor import Floor
from latency import timed_exec
from report import Latency

import microguest
from microguest.errors import MachineError
from microguest.guest.wire.messages import Start
from microguest.host_client.client.address import HybridAddress, parse
from microguest.host_client.client.deadline import Deadline
from microguest.host_client.machines.folder import machines_root

__all__ = ["FLOOR", "FLOOR_OUTPUT", "FLOOR_RELAY", "OURS", "OURS_OUTPUT", "OURS_PYTHON", "measure"]

FLOOR = "C floor, in the guest"
OURS = "microguest, prepared bytes (C client)"
OURS_PYTHON = "microguest, Agent.exec (Python client)"
FLOOR_OUTPUT = "C floor: plain sender"
FLOOR_RELAY = "C floor: pipe to socket, read + write, 1 MiB"
OURS_OUTPUT = "microguest"
OUTPUT = 128 << 20  # bytes
PORT = 7777  # in the guest; any that is free
EXECS = 25  # of each contender in a round
READY_WITHIN = 10.0  # seconds


def measure(floor: Floor, rounds: int) -> tuple[dict[str, Latency], dict[str, float]]:
    """Latencies and rates in GB/s. MicroguestError where there can be no such machine."""
    image = floor.folder / "image"
    image.mkdir()
    for program in (floor.program, floor.true):
        shutil.copy(program, image)
    with microguest.boot(f"dir:{image}", machine="qemu") as vm:
        address = parse(vm.url)
        if not isinstance(address, HybridAddress):
            raise MachineError(f"{vm.url}: only hybrid vsock is measured here")
        token = (Path(machines_root()) / vm.name / "token").read_text()
        guest = f"{address.path},{address.port}"
        return (
            latencies(floor, vm.agent, guest, token, rounds),
            rates(floor, vm.agent, address.path, guest, token, rounds),
        )


def latencies(
    floor: Floor, agent: microguest.Agent, guest: str, token: str, rounds: int
) -> dict[str, Latency]:
    """`guest`: where floor.c dials the agent."""
    request = floor.request("guest-true", token, "/true")
    taken: dict[str, list[int]] = {FLOOR: [], OURS: [], OURS_PYTHON: []}
    for _ in range(rounds):
        spawned = agent.exec(["/floor", "spawn", str(EXECS), "/true"], check=True)
        taken[FLOOR] += [int(line) for line in spawned.stdout.splitlines()]
        taken[OURS] += floor.times("exec", guest, EXECS, request)
        taken[OURS_PYTHON] += [timed_exec(agent, Path("/true")) for _ in range(EXECS)]
    return {name: Latency.of(values) for name, values in taken.items()}


def rates(
    floor: Floor, agent: microguest.Agent, device: str, guest: str, token: str, rounds: int
) -> dict[str, float]:
    """GB/s from the guest's C programs and from a process of the agent; medians of the rounds."""
    pour = ("/floor", "pour", str(OUTPUT))
    request = floor.request("guest-pour", token, *pour)
    sender = Start(argv=("/floor", "send", str(PORT), str(2 * rounds), *pour))
    found: dict[str, list[float]] = {FLOOR_OUTPUT: [], FLOOR_RELAY: [], OURS_OUTPUT: []}
    with agent.open_process(sender) as process:
        next(process.events(Deadline(READY_WITHIN)))  # it says that it listens
        for _ in range(rounds):
            for name in (FLOOR_OUTPUT, FLOOR_RELAY):  # in this order, which is the sender's
                found[name].append(floor.rate("receive", f"{device},{PORT}"))
            found[OURS_OUTPUT].append(floor.rate("drain", guest, request))
    return {name: statistics.median(values) for name, values in found.items()}
