"""What this host can do for a machine, found out by trying, and why.

Each probe is quick, has a deadline and leaves nothing. Both `boot` and `microguest doctor` ask.
"""

import fcntl
import functools
import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import Final

from microguest.host_client.errors import MachineError
from microguest.host_client.probe import probe

__all__ = [
    "Accelerator",
    "VsockChoice",
    "accelerator",
    "qemu_command",
    "qemu_version",
    "vsock_choice",
]

KVM_GET_API_VERSION: Final = 0xAE00  # linux/kvm.h
KVM_API_VERSION: Final = 12
KVM_DEVICE: Final = "/dev/kvm"
VHOST_VSOCK: Final = "/dev/vhost-vsock"
VSOCK_DAEMON: Final = "vhost-device-vsock"
QMP_QUIT: Final = b'{"execute":"qmp_capabilities"}\n{"execute":"quit"}\n'


@dataclass(frozen=True, slots=True)
class Accelerator:
    """`options` for QEMU's command line, and for people why it is this one."""

    name: str  # "kvm" or "tcg"
    options: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class VsockChoice:
    """`kind`: as Plan.vsock."""

    kind: str
    reason: str
    command: str = ""  # of a daemon


def qemu_command() -> str:
    """Path of QEMU for this architecture. MachineError where it is not installed."""
    name = f"qemu-system-{os.uname().machine}"
    path = shutil.which(name)
    if path is None:
        raise MachineError(
            f"{name} is not on PATH: install it (Debian: qemu-system-x86), or use machine "
            "namespaces, which needs no VM"
        )
    return path


def qemu_version(command: str) -> str:
    """The first line of `--version`; MachineError where QEMU does not even do that."""
    try:
        done = probe([command, "--version"])
    except (OSError, subprocess.SubprocessError) as error:
        raise MachineError(f"{command} --version fails: {error}") from error
    if done.returncode != 0:
        said = done.stderr.decode("utf-8", "replace").strip()
        raise MachineError(f"{command} --version fails ({done.returncode}): {said:.200}")
    return done.stdout.decode("utf-8", "replace").partition("\n")[0]


@functools.cache
def accelerator(qemu: str) -> Accelerator:
    """KVM where QEMU really starts a machine with it, else software emulation."""
    problem = _kvm_problem(qemu)
    if problem:
        return Accelerator("tcg", ("-accel", "tcg,thread=multi"), problem)
    return Accelerator("kvm", ("-accel", "kvm", "-cpu", "host"), "QEMU starts with it")


def _kvm_problem(qemu: str) -> str:
    """Why KVM cannot be used, "" where it can. A device that opens is no proof: QEMU may abort."""
    try:
        fd = os.open(KVM_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"{KVM_DEVICE}: {error.strerror}"
    try:
        if fcntl.ioctl(fd, KVM_GET_API_VERSION) != KVM_API_VERSION:
            return f"{KVM_DEVICE} has another API version than {KVM_API_VERSION}"
    except OSError as error:
        return f"{KVM_DEVICE}: {error.strerror}"
    finally:
        os.close(fd)
    argv = [qemu, "-M", "q35", "-accel", "kvm", "-cpu", "host", "-m", "16", "-nodefaults"]
    argv += ["-no-user-config", "-display", "none", "-S", "-qmp", "stdio"]
    try:
        done = probe(argv, given=QMP_QUIT)
    except (OSError, subprocess.SubprocessError) as error:
        return f"QEMU with KVM: {error}"
    if done.returncode == 0:
        return ""
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    said = lines[0] if lines else f"exit code {done.returncode}"
    return f"QEMU with KVM fails: {said:.200}"


def vsock_choice() -> VsockChoice:
    """The kernel's vhost-vsock, else rust-vmm's daemon, else the built-in device."""
    try:
        os.close(os.open(VHOST_VSOCK, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        problem = f"{VHOST_VSOCK}: {error.strerror}"
    else:
        return VsockChoice("kernel", f"{VHOST_VSOCK} can be opened")
    daemon = shutil.which(VSOCK_DAEMON)
    if daemon is not None:
        return VsockChoice("daemon", f"{problem}; {daemon} is installed", daemon)
    return VsockChoice("built-in", f"{problem}; no {VSOCK_DAEMON} on PATH")
