"""`machine="qemu"`: a virtual machine. docs/reference/host.md explains its command line.

All paths in it are relative to the run folder, so that no comma or length of a path matters; the
exception is the root's disk.
"""

import os
import random
import shutil
from dataclasses import dataclass
from typing import Final

from microguest.guest.boot.config import AGENT_PORT, PATH, REPORT_PORT, Endpoint
from microguest.guest.boot.root import Lower, Upper, Volume
from microguest.guest.bundle import cpio
from microguest.host_client import images
from microguest.host_client.client.address import HybridAddress, VsockAddress
from microguest.host_client.errors import MachineError
from microguest.host_client.machines.capacity import check_enough, check_host
from microguest.host_client.machines.deputy import share_filter
from microguest.host_client.machines.disks import GuestDisk, image_disk
from microguest.host_client.machines.host import (
    VsockChoice,
    accelerator,
    qemu_command,
    vsock_choice,
)
from microguest.host_client.machines.mounts import Mount
from microguest.host_client.machines.networking import MAC
from microguest.host_client.machines.plan import HYBRID_SOCKET, Plan, Share, blank
from microguest.host_client.machines.prepare import Preparation, directory, lease_of
from microguest.host_client.machines.settings import UPPER_SIZE, Settings, mebibytes
from microguest.host_client.machines.virtiofsd import share_command, virtiofsd
from microguest.host_client.shortage import explain
from microguest.host_client.values import absolute_path

__all__ = ["QemuBackend"]

INITRAMFS: Final = "initramfs.cpio"
DAEMON_SOCKET: Final = "vhost.sock"
DISK_SERIAL: Final = "root"
UPPER_SERIAL: Final = "upper"
PRIVATE_CID: Final = 3  # of a device that only this machine has
KERNEL_CIDS: Final = range(2048, 2**31)  # shared by all machines of the host's kernel; see plan()
# no_timer_check: an emulated timer is late where the host is busy, and the kernel would panic.
KERNEL_LINE: Final = "console=ttyS0 quiet panic=-1 reboot=t no_timer_check"
KERNEL_HEAD: Final = 0x206  # bytes that show what a file is
# Magic numbers: "HdrS" of a bzImage (x86 boot protocol) or "ARM\x64" of an arm64 Image at their
# offsets, an ELF file, gzip as arm64 kernels may be packed.
KERNEL_MAGIC: Final = ((0x202, b"HdrS"), (56, b"ARM\x64"), (0, b"\x7fELF"), (0, b"\x1f\x8b"))


# What a full disk of this host does not take is an error in the guest, as on a real disk. QEMU's
# own choice is to pause the whole machine without a word until somebody lets it go on.
ERRORS: Final = "werror=report,rerror=report"


class Supplies:
    """What the machine has beside its memory: disks and shares, and how the guest sees them.

    Raises MachineError, and ImageError where the root's disk cannot be made.
    """

    def __init__(self, preparation: Preparation) -> None:
        settings, folder = preparation.settings, preparation.folder
        root = images.as_disk(preparation.image, folder.run, progress=preparation.progress)
        self.root = root.path
        self.lower = Lower(kind="disk", serial=DISK_SERIAL, fstype=root.fstype)
        self.disks = [GuestDisk(str(root.path), DISK_SERIAL, read_only=True)]
        self.shares: list[Share] = []
        self.upper: Upper | None = None
        if settings.upper is not None:
            size = settings.upper_size or UPPER_SIZE
            self.disks.append(image_disk(settings.upper, UPPER_SERIAL, size=size))
            self.upper = Upper(kind="disk", serial=UPPER_SERIAL, format="if-blank")
        self.volumes = [
            self._volume(preparation, mount, f"volume{index}")
            for index, mount in enumerate(settings.mounts)
        ]

    def _volume(self, preparation: Preparation, mount: Mount, name: str) -> Volume:
        if mount.kind == "tmpfs":
            return preparation.tmpfs(mount)
        if mount.kind == "bind":
            source = directory(mount.source, mount.target)
            argv = share_command(
                virtiofsd(), source, read_only=mount.read_only, suid=mount.suid, dev=mount.dev
            )
            program = share_filter(suid=mount.suid) if os.geteuid() == 0 else ""
            share = Share(source=source, argv=argv, socket=f"{name}.sock", seccomp=program)
            self.shares.append(share)
            return preparation.volume(mount, source={"kind": "virtiofs", "tag": name})
        read_only = mount.read_only or mount.fstype != "ext4"
        disk = image_disk(mount.source, name, size=mount.size, read_only=read_only)
        self.disks.append(disk)
        source_of_disk = {"kind": "disk", "serial": name, "fstype": mount.fstype}
        if not read_only:
            source_of_disk["format"] = "if-blank"
        return preparation.volume(mount, source=source_of_disk)


