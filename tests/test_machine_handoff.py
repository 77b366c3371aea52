"""PID 1 that becomes an init of the image's own, in namespaces: busybox's, unknown ones, none.

systemd needs a virtual machine: tests/test_vm_handoff.py.
"""

from pathlib import Path

import pytest
from init_machine import (
    Config,
    Machine,
    boot_config,
    command_of,
    make_root,
    require_program,
    wait_for,
)

INITTAB = """\
::sysinit:/bin/echo the init runs
::respawn:/bin/sleep 1000
::shutdown:/bin/echo the init ends it
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_program()
    image = make_root(tmp_path_factory.mktemp("image"))
    (image / "etc" / "inittab").write_text(INITTAB)
    return image


def handoff(argv: list[str], **workload: object) -> Config:
    return {**boot_config(argv, **workload), "mode": "handoff"}


def test_busybox_init(root: Path) -> None:
    with Machine(root, handoff(["/bin/init"])) as machine:
        ready = machine.report("ready")
        machine.report("handed_off")
        init = machine.init_pid()
        wait_for(lambda: command_of(init)[:1] in (["init"], ["/bin/init"]), "the init")
