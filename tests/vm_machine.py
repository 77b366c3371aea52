"""The bundle's kernel and PID 1 in QEMU with hand-made hardware and boot config.

For what namespaces cannot show (block devices, shares, modules, the power) and `host_client` would
not do (disks that are missing, configs that are broken). There is no vsock device: the console is
what is looked at, so the workload prints and `boot_failed` is read from there.
"""

import contextlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from init_machine import CONSOLE_MARK, TOKEN, Config, Report, parse
from patience import PATIENCE

from microguest.guest.boot.config import PATH
from microguest.guest.bundle import cpio
from microguest.guest.report import line_mark
from microguest.host_client.machines.host import accelerator, qemu_command

BUNDLE = Path(__file__).parent.parent / "dist" / "guest" / platform.machine()
RUN = 3 * PATIENCE  # seconds for a machine from its start to its end
CONSOLE_MAX = 4 * 1024 * 1024  # bytes that are read of a console


def vm_config(argv: list[str] | None = None, **workload: object) -> Config:
    """A boot config for a disk with serial `root` that has an erofs; change it as a test needs."""
    config: Config = {
        "root": {"lower": [{"kind": "disk", "serial": "root", "fstype": "erofs"}]},
        "agent": {"listen": {"transport": "vsock", "port": 1024}, "token": TOKEN},
    }
    if argv is not None:
        config["workload"] = {"argv": argv, **workload}
    return config


class Ended:
    """A machine that has ended: QEMU's exit code, all of its console, and how long it ran."""

    def __init__(self, code: int | None, console: str, seconds: float) -> None:
        self.code = code  # None: it had to be killed
        self.console = console
        self.seconds = seconds

    def report(self) -> Report:
        """The one report on the console, which is a failed boot's."""
        marked = [line for line in self.console.splitlines() if line.startswith(CONSOLE_MARK)]
        assert len(marked) == 1, self.console[-4000:]
        return parse(marked[0].removeprefix(CONSOLE_MARK))

    @property
    def lines(self) -> list[str]:
        """What is neither the kernel's nor PID 1's."""
        return [
            line
            for line in self.console.replace("\r", "").splitlines()
            if line and not line.startswith(("[", CONSOLE_MARK, line_mark(TOKEN)))
        ]


def run_vm(
    config: Config | str | bytes,
    *,
    disks: Mapping[str, Path] | None = None,
    writable: Sequence[str] = (),
    options: Sequence[str] = (),
    kernel_line: str = "",
    memory: int = 256,
    segments: Sequence[bytes] = (),
    timeout: float = RUN,
) -> Ended:
    """Boot it and wait for its end.

    disks: by serial, read-only but for those named in `writable`. options: more of QEMU's.
    segments: cpio archives behind the bundle's initramfs and the boot config. timeout: seconds,
    then QEMU is killed and `Ended.code` is None.
    """
    if not (BUNDLE / "vmlinuz").exists():
        pytest.skip(f"{BUNDLE} is missing: make guest")
    if shutil.which(f"qemu-system-{platform.machine()}") is None:
        pytest.skip("needs QEMU: apt install qemu-system-x86")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mg-vm-")))
        initramfs = folder / "initramfs.cpio"
        write_initramfs(initramfs, config, segments)
        console = stack.enter_context((folder / "console").open("w+b"))
        argv = command_line(initramfs, disks or {}, writable, options, kernel_line, memory)
        began = time.monotonic()
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT
        )
        try:
            code: int | None = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            process.kill()
            process.wait()
        console.seek(0)
        text = console.read(CONSOLE_MAX).decode("utf-8", "backslashreplace")
        return Ended(code, text, time.monotonic() - began)


def write_initramfs(path: Path, config: Config | str | bytes, segments: Sequence[bytes]) -> None:
    document = json.dumps(config) if isinstance(config, dict) else config
    data = document.encode() if isinstance(document, str) else document
    boot = [cpio.directory("microguest"), cpio.regular(PATH.lstrip("/"), data, 0o600)]
    with path.open("wb") as target:
        target.write((BUNDLE / "initramfs.cpio").read_bytes())
        for segment in (cpio.segment(boot), *segments):
            target.write(bytes(-target.tell() % cpio.ALIGNMENT) + segment)


def command_line(
    initramfs: Path,
    disks: Mapping[str, Path],
    writable: Sequence[str],
    options: Sequence[str],
    kernel_line: str,
    memory: int,
) -> list[str]:
    """QEMU's; vhost-user devices among `options` find the memory that they need."""
    qemu = qemu_command()
    argv = [qemu, "-M", "q35", *accelerator(qemu).options, "-m", f"{memory}M", "-smp", "1"]
    argv += ["-object", f"memory-backend-memfd,id=mem,size={memory}M,share=on"]
    argv += ["-machine", "memory-backend=mem", "-nodefaults", "-no-user-config", "-no-reboot"]
    argv += ["-display", "none", "-serial", "stdio", "-device", "virtio-rng-pci"]
    for number, (serial, path) in enumerate(disks.items()):
        read_only = "off" if serial in writable else "on"
        access = f"read-only={read_only}"
        file = f"driver=file,node-name=f{number},filename={path},locking=off,{access}"
        argv += ["-blockdev", file]
        argv += ["-blockdev", f"driver=raw,node-name=d{number},file=f{number},{access}"]
        argv += ["-device", f"virtio-blk-pci,drive=d{number},serial={serial}"]
    argv += [*options, "-kernel", str(BUNDLE / "vmlinuz"), "-initrd", str(initramfs)]
    return [*argv, "-append", f"console=ttyS0 quiet panic=-1 reboot=t no_timer_check {kernel_line}"]


def make_erofs(tree: Path, image: Path) -> Path:
    """An erofs of a folder's files."""
    _make(["mkfs.erofs", "--quiet", str(image), str(tree)])
    return image


def make_ext4(image: Path, size: str, tree: Path | None = None, *options: str) -> Path:
    """An ext4 of `size` as mke2fs has it (64M), with a folder's files in it."""
    _make(["mke2fs", "-q", "-F", "-t", "ext4", *options, *(["-d", str(tree)] if tree else []),
           str(image), size])  # fmt: skip
    return image


def make_squashfs(tree: Path, image: Path) -> Path:
    """A squashfs of a folder's files."""
    _make(["mksquashfs", str(tree), str(image), "-quiet", "-no-progress", "-noappend"])
    return image


def _make(argv: list[str]) -> None:
    if shutil.which(argv[0], path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
        pytest.skip(f"needs {argv[0]}")
    done: Any = subprocess.run(argv, capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, f"{argv}: {done.stderr.decode()}"
