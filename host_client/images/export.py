"""A merged tree as one clean tar stream: parents before children, each inode once, no whiteouts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, BinaryIO

from host_client.errors import ImageError
from host_client.images.budget import Budget, Exhausted
from host_client.images.sparse import stored_bytes
from host_client.images.tarformat import Entry, Kind
from host_client.images.tarwriter import END_OF_ARCHIVE, header_bytes, padding
from host_client.images.tree import Inode, Tree, show

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
    1970.  devices: it can make device nodes.
    """

    root: bool
    xattrs: tuple[bytes, ...]
    full_times: bool
    devices: bool


SQUASHFS = Abilities(
    root=False, xattrs=(b"user.", b"trusted.", b"security."), full_times=False, devices=True
)
EROFS = Abilities(root=True, xattrs=(b"",), full_times=True, devices=True)
DIRECTORY = Abilities(root=True, xattrs=(b"",), full_times=True, devices=True)
DIRECTORY_OF_A_USER = Abilities(root=True, xattrs=(b"user.",), full_times=True, devices=False)


def write_tar(merged: Merged, abilities: Abilities, pipe: IO[bytes]) -> None:
    """Write the root to `pipe`."""
    for entry, inode in _entries(merged.tree, abilities):
        header = header_bytes(entry)
        try:
            merged.budget.write(len(header) + entry.size)
        except Exhausted as error:
            raise Exhausted(f"file {show(entry.name)}: {error}") from error
        pipe.write(header)
        if entry.kind is Kind.FILE:
            _copy(merged, inode, pipe)
    pipe.write(END_OF_ARCHIVE)


def squashfs_seconds(mtime_ns: int) -> int:
    """The nearest time that squashfs can hold: unsigned 32-bit seconds since 1970."""
    return min(max(mtime_ns // 1_000_000_000, 0), _MAX_SQUASHFS_TIME)


def _entries(tree: Tree, abilities: Abilities) -> Iterator[tuple[Entry, Inode]]:
    first_names: dict[int, bytes] = {}
    for path, inode in tree.walk():
        if not path and not abilities.root:
            continue
        if inode.kind in (Kind.CHAR_DEVICE, Kind.BLOCK_DEVICE) and not abilities.devices:
            continue
        name = path or b"."  # no "./" before names: sqfstar loses hard links then
        if inode.kind is Kind.DIRECTORY:
            name += b"/"
        if inode.number in first_names:
            yield Entry(name, Kind.HARD_LINK, target=first_names[inode.number]), inode
            continue
        if inode.linked:
            first_names[inode.number] = name
        yield _entry(name, inode, abilities), inode


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
