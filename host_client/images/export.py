"""A merged tree as one clean tar stream: parents before children, each inode once, no whiteouts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, BinaryIO

from microguest.host_client.errors import ImageError
from microguest.host_client.images import limits
from microguest.host_client.images.budget import Budget, Exhausted
from microguest.host_client.images.sparse import stored_bytes
from microguest.host_client.images.tarformat import Entry, Kind
from microguest.host_client.images.tarwriter import END_OF_ARCHIVE, header_bytes, padding
from microguest.host_client.images.tree import Inode, Tree, show

_LINK_IN_INODE = 60  # bytes of a target: less is not in a block of its own
_MAX_SQUASHFS_TIME = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Merged:
    """The root of an image, to be written somewhere.

    layers: the spooled archives that hold the files' bytes.  told: called every so often meanwhile.
    """

    tree: Tree
    layers: Sequence[BinaryIO]
    budget: Budget
    told: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Abilities:
    """What the receiver of the stream can keep.

    root: it takes an entry for the root directory itself.  xattrs: prefixes of the names of the
    extended attributes it can hold.  full_times: it has fractions of a second and times before
    1970.  devices: it can make device nodes.  owners: how many different ones it can hold, None
    for any number.  compares: it looks for a name by going through all names of its directory.
    block: bytes of the smallest piece of a disk that it takes for what an inode does not hold; 0:
    it packs them.
    """

    root: bool
    xattrs: tuple[bytes, ...]
    full_times: bool
    devices: bool
    owners: int | None = None
    compares: bool = False
    block: int = 0


SQUASHFS = Abilities(
    root=False,
    xattrs=(b"user.", b"trusted.", b"security."),
    full_times=False,
    devices=True,
    owners=limits.MAX_OWNERS,
    compares=True,
)
EROFS = Abilities(root=True, xattrs=(b"",), full_times=True, devices=True, compares=True)
DIRECTORY = Abilities(
    root=True, xattrs=(b"",), full_times=True, devices=True, block=limits.HOST_BLOCK
)
DIRECTORY_OF_A_USER = Abilities(
    root=True, xattrs=(b"user.",), full_times=True, devices=False, block=limits.HOST_BLOCK
)


def write_tar(merged: Merged, abilities: Abilities, pipe: IO[bytes]) -> None:
    """Write the root to `pipe`."""
    owners: set[int] = set()
    for entry, inode in _entries(merged, abilities):
        owners.update((entry.uid, entry.gid))
        if abilities.owners is not None and len(owners) > abilities.owners:
            raise ImageError(
                f"file {show(entry.name)}: the image has more than {abilities.owners} different "
                f"users and groups, which a squashfs cannot hold: {_INSTEAD}, or install "
                "erofs-utils 1.7 or newer on this host"
            )
        header = header_bytes(entry)
        try:
            merged.budget.write(len(header) + _size_on_disk(entry, abilities.block))
        except Exhausted as error:
            raise Exhausted(f"file {show(entry.name)}: {error}") from error
        pipe.write(header)
        if entry.kind is Kind.FILE:
            _copy(merged, inode, pipe)
    pipe.write(END_OF_ARCHIVE)


def _size_on_disk(entry: Entry, block: int) -> int:
    """What it takes beside its inode and its name, for which its header is charged.

    As ext4 has it: a directory has a block, a link of less than 60 bytes is in the inode, and so
    are no attributes, as the smallest inodes have room for none.
    """
    if not block:
        return entry.size
    link = (
        entry.target if entry.kind is Kind.SYMLINK and len(entry.target) >= _LINK_IN_INODE else b""
    )
    own = block if entry.kind is Kind.DIRECTORY else entry.size + len(link)
    attributes = sum(len(name) + len(value) for name, value in entry.xattrs.items())
    return _up(own, block) + _up(attributes, block)


def _up(size: int, block: int) -> int:
    return -(-size // block) * block


def squashfs_seconds(mtime_ns: int) -> int:
    """The nearest time that squashfs can hold: unsigned 32-bit seconds since 1970."""
    return min(max(mtime_ns // 1_000_000_000, 0), _MAX_SQUASHFS_TIME)


_INSTEAD = "boot it with --machine namespaces, which takes a directory and no disk"


def _entries(merged: Merged, abilities: Abilities) -> Iterator[tuple[Entry, Inode]]:
    linked: dict[int, _Linked] = {}
    for path, inode in merged.tree.walk():
        if abilities.compares and inode.kind is Kind.DIRECTORY:
            _charge_names(merged.budget, path, inode)
        if not path and not abilities.root:
            continue
        if inode.kind in (Kind.CHAR_DEVICE, Kind.BLOCK_DEVICE) and not abilities.devices:
            continue
        name = path or b"."  # no "./" before names: sqfstar loses hard links then
        if inode.kind is Kind.DIRECTORY:
            name += b"/"
        if inode.linked:
            first = linked.get(inode.number)
            if first is not None:
                first.count(merged.budget, path)
                yield Entry(name, Kind.HARD_LINK, target=first.name), inode
                continue
            steps = _names_on_the_way(merged.tree, path) if abilities.compares else 0
            linked[inode.number] = _Linked(name, steps // limits.NAMES_A_STEP)
        yield _entry(name, inode, abilities), inode


@dataclass(slots=True)
class _Linked:
    """A file of several names: the one that was written first, and what it takes to find that."""

    name: bytes
    steps: int
    names: int = 1

    def count(self, budget: Budget, path: bytes) -> None:
        """`path` is another name of it."""
        self.names += 1
        if self.names > limits.MAX_LINKS:
            raise ImageError(
                f"file {show(path)}: it is hard link {self.names} to {show(self.name)}, which may "
                f"have {limits.MAX_LINKS} names: make the others symlinks"
            )
        try:
            budget.step(self.steps)
        except Exhausted as error:
            raise Exhausted(
                f"file {show(path)}, a hard link to {show(self.name)} in a large directory: "
                f"{error}: {_INSTEAD}"
            ) from error


def _names_on_the_way(tree: Tree, path: bytes) -> int:
    """Names that may be compared until the file at `path` is found: all of its directories."""
    directory, names = tree.root, 0
    for part in path.split(b"/"):
        names += len(directory.children)
        directory = directory.children[part]
    return names


def _charge_names(budget: Budget, path: bytes, directory: Inode) -> None:
    """For the names of a directory, each of which will be compared with all before it."""
    names = len(directory.children)
    try:
        budget.step(names * names // (2 * limits.NAMES_A_STEP))
    except Exhausted as error:
        raise Exhausted(
            f"directory {show(path)} has {names} names, which takes too long to put on a disk: "
            f"{error}: spread them over more directories, or {_INSTEAD}"
        ) from error


def _entry(name: bytes, inode: Inode, abilities: Abilities) -> Entry:
    mtime = inode.mtime_ns
    if not abilities.full_times:
        mtime = squashfs_seconds(mtime) * 1_000_000_000
    return Entry(
        name=name,
        kind=inode.kind,
        mode=inode.mode,
        uid=inode.uid,
        gid=inode.gid,
        mtime_ns=mtime,
        size=inode.size,
        target=inode.target,
        major=inode.major,
        minor=inode.minor,
        xattrs={
            key: value for key, value in inode.xattrs.items() if key.startswith(abilities.xattrs)
        },
    )


def _copy(merged: Merged, inode: Inode, pipe: IO[bytes]) -> None:
    layer = merged.layers[inode.layer].fileno()
    for chunk in stored_bytes(layer, inode.offset, inode.size, inode.pieces):
        if not chunk:
            raise ImageError("an unpacked layer became shorter while it was read: try again")
        merged.budget.step()
        merged.told()
        pipe.write(chunk)
    pipe.write(padding(inode.size))
