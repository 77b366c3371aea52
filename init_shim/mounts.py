"""mount(2) with its flags, shares of the host, and the API file systems that every Linux program
expects.

API file systems that are mounted already stay as they are: in namespaces the launcher has prepared
/proc, /sys and /dev because only it may.
"""

import errno
import os
import stat

import _guestsys

from microguest.guest import bounds
from microguest.init_shim.failure import Failure, call

__all__ = [
    "API_MOVED",
    "BIND",
    "DETACH",
    "MOVE",
    "NODEV",
    "NOEXEC",
    "NOSUID",
    "PRIVATE",
    "READ_ONLY",
    "RECURSIVE",
    "REMOUNT",
    "ensure_directory",
    "is_mount_point",
    "mount",
    "mount_api",
    "mount_share",
    "mount_table",
    "open_proc",
    "restrict",
    "restrict_tree",
    "size_tmpfs",
]

# linux/mount.h
READ_ONLY = 0x1
NOSUID = 0x2
NODEV = 0x4
NOEXEC = 0x8
REMOUNT = 0x20
NOATIME = 0x400
NODIRATIME = 0x800
BIND = 0x1000
MOVE = 0x2000
RECURSIVE = 0x4000
PRIVATE = 0x40000
RELATIME = 0x200000

# What statvfs(3) tells of a mount with the same numbers as mount(2); RELATIME has another there.
TOLD_FLAGS = READ_ONLY | NOSUID | NODEV | NOEXEC | NOATIME | NODIRATIME
TOLD_RELATIME = 0x1000

DETACH = 0x2  # umount2(2): MNT_DETACH

# Without `max`, users could take every terminal that there is.
DEVPTS_OPTIONS = f"mode=0620,ptmxmode=0666,max={bounds.TERMINALS}"
# target, type, flags, options, and whether a kernel may lack it
API = (
    ("/proc", "proc", NOSUID | NODEV | NOEXEC, "", False),
    ("/sys", "sysfs", NOSUID | NODEV | NOEXEC, "", False),
    ("/dev", "devtmpfs", NOSUID | NOEXEC, "mode=0755", False),
    ("/dev/pts", "devpts", NOSUID | NOEXEC, DEVPTS_OPTIONS, False),
    ("/dev/shm", "tmpfs", NOSUID | NODEV, "mode=1777", False),  # noqa: S108  not a temporary file
    ("/dev/mqueue", "mqueue", NOSUID | NODEV | NOEXEC, "", True),
    ("/run", "tmpfs", NOSUID | NODEV, "mode=0755", False),
    ("/sys/fs/cgroup", "cgroup2", NOSUID | NODEV | NOEXEC, "nsdelegate", True),
)
TABLE_SIZE = 1024 * 1024  # bytes of the list of mounts
API_MOVED = ("/proc", "/sys", "/dev", "/run")  # the others are inside these
ABSENT = (errno.ENODEV, errno.ENOENT, errno.EPERM, errno.EBUSY, errno.EROFS)


def mount_api() -> None:
    """Mount what is missing. A console is taken as stdio where this made /dev appear."""
    for target, kind, flags, options, optional in API:
        if is_mount_point(target):
            continue
        try:
            if not os.path.isdir(target):
                with call("mkdir", target):
                    os.mkdir(target)
            mount(kind, target, kind, flags, options)
        except Failure as failure:
            if not (optional and failure.errno in ABSENT):
                raise
            continue
        if target == "/dev":
            link_standard_streams()
            take_console()
    with call("open", "/proc"):
        proc_folder()


def mount_table() -> list[bytes]:
    """The lines of /proc/self/mounts, as proc_pid_mounts(5). Raises OSError.

    The kernel gives a page of it at a time, whatever is asked for. Whoever mounts more than
    TABLE_SIZE loses the rest.
    """
    fd, table = open_proc("self/mounts"), b""
    try:
        while len(table) < TABLE_SIZE and (more := os.read(fd, TABLE_SIZE - len(table))):
            table += more
    finally:
        os.close(fd)
    return table.splitlines()


