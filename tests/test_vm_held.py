"""PID 1 of a virtual machine where programs hold up the console and /proc: it lives, and ends."""

import shutil
import subprocess
from pathlib import Path

import pytest
from init_machine import make_root, require_program
from vm_machine import Ended, make_erofs, run_vm, vm_config

pytestmark = pytest.mark.qemu

HOLDUPS = Path(__file__).parent / "data" / "holdups.c"
# The end's own waits, and what the boot and the script take on a busy machine.
PATIENCE = 120.0

# What the agent writes to its stderr, PID 1 writes to the console.
SCRIPT = """
for status in $(grep -l '^PPid:.1$' /proc/[0-9]*/status); do
    words=${{status%/status}}/fd/2
    [ -p $words ] && break
done
exec 3>$words
cd /tmp
holdups {how} /tmp/held &
until [ -e /tmp/held ] || ! kill -0 $!; do sleep .1; done
for number in 0 1 2 3 4 5 6 7 8 9; do
    echo "$(printf %0500d $number) from the agent" >&3
    sleep .2
done
kill -TERM 1
while sleep 1; do :; done
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_program()
    if shutil.which("gcc") is None:
        pytest.skip("needs a C compiler: apt install gcc")
    tree = make_root(tmp_path_factory.mktemp("held") / "root")
    program = tree / "bin" / "holdups"
    subprocess.run(["gcc", "-static", "-o", program, HOLDUPS, "-pthread"], check=True)
    return make_erofs(tree, tree.parent / "image.erofs")


def held(image: Path, argv: list[str], **workload: object) -> Ended:
    config = vm_config(argv, **workload)
    config["root"]["upper"] = {"kind": "tmpfs"}
    ended = run_vm(config, disks={"root": image}, timeout=PATIENCE)
    assert ended.code == 0, ended.console[-3000:]
    return ended


def console_held_by(how: str) -> list[str]:
    return ["/bin/sh", "-c", SCRIPT.format(how=how)]


def test_a_console_that_leads_elsewhere_holds_up_nobody(image: Path) -> None:
    """TIOCCONS: what is written to /dev/console goes to a terminal that nobody reads."""
    ended = held(image, console_held_by("redirect"))
    assert "9 from the agent" in ended.console


def test_a_console_that_a_user_has_stopped_tells_what_pid_1_says(image: Path) -> None:
    ended = held(image, console_held_by("stop"))
    assert "9 from the agent" in ended.console


def test_a_proc_that_hangs_does_not_stop_the_power_off(image: Path) -> None:
    ended = held(image, ["holdups", "cover", "/tmp/held"])
    assert "cannot be killed" in ended.console


def test_a_working_directory_that_hangs_does_not_stop_the_power_off(image: Path) -> None:
    """The workload is to be started again in a share whose server is gone."""
    restart = {"policy": "always", "delay": 0.01, "delay_max": 0.01}
    ended = held(image, ["holdups", "stall", "/srv/place"], cwd="/srv/place", restart=restart)
    assert ended.lines.count("stalled") == 1
