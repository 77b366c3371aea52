"""Block devices of the machine: found by serial number, mounted as what they are said to hold.

Order of devices means nothing: a serial number is the only name that host and guest agree on.
"""

import errno
import os
import time

from microguest.guest import bounds
from microguest.init_shim import mounts
from microguest.init_shim.failure import Failure, call
from microguest.init_shim.mounts import mount
from microguest.init_shim.reporter import leave_out

__all__ = ["find_disk", "is_read_only", "mount_disk"]

SERIAL_SIZE = 20  # bytes of a virtio-blk serial number (virtio 1.2, 5.2.4); the rest is cut off
POLL = 0.005  # seconds between looks for a disk that the kernel has not found yet
NEVER_WRITABLE = ("erofs", "squashfs")

_found: dict[str, list[str]] = {}  # devices by serial number, as of the last look


def mount_disk(serial: str, fstype: str, target: str, flags: int, policy: str = "never") -> None:
    """Mount the disk with this serial number at `target`. Raises Failure.

    flags: MS_ of mount(2); without READ_ONLY the disk must be one that can be written to. policy:
    "if-blank" makes an ext4 where there is nothing but zeros, and lets one that was made so grow
    with its device.
    """
    device = find_disk(serial)
    if fstype in NEVER_WRITABLE:
        flags |= mounts.READ_ONLY  # the kernel refuses to mount a read-only device without it
    locked = is_read_only(device)
    writable = not flags & mounts.READ_ONLY
    if writable and locked:
        raise Failure(
            f"disk {serial!r} ({device}) is read-only, and {target} is to be written to; "
            "give the disk to the machine as writable",
            syscall="mount",
            path=target,
            errno=errno.EROFS,
        )
    # Without its journal replayed, what a crash left is seen as it is: nothing can be written here.
    options = "noload" if fstype == "ext4" and locked else ""
    if policy == "if-blank" and not locked:
        from microguest.init_shim.root import blank_disk

        blank_disk.format_if_blank(device, serial)
    try:
        mount(device, target, fstype, flags, options)
    except Failure as failure:
        failure.message += f"; disk {serial!r} is said to have an {fstype}"
        raise
    if writable and policy == "if-blank":
        try:
            blank_disk.grow(device, target)
        except Failure as failure:  # what is on it can be used as it is, and mended
            leave_out(f"disk {serial!r} ({device}) does not grow: {failure.message}")


def find_disk(serial: str) -> str:
    """The device with this serial number; waits DISK_WAIT seconds for it to appear.

    Raises Failure where there is none, or more than one: nobody can tell them apart.
    """
    wanted = serial[:SERIAL_SIZE]
    deadline = time.monotonic() + bounds.DISK_WAIT
    while wanted not in _found:
        disks = disk_serials()
        _found.clear()
        for name, found in disks.items():
            _found.setdefault(found, []).append(f"/dev/{name}")
        if wanted in _found:
            break
        if time.monotonic() > deadline:
            there = ", ".join(f"{name} ({found!r})" for name, found in disks.items()) or "none"
            raise Failure(
                f"no disk with serial {serial!r} after {bounds.DISK_WAIT:g} s; disks: {there}",
                syscall="open",
                path="/sys/block",
                errno=errno.ENODEV,
            )
        time.sleep(POLL)
    if len(_found[wanted]) > 1:
        raise Failure(
            f"{' and '.join(_found[wanted])} have the same serial {wanted!r}; serials must differ "
            f"in their first {SERIAL_SIZE} bytes",
            path="/sys/block",
            errno=errno.ENOTUNIQ,
        )
    return _found[wanted][0]


def disk_serials() -> dict[str, str]:
    """virtio-blk disks that can be opened, and their serial numbers, "" where one has none."""
    found = {}
    with call("open", "/sys/block"):
        names = sorted(name for name in os.listdir("/sys/block") if name.startswith("vd"))
    names = [name for name in names if os.path.exists(f"/dev/{name}")]
    for name in names:
        try:
            with open(f"/sys/block/{name}/serial", encoding="utf-8", errors="replace") as file:
                found[name] = file.read(64).strip("\n\0")
        except OSError:
            found[name] = ""
    return found


def is_read_only(device: str) -> bool:
    """Whether the machine was given the disk without the right to write to it."""
    path = f"/sys/block/{os.path.basename(device)}/ro"
    with call("open", path), open(path, encoding="ascii") as file:
        return file.read(2).strip() == "1"
