"""`microguest doctor`: what this host has, and what will be used, with the reason."""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from microguest.guest.errors import MicroguestError
from microguest.host_client.cli.tell import say
from microguest.host_client.images.cache import default_directory
from microguest.host_client.images.tools import PACKAGES, find_command
from microguest.host_client.machines import host
from microguest.host_client.machines.bundle import find_bundle
from microguest.host_client.machines.folder import machines_root
from microguest.host_client.machines.virtiofsd import is_successor, share_command, virtiofsd
from microguest.host_client.ownership import own_folder_problem

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
    say("virtual machines can run here" if usable else "no virtual machine can run here yet")
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
    there = {tool: find_command(tool) for tool in PACKAGES}
    missing = [tool for tool, where in there.items() if where is None]
    detail = ", ".join(tool for tool, where in there.items() if where) or "none"
    good = bool(there["mkfs.erofs"] or there["sqfstar"])
    if missing:
        detail += f"; missing: {', '.join(missing)}"
    return Finding(good, "image tools", detail, needed=True)


def shares() -> Finding:
    """Whether a virtual machine can see directories of the host: as this user, with this daemon."""
    try:
        program = virtiofsd()
        share_command(program, "/", read_only=False)
        kind = "" if is_successor(program) else " (QEMU's own, which needs root, as you are)"
    except MicroguestError as error:
        return Finding(False, "shares", str(error))
    return Finding(True, "shares", f"{program}{kind}")


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
    try:
        return _place("state", machines_root(), STATE_MIN, "XDG_STATE_HOME")
    except MicroguestError as error:  # another user's, or open to others
        return Finding(False, "state", str(error), needed=True)


def cache() -> Finding:
    """Where disks of images are made and kept."""
    return _place("image cache", default_directory(), CACHE_MIN, "XDG_CACHE_HOME")


STATE_MIN: Final = 16 << 20  # bytes: a machine's folder with a console and a history at their caps
CACHE_MIN: Final = (
    64 << 20
)  # bytes: less than any image with a C library takes, unpacked and as a disk
INODES_MIN: Final = 64  # for one machine


def _place(what: str, folder: str, least: int, variable: str) -> Finding:
    """Whether the folder can be written to by us alone, and has room for one machine."""
    place = folder
    while not os.path.exists(place):
        place = os.path.dirname(place)
    if not os.access(place, os.W_OK | os.X_OK):
        return Finding(False, what, f"{folder} cannot be written: set {variable}", needed=True)
    if problem := own_folder_problem(folder):
        detail = f"{folder} cannot be trusted: {problem}: set {variable}"
        return Finding(False, what, detail, needed=True)
    room = os.statvfs(place)
    free = room.f_bavail * room.f_frsize
    detail = f"{folder} ({free >> 20} MiB free)"
    if free < least:
        detail += f": {least >> 20} MiB are needed: free some, or set {variable}"
        return Finding(False, what, detail, needed=True)
    if room.f_files and room.f_favail < INODES_MIN:  # some file systems have no fixed number
        detail += f": {room.f_favail} more files can be made there: remove some, or set {variable}"
        return Finding(False, what, detail, needed=True)
    return Finding(True, what, detail, needed=True)


CHECKS: tuple[Callable[[], Finding], ...] = (
    qemu,
    acceleration,
    vsock,
    bundle,
    image_tools,
    shares,
    namespaces,
    state,
    cache,
)
