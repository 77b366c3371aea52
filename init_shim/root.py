"""The image's root: read-only layers, a tmpfs over them, and the move into it.

Paths here are fixed and in the initial root, so that overlayfs options need no escaping whatever an
endpoint or layer is called.
"""

import errno
import os
import stat
import time

import _guestsys

from guest import limits
from guest.rootplan import Root
from init_shim import mounts
from init_shim.failure import Failure, call
from init_shim.mounts import ensure_directory, mount

__all__ = ["NEW_ROOT", "mount_lowers", "mount_root", "mount_upper", "switch_root"]

LAYERS = "/microguest/layers"
UPPER = "/microguest/upper"
NEW_ROOT = "/newroot"
SERIAL_SIZE = 20  # bytes of a virtio-blk serial number (virtio 1.2, 5.2.4); the rest is cut off
DISK_POLL = 0.005  # seconds between looks for a disk that the kernel has not found yet


def mount_lowers(plan: Root) -> None:
    """Each layer read-only at LAYERS/<its index>. Raises Failure."""
    ensure_directory(LAYERS)
    for index, lower in enumerate(plan.lower):
        target = f"{LAYERS}/{index}"
        ensure_directory(target)
        if lower.kind == "disk":
            device = find_disk(lower.serial)
            # Read-only disks refuse a mount that does not say so itself.
            flags = mounts.READ_ONLY | mounts.NODEV
            mount(device, target, lower.fstype, flags)
        else:
            with call("open", lower.path, hint="a lower layer must be a directory"):
                os.close(os.open(lower.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
            mount(lower.path, target, None, mounts.BIND | mounts.RECURSIVE)


def find_disk(serial: str) -> str:
    """The device with this serial number; waits DISK_WAIT seconds for it to appear."""
    deadline = time.monotonic() + limits.DISK_WAIT
    while True:
        disks = disk_serials()
        for name, found in disks.items():
            device = f"/dev/{name}"
            if found == serial[:SERIAL_SIZE] and os.path.exists(device):
                return device
        if time.monotonic() > deadline:
            there = ", ".join(f"{name} ({found!r})" for name, found in disks.items()) or "none"
            raise Failure(
                f"no disk with serial {serial!r} after {limits.DISK_WAIT:g} s; disks: {there}",
                syscall="open",
                path="/sys/block",
                errno=errno.ENODEV,
            )
        time.sleep(DISK_POLL)


def disk_serials() -> dict[str, str]:
    """virtio-blk disks and their serial numbers, "" where one has none."""
    found = {}
    with call("open", "/sys/block"):
        names = sorted(name for name in os.listdir("/sys/block") if name.startswith("vd"))
    for name in names:
        try:
            with open(f"/sys/block/{name}/serial", encoding="utf-8", errors="replace") as file:
                found[name] = file.read(64).strip("\n\0")
        except OSError:
            found[name] = ""
    return found


def mount_upper(plan: Root) -> None:
    """The tmpfs that takes all writes, with its two directories."""
    assert plan.upper is not None
    ensure_directory(UPPER)
    mount("tmpfs", UPPER, "tmpfs", mounts.NODEV, f"mode=0755,size={plan.upper.size}")
    for name in ("upper", "work"):
        ensure_directory(f"{UPPER}/{name}")


def mount_root(plan: Root) -> None:
    """The layers under the upper, at NEW_ROOT."""
    layers = len(plan.lower)
    # The merged root directory has the upper's owner and mode; it should have the image's.
    top = os.stat(f"{LAYERS}/0")
    unprivileged = in_user_namespace()  # the owner is then somebody who has no number here
    if not unprivileged:
        with call("chown", f"{UPPER}/upper"):
            os.chown(f"{UPPER}/upper", top.st_uid, top.st_gid)
    with call("chmod", f"{UPPER}/upper"):
        os.chmod(f"{UPPER}/upper", stat.S_IMODE(top.st_mode))
    lower = ":".join(f"{LAYERS}/{index}" for index in range(layers))
    options = f"lowerdir={lower},upperdir={UPPER}/upper,workdir={UPPER}/work"
    if unprivileged:
        options += ",userxattr"  # trusted.* attributes are not for us (kernel: overlayfs.rst)
    ensure_directory(NEW_ROOT)
    mount("overlay", NEW_ROOT, "overlay", 0, options)


def in_user_namespace() -> bool:
    """Whether root here is an ordinary user outside."""
    with open("/proc/self/uid_map", encoding="ascii") as file:
        return file.read().split() != ["0", "0", str(2**32 - 1)]


def switch_root(machine: str) -> int:
    """Make NEW_ROOT the root, with the API file systems in it. Returns an O_PATH fd of it.

    A virtual machine's initramfs cannot be pivoted away: it is covered and emptied, which frees its
    memory. Afterwards nothing of the initial root can be reached by name.
    """
    for target in mounts.API_MOVED:
        ensure_directory(NEW_ROOT + target)
        mount(target, NEW_ROOT + target, None, mounts.MOVE)
    with call("chdir", NEW_ROOT):
        os.chdir(NEW_ROOT)
    if machine == "vm":
        initramfs = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        mount(".", "/", None, mounts.MOVE)
        with call("chroot", NEW_ROOT):
            os.chroot(".")
        delete_tree(initramfs, os.fstat(initramfs).st_dev)
    else:
        with call("pivot_root", NEW_ROOT):
            _guestsys.pivot_root(".", ".")
        with call("umount2", "the initial root"):
            _guestsys.umount2(".", mounts.DETACH)
    with call("chdir", "/"):
        os.chdir("/")
    with call("open", "/"):
        return os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def delete_tree(folder: int, device: int) -> None:
    """Delete what is in `folder`, on `device` only, and close it. A failure costs memory only."""
    try:
        for name in os.listdir(folder):
            try:
                info = os.stat(name, dir_fd=folder, follow_symlinks=False)
                if info.st_dev != device:
                    continue
                if stat.S_ISDIR(info.st_mode):
                    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                    delete_tree(os.open(name, flags, dir_fd=folder), device)
                    os.rmdir(name, dir_fd=folder)
                else:
                    os.unlink(name, dir_fd=folder)
            except OSError:
                continue
    finally:
        os.close(folder)
