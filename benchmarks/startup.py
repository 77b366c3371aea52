"""How long the guest takes to start, how large it is, how much memory it holds.

    python benchmarks/startup.py [--rounds N] [--json FILE]        `make bench` runs it

Natively: PID 1 from its exec to the open listener (seen by strace, which stops only on those two
calls), the agent from its start to ready, a whole machine in namespaces. Under emulation: a QEMU
machine from launch to the first command's result. Figures are medians and minima; the host's speed
moves, so compare what was measured in one run.
"""

import argparse
import json
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import microguest
from microguest.guest.boot.config import AgentSettings, BootConfig, Endpoint
from microguest.guest.boot.root import Lower, Root
from microguest.guest.boot.workload import ImageDefaults, Workload
from microguest.guest.supervision import AGENT_FD, MESSAGES, Configure

PROJECT = Path(__file__).parent.parent
BUNDLE = PROJECT / "dist" / "guest" / platform.machine()
ELF = BUNDLE / "microguest"
DEMO_IMAGE = f"oci:{PROJECT / 'dist' / 'demo'}:busybox"

TRUE_MACHINE = BootConfig(
    machine="namespaces",
    root=Root(lower=(Lower(kind="directory", path="/microguest/lower"),)),
    agent=AgentSettings(
        listen=Endpoint(transport="unix", path="/microguest/host/agent.sock"), token="0" * 32
    ),
    workload=Workload(argv=("/bin/true",)),
)

Figures = dict[str, float]


def main() -> int:
    """Measure everything, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="of each native measurement")
    parser.add_argument("--boots", type=int, default=5, help="of a QEMU machine")
    parser.add_argument("--json", type=Path, default=PROJECT / "dist" / "bench" / "startup.json")
    options = parser.parse_args()
    figures: dict[str, Figures] = {"size (bytes)": sizes()}
    figures["PID 1: exec to listener (ms)"] = spread(
        [pid1_to_listener() for _ in range(options.rounds)]
    )
    figures["agent: start to ready (ms)"] = spread(
        [agent_to_ready() for _ in range(options.rounds)]
    )
    figures["memory (KiB)"] = memory()
    figures["namespaces: launch to first exec (ms)"] = spread(
        [first_exec("namespaces") for _ in range(options.rounds)]
    )
    figures["qemu: launch to first exec (ms)"] = spread(
        [first_exec("qemu") for _ in range(options.boots)]
    )
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(figures, indent=1) + "\n")
    print_table(figures)
    return 0


def sizes() -> Figures:
    """The ELF, plain and as zstd -19 makes it, and the initramfs."""
    found: Figures = {"ELF": ELF.stat().st_size}
    if shutil.which("zstd"):
        packed = subprocess.run(["zstd", "-19", "-qc", ELF], capture_output=True, check=True)
        found["ELF, zstd -19"] = len(packed.stdout)
    found["initramfs"] = (BUNDLE / "initramfs.cpio").stat().st_size
    return found


def pid1_to_listener() -> float:
    """Milliseconds between the execve of PID 1 and its listen(2), in a machine that runs `true`."""
    with tempfile.TemporaryDirectory() as folder:
        run, root, trace = (Path(folder) / name for name in ("run", "root", "trace"))
        (run / "host").mkdir(parents=True)
        (root / "bin").mkdir(parents=True)
        shutil.copy(shutil.which("busybox") or "busybox", root / "bin" / "true")
        (run / "boot.json").write_text(TRUE_MACHINE.to_json())
        (run / "boot.json").chmod(0o600)
        watch = ["strace", "-f", "--seccomp-bpf", "-ttt", "-e", "trace=execve,listen"]
        launch = [str(ELF), "namespaces", "--root", str(root), "--run", str(run)]
        subprocess.run(
            [*watch, "-o", str(trace), *launch], check=True, timeout=60, stdout=subprocess.DEVNULL
        )
        lines = trace.read_text().splitlines()
    executed = next(line for line in lines if 'execve("/init"' in line)
    listening = next(line for line in lines if "listen(" in line)
    return (float(listening.split()[1]) - float(executed.split()[1])) * 1000


def agent_to_ready() -> float:
    """Milliseconds from starting the agent's process until it says that it serves."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/agent.sock")
        listener.listen()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        configure = Configure(
            transport="unix", token="0" * 32, image=ImageDefaults(), starts=1, versions={}
        )
        with ours, theirs:
            socket.send_fds(ours, [MESSAGES.encode(configure)], [listener.fileno()])
            start = time.monotonic()
            agent = start_agent(theirs)
            ours.settimeout(30)
            ours.recv(65536)
            elapsed = time.monotonic() - start
            ours.close()  # PID 1 is gone: the agent ends
            agent.wait(timeout=10)
    return elapsed * 1000


def start_agent(pair: socket.socket) -> "subprocess.Popen[bytes]":
    """The ELF as the agent, with `pair` as its descriptor AGENT_FD."""
    shell = f'exec -a agent "$0" {AGENT_FD}<&{pair.fileno()}'
    return subprocess.Popen(["bash", "-c", shell, ELF], pass_fds=[pair.fileno()], env={})


def memory() -> Figures:
    """Resident and private memory of PID 1 and of the agent, idle, natively."""
    with microguest.boot(DEMO_IMAGE, machine="namespaces") as vm:
        vm.agent.exec(["true"])
        init = first_child(vm.state.vmm)
        found: Figures = {}
        for name, pid in (("PID 1", init), ("agent", first_child(init))):
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            kib = {line.split()[0]: int(line.split()[1]) for line in rollup.splitlines()[1:]}
            found[f"{name} resident"] = kib["Rss:"]
            found[f"{name} private"] = kib["Private_Dirty:"] + kib["Private_Clean:"]
    return found


def first_child(pid: int) -> int:
    """The oldest child of a process with one thread."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def first_exec(machine: str) -> float:
    """Milliseconds from the launch of a machine to the result of its first command."""
    with microguest.boot(DEMO_IMAGE, machine=machine) as vm:
        vm.agent.exec(["true"])
        return vm.timeline()[-1].end_ms


def spread(values: list[float]) -> Figures:
    """What is quoted of several runs."""
    return {
        "median": round(statistics.median(values), 1),
        "min": round(min(values), 1),
        "max": round(max(values), 1),
    }


def print_table(figures: dict[str, Figures]) -> None:
    """As Markdown, ready for docs/design/performance.md."""
    print("| what | figures |\n|---|---|")
    for what, values in figures.items():
        shown = ", ".join(f"{name} {value:,}" for name, value in values.items())
        print(f"| {what} | {shown} |")


if __name__ == "__main__":
    sys.exit(main())