@dataclass(frozen=True, slots=True)
class Board:
    """A QEMU machine type: its options, and what virtio devices are called on it."""

    options: tuple[str, ...]
    suffix: str
    kernel_line: str = KERNEL_LINE


Q35: Final = Board(("-M", "q35"), "pci")


class QemuBackend:
    """KVM where it works, else software emulation."""

    name = "qemu"

    def check(self, settings: Settings) -> None:
        """MachineError where QEMU or a given kernel is missing or is not what it should be."""
        qemu_command()
        check_host(settings)
        if settings.kernel is not None:
            check_kernel(settings.kernel)

    def plan(self, preparation: Preparation) -> Plan:
        """Write the initramfs, have the disk made, and say what to start."""
        settings, folder = preparation.settings, preparation.folder
        check_enough(settings, preparation.bundle.initramfs)
        vsock = vsock_choice()
        # The kernel refuses a CID that is taken already; of 2**31 that is not worth a register.
        cid = random.SystemRandom().choice(KERNEL_CIDS) if vsock.kind == "kernel" else PRIVATE_CID
        # In the kernel all guests reach the same ports of the host: each gets one of its own.
        report_port = cid if vsock.kind == "kernel" else REPORT_PORT
        supplies = Supplies(preparation)
        config = preparation.boot_config(
            "vm",
            supplies.lower,
            Endpoint(transport="vsock", port=AGENT_PORT),
            Endpoint(transport="vsock", port=report_port),
            upper=supplies.upper,
            volumes=supplies.volumes,
        )
        write_initramfs(preparation.bundle.initramfs, os.path.join(folder.run, INITRAMFS), config)
        kernel = absolute_path(settings.kernel or preparation.bundle.kernel)
        address = (
            VsockAddress(cid, AGENT_PORT)
            if vsock.kind == "kernel"
            else HybridAddress(os.path.join(folder.run, HYBRID_SOCKET), AGENT_PORT)
        )
        daemon = vsock.kind == "daemon"
        return Plan(
            name=folder.name,
            machine=self.name,
            image=settings.image,
            command=preparation.command,
            labels=dict(settings.labels),
            stdio=settings.stdio,
            url=str(address),
            argv=command_line(
                Q35,
                settings,
                name=folder.name,
                kernel=kernel,
                supplies=supplies,
                vsock=vsock,
                cid=cid,
            ),
            console="socket",
            vsock=vsock.kind,
            guest_cid=cid,
            daemon_argv=daemon_command(vsock, cid) if daemon else (),
            daemon_socket=DAEMON_SOCKET if daemon else "",
            report_socket=f"{HYBRID_SOCKET}_{report_port}" if daemon else "",
            report_port=report_port,
            shares=tuple(supplies.shares),
            lease=lease_of(preparation.image, supplies.root),
            token_proof=preparation.token_proof,
            boot_timeout=settings.timeout,
            boot_files=(INITRAMFS,),
            keep=settings.keep,
        )


