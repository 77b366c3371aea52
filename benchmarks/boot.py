"""How long until the workload runs, beside a C init that makes the same mounts, crun and runc.

    python benchmarks/boot.py [--rounds N] [--boots N]

Natively each round starts every contestant once, on the same root, and waits for the first byte of
the same static program. In QEMU PID 1 and the floor boot the same kernel, modules and disk. Prints
PASS or MISS for the limits that start-up has to keep, and writes dist/bench/boot.json.
"""

import argparse
import json
import os
import platform
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from peers import ONE_HIERARCHY

from microguest.guest.boot.config import PATH, AgentSettings, BootConfig, Endpoint
from microguest.guest.boot.root import Lower, Root
from microguest.guest.boot.workload import Workload
from microguest.guest.bundle import cpio
from microguest.host_client.machines.host import accelerator, qemu_command

PROJECT = Path(__file__).parent.parent
BUNDLE = PROJECT / "dist" / "guest" / platform.machine()
ELF = BUNDLE / "microguest"
MARK = b"workload-runs"
PROGRAM = ("/bin/busybox", "echo", MARK.decode())
DEADLINE = 60.0
INSIDE = "MICROGUEST_BENCH_INSIDE"  # set where see_one_hierarchy has been

TO_LISTENER = 12.0  # ms natively, from the execve of PID 1
TO_WORKLOAD = 20.0
TIMES_FLOOR = 1.5  # launch to workload in QEMU

Figures = dict[str, list[float]]


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40, help="of the native contestants")
    parser.add_argument("--boots", type=int, default=7, help="of each QEMU machine")
    parser.add_argument("--json", type=Path, default=PROJECT / "dist" / "bench" / "boot.json")
    options = parser.parse_args()
    see_one_hierarchy()
    with tempfile.TemporaryDirectory(prefix="mg-bench-") as work:
        folder = Path(work)
        root = make_root(folder / "root")
        floor = compile_floor(folder / "floor_init")
        native = natively(contestants(folder, root, floor), options.rounds)
        traced = [traced_start(folder, root, number) for number in range(5)]
        booted = in_qemu(folder, root, floor, options.boots)
    figures = {**native, **booted}
    for name, column in (("PID 1: exec to listener", 0), ("PID 1: exec to workload exec", 1)):
        figures[name] = [pair[column] for pair in traced]
    print_table(figures)
    verdicts = judge(figures)
    for line in verdicts:
        print(line)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"ms": figures, "verdicts": verdicts}, indent=1) + "\n")
    return 0


def see_one_hierarchy() -> None:
    """Go on in a mount namespace of our own, where crun takes the host's cgroups."""
    if os.geteuid() == 0 and not os.environ.get(INSIDE):
        os.environ[INSIDE] = "1"
        again = [sys.executable, *sys.argv]
        os.execvp("unshare", ["unshare", "--mount", "sh", "-c", ONE_HIERARCHY, "sh", *again])


def judge(figures: Figures) -> list[str]:
    """PASS or MISS with the figures, one line for each limit."""
    ratio = middle(figures["QEMU: microguest"]) / middle(figures["QEMU: floor in C"])
    limits = (
        ("exec to listener, ms", middle(figures["PID 1: exec to listener"]), TO_LISTENER),
        ("exec to workload exec, ms", middle(figures["PID 1: exec to workload exec"]), TO_WORKLOAD),
        ("QEMU, launch to workload / floor", ratio, TIMES_FLOOR),
    )
    return [
        f"{'PASS' if found <= limit else 'MISS'}: {what}: {found:.2f} (at most {limit:g})"
        for what, found, limit in limits
    ]


# ── natively ─────────────────────────────────────────────────────────────────────────────────────


