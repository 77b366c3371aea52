"""What is mounted into the new root before it becomes the root: shares, disks, tmpfs, binds.

Targets, and sources in the image, are resolved inside the new root (init_shim/confined.py); what a
mount may not allow is looked up afterwards, because more than one thing takes no notice of a flag.
"""

import errno
import os

from microguest.guest.boot.root import Root, Volume
from microguest.init_shim import mounts
from microguest.init_shim.confined import Opened, RootFolder
from microguest.init_shim.failure import Failure, call
from microguest.init_shim.mounts import BIND, NODEV, NOEXEC, NOSUID, READ_ONLY, RECURSIVE, mount
from microguest.init_shim.reporter import leave_out
from microguest.init_shim.root import disks
from microguest.init_shim.root.assembling import NEW_ROOT

__all__ = ["mount_volumes"]

STAGE = "/microguest/volume"  # in the initial root
FLAG_NAMES = ((READ_ONLY, "read-only"), (NOSUID, "nosuid"), (NODEV, "nodev"), (NOEXEC, "noexec"))


def mount_volumes(plan: Root, volumes: tuple[Volume, ...]) -> None:
    """The root's `directories`, its `writable` paths as mounts of their own, then the volumes,
    parents first. Raises Failure.
    """
    if not (plan.directories or plan.writable or volumes):
        return
    with RootFolder(NEW_ROOT) as root:
        for path in plan.directories:
            make_directory(root, path)
        for path in sorted(plan.writable, key=depth):
            make_writable(root, path)
        ordered = sorted(volumes, key=lambda volume: (depth(volume.target), volume.kind == "bind"))
        mounted = []
        try:
            for volume in ordered:
                mounted.append(mount_volume(root, volume))
            for volume, there in zip(ordered, mounted, strict=True):
                check_visible(root, volume, there)
        finally:
            for there in mounted:
                os.close(there.fd)


def depth(path: str) -> int:
    """How many names a path has: a parent has fewer than what is inside it."""
    return len([name for name in path.split("/") if name])


def make_directory(root: RootFolder, path: str) -> None:
    """One that an image says it has; what is there, or cannot be made, is the image's affair."""
    try:
        os.close(root.open_target(path, directory=True, create=True).fd)
    except Failure as failure:
        leave_out(f"{path} is not made: {failure.message}")


def make_writable(root: RootFolder, path: str) -> None:
    """Bind a path over itself, so that the root around it can become read-only."""
    try:
        place = root.open(path)
    except Failure:
        place = open_place(root, path, directory=True, create=True)
    with place:
        if place.flags & READ_ONLY:
            raise Failure(
                f"{path} cannot be writable: its file system is read-only; give the root an upper",
                path=path,
            )
        mount(place.path, place.path, None, BIND | RECURSIVE)  # with what is in /dev or /sys


def open_place(root: RootFolder, path: str, *, directory: bool, create: bool) -> Opened:
    """As `RootFolder.open_target`; on a full disk it says how its owner gets in all the same."""
    try:
        return root.open_target(path, directory=directory, create=create)
    except Failure as failure:
        if failure.errno in (errno.ENOSPC, errno.EDQUOT):
            failure.message += (
                "; the root is full: start the machine without what is mounted there, and make room"
            )
        raise


def mount_volume(root: RootFolder, volume: Volume) -> Opened:
    """Mount one, and return what is seen at its target then."""
    source = open_source(root, volume)
    try:
        directory = source is None or source.is_directory
        with open_place(root, volume.target, directory=directory, create=volume.create) as place:
            check_place(root, volume, place)
            mount_at(root, volume, source, place)
    finally:
        if source is not None:
            os.close(source.fd)
    there = root.open(volume.target)
    try:
        check_flags(volume, there)
    except BaseException:
        os.close(there.fd)
        raise
    return there


def open_source(root: RootFolder, volume: Volume) -> Opened | None:
    """What is to be bound; None for kinds that are file systems of their own."""
    if volume.kind == "bind":
        return root.open(volume.path)
    if volume.kind == "directory":
        with call("open", volume.path, hint="it must be in the initial root"):
            return Opened(os.open(volume.path, os.O_PATH | os.O_CLOEXEC))
    return None


def check_place(root: RootFolder, volume: Volume, place: Opened) -> None:
    """Raises Failure for targets that would take the machine apart."""
    if place.is_same(root):
        raise Failure(f"{volume.target} leads to the root itself", path=volume.target)
    with root.open("/dev") as devices:
        if place.is_same(devices):
            raise Failure(
                f"{volume.target} leads to /dev, whose devices the machine needs; mount inside it",
                path=volume.target,
            )
    with root.open("/proc") as proc:
        if os.fstat(place.fd).st_dev == os.fstat(proc.fd).st_dev:
            raise Failure(
                f"{volume.target} leads into /proc, where nothing is mounted", path=volume.target
            )


def mount_at(root: RootFolder, volume: Volume, source: Opened | None, place: Opened) -> None:
    """mount(2) on the opened target. mount(2) takes no notice of flags together with BIND: those
    of a bind, and of what is mounted inside it, are set in a second call."""
    flags = flags_of(volume)
    if source is not None:
        mount(source.path, place.path, None, BIND | RECURSIVE)
        with root.open(volume.target) as bound:
            mounts.restrict_tree(bound.fd, volume.target, flags)
    elif volume.kind == "disk":
        # Elsewhere first: the opened target keeps leading to what it was before the mount.
        mounts.ensure_directory(STAGE)
        disks.mount_disk(volume.serial, volume.fstype, STAGE, flags, volume.format)
        mount(STAGE, place.path, None, mounts.MOVE)
    elif volume.kind == "tmpfs":
        mount("tmpfs", place.path, "tmpfs", flags, f"mode={volume.mode:o},size={volume.size}")
    else:
        mounts.mount_share(volume.kind, volume.tag, place.path, flags, cache="mmap")


def flags_of(volume: Volume) -> int:
    """MS_ flags of mount(2)."""
    flags = READ_ONLY if volume.read_only else 0
    flags |= 0 if volume.suid else NOSUID
    flags |= 0 if volume.dev else NODEV
    return flags | (0 if volume.exec else NOEXEC)


def check_flags(volume: Volume, there: Opened) -> None:
    """Raises Failure where the mount allows what the volume does not."""
    flags = flags_of(volume)
    lacking = [name for flag, name in FLAG_NAMES if flags & flag and not there.flags & flag]
    if lacking:
        raise Failure(
            f"{volume.target} was mounted {', '.join(lacking)} and turned out not to be",
            syscall="statvfs",
            path=volume.target,
        )


def check_visible(root: RootFolder, volume: Volume, there: Opened) -> None:
    """Raises Failure where a later volume has hidden this one, by name or through a link."""
    try:
        with root.open(volume.target) as now:
            if now.is_same(there):
                return
    except Failure:
        pass  # not even the target is seen any more
    raise Failure(f"the volume at {volume.target} is hidden by another one", path=volume.target)
