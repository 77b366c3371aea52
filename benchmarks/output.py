"""How fast a process's output arrives natively, and what the agent holds while it does not.

The floor is a C program that does the least that an agent has to: pipe to socket.
"""

import contextlib
import os
import signal
import socket
import statistics
from collections.abc import Iterator
from pathlib import Path

from agentalone import TOKEN, AgentAlone
from floor import Floor

from microguest.guest.wire.messages import Keep

__all__ = [
    "BEFORE_STALLED",
    "FLOOR_READ",
    "FLOOR_SPLICE",
    "IDLE",
    "KEPT",
    "OURS",
    "WITH_KEPT",
    "WITH_STALLED",
    "memory",
    "output",
]

OUTPUT = 1 << 30  # bytes
FLOOR_READ = "C floor: read + write, 1 MiB"
FLOOR_SPLICE = "C floor: splice, 1 MiB"
OURS = "microguest"
STALLED = 64  # readers that do not read
KEPT = 64
IDLE = "idle"
WITH_KEPT = f"{KEPT} idle kept processes"
BEFORE_STALLED = "after those, idle"
WITH_STALLED = f"{STALLED} stalled readers, full pipes"
AFTERWARDS = "after those"

Rates = dict[str, float]  # GB/s


def output(floor: Floor, agent: AgentAlone, rounds: int) -> Rates:
    """One process that writes 1 MiB at a time, to one reader; medians of the rounds."""
    pour = (str(floor.program), "pour", str(OUTPUT))
    request = floor.request("pour", TOKEN, *pour)
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, words in {
            FLOOR_READ: ("relay", "read", *pour),
            FLOOR_SPLICE: ("relay", "splice", *pour),
            OURS: ("drain", agent.socket_path, request),
        }.items():
            found.setdefault(name, []).append(floor.rate(*words))
    return {name: statistics.median(rates) for name, rates in found.items()}


def memory(floor: Floor, agent: AgentAlone) -> dict[str, int]:
    """Resident memory in KiB: idle, with KEPT idle processes, with STALLED readers of full pipes.

    "kept" is missing where the agent does not keep processes.
    """
    found = {IDLE: agent.settled_kib()}
    pause = floor.request("kept", TOKEN, str(floor.program), "pause", keep=Keep())
    with many_connections(agent, pause, KEPT):
        agent.settled_kib()
    kept = agent.settled_kib()
    pids = agent.children()
    if len(pids) == KEPT:
        found[WITH_KEPT] = kept
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    found[BEFORE_STALLED] = agent.settled_kib()
    pour = floor.request("stalled", TOKEN, str(floor.program), "pour", str(OUTPUT))
    with many_connections(agent, pour, STALLED):
        found[WITH_STALLED] = agent.settled_kib()
    found[AFTERWARDS] = agent.settled_kib()
    return found


@contextlib.contextmanager
def many_connections(agent: AgentAlone, request: Path, count: int) -> Iterator[None]:
    """So many hosts that ask and never read."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(str(agent.socket_path))
            sock.sendall(request.read_bytes())
        yield