def command_line(
    board: Board,
    settings: Settings,
    *,
    name: str,
    kernel: str,
    supplies: Supplies,
    vsock: VsockChoice,
    cid: int,
) -> tuple[str, ...]:
    """QEMU's words, with blanks for the descriptors that the monitor passes on."""
    qemu, size = qemu_command(), mebibytes(settings.memory)
    return (
        *(qemu, *board.options, *accelerator(qemu).options),
        *("-m", f"{size}M", "-smp", str(settings.cpus)),
        # vhost-user devices read the guest's memory: it must be shared, and exactly that large.
        *("-object", f"memory-backend-memfd,id=mem,size={size}M,share=on"),
        *("-machine", "memory-backend=mem"),
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-name", f"microguest-{name}"),
        *("-chardev", f"socket,id=console,fd={blank('console')}", "-serial", "chardev:console"),
        *("-chardev", f"socket,id=qmp,fd={blank('qmp')}", "-mon", "chardev=qmp,mode=control"),
        *vsock_options(board, vsock, cid),
        # Without it getrandom(2) blocks for seconds: an emulated CPU has no RDRAND.
        *("-device", f"virtio-rng-{board.suffix}"),
        *(word for disk in supplies.disks for word in disk_options(board, disk)),
        *(word for share in supplies.shares for word in share_options(board, share)),
        *(network_options(board) if settings.network == "user" else ()),
        *("-kernel", kernel, "-initrd", INITRAMFS, "-append", board.kernel_line),
    )


def vsock_options(board: Board, vsock: VsockChoice, cid: int) -> tuple[str, ...]:
    """The device by which the guest has vsock."""
    if vsock.kind == "kernel":
        return ("-device", f"vhost-vsock-{board.suffix},guest-cid={cid}")
    where = f"path={DAEMON_SOCKET}" if vsock.kind == "daemon" else f"fd={blank('vsock')}"
    return (
        *("-chardev", f"socket,id=vs,{where}"),
        *("-device", f"vhost-user-vsock-{board.suffix},chardev=vs"),
    )


def disk_options(board: Board, disk: GuestDisk) -> tuple[str, ...]:
    """A virtio-blk device; what is written to it is in the file when the guest has flushed it."""
    how = "read-only=on" if disk.read_only else "read-only=off,discard=unmap"
    name = disk.serial
    return (
        *("-blockdev", f"driver=file,node-name={name}-file,filename={escaped(disk.path)},{how}"),
        *("-blockdev", f"driver=raw,node-name={name},file={name}-file,{how}"),
        *("-device", f"virtio-blk-{board.suffix},drive={name},serial={name},{ERRORS}"),
    )


def share_options(board: Board, share: Share) -> tuple[str, ...]:
    """A virtiofs device. Its tag is its socket's name without the ending."""
    name = share.socket.removesuffix(".sock")
    return (
        *("-chardev", f"socket,id={name},path={share.socket}"),
        *("-device", f"vhost-user-fs-{board.suffix},chardev={name},tag={name}"),
    )


def network_options(board: Board) -> tuple[str, ...]:
    """QEMU's own little network; see host_client.machines.networking."""
    no_boot = ",romfile=" if board.suffix == "pci" else ""  # which Debian packs apart
    return (
        *("-netdev", "user,id=net0,ipv6=off"),
        *("-device", f"virtio-net-{board.suffix},netdev=net0,mac={MAC}{no_boot}"),
    )


def daemon_command(vsock: VsockChoice, cid: int) -> tuple[str, ...]:
    """rust-vmm's vhost-device-vsock for one machine."""
    return (
        *(vsock.command, "--vm"),
        f"guest-cid={cid},socket={DAEMON_SOCKET},uds-path={HYBRID_SOCKET}",
    )


def write_initramfs(base: str, path: str, config: bytes) -> None:
    """The bundle's initramfs with the boot config as a second segment; only this user reads it."""
    segment = cpio.segment(
        [cpio.directory("microguest"), cpio.regular(PATH.lstrip("/"), config, 0o600)]
    )
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    # With a buffer: one write(2) to a disk that gets full takes a part of the config and says so.
    with open(fd, "wb") as target, open(base, "rb", buffering=0) as source:
        shutil.copyfileobj(source, target, 1024 * 1024)
        target.write(bytes(-target.tell() % cpio.ALIGNMENT) + segment)


def check_kernel(path: str) -> None:
    """MachineError where the file cannot be read or is no kernel that QEMU could start."""
    try:
        with open(path, "rb") as file:
            head = file.read(KERNEL_HEAD)
    except OSError as error:
        raise MachineError(f"cannot read the kernel {explain(error, path)}") from error
    if not any(head[at : at + len(magic)] == magic for at, magic in KERNEL_MAGIC):
        raise MachineError(f"{path} is not a Linux kernel: neither bzImage, Image nor vmlinux")


def escaped(path: str) -> str:
    """A path as a value among QEMU's comma-separated options."""
    return path.replace(",", ",,")
