"""How fast a process's output arrives natively, and what the agent holds while it does not.

The floor is a C program that does the least that an agent has to: pipe to socket.
"""

import contextlib
import socket
import statistics

from agentalone import TOKEN, AgentAlone
from floor import Floor

__all__ = ["FLOOR_READ", "FLOOR_SPLICE", "OURS", "memory", "output"]

OUTPUT = 1 << 30  # bytes
FLOOR_READ = "C floor: read + write, 1 MiB"
FLOOR_SPLICE = "C floor: splice, 1 MiB"
OURS = "microguest"
STALLED = 64  # readers that do not read

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
    """Resident memory in KiB: as it stands, and while STALLED processes write and nobody reads."""
    idle = agent.settled_kib()
    request = floor.request("stalled", TOKEN, str(floor.program), "pour", str(OUTPUT)).read_bytes()
    with contextlib.ExitStack() as stack:
        for _ in range(STALLED):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(str(agent.socket_path))
            sock.sendall(request)
        stalled = agent.settled_kib(1.0)
    return {"idle": idle, "stalled": stalled, "afterwards": agent.settled_kib(1.0)}
