"""`microguest doctor`: what this host has, and what will be used, with the reason."""

import argparse
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

from guest.errors import MicroguestError
from host_client.cli.tell import say
from host_client.machines import host
from host_client.machines.bundle import find_bundle
from host_client.machines.folder import machines_root
from host_client.machines.shares import virtiofsd

__all__ = ["main"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`needed`: no virtual machine runs without it."""

    good: bool
    what: str
    detail: str
    needed: bool = False


def main(_options: argparse.Namespace) -> int:
    """Print the findings; 0 if a virtual machine can run, else 1."""
    findings = [check() for check in CHECKS]
    for finding in findings:
        mark = "ok" if finding.good else "no" if finding.needed else "--"
        say(f"{mark}  {finding.what:<12} {finding.detail}")
    usable = all(finding.good for finding in findings if finding.needed)
    say("machines can run here" if usable else "no machine can run here yet")
    return 0 if usable else 1


def qemu() -> Finding:
    """QEMU's path and version."""
    try:
        command = host.qemu_command()
        return Finding(True, "qemu", f"{host.qemu_version(command)}: {command}", needed=True)
    except MicroguestError as error:
        return Finding(False, "qemu", str(error), needed=True)


def acceleration() -> Finding:
    """KVM or software emulation."""
    try:
        chosen = host.accelerator(host.qemu_command())
    except MicroguestError as error:
        return Finding(False, "kvm", str(error))
    if chosen.name == "kvm":
        return Finding(True, "kvm", f"will be used: {chosen.reason}")
    return Finding(False, "kvm", f"software emulation will be used: {chosen.reason}")


def vsock() -> Finding:
    """Which of the three devices."""
    chosen = host.vsock_choice()
    if chosen.kind == "built-in" and os.uname().machine != "x86_64":
        return Finding(False, "vsock", f"no device for this architecture: {chosen.reason}", True)
    names = {"kernel": "the kernel's", "daemon": "the daemon's", "built-in": "the built-in one"}
    return Finding(True, "vsock", f"{names[chosen.kind]} will be used: {chosen.reason}", True)


def bundle() -> Finding:
    """The guest's kernel, initramfs and program, checked byte by byte."""
    try:
        found = find_bundle()
        found.verify()
    except (MicroguestError, OSError) as error:
        return Finding(False, "guest", str(error), needed=True)
    versions = found.manifest.versions.get("microguest", "?")
    kernel = found.manifest.kernel_release
    return Finding(True, "guest", f"{found.folder}: {versions}, kernel {kernel}", needed=True)


def image_tools() -> Finding:
    """What makes disks of images."""
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    tools = ("mkfs.erofs", "sqfstar", "mksquashfs", "tar", "zstd")
    there = {tool: shutil.which(tool, path=path) for tool in tools}
    missing = [tool for tool, where in there.items() if where is None]
    detail = ", ".join(tool for tool, where in there.items() if where) or "none"
    good = bool(there["mkfs.erofs"] or there["sqfstar"])
    if missing:
        detail += f"; missing: {', '.join(missing)}"
    return Finding(good, "image tools", detail, needed=True)


def shares() -> Finding:
    """Whether a virtual machine can see directories of the host."""
    try:
        return Finding(True, "shares", virtiofsd())
    except MicroguestError as error:
        return Finding(False, "shares", str(error))


def namespaces() -> Finding:
    """Whether machine="namespaces" can work."""
    if os.geteuid() == 0:
        return Finding(True, "namespaces", "as root (no isolation; for tests)")
    try:
        with open("/proc/sys/user/max_user_namespaces", encoding="ascii") as file:
            allowed = int(file.read())
    except (OSError, ValueError):
        allowed = 0
    if allowed:
        return Finding(True, "namespaces", f"{allowed} user namespaces allowed (no isolation)")
    return Finding(False, "namespaces", "this user may make no user namespace")


def state() -> Finding:
    """Where machines keep what belongs to them."""
    root = machines_root()
    place = root
    while not os.path.exists(place):
        place = os.path.dirname(place)
    if not os.access(place, os.W_OK):
        return Finding(False, "state", f"{root} cannot be written: set XDG_STATE_HOME", True)
    free = shutil.disk_usage(place).free >> 20
    return Finding(True, "state", f"{root} ({free} MiB free)", True)


CHECKS: tuple[Callable[[], Finding], ...] = (
    qemu,
    acceleration,
    vsock,
    bundle,
    image_tools,
    shares,
    namespaces,
    state,
)
