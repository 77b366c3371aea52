"""Every step of the boot made to fail in a virtual machine: the right step, one line, power off.

Faults are made with what a host hands to a machine: its disks, its initramfs, its memory, its
kernel's command line, its boot config.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from init_machine import Config, make_root, require_program
from vm_machine import BUNDLE, Ended, make_erofs, run_vm, vm_config

from microguest.guest.bundle import cpio

pytestmark = [pytest.mark.qemu, pytest.mark.slow]

POWERED_OFF = re.compile(
    r"\[ *([0-9.]+)\] reboot: (?:Power down|Restarting system|machine restart)"
)
LATEST = 30.0  # seconds of the guest's own time at the power-off, however busy the host is


@dataclass
class Parts:
    """What a machine is made of, for a fault to damage."""

    config: Config
    disks: dict[str, Path]
    folder: Path
    segments: list[bytes] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    writable: list[str] = field(default_factory=list)  # of the disks
    kernel_line: str = ""
    raw_config: bytes | None = None


WRITE_PROOF = """
for disk in /sys/block/vd*; do
    [ "$(cat $disk/serial)" = proof ] || continue
    echo it ran | dd of=/dev/${disk##*/} conv=notrunc,fsync
done
"""

Fault = Callable[[Parts], None]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_program()
    folder = tmp_path_factory.mktemp("faults")
    return make_erofs(make_root(folder / "root"), folder / "root.erofs")


def boot(image: Path, folder: Path, fault: Fault, **machine: Any) -> Ended:
    parts = Parts(vm_config(["/bin/true"]), {"root": image}, folder)
    fault(parts)
    return run_vm(
        parts.config if parts.raw_config is None else parts.raw_config,
        disks=parts.disks,
        segments=parts.segments,
        options=parts.options,
        kernel_line=parts.kernel_line,
        writable=parts.writable,
        **machine,
    )


def powered_off(ended: Ended) -> None:
    """By itself, and soon."""
    assert ended.code == 0, ended.console[-3000:]
    found = POWERED_OFF.search(ended.console)
    assert found, ended.console[-3000:]
    assert float(found[1]) < LATEST


def overlay_file(parts: Parts, name: str, data: bytes, mode: int = 0o644) -> None:
    """A file of the initramfs, in the place of the one that was there."""
    folders = Path(name).parts[:-1]
    entries = [cpio.directory("/".join(folders[: n + 1])) for n in range(len(folders))]
    parts.segments.append(cpio.segment([*entries, cpio.regular(name, data, mode)]))


def module_names() -> list[str]:
    """The bundle's modules in load order, from its initramfs."""
    archive = (BUNDLE / "initramfs.cpio").read_bytes()
    return re.findall(r"microguest/modules/([0-9]{3}-[a-z0-9_]+\.ko)", archive.decode("latin-1"))


def without_module(parts: Parts, *names: str) -> None:
    kept = [file for file in module_names() if file[4:-3] not in names]
    assert len(kept) < len(module_names())
    overlay_file(parts, "microguest/modules/order", "".join(f"{n}\n" for n in kept).encode())


# ── the faults ───────────────────────────────────────────────────────────────────────────────────


def proc_is_a_file(parts: Parts) -> None:
    overlay_file(parts, "proc", b"")


def config_is_empty(parts: Parts) -> None:
    parts.raw_config = b""


def config_is_cut(parts: Parts) -> None:
    parts.raw_config = json.dumps(parts.config).encode()[:-20]


def config_is_garbage(parts: Parts) -> None:
    parts.raw_config = os.urandom(5000)


def config_is_huge(parts: Parts) -> None:
    parts.raw_config = b" " * (5 * 1024 * 1024)


def module_is_no_module(parts: Parts) -> None:
    overlay_file(parts, "microguest/modules/order", b"bad.ko\n")
    overlay_file(parts, "microguest/modules/bad.ko", b"not an ELF file")


def module_is_missing(parts: Parts) -> None:
    overlay_file(parts, "microguest/modules/order", b"000-nothing.ko\n")


def no_vsock(parts: Parts) -> None:
    without_module(parts, "vsock_loopback", "vmw_vsock_virtio_transport",
                   "vmw_vsock_virtio_transport_common", "vsock")  # fmt: skip


def nobody_takes_reports(parts: Parts) -> None:
    parts.config["report"] = {"transport": "vsock", "port": 1025}


def disk_is_missing(parts: Parts) -> None:
    parts.disks = {}


def disk_has_another_serial(parts: Parts) -> None:
    parts.disks = {"data": parts.disks["root"]}


def disk_is_blank(parts: Parts) -> None:
    damaged(parts, bytes(1 << 20))


def disk_is_cut(parts: Parts) -> None:
    damaged(parts, parts.disks["root"].read_bytes()[:2048])


def superblock_is_corrupt(parts: Parts) -> None:
    data = bytearray(parts.disks["root"].read_bytes())
    data[1024:1152] = os.urandom(128)
    damaged(parts, bytes(data))


def disk_is_another_file_system(parts: Parts) -> None:
    parts.config["root"]["lower"][0]["fstype"] = "squashfs"


def second_layer_is_missing(parts: Parts) -> None:
    parts.config["root"]["lower"].append({"kind": "disk", "serial": "more", "fstype": "erofs"})


def share_is_missing(parts: Parts) -> None:
    parts.config["root"]["lower"][0] = {"kind": "virtiofs", "tag": "nothing"}


def upper_disk_is_missing(parts: Parts) -> None:
    parts.config["root"]["upper"] = {"kind": "disk", "serial": "upper"}


def upper_disk_has_foreign_data(parts: Parts) -> None:
    disk = parts.folder / "upper"
    disk.write_bytes(os.urandom(4 << 20))
    parts.disks["upper"] = disk
    parts.writable = ["upper"]
    parts.config["root"]["upper"] = {"kind": "disk", "serial": "upper", "format": "if-blank"}


def disk_template_is_none(parts: Parts) -> None:
    upper_disk_has_foreign_data(parts)
    parts.disks["upper"].write_bytes(bytes(4 << 20))
    overlay_file(parts, "microguest/ext4", b"not a template")


def volume_target_is_a_file(parts: Parts) -> None:
    parts.config["volumes"] = [{"kind": "tmpfs", "target": "/bin/busybox"}]


def no_overlayfs(parts: Parts) -> None:
    without_module(parts, "overlay")


def volume_disk_is_missing(parts: Parts) -> None:
    parts.config["volumes"] = [
        {"kind": "disk", "serial": "data", "fstype": "ext4", "target": "/data"}
    ]


def volume_share_is_missing(parts: Parts) -> None:
    parts.config["volumes"] = [{"kind": "virtiofs", "tag": "nothing", "target": "/data"}]


def volume_target_is_missing(parts: Parts) -> None:
    parts.config["volumes"] = [{"kind": "tmpfs", "target": "/nothing/here", "create": False}]


def interface_is_missing(parts: Parts) -> None:
    parts.config["network"] = {"interfaces": [{"name": "eth7", "addresses": ["10.0.0.2/24"]}]}


def address_is_none(parts: Parts) -> None:
    parts.config["network"] = {"interfaces": [{"name": "lo", "addresses": ["10.0.0.999/24"]}]}


def sysctl_does_not_exist(parts: Parts) -> None:
    parts.config["hardening"] = {"sysctls": {"kernel.no_such_thing": "1"}}


def sysctl_is_refused(parts: Parts) -> None:
    parts.config["hardening"] = {"sysctls": {"kernel.sysrq": "many"}}


def damaged(parts: Parts, data: bytes) -> None:
    path = parts.folder / "damaged"
    path.write_bytes(data + bytes(-len(data) % 512))
    parts.disks["root"] = path


@pytest.mark.parametrize(
    ("fault", "step", "named"),
    [
        (proc_is_a_file, "api-mounts", "/proc"),
        (config_is_empty, "config", "not a JSON document"),
        (config_is_cut, "config", "not a JSON document"),
        (config_is_garbage, "config", "not a JSON document"),
        (config_is_huge, "config", "at most"),
        (module_is_no_module, "modules", "bad.ko"),
        (module_is_missing, "modules", "nothing.ko"),
        (no_vsock, "listener", "vsock"),
        (nobody_takes_reports, "report", "vsock:1025"),
        (disk_is_missing, "root-lower", "'root'"),
        (disk_has_another_serial, "root-lower", "'data'"),
        (disk_is_blank, "root-lower", "erofs"),
        (disk_is_cut, "root-lower", "erofs"),
        (superblock_is_corrupt, "root-lower", "erofs"),
        (disk_is_another_file_system, "root-lower", "squashfs"),
        (second_layer_is_missing, "root-lower", "'more'"),
        (share_is_missing, "root-lower", "nothing"),
        (upper_disk_is_missing, "root-upper", "'upper'"),
        (upper_disk_has_foreign_data, "root-upper", "disk 'upper' (/dev/vdb) holds something"),
        (disk_template_is_none, "root-upper", "/microguest/ext4: it is no disk template"),
        (no_overlayfs, "root-overlay", "the kernel has no overlay"),
        (volume_target_is_a_file, "volumes", "/bin/busybox"),
        (volume_disk_is_missing, "volumes", "'data'"),
        (volume_share_is_missing, "volumes", "nothing"),
        (volume_target_is_missing, "volumes", "/nothing"),
        (interface_is_missing, "network", "eth7"),
        (address_is_none, "network", "10.0.0.999"),
        (sysctl_does_not_exist, "hardening", "no_such_thing"),
        (sysctl_is_refused, "hardening", "sysrq"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_fault_is_named_and_the_machine_powers_off(
    image: Path, tmp_path: Path, fault: Fault, step: str, named: str
) -> None:
    ended = boot(image, tmp_path, fault)
    powered_off(ended)
    name, fields = ended.report()
    assert (name, fields["step"]) == ("boot_failed", step)
    assert named in fields["message"]
    assert "unexpected" not in fields["message"]


def test_a_workload_that_cannot_start_ends_the_machine_too(image: Path, tmp_path: Path) -> None:
    def absent(parts: Parts) -> None:
        parts.config["workload"]["argv"] = ["/no/such/program"]

    ended = boot(image, tmp_path, absent)
    powered_off(ended)


def test_without_memory_for_the_initramfs_the_machine_ends(image: Path, tmp_path: Path) -> None:
    ended = boot(image, tmp_path, lambda _parts: None, memory=48)
    assert ended.code == 0, ended.console[-3000:]  # the kernel panics, and panic=-1 restarts it


def test_a_machine_without_a_console_runs_and_ends(image: Path, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    proof.write_bytes(bytes(4096))

    def silent(parts: Parts) -> None:
        parts.kernel_line = "console=ttyS3"
        parts.disks["proof"] = proof
        parts.writable = ["proof"]
        parts.config["workload"]["argv"] = ["/bin/sh", "-c", WRITE_PROOF]

    ended = boot(image, tmp_path, silent)
    assert ended.code == 0
    assert proof.read_bytes().startswith(b"it ran\n")
