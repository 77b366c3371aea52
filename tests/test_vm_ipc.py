"""All that outlives its makers, taken together in a small virtual machine, which lives on."""

import pathlib
import shutil
import subprocess

import pytest
from init_machine import make_root, require_program
from vm_machine import make_erofs, run_vm, vm_config

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(600)]

SOURCE = pathlib.Path(__file__).parent / "data" / "ipc.c"
LIVES = 4
# All of it as a user, in each life.
LIFE = """
echo x >> /run/lives
user() { su -s /bin/sh tester -c "$*"; }
echo "got $(user ipc segments 400) $(user ipc queues) $(user ipc sets)"
test $(wc -l < /run/lives) -ge LIVES
""".replace("LIVES", str(LIVES))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    if shutil.which("gcc") is None:
        pytest.skip("needs a C compiler: apt install gcc")
    program = tmp_path_factory.mktemp("program") / "ipc"
    subprocess.run(["gcc", "-static", "-Os", "-s", "-o", program, SOURCE], check=True)
    return program


def test_lives_that_leave_all_they_can_do_not_end_the_machine(
    tmp_path: pathlib.Path, program: pathlib.Path
) -> None:
    require_program()
    tree = make_root(tmp_path / "root")
    (tree / "tmp").chmod(0o1777)
    shutil.copy(program, tree / "bin" / "ipc")
    restart = {"policy": "on-failure", "delay": 0.05}
    config = vm_config(["/bin/sh", "-c", LIFE], restart=restart)
    disks = {"root": make_erofs(tree, tmp_path / "image.erofs")}
    ended = run_vm(config, disks=disks, memory=384)
    assert ended.code == 0, ended.console[-3000:]
    got = [line.split()[1:] for line in ended.lines if line.startswith("got ")]
    assert len(got) == LIVES, ended.console[-3000:]
    assert all(each == got[0] for each in got)  # nothing of the lives before is in the way
    segments, queues, sets = map(int, got[0])
    assert 20 <= segments <= 64
    assert queues == 16
    assert 1000 <= sets <= 384 * 1024 * 1024 / 128 / 512
