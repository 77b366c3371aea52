"""The image's root: read-only layers under what takes the writes, or one file system as it is, and
the move into it.

Paths here are fixed and in the initial root, so that overlayfs options need no escaping whatever an
endpoint or layer is called. docs/design/roots.md has the reason of each option.
"""

import errno
import os
import stat

import _guestsys

from microguest.guest.boot.config import BootConfig
from microguest.guest.boot.root import Lower, Root, Volume
from microguest.init_shim import mounts
from microguest.init_shim.confined import RootFolder
from microguest.init_shim.failure import Failure, call
from microguest.init_shim.mounts import ensure_directory, mount
from microguest.init_shim.reporter import leave_out
from microguest.init_shim.root import disks, write_out

TYPE_CHECKING = False  # typing itself is too heavy for PID 1
if TYPE_CHECKING:
    from microguest.init_shim.root.memory_sizes import Sizes

__all__ = ["NEW_ROOT", "make_read_only", "mount_lowers", "mount_root", "mount_upper", "switch_root"]

LAYERS = "/microguest/layers"
UPPER = "/microguest/upper"
NEW_ROOT = "/newroot"
SPARES = f"{UPPER}/spare"  # beside what the overlay shows
SPARE_FILES = 8  # overlayfs needs two or three
SPARE_SIZE = 4096  # bytes: a block each, for the directory that it makes anew
FULL = (
    "the disk of the upper is full: give it more room (truncate -s +256M FILE), which the next boot"
    " takes, or delete something in it elsewhere"
)
OVERLAY_ABILITIES = "/sys/module/overlay/parameters"
# Extended attributes that overlayfs itself keeps in its layers.
OVERLAY_ATTRIBUTES = ("trusted.overlay.", "user.overlay.")


def mount_lowers(plan: Root) -> None:
    """Each layer read-only at LAYERS/<its index>; without an upper, the layer is the new root.

    Raises Failure.
    """
    if plan.upper is None:
        ensure_directory(NEW_ROOT)
        mount_plain(plan.lower[0], plan.read_only)
        return
    ensure_directory(LAYERS)
    for index, lower in enumerate(plan.lower):
        target = f"{LAYERS}/{index}"
        ensure_directory(target)
        mount_lower(lower, target, mounts.READ_ONLY | mounts.NODEV)


def mount_plain(lower: Lower, read_only: bool) -> None:
    """The one lower as the root, writable where it can be and is not meant to be read-only.

    A root that is read_only with exceptions is mounted writable too: it is one file system, and
    `make_read_only` makes the difference.
    """
    flags = 0
    if lower.kind == "disk" and disks.is_read_only(disks.find_disk(lower.serial)):
        flags = mounts.READ_ONLY
    mount_lower(lower, NEW_ROOT, flags)


