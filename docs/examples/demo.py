"""Boot a machine from an image, run programs in it, show where the time went, leave nothing behind.

python docs/examples/demo.py IMAGE [MACHINE]        `make demo` runs it with the demo image
"""

import sys

import microguest
from microguest import Machine
from microguest.errors import MachineError
from microguest.guest.report import Step

CHART_WIDTH = 44  # columns of the timeline's bars


def main(image: str, machine: str) -> int:
    """The whole story. Exit status 0 only after the machine has really powered itself off."""
    print(f"booting {image} on {machine} …", flush=True)
    with microguest.boot(image, machine=machine) as vm:
        show_commands(vm)
        timeline = vm.timeline()
        end = vm.stop()
    show_timeline(timeline)
    print(f"\n{end.describe_end()}; {machine} exited with status {end.vmm_code}")
    return 0 if end.vmm_code == 0 else 1


def show_commands(vm: Machine) -> None:
    """What a program on the host sees of programs in the guest."""
    for script in (
        "uname -sr; hostname",
        "echo to stdout; echo to stderr >&2; exit 7",
        "mount | head -3; touch /scratch && ls -l /scratch",
    ):
        result = vm.agent.exec(["sh", "-c", script])
        print(f"\n$ {script}")
        print((result.stdout + result.stderr).decode(), end="")
        print(f"→ {result.returncode} after {result.duration * 1000:.0f} ms")
    digest = vm.agent.exec(["sha256sum"], input=b"bytes from the host\n")
    print(f"\n$ sha256sum < bytes of the host\n{digest.stdout.decode()}", end="")


def show_timeline(steps: list[Step]) -> None:
    """One line per step, from the launch of the machine to the first result of a command."""
    total = max(step.end_ms for step in steps) or 1.0
    print(f"\n{'step':<14}{'at':>9}{'took':>9}   ms since launch")
    for step in steps:
        took = step.end_ms - step.start_ms
        left = int(step.start_ms / total * CHART_WIDTH)
        bar = "█" * max(1, round(took / total * CHART_WIDTH))
        print(f"{step.name:<14}{step.start_ms:>9.0f}{took:>9.0f}   {' ' * left}{bar}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    try:
        sys.exit(main(sys.argv[1], sys.argv[2] if len(sys.argv) == 3 else "qemu"))
    except MachineError as error:
        sys.exit(f"demo: {error}")
