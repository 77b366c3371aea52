"""What the root file system is made of, and what is mounted into it: part of the boot config.

Lowers, upper and volumes name their sources by what a host can give a machine: the serial of a
block device, the tag of a virtiofs or 9p share, a directory of the initial root. Pure records.
"""

from microguest.guest import bounds
from microguest.guest.record import Record, RecordError

__all__ = ["Lower", "Root", "Upper", "Volume", "check_size"]

SHARED = ("virtiofs", "9p")
SIZE_DIGITS = 18  # of the number in a size, which is then within what the kernel takes


# The checks come first: some records are defaults of others, and so are checked at import.


def check_source(kind: str, serial: str, tag: str, path: str) -> None:
    """Raises RecordError where what `kind` is found by is missing, or no system call takes it."""
    for field, text in (("serial", serial), ("tag", tag), ("path", path)):
        if "\0" in text:
            raise RecordError(f"{field}: {text!r:.100} has a NUL byte")
    if kind == "disk" and not serial:
        raise RecordError("serial: is needed to find the disk")
    if kind in SHARED and not tag:
        raise RecordError("tag: is needed to find the share")
    if "," in tag:
        raise RecordError(f"tag: {tag!r:.100} has a comma, which mount options cannot hold")
    if kind in ("directory", "bind") and not path.startswith("/"):
        raise RecordError("path: must be absolute")


def check_target(path: str, field: str) -> None:
    """Raises RecordError for what is no place below the root that something can be mounted at."""
    words = path.split("/")
    if words[0] or not any(words) or ".." in words or "." in words or "\0" in path:
        raise RecordError(
            f"{field}: {path!r:.200} is not an absolute path below / without . and .."
        )


def check_size(size: str, field: str = "size") -> None:
    """Raises RecordError for what tmpfs(5) does not take."""
    number = size[:-1] if size[-1:] in tuple("%kmgKMG") else size
    if not (number.isascii() and number.isdecimal() and len(number) <= SIZE_DIGITS):
        raise RecordError(f"{field}: {size!r:.100} is not a size or percentage")


def check_format(kind: str, policy: str) -> None:
    """Raises RecordError where it is not a policy, or not for this kind."""
    if policy not in ("never", "if-blank"):
        raise RecordError(f"format: {policy!r:.100} is not never or if-blank")
    if policy != "never" and kind != "disk":
        raise RecordError("format: only a disk can be formatted")


class Lower(Record):
    """One layer of the root; the first of `Root.lower` is the topmost."""

    kind: str  # "disk": a virtio-blk device; "virtiofs", "9p"; "directory" of the initial root
    serial: str = ""  # disk: the serial that the host gave it
    fstype: str = ""  # disk: "erofs", "squashfs" or "ext4"
    tag: str = ""  # virtiofs, 9p: the share's name
    path: str = ""  # directory

    def check(self) -> None:
        if self.kind not in ("disk", *SHARED, "directory"):
            raise RecordError(f"kind: {self.kind!r:.100} is not disk, virtiofs, 9p or directory")
        if self.kind == "disk" and self.fstype not in ("erofs", "squashfs", "ext4"):
            raise RecordError(f"fstype: {self.fstype!r:.100} is not erofs, squashfs or ext4")
        check_source(self.kind, self.serial, self.tag, self.path)


class Upper(Record):
    """What takes the writes of an overlay root."""

    kind: str = "tmpfs"  # or "disk": what is written stays there for the next boot
    size: str = "50%"  # tmpfs: of memory, or bytes with k, m, g: tmpfs(5) size=
    serial: str = ""  # disk
    # disk: "never", or "if-blank": a device that begins with nothing but zeros gets an ext4
    format: str = "never"

    def check(self) -> None:
        if self.kind not in ("tmpfs", "disk"):
            raise RecordError(f"kind: {self.kind!r:.100} is not tmpfs or disk")
        check_size(self.size)
        check_format(self.kind, self.format)
        if self.kind == "disk":
            check_source("disk", self.serial, "", "")


class Root(Record):
    """The root: overlayfs of the lowers under the upper, or one lower as it is.

    upper None: there is no overlay; the one lower is the root itself, writable where its file
    system is and `read_only` is not set. read_only: the root cannot be written to, but what is at
    and below the paths in `writable`, which exist or are made, can be. directories: made where they
    are missing, root's and with mode 0755, as far as the root takes them.
    """

    lower: tuple[Lower, ...]
    upper: Upper | None = Upper()
    read_only: bool = False
    writable: tuple[str, ...] = ()
    directories: tuple[str, ...] = ()

    def check(self) -> None:
        if not self.lower:
            raise RecordError("lower: needs at least one layer")
        if len(self.lower) > bounds.LAYERS:
            raise RecordError(f"lower: {len(self.lower)} layers, at most {bounds.LAYERS}")
        if self.upper is None and len(self.lower) > 1:
            raise RecordError("upper: only a root of one layer can do without")
        if self.writable and not self.read_only:
            raise RecordError("writable: only a root that is read_only has exceptions")
        for field, paths in (("writable", self.writable), ("directories", self.directories)):
            if len(paths) > bounds.VOLUMES:
                raise RecordError(f"{field}: {len(paths)} paths, at most {bounds.VOLUMES}")
            for path in paths:
                check_target(path, field)


class Volume(Record):
    """Something mounted into the root; those whose target is inside another's come after it.

    nosuid and nodev unless `suid` and `dev` say otherwise. A symbolic link on the way to the target
    is followed inside the root only.
    """

    kind: str  # "virtiofs", "9p", "disk", "tmpfs", "directory" of the initial root, "bind"
    target: str  # absolute path in the image
    tag: str = ""  # virtiofs, 9p
    serial: str = ""  # disk
    fstype: str = ""  # disk: "ext4", "erofs" or "squashfs"
    format: str = "never"  # disk: as in Upper
    path: str = ""  # directory: in the initial root; bind: in the image
    size: str = "50%"  # tmpfs: as in Upper
    mode: int = 0o1777  # tmpfs: of its root directory
    read_only: bool = False
    suid: bool = False
    dev: bool = False
    exec: bool = True
    create: bool = True  # make a missing target; without it a missing one fails the boot

    def check(self) -> None:
        if self.kind not in ("disk", *SHARED, "tmpfs", "directory", "bind"):
            raise RecordError(
                f"kind: {self.kind!r:.100} is not virtiofs, 9p, disk, tmpfs, directory or bind"
            )
        check_target(self.target, "target")
        check_size(self.size)
        check_format(self.kind, self.format)
        if self.kind == "disk" and self.fstype not in ("ext4", "erofs", "squashfs"):
            raise RecordError(f"fstype: {self.fstype!r:.100} is not ext4, erofs or squashfs")
        if not 0 <= self.mode <= 0o1777:
            raise RecordError(f"mode: {self.mode:o} is not 0 to 1777")
        check_source(self.kind, self.serial, self.tag, self.path)