def mount_lower(lower: Lower, target: str, flags: int) -> None:
    if lower.kind == "disk":
        disks.mount_disk(lower.serial, lower.fstype, target, flags)
    elif lower.kind == "directory":
        with call("open", lower.path, hint="a lower layer must be a directory"):
            os.close(os.open(lower.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        mount(lower.path, target, None, mounts.BIND | mounts.RECURSIVE)
    else:
        cache = "loose" if flags & mounts.READ_ONLY else "mmap"
        mounts.mount_share(lower.kind, lower.tag, target, flags, cache)


def mount_upper(config: BootConfig) -> "Sizes":
    """What takes all writes: a tmpfs, or a disk that keeps them for the next boot.

    With it, all that is in memory gets the size that it keeps. Returns these. Raises Failure.
    """
    # Nobody waits for it before the listener is open.
    from microguest.init_shim.root import memory_sizes

    plan, sizes = config.root, memory_sizes.measured(config)
    mounts.size_tmpfs("/dev/shm", sizes.shm)  # noqa: S108  not a temporary file
    mounts.size_tmpfs("/run", sizes.run)
    if plan.upper is None:
        return sizes
    ensure_directory(UPPER)
    if plan.upper.kind == "tmpfs":
        mount("tmpfs", UPPER, "tmpfs", mounts.NODEV, f"mode=0755,size={sizes.root}")
    else:
        disks.mount_disk(plan.upper.serial, "ext4", UPPER, mounts.NODEV, plan.upper.format)
        write_out.remember(UPPER)  # the overlay hides it
    return sizes


def mount_root(plan: Root, *, keep_run: bool) -> None:
    """The root at NEW_ROOT: of the layers and the upper, if there is one, with the API mounts.

    keep_run: what the image has in /run is there as well.
    """
    if plan.upper is not None:
        make_upper_folders()
        lower = ":".join(f"{LAYERS}/{index}" for index in range(len(plan.lower)))
        options = [f"lowerdir={lower},upperdir={UPPER}/upper,workdir={UPPER}/work"]
        options += overlay_options(kept=plan.upper.kind == "disk")
        ensure_directory(NEW_ROOT)
        mount_overlay(",".join(options), kept=plan.upper.kind == "disk")
    share_api(keep_run=keep_run)


def mount_overlay(options: str, *, kept: bool) -> None:
    """The overlay, also on a kept upper that its user has filled. Raises Failure.

    At each mount overlayfs makes some files below `work` to see what the file system can. Where
    there is no inode for them the mount fails, or is read-only, and who could make room never gets
    in. So some are kept where no workload sees them, and are there again before one runs.
    """
    if not kept:
        mount("overlay", NEW_ROOT, "overlay", 0, options)
        return
    full = False
    try:
        mount("overlay", NEW_ROOT, "overlay", 0, options)
        if is_read_only_mount(NEW_ROOT):
            full = True
            with call("umount2", NEW_ROOT):
                _guestsys.umount2(NEW_ROOT, 0)
    except Failure as failure:
        if failure.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        full = True
    if full:
        drop_spares()
        mount_on_full(options)
    make_spares()


def mount_on_full(options: str) -> None:
    """The overlay with what room could be made; read-only is better than nothing."""
    try:
        mount("overlay", NEW_ROOT, "overlay", 0, options)
    except Failure as failure:
        if failure.errno in (errno.ENOSPC, errno.EDQUOT):
            failure.message += f"; {FULL}"
        raise
    if is_read_only_mount(NEW_ROOT):
        leave_out(f"the root is read-only; {FULL}")


def is_read_only_mount(path: str) -> bool:
    return bool(os.statvfs(path).f_flag & mounts.READ_ONLY)


def make_spares() -> None:
    """What `drop_spares` can delete, as far as there is room."""
    try:
        if not os.path.isdir(SPARES):
            os.mkdir(SPARES, 0o700)
        there = os.listdir(SPARES)
        for name in map(str, range(SPARE_FILES)):
            if name not in there:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                fd = os.open(f"{SPARES}/{name}", flags, 0o600)
                try:
                    os.write(fd, bytes(SPARE_SIZE))
                finally:
                    os.close(fd)
    except OSError:
        pass  # there is the hint then, where they are missed


def drop_spares() -> None:
    """Make room for a mount."""
    try:
        for name in os.listdir(SPARES):
            os.unlink(f"{SPARES}/{name}")
    except OSError:
        pass  # the mount says what is wrong
    os.sync()  # ext4 gives freed blocks away after they are free on the disk


def make_upper_folders() -> None:
    """The upper's directories; the root's owner, mode and attributes are the topmost layer's.

    Those of an upper that was kept are the workload's own by now, and stay.
    """
    ensure_directory(f"{UPPER}/work")
    if os.path.isdir(f"{UPPER}/upper"):
        return
    new = f"{UPPER}/work/new-upper"  # half-made, it must not count as kept
    ensure_directory(new)
    top = f"{LAYERS}/0"
    info = os.stat(top)
    if not in_user_namespace():  # the owner is then somebody who has no number here
        with call("chown", new):
            os.chown(new, info.st_uid, info.st_gid)
    with call("chmod", new):
        os.chmod(new, stat.S_IMODE(info.st_mode))
    copy_attributes(top, new)
    with call("rename", new):
        os.rename(new, f"{UPPER}/upper")


def copy_attributes(source: str, target: str) -> None:
    """Extended attributes, as far as `target` takes them; overlayfs merges those of no root."""
    try:
        names = os.listxattr(source)
    except OSError:
        return
    for name in names:
        if not name.startswith(OVERLAY_ATTRIBUTES):
            try:
                os.setxattr(target, name, os.getxattr(source, name))
            except OSError:
                continue  # a tmpfs before Linux 6.6 has no user.*


def overlay_options(kept: bool) -> list[str]:
    """What this kernel's overlayfs can and this root needs. kept: the upper outlives the boot."""
    if in_user_namespace():
        return ["userxattr"]  # trusted.* is not for us; redirects and metacopy need it
    wanted = {
        # Renaming a directory of a layer, which is EXDEV otherwise; and chmod without copying data.
        # Both tie the upper to the very layers below it: not where the image may change meanwhile.
        "redirect_dir": "off" if kept else "on",
        "metacopy": "off" if kept else "on",
        "index": "off",
    }
    try:
        able = os.listdir(OVERLAY_ABILITIES)
    except OSError:
        return []
    options = [f"{name}={value}" for name, value in wanted.items() if name in able]
    if "xino_auto" in able:
        options.append("xino=on")  # one st_dev for the whole root, and inode numbers that stay
    return options


def in_user_namespace() -> bool:
    """Whether root here is an ordinary user outside."""
    with open("/proc/self/uid_map", encoding="ascii") as file:
        return file.read().split() != ["0", "0", str(2**32 - 1)]


def share_api(*, keep_run: bool) -> None:
    """The API file systems seen in the new root as well: volumes may go below them, as to /run/x.

    An image that has something else than a directory there gets a directory instead.
    """
    for target in mounts.API_MOVED:
        try:
            ensure_directory(NEW_ROOT + target)
        except Failure as failure:
            if failure.errno == errno.EROFS:
                failure.message += f"; a root without an upper needs a directory at {target}"
            raise
        if target == "/run" and keep_run:
            copy_run()
        mount(target, NEW_ROOT + target, None, mounts.BIND | mounts.RECURSIVE)


def copy_run() -> None:
    """The image's /run, without which some of its programs do not start, and its owner."""
    covered = NEW_ROOT + "/run"
    info = os.stat(covered)
    plain = (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (0, 0, 0o755)
    if plain and not os.listdir(covered):
        return
    from microguest.init_shim.root import image_run

    image_run.copy(covered, "/run")


def switch_root(plan: Root, volumes: tuple[Volume, ...]) -> int:
    """Make NEW_ROOT the root. Returns an O_PATH fd of it.

    A real root is exchanged by pivot_root(2) and unmounted. An initramfs cannot be (the call's
    EINVAL): it is covered and emptied, which frees its memory, but for directories that are layers
    or volumes. Afterwards nothing of the initial root can be reached by name.
    """
    kept = inodes_in_use(plan, volumes)
    initial = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with call("chdir", NEW_ROOT):
        os.chdir(NEW_ROOT)
    try:
        _guestsys.pivot_root(".", ".")
    except OSError as error:
        if error.errno != errno.EINVAL:
            with call("pivot_root", NEW_ROOT):
                raise
        for target in mounts.API_MOVED:
            with call("umount2", target):
                _guestsys.umount2(target, mounts.DETACH)
        mount(".", "/", None, mounts.MOVE)
        with call("chroot", NEW_ROOT):
            os.chroot(".")
        delete_tree(initial, os.fstat(initial).st_dev, kept)
    else:
        os.close(initial)
        with call("umount2", "the initial root"):
            _guestsys.umount2(".", mounts.DETACH)
    with call("chdir", "/"):
        os.chdir("/")
    with call("open", "/"):
        return os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def make_read_only(plan: Root) -> None:
    """Take the right to write from the root's mount, if that is wanted. Raises Failure.

    After the last step that writes into the image. Paths in `writable` are mounts of their own by
    then (init_shim/root/volumes.py), and so are volumes: both stay as they are.
    """
    if not plan.read_only:
        return
    mounts.restrict("/", mounts.READ_ONLY)
    with RootFolder("/") as root:
        if not root.flags & mounts.READ_ONLY:
            raise Failure("the root was made read-only and can still be written to", path="/")


def inodes_in_use(plan: Root, volumes: tuple[Volume, ...]) -> frozenset[int]:
    """Inode numbers of what the plan uses of the initial root itself."""
    sources = [lower.path for lower in plan.lower if lower.kind == "directory"]
    sources += [volume.path for volume in volumes if volume.kind == "directory"]
    return frozenset(os.stat(path).st_ino for path in sources)


def delete_tree(folder: int, device: int, kept: frozenset[int]) -> None:
    """Delete what is in `folder`, on `device` only and not `kept`, and close it.

    A failure costs memory only.
    """
    try:
        for name in os.listdir(folder):
            try:
                info = os.stat(name, dir_fd=folder, follow_symlinks=False)
                if info.st_dev != device or info.st_ino in kept:
                    continue
                if stat.S_ISDIR(info.st_mode):
                    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                    delete_tree(os.open(name, flags, dir_fd=folder), device, kept)
                    os.rmdir(name, dir_fd=folder)
                else:
                    os.unlink(name, dir_fd=folder)
            except OSError:
                continue
    finally:
        os.close(folder)
