"""The machine's end in a virtual machine: its keyboard, its disks, its shares and its power."""

import json
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import machinekit
import pytest
from init_machine import make_root, require_program
from patience import PATIENCE, SLACK
from vm_machine import RUN, Ended, make_erofs, make_ext4, run_vm, vm_config

from microguest import boot
from microguest.errors import MachineError
from microguest.guest import bounds
from microguest.host_client.machines.virtiofsd import virtiofsd

pytestmark = pytest.mark.qemu

# What docs/design/boot.md says that an end takes at most, but for a report connection's farewell.
LONGEST = bounds.STOP_GRACE + bounds.OTHERS_GRACE + bounds.KILL_WAIT + bounds.SYNC_WAIT
SPARE = SLACK  # seconds for the steps themselves, under emulation and beside other tests

FIND_DISK = """
disk() {
    for found in /sys/block/vd*; do
        [ "$(cat $found/serial)" = $1 ] && echo /dev/${found##*/}
    done
}
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_program()
    folder = tmp_path_factory.mktemp("end")
    return make_erofs(make_root(folder / "root"), folder / "root.erofs")


def shell(script: str) -> list[str]:
    return ["/bin/sh", "-c", FIND_DISK + script]


class Aside:
    """What happens to a machine while it runs: a second serial port, and QEMU's own monitor.

    `options` are for QEMU. `act` runs in a thread once the machine has said `ready` on the port.
    """

    def __init__(self, folder: Path, act: "Callable[[Aside], None]") -> None:
        self.options = [
            *("-serial", f"unix:{folder}/port,server=on,wait=off"),
            *("-qmp", f"unix:{folder}/qmp,server=on,wait=off"),
        ]
        self._folder = folder
        self._act = act
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_how: object) -> None:
        self._thread.join(RUN)

    def _run(self) -> None:
        with self._dial("port") as self.port:
            heard = b""
            while b"ready" not in heard:
                data = self.port.recv(100)
                if not data:
                    return
                heard += data
            self._act(self)
            while self.port.recv(100):
                pass

    def _dial(self, name: str) -> socket.socket:
        deadline = time.monotonic() + PATIENCE
        while True:
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(RUN)
            try:
                connection.connect(str(self._folder / name))
            except OSError:
                connection.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                return connection

    def press(self, *keys: str) -> None:
        """Together, on the machine's keyboard."""
        codes = [{"type": "qcode", "data": key} for key in keys]
        with self._dial("qmp") as monitor, monitor.makefile("rw") as lines:
            lines.readline()
            for command in (
                {"execute": "qmp_capabilities"},
                {"execute": "send-key", "arguments": {"keys": codes}},
            ):
                lines.write(json.dumps(command) + "\n")
                lines.flush()
                lines.readline()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short one: a Unix socket's path has at most 107 characters."""
    with tempfile.TemporaryDirectory(prefix="mg-") as name:
        yield Path(name)


