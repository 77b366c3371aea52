"""Whole machines that are saved to a file and restored from it, as often as a test likes.

`host_client` has no such thing, so QEMU is driven by hand over QMP. Its vhost-user vsock device
cannot be saved (docs/design/restore.md): it is unplugged before, and a fresh one is plugged into
each machine that is restored. To the guest that looks as a restore does with other devices: every
connection is reset, listeners stay.
"""

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import pytest
from init_machine import TOKEN, make_root
from patience import PATIENCE
from vm_machine import BUNDLE, make_erofs, vm_config, write_initramfs

from microguest.host_client.client.agent import Agent
from microguest.host_client.client.steps import run
from microguest.host_client.machines.host import accelerator, qemu_command

PROJECT = Path(__file__).parent.parent
ANSWER = PATIENCE  # seconds for the agent to answer
MEMORY = "256M"
PLUG = "plug"  # the slot that the vsock device is in
POLL = 0.01


class Qmp:
    """QEMU's control connection, blocking."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(PATIENCE)
        self._sock = sock
        self._lines = sock.makefile("rb")
        self._events: list[str] = []
        self._receive()  # the greeting
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: object) -> Any:
        """What the command returns. AssertionError with QEMU's sentence where it refuses."""
        request = {"execute": command, "arguments": arguments}
        self._sock.sendall(json.dumps(request).encode() + b"\n")
        while True:
            answer = self._receive()
            assert "error" not in answer, answer["error"]["desc"]
            if "return" in answer:
                return answer["return"]

    def wait_for(self, event: str) -> None:
        while event not in self._events:
            self._receive()
        self._events.clear()

    def until(self, command: str, *statuses: str) -> str:
        """Ask until the answer's status is one of these."""
        deadline = time.monotonic() + PATIENCE
        while (status := self(command).get("status")) not in statuses:
            assert time.monotonic() < deadline, f"{command} says {status}"
            time.sleep(POLL)
        return str(status)

    def close(self) -> None:
        self._lines.close()
        self._sock.close()

    def _receive(self) -> dict[str, Any]:
        line = self._lines.readline()
        assert line, "QEMU has ended"
        message: dict[str, Any] = json.loads(line)
        if "event" in message:
            self._events.append(message["event"])
        return message


class SnapshotMachine:
    """A machine with a vsock device that can be unplugged. Without `state` it boots."""

    def __init__(
        self, folder: Path, disk: Path, initramfs: Path, state: Path | None = None
    ) -> None:
        self._closing = contextlib.ExitStack()
        self.folder = Path(self._closing.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        self._device: subprocess.Popen[bytes] | None = None
        ours, theirs = socket.socketpair()
        argv = command_line(disk, initramfs, self.folder / "console", theirs.fileno(), state)
        if state is None:
            self._start_device()
            argv += ["-chardev", f"socket,id=vsock,path={self._control}"]
            argv += ["-device", f"vhost-user-vsock-pci,id=vsock,chardev=vsock,bus={PLUG}"]
        try:
            with theirs:
                self._process = subprocess.Popen(
                    argv, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
                )
            self.qmp = Qmp(ours)
            if state is not None:
                self.qmp.until("query-status", "paused")
        except BaseException:
            ours.close()
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_how: object) -> None:
        self.close()

    @property
    def console(self) -> str:
        return (self.folder / "console").read_text("utf-8", "replace")

    @property
    def _control(self) -> Path:
        return self.folder / "control"

    def agent(self, *, keeps_clock: bool) -> Agent:
        """Said hello to."""
        url = f"hybrid://{self.folder}/hybrid?port=1024"
        agent = Agent.at(url, token=TOKEN, timeout=ANSWER)
        agent.driver.keeps_clock = keeps_clock
        self._closing.callback(agent.close)
        run(agent.driver.ping())
        return agent

    def save(self, state: Path) -> None:
        """Unplug the vsock device, stop, and write everything to a file. It does not go on."""
        self.qmp("device_del", id="vsock")
        self.qmp.wait_for("DEVICE_DELETED")
        self.qmp("stop")
        self.qmp("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
        self.qmp("migrate", uri=f"exec:cat>{state}")
        assert self.qmp.until("query-migrate", "completed", "failed") == "completed"

    def go_on(self) -> None:
        """A restored one: with a fresh vsock device."""
        self._start_device()
        where = {"type": "unix", "data": {"path": str(self._control)}}
        backend = {"type": "socket", "data": {"addr": where, "server": False}}
        self.qmp("chardev-add", id="vsock", backend=backend)
        self.qmp("device_add", driver="vhost-user-vsock-pci", id="vsock", chardev="vsock", bus=PLUG)
        self.qmp("cont")

    def close(self) -> None:
        for process in (getattr(self, "_process", None), self._device):
            if process is not None:
                process.kill()
                process.wait()
        if hasattr(self, "qmp"):
            self.qmp.close()
        self._closing.close()

    def _start_device(self) -> None:
        argv = [sys.executable, "-m", "microguest.host_client.vhost_vsock"]
        argv += ["--control", str(self._control), "--hybrid", str(self.folder / "hybrid")]
        self._device = subprocess.Popen(argv, cwd=PROJECT, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + PATIENCE
        while not self._control.exists():
            assert time.monotonic() < deadline
            time.sleep(POLL)


def make_disk_and_initramfs(folder: Path) -> tuple[Path, Path]:
    """A busybox root and what boots it."""
    if not (BUNDLE / "vmlinuz").exists():
        pytest.skip(f"{BUNDLE} is missing: make guest")
    disk = make_erofs(make_root(folder / "root"), folder / "root.erofs")
    initramfs = folder / "initramfs.cpio"
    write_initramfs(initramfs, vm_config(), ())
    return disk, initramfs


def command_line(
    disk: Path, initramfs: Path, console: Path, qmp: int, state: Path | None
) -> list[str]:
    """QEMU's; everything but the vsock device, which can come and go."""
    qemu = qemu_command()
    argv = [qemu, "-M", "q35", *accelerator(qemu).options, "-m", MEMORY, "-smp", "1"]
    argv += ["-object", f"memory-backend-memfd,id=mem,size={MEMORY},share=on"]
    argv += ["-machine", "memory-backend=mem", "-nodefaults", "-no-user-config", "-no-reboot"]
    argv += ["-display", "none", "-serial", f"file:{console}", "-device", "virtio-rng-pci"]
    argv += ["-blockdev", f"driver=file,node-name=file,filename={disk},locking=off,read-only=on"]
    argv += ["-blockdev", "driver=raw,node-name=disk,file=file,read-only=on"]
    argv += ["-device", "virtio-blk-pci,drive=disk,serial=root"]
    argv += ["-device", f"pcie-root-port,id={PLUG},chassis=1,slot=1"]
    argv += ["-chardev", f"socket,id=qmp,fd={qmp}", "-mon", "chardev=qmp,mode=control"]
    argv += ["-kernel", str(BUNDLE / "vmlinuz"), "-initrd", str(initramfs)]
    argv += ["-append", "console=ttyS0 quiet panic=-1 reboot=t no_timer_check"]
    return [*argv, "-incoming", f"exec:cat {state}"] if state is not None else argv