def open_proc(path: str) -> int:
    """Open a file of /proc for reading, also where it is covered by now. Raises OSError.

    path: below /proc. What a workload mounts over it may never answer, and PID 1 would hang.
    """
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc_folder())


def proc_folder() -> int:
    """Opened once, at the boot's start. Raises OSError."""
    global _proc  # noqa: PLW0603  there is one
    if _proc < 0:
        _proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    return _proc


_proc = -1


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """mount(2), failing with a sentence that says what was to be mounted."""
    what = f"type {kind}, source {source}" if kind else f"from {source}"
    try:
        with call("mount", target, hint=what):
            _guestsys.mount(source, target, kind, flags, options or None)
    except Failure as failure:
        if failure.errno == errno.ENODEV and kind:
            failure.message += f"; the kernel has no {kind}"
        raise


def mount_share(kind: str, tag: str, target: str, flags: int, cache: str) -> None:
    """Mount what the host shares under `tag`. Raises Failure.

    kind: "virtiofs" or "9p". cache: 9p's "loose" for what does not change meanwhile, or "mmap",
    which keeps no more than shared memory maps need (kernel: filesystems/9p.rst).
    """
    options = ""
    if kind == "9p":
        # 512 KiB is what the virtio transport can carry in one request.
        options = f"trans=virtio,version=9p2000.L,msize=524288,cache={cache}"
    try:
        mount(tag, target, kind, flags, options)
    except Failure as failure:
        if failure.errno in (errno.EINVAL, errno.ENOENT):
            failure.message += f"; is there a {kind} share with the tag {tag!r}?"
        raise


def size_tmpfs(path: str, size: int) -> None:
    """Let an API tmpfs hold `size` bytes. Raises Failure."""
    mount(None, path, None, REMOUNT | NOSUID | NODEV, f"size={size}")


def restrict(path: str, flags: int) -> None:
    """Add flags to the mount at `path`, not to its file system. Raises Failure.

    Those that it has stay: a user namespace may not take them off (mount_namespaces(7)).
    """
    with call("statvfs", path):
        told = os.statvfs(path).f_flag
    kept = told & TOLD_FLAGS | (RELATIME if told & TOLD_RELATIME else 0)
    mount(None, path, None, REMOUNT | BIND | kept | flags)


def restrict_tree(fd: int, path: str, flags: int) -> None:
    """Add flags to the mount at a descriptor and to every mount below it. Raises Failure.

    flags: of READ_ONLY, NOSUID, NODEV and NOEXEC, which mount_setattr(2) numbers alike. `path` is
    for messages.
    """
    with call("mount_setattr", path, hint="a bind needs Linux 5.12"):
        _guestsys.mount_setattr(fd, flags)


def is_mount_point(path: str) -> bool:
    """Whether another file system than the parent's is seen at `path`; False if it is missing."""
    try:
        return os.stat(path).st_dev != os.stat(os.path.dirname(path)).st_dev
    except OSError:
        return False


def ensure_directory(path: str, mode: int = 0o755) -> None:
    """A real directory at `path`; its parent exists. A symlink or file of an image is replaced.

    Mounting through an image's symlink would put the mount wherever the image likes.
    """
    try:
        kind = os.lstat(path).st_mode
    except FileNotFoundError:
        kind = 0
    if stat.S_ISDIR(kind):
        return
    if kind:
        with call("unlink", path):
            os.unlink(path)
    with call("mkdir", path):
        os.mkdir(path, mode)


def link_standard_streams() -> None:
    """/dev/fd and its relatives, which devtmpfs does not have."""
    for name, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        try:
            os.symlink(f"/proc/self/fd{target}", f"/dev/{name}")
        except FileExistsError:
            pass


def take_console() -> None:
    """The kernel's console as stdin, stdout and stderr; without one, they stay what they are."""
    try:
        console = os.open("/dev/console", os.O_RDWR | os.O_NOCTTY)
    except OSError:
        return
    for fd in (0, 1, 2):
        os.dup2(console, fd)
    if console > 2:
        os.close(console)