def contestants(folder: Path, root: Path, floor: Path) -> dict[str, Callable[[int], float]]:
    """What starts the program in `root`, by name; each gives milliseconds to its first byte."""
    found: dict[str, Callable[[int], float]] = {
        "native: floor in C": lambda number: to_first_byte(
            [str(floor), str(fresh(folder, f"floor{number}")), str(root), *PROGRAM]
        ),
        "native: microguest namespaces": lambda number: to_first_byte(
            launcher(fresh(folder, f"run{number}"), root)
        ),
    }
    for runtime in ("crun", "runc"):
        if shutil.which(runtime):
            bundle = oci_bundle(runtime, fresh(folder, runtime), root)
            found[f"native: {runtime} run"] = lambda number, r=runtime, b=bundle: (  # type: ignore[misc]
                to_first_byte([r, "run", "--bundle", str(b), f"mg-bench-{os.getpid()}-{number}"])
            )
    return found


def natively(starts: dict[str, Callable[[int], float]], rounds: int) -> Figures:
    """Each once a round, so that a slow moment of the machine hits all of them."""
    figures: Figures = {name: [] for name in starts}
    for number in range(rounds):
        for name, start in starts.items():
            figures[name].append(start(number))
    return figures


def to_first_byte(argv: list[str]) -> float:
    """Milliseconds from starting `argv` until the mark is read from its stdout."""
    began = time.monotonic()
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process:
        elapsed = until_mark(process.stdout.fileno(), began)
        process.stdout.read()
    return elapsed


def until_mark(fd: int, began: float) -> float:
    """Milliseconds since `began` when the mark has come."""
    seen = b""
    while MARK not in seen:
        ready, _, _ = select.select([fd], [], [], DEADLINE)
        data = os.read(fd, 65536) if ready else b""
        if not data:
            raise SystemExit(f"the program did not run: {seen[-2000:].decode(errors='replace')}")
        seen += data
    return (time.monotonic() - began) * 1000


def launcher(run: Path, root: Path) -> list[str]:
    """The machine in namespaces that runs the program."""
    (run / "host").mkdir()
    config = BootConfig(
        machine="namespaces",
        root=Root(lower=(Lower(kind="directory", path="/microguest/lower"),)),
        agent=AgentSettings(
            listen=Endpoint(transport="unix", path="/microguest/host/agent.sock"), token="0" * 32
        ),
        workload=Workload(argv=PROGRAM),
    )
    boot = run / "boot.json"
    boot.touch(mode=0o600)
    boot.write_text(config.to_json())
    return [str(ELF), "namespaces", "--root", str(root), "--run", str(run)]


def traced_start(folder: Path, root: Path, number: int) -> tuple[float, float]:
    """Milliseconds from the execve of PID 1 to its listen(2), and to the workload's execve."""
    trace = folder / f"trace{number}"
    watch = ["strace", "-f", "--seccomp-bpf", "-ttt", "-e", "trace=execve,listen", "-o", str(trace)]
    subprocess.run(
        [*watch, *launcher(fresh(folder, f"traced{number}"), root)],
        check=True,
        timeout=DEADLINE,
        stdout=subprocess.DEVNULL,
    )
    lines = trace.read_text().splitlines()
    marks = ('execve("/init"', "listen(", f'execve("{PROGRAM[0]}"')
    executed, listening, started = (
        float(next(line for line in lines if mark in line).split()[1]) for mark in marks
    )
    return (listening - executed) * 1000, (started - executed) * 1000


def oci_bundle(runtime: str, bundle: Path, root: Path) -> Path:
    """The runtime's own default config, with our program and no terminal."""
    subprocess.run([runtime, "spec"], cwd=bundle, check=True, timeout=DEADLINE)
    path = bundle / "config.json"
    config = json.loads(path.read_text())
    config["process"].update(terminal=False, args=list(PROGRAM))
    config["root"] = {"path": str(root), "readonly": False}
    path.write_text(json.dumps(config))
    return bundle


# ── in QEMU ──────────────────────────────────────────────────────────────────────────────────────