def assert_clean(disk: Path) -> None:
    """Nothing to repair and no journal to replay."""
    done = subprocess.run(["e2fsck", "-fn", str(disk)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    header = subprocess.run(
        ["dumpe2fs", "-h", str(disk)], capture_output=True, text=True, check=True
    ).stdout
    assert re.search(r"Filesystem state: +clean\n", header), header
    assert "needs_recovery" not in header


def content(disk: Path, path: str) -> str:
    done = subprocess.run(
        ["debugfs", "-R", f"cat {path}", str(disk)], capture_output=True, text=True, check=True
    )
    return done.stdout


def assert_powered_off(ended: Ended) -> None:
    assert ended.code == 0, ended.console[-3000:]
    assert "reboot: Power down" in ended.console


def test_ctrl_alt_del_ends_it_well_and_its_disks_are_clean(
    image: Path, folder: Path, tmp_path: Path
) -> None:
    """The root's upper is a disk, under an overlay that cannot be unmounted; another is mounted by
    the workload; on both a process has a file open."""
    upper, data = make_ext4(tmp_path / "upper", "64M"), make_ext4(tmp_path / "data", "64M")
    script = """
        mkdir /data && mount -t ext4 $(disk data) /data
        sh -c "exec 3>/open 4>/data/open; while :; do sleep 1; done" &
        trap 'echo asked; echo late > /late; echo late > /data/late; exit 0' USR1
        echo ready > /dev/ttyS1
        while :; do sleep 0.1; done
    """
    config = vm_config(shell(script), stop_signal="USR1")
    config["root"]["upper"] = {"kind": "disk", "serial": "upper"}
    with Aside(folder, lambda aside: aside.press("ctrl", "alt", "delete")) as aside:
        ended = run_vm(
            config,
            disks={"root": image, "upper": upper, "data": data},
            writable=["upper", "data"],
            options=aside.options,
            kernel_line="loglevel=7",
        )
    assert_powered_off(ended)
    assert "asked" in ended.lines
    for disk in (upper, data):
        assert_clean(disk)
    assert content(upper, "/upper/late") == "late\n"
    assert content(data, "/late") == "late\n"


@pytest.mark.slow
def test_hung_shares_and_full_disks_do_not_prevent_the_end(
    image: Path, folder: Path, tmp_path: Path
) -> None:
    """In one share processes hang, whom no signal reaches; the other hangs when it is unmounted.
    The root and a disk are full, and the disk is clean all the same.

    The kernel resets its devices last, and QEMU waits for the daemons then, which is for a host to
    end: by then, PID 1 must have done all that it does.
    """
    data = make_ext4(tmp_path / "data", "16M")
    script = """
        mkdir /data /busy /idle && mount -t ext4 $(disk data) /data
        mount -t virtiofs busy /busy && mount -t virtiofs idle /idle && cat /busy/here /idle/here
        dd if=/dev/zero of=/data/big bs=64k 2> /dev/null; dd if=/dev/zero of=/big 2> /dev/null
        exec 5<> /dev/ttyS1
        echo ready >&5
        read word <&5
        cat /busy/there & cat /busy/elsewhere &
        sh -c "trap '' TERM; while :; do sleep 1; done" &
        sleep 0.5
        echo asking for the end > /dev/kmsg
        kill -TERM 1
        sleep 1000
    """
    (tmp_path / "share").mkdir()
    for name in ("here", "there", "elsewhere"):
        (tmp_path / "share" / name).write_text(f"{name}\n")
    config = vm_config(shell(script))
    config["root"]["upper"] = {"size": "4m"}
    with (
        share_of(tmp_path / "share", folder, "busy") as (busy, busy_options),
        share_of(tmp_path / "share", folder, "idle") as (idle, idle_options),
    ):

        def hang(aside: Aside) -> None:
            for daemon in (busy, idle):
                daemon.send_signal(signal.SIGSTOP)
            aside.port.sendall(b"go\n")
            time.sleep(LONGEST + SPARE)
            for daemon in (busy, idle):
                daemon.send_signal(signal.SIGCONT)

        with Aside(folder, hang) as aside:
            ended = run_vm(
                config,
                disks={"root": image, "data": data},
                writable=["data"],
                options=[*aside.options, *busy_options, *idle_options],
                kernel_line="loglevel=7",
            )
    assert_powered_off(ended)
    assert ended.lines.count("here") == 2
    assert "there" not in ended.lines
    assert "processes are left that cannot be killed" in ended.console
    assert "/idle hangs; going on without it" in ended.console
    assert_clean(data)


def test_a_slow_disk_gets_the_time_that_it_takes(image: Path, tmp_path: Path) -> None:
    """Longer than a file system has that makes no headway."""
    data = make_ext4(tmp_path / "data", "64M")
    script = """
        mkdir /data && mount -t ext4 $(disk slow) /data
        yes | head -c 24000000 > /data/big
    """
    ended = run_vm(
        vm_config(shell(script)),
        disks={"root": image},
        options=[
            *("-drive", f"if=none,id=slow,format=raw,file={data},throttling.bps-write=8000000"),
            *("-device", "virtio-blk-pci,drive=slow,serial=slow"),
        ],
        kernel_line="loglevel=7",
    )
    assert_powered_off(ended)
    assert "hangs" not in ended.console
    assert_clean(data)
    assert len(content(data, "/big")) == 24000000


@contextmanager
def share_of(
    source: Path, folder: Path, tag: str
) -> "Iterator[tuple[subprocess.Popen[bytes], list[str]]]":
    """A virtiofsd of `source`, and QEMU's options for it."""
    try:
        program = virtiofsd()
    except MachineError as error:
        pytest.skip(str(error))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / tag))
        listener.listen(1)
        fd = listener.fileno()
        old = subprocess.run([program, "--help"], capture_output=True, check=False).stdout
        words = (
            [f"--shared-dir={source}", "--sandbox=chroot"]
            if b"--shared-dir" in old
            else ["-o", f"source={source}", "-o", "sandbox=chroot", "--rlimit-nofile=0"]
        )
        daemon = subprocess.Popen(
            [program, f"--fd={fd}", *words], pass_fds=[fd], stderr=subprocess.DEVNULL
        )
    try:
        yield (
            daemon,
            [
                *("-chardev", f"socket,id={tag},path={folder / tag}"),
                *("-device", f"vhost-user-fs-pci,chardev={tag},tag={tag}"),
            ],
        )
    finally:
        daemon.kill()
        daemon.wait()


def test_without_acpi_a_restart_is_the_end(image: Path) -> None:
    """Its VMM was told not to start it again; switching off would leave it halted for ever."""
    ended = run_vm(vm_config(["true"]), disks={"root": image}, kernel_line="acpi=off loglevel=7")
    assert ended.code == 0, ended.console[-3000:]
    assert "reboot: Restarting system" in ended.console


def test_a_host_asks_for_a_restart_which_the_vmm_takes_for_the_end(
    elf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert elf
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    script = "trap 'exit 4' TERM; while :; do sleep 0.1; done"
    with boot(machinekit.demo_image(), machine="qemu", command=["sh", "-c", script]) as machine:
        assert machine.agent.exec(["true"]).returncode == 0
        machine.agent.shutdown(reboot=True)
        state = machine.wait(timeout=PATIENCE)
    assert (state.status, state.vmm_code, state.phase) == ("reboot", 0, "ended")
    assert state.workload_exited is not None
    assert state.workload_exited.code == 4
