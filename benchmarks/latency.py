"""How long one exec takes, alone and in a crowd: ours, the C floor, the peers.

Contenders take turns in short rounds, so that all of them see the same machine: its speed moves.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from agentalone import TOKEN, AgentAlone
from floor import Floor
from report import Crowd, Latency

import microguest

__all__ = ["CLIENTS", "FLOOR", "NATIVE", "OURS", "OURS_PYTHON", "crowd", "latencies"]

FLOOR = "C floor: posix_spawn + waitpid"
FLOOR_OF_TWO = "C floor, two at a time"
OURS = "microguest, prepared bytes (C client)"
OURS_PYTHON = "microguest, Agent.exec (Python client)"
FLOOR_BARE = "C floor, program without libc"
OURS_BARE = "microguest, program without libc (C client)"
NATIVE = (FLOOR, OURS, OURS_PYTHON, FLOOR_BARE, OURS_BARE)  # all that are no peers
QUICK_SHARE = 50  # execs of a round, of those that take about a millisecond
SLOW_SHARE = 5
QUICK = 3_000_000  # nanoseconds
CLIENTS = 64
CROWD_SECONDS = 2

Sample = Callable[[int], list[int]]


def latencies(
    floor: Floor, agent: AgentAlone, peers: Mapping[str, Sample], rounds: int
) -> dict[str, Latency]:
    """Of a static program that does nothing, started warm. `rounds`: turns of each contender."""
    request = floor.request("true", TOKEN, str(floor.true))
    bare = floor.request("bare", TOKEN, str(floor.bare))
    with microguest.connect(agent.url, token=TOKEN) as client:
        contenders: dict[str, Sample] = {
            FLOOR: lambda count: floor.times("spawn", count, floor.true),
            OURS: lambda count: floor.times("exec", agent.socket_path, count, request),
            OURS_PYTHON: lambda count: [timed_exec(client, floor.true) for _ in range(count)],
            **peers,
            FLOOR_BARE: lambda count: floor.times("spawn", count, floor.bare),
            OURS_BARE: lambda count: floor.times("exec", agent.socket_path, count, bare),
        }
        shares = {
            name: QUICK_SHARE if min(sample(5)) < QUICK else SLOW_SHARE
            for name, sample in contenders.items()
        }
        taken: dict[str, list[int]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, sample in contenders.items():
                taken[name] += sample(shares[name])
    return {name: Latency.of(values) for name, values in taken.items()}


def timed_exec(client: microguest.Agent, program: Path) -> int:
    """One exec through the host's library, from the call to the result."""
    start = time.monotonic_ns()
    client.exec([program], check=True)
    return time.monotonic_ns() - start


def crowd(floor: Floor, agent: AgentAlone, rounds: int) -> dict[str, Crowd]:
    """CLIENTS at once, each starting its next exec as soon as one ended, for some seconds a round.

    The floors are as many processes that spawn as there are clients, and two. Of the rounds, that
    with the median rate is given.
    """
    request = floor.request("crowd", TOKEN, str(floor.true))
    found: dict[str, list[Crowd]] = {name: [] for name in (FLOOR, FLOOR_OF_TWO, OURS)}
    for _ in range(rounds):
        for name, clients in ((FLOOR, CLIENTS), (FLOOR_OF_TWO, 2)):
            lines = floor.run("crowd-spawn", clients, CROWD_SECONDS, floor.true)
            found[name].append(Crowd.of(lines, CROWD_SECONDS))
        lines = floor.run("crowd", agent.socket_path, CLIENTS, CROWD_SECONDS, request)
        found[OURS].append(Crowd.of(lines, CROWD_SECONDS))
    return {name: Crowd.middle(crowds) for name, crowds in found.items()}