def in_qemu(folder: Path, root: Path, floor: Path, boots: int) -> Figures:
    """Launch to workload, in turns."""
    disk = folder / "root.erofs"
    subprocess.run(["mkfs.erofs", "--quiet", str(disk), str(root)], check=True, timeout=DEADLINE)
    machines = {
        "QEMU: floor in C": floor_initramfs(folder / "floor.cpio", floor),
        "QEMU: microguest": our_initramfs(folder / "ours.cpio"),
    }
    figures: Figures = {name: [] for name in machines}
    for _ in range(boots):
        for name, initramfs in machines.items():
            with booted(initramfs, disk) as (process, began):
                assert process.stdout is not None
                figures[name].append(until_mark(process.stdout.fileno(), began))
    return figures


@contextmanager
def booted(initramfs: Path, disk: Path) -> "Iterator[tuple[subprocess.Popen[bytes], float]]":
    """A machine whose console is the process's stdout, and when it was launched."""
    qemu = qemu_command()
    argv = [qemu, "-M", "q35", *accelerator(qemu).options, "-m", "512M", "-smp", "1"]
    argv += ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]
    argv += ["-serial", "stdio", "-device", "virtio-rng-pci"]
    argv += ["-drive", f"file={disk},format=raw,if=none,id=disk,readonly=on"]
    argv += ["-device", "virtio-blk-pci,drive=disk,serial=root"]
    argv += ["-kernel", str(BUNDLE / "vmlinuz"), "-initrd", str(initramfs)]
    argv += ["-append", "console=ttyS0 quiet panic=-1 reboot=t no_timer_check"]
    began = time.monotonic()
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        yield process, began
    finally:
        process.kill()
        process.communicate()


def our_initramfs(path: Path) -> Path:
    """The bundle's, with a boot config."""
    config = BootConfig(
        root=Root(lower=(Lower(kind="disk", serial="root", fstype="erofs"),)),
        agent=AgentSettings(listen=Endpoint(transport="vsock", port=1024), token="0" * 32),
        workload=Workload(argv=PROGRAM),
    )
    boot = cpio.regular(PATH.lstrip("/"), config.to_json().encode(), 0o600)
    base = (BUNDLE / "initramfs.cpio").read_bytes()
    padding = bytes(-len(base) % cpio.ALIGNMENT)
    path.write_bytes(base + padding + cpio.segment([cpio.directory("microguest"), boot]))
    return path


def floor_initramfs(path: Path, floor: Path) -> Path:
    """The bundle's, with the floor's program over /init: the same modules, and the same size."""
    base = (BUNDLE / "initramfs.cpio").read_bytes()
    padding = bytes(-len(base) % cpio.ALIGNMENT)
    path.write_bytes(
        base + padding + cpio.segment([cpio.regular("init", floor.read_bytes(), 0o755)])
    )
    return path


# ── what both need ───────────────────────────────────────────────────────────────────────────────


def make_root(folder: Path) -> Path:
    """busybox, and the folders that runtimes mount on."""
    for name in ("bin", "proc", "sys", "dev", "run", "etc", "tmp"):
        (folder / name).mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "busybox", folder / "bin" / "busybox")
    return folder


def compile_floor(path: Path) -> Path:
    """floor_init.c, static."""
    source = Path(__file__).parent / "floor_init.c"
    subprocess.run(["gcc", "-O2", "-static", "-o", str(path), str(source)], check=True, timeout=120)
    return path


def fresh(folder: Path, name: str) -> Path:
    """A new directory."""
    path = folder / name
    path.mkdir()
    return path


def middle(values: list[float]) -> float:
    """The median."""
    return statistics.median(values)


def print_table(figures: Figures) -> None:
    """As Markdown, ready for docs/design/performance.md."""
    print("| ms until the workload runs | median | min | max | median / floor | runs |")
    print("|---|---|---|---|---|---|")
    for name, values in figures.items():
        floor = figures.get(f"{name.partition(':')[0]}: floor in C")
        ratio = f"{middle(values) / middle(floor):.2f}" if floor else ""
        cells = [f"{value:,.1f}" for value in (middle(values), min(values), max(values))]
        print(f"| {name} | {' | '.join(cells)} | {ratio} | {len(values)} |")


if __name__ == "__main__":
    sys.exit(main())
