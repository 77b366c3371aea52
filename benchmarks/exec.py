"""What an exec costs: against a C floor, and beside what else this machine has for it.

    python benchmarks/exec.py [--quick] [--no-qemu] [--json FILE]        `make bench` runs it

The frozen agent serves natively on a Unix socket, so that it, the floor and the peers start the
same static program on the same kernel; then the same in a QEMU machine over vsock. Prints tables
and, for each figure that has to keep a limit, PASS or MISS; writes JSON and a plot beside it.
The exit status tells only whether the measuring worked.
"""

import argparse
import os
import platform
import shutil
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import inqemu
import latency
import output
from agentalone import AgentAlone
from floor import Floor
from peers import start_peers
from report import Claim, Report, draw

from microguest.guest.errors import MicroguestError

PROJECT = Path(__file__).parent.parent
COLOURS = {"microguest": "#0b6e4f", "C floor": "#3d4a5c"}


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a quarter of the rounds")
    parser.add_argument("--no-qemu", action="store_true", help="natively only")
    parser.add_argument("--json", type=Path, default=PROJECT / "dist" / "bench" / "exec.json")
    options = parser.parse_args()
    if shutil.which("gcc") is None:
        sys.stderr.write("the floor is a C program: install gcc, or run `make bench`\n")
        return 1
    report = Report(host=describe_host())
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        floor = Floor(Path(folder))
        natively(report, floor, 8 if options.quick else 30)
        if not options.no_qemu:
            in_qemu(report, floor, 2 if options.quick else 6)
    report.claims = claims(report)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    report.write_json(options.json)
    plot = draw(report.latency, "Warm exec of a static program", COLOURS)
    options.json.with_suffix(".svg").write_text(plot)
    report.print()
    return 0


def natively(report: Report, floor: Floor, rounds: int) -> None:
    """Memory first, while the agent is young; then what is timed."""
    with AgentAlone(floor.folder) as agent, ExitStack() as stack:
        peers, report.unavailable = start_peers(stack, floor)
        report.latency = latency.latencies(floor, agent, peers, rounds)
        report.memory = output.memory(floor, agent)
        if output.WITH_KEPT not in report.memory:
            report.unavailable["memory of kept processes"] = "this agent did not keep them"
        report.output = output.output(floor, agent, max(3, rounds // 6))
        report.crowd = latency.crowd(floor, agent, max(1, rounds // 10))


def in_qemu(report: Report, floor: Floor, rounds: int) -> None:
    """As far as a machine boots here."""
    try:
        report.qemu_latency, report.qemu_output = inqemu.measure(floor, rounds)
    except MicroguestError as error:
        report.unavailable["QEMU"] = str(error)


def claims(report: Report) -> list[Claim]:
    """What the process engine promises, with what was measured."""
    floor, ours = report.latency[latency.FLOOR], report.latency[latency.OURS]
    client = report.latency[latency.OURS_PYTHON]
    peers = {name: row.p50 for name, row in report.latency.items() if name not in latency.NATIVE}
    found = [
        Claim("exec p50 / C floor, prepared bytes", ratio(ours.p50, floor.p50), 1.6, "x"),
        Claim("exec p50 / C floor, Agent.exec", ratio(client.p50, floor.p50), 1.6, "x"),
        Claim("exec p99 / p50, prepared bytes", ratio(ours.p99, ours.p50), 3, "x"),
        Claim("exec p99 / p50, Agent.exec", ratio(client.p99, client.p50), 3, "x"),
    ]
    if peers:
        best = min(peers, key=lambda name: peers[name])
        found.append(Claim(f"Agent.exec p50, best peer is {best}", client.p50, peers[best], "µs"))
    return found + crowd_claims(report) + output_claims(report) + memory_claims(report)


def crowd_claims(report: Report) -> list[Claim]:
    many = report.crowd[latency.OURS]
    best = max(row.rate for name, row in report.crowd.items() if name != latency.OURS)
    return [
        Claim(
            f"{latency.CLIENTS} clients, rate / the better floor",
            ratio(many.rate, best),
            0.6,
            "x",
            at_least=True,
        ),
        Claim("median client / slowest client", ratio(1, many.slowest_share), 3, "x"),
    ]


def output_claims(report: Report) -> list[Claim]:
    ours = report.output[output.OURS]
    share = ratio(ours, report.output[output.FLOOR_READ])
    found = [
        Claim("output natively", round(ours, 2), 1.5, "GB/s", at_least=True),
        Claim("output natively / C floor", share, 0.6, "x", at_least=True),
    ]
    if report.qemu_output:
        for name, least in (
            ("plain sender", inqemu.FLOOR_OUTPUT),
            ("C pipe to socket", inqemu.FLOOR_RELAY),
        ):
            share = ratio(report.qemu_output[inqemu.OURS_OUTPUT], report.qemu_output[least])
            found.append(Claim(f"output over vsock / {name}", share, 0.8, "x", at_least=True))
    return found


def memory_claims(report: Report) -> list[Claim]:
    memory = report.memory
    found = [Claim("agent resident, idle", memory[output.IDLE], 20 * 1024, "KiB")]
    if output.WITH_KEPT in memory:
        each = (memory[output.WITH_KEPT] - memory[output.IDLE]) / output.KEPT
        found.append(Claim("more for each idle kept process", round(each, 1), 24, "KiB"))
    more = memory[output.WITH_STALLED] - memory[output.BEFORE_STALLED]
    found.append(Claim("more with stalled readers", more, 2048, "KiB"))
    return found


def ratio(value: float, base: float) -> float:
    return round(value / base, 2) if base else float("inf")


def describe_host() -> dict[str, str]:
    """What the figures depend on."""
    return {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "load average at the start": f"{os.getloadavg()[0]:.1f}",
        "cores": str(len(os.sched_getaffinity(0))),
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    sys.exit(main())
