"""The merged root of an image, in memory: layers are applied to inodes, never to a file system.

A hostile name can therefore reach nothing but this tree. What an entry does is what umoci and
container engines do when they unpack it; the rules are in the OCI image spec, layer.md, and in
docs/design/images.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from microguest.host_client.errors import ImageError
from microguest.host_client.images import limits
from microguest.host_client.images.budget import Budget, Exhausted
from microguest.host_client.images.sparse import Pieces
from microguest.host_client.images.tarformat import Entry, Kind

_WHITEOUT = b".wh."
_WHITEOUT_META = b".wh..wh."
_OPAQUE = b".wh..wh..opq"

# Names by which overlayfs keeps its own notes: a layer must not write them into our lower.
_OVERLAY_XATTRS = (b"trusted.overlay.", b"user.overlay.")

_XATTR_BYTES = 120  # what an attribute takes beside its own bytes
_PIECE_BYTES = 8  # a number in the map of a sparse file

# Shared by all files that are no directories, and by all that have no attributes: never written to.
_NO_CHILDREN: dict[bytes, "Inode"] = {}
_NO_XATTRS: dict[bytes, bytes] = {}


@dataclass(slots=True)
class Inode:
    """A file of any kind. `children` is used by directories only; `layer` says whose data it is.

    Inodes share `xattrs` where these are equal: it must not be changed.
    """

    number: int
    kind: Kind
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    xattrs: dict[bytes, bytes]
    children: dict[bytes, "Inode"]
    layer: int = 0
    offset: int = 0
    size: int = 0
    pieces: Pieces = ()
    target: bytes = b""
    major: int = 0
    minor: int = 0
    linked: bool = False


class Tree:
    """A root directory that layers are applied to, lowest first."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._inodes = 0
        self._layer = -1
        self._xattrs: dict[tuple[tuple[bytes, bytes], ...], dict[bytes, bytes]] = {}
        # (directory's inode number, name) of all that the current layer has set: its own whiteouts
        # do not touch these (layer.md: "whiteout files MUST only apply to resources in lower").
        self._touched: set[tuple[int, bytes]] = set()
        # Directories from which the current layer has dropped what is from lower ones. Once is
        # enough, and a layer that asks again and again would cost its length squared.
        self._cleared: set[int] = set()
        self.root = self._inode(Kind.DIRECTORY, mode=0o755)

    def apply(self, entries: Iterator[Entry]) -> None:
        """Apply one layer's entries in their order. ImageError for what no root may contain."""
        self._layer += 1
        self._touched = set()
        self._cleared = set()
        for entry in entries:
            try:
                self._budget.entry()
                self._apply(entry)
            except Exhausted as error:
                raise Exhausted(f"entry {show(entry.name)}: {error}") from error

    def _apply(self, entry: Entry) -> None:
        parts = self._clean(entry.name)
        if not parts:
            if entry.kind is not Kind.DIRECTORY:
                raise ImageError(f"layer replaces the root directory by a {entry.kind.name}")
            self._describe(self.root, entry)
            return
        if any(part.startswith(_WHITEOUT_META) for part in parts[:-1]):
            return  # aufs kept its own records in such directories
        name = parts[-1]
        if name.startswith(_WHITEOUT):
            self._white_out(parts[:-1], name)
            return
        parent = self._walk(parts[:-1], entry.name)
        self._touch(parent, name)
        directory = parent[-1][1]
        if name not in directory.children:
            self._budget.retain(len(name))
        if entry.kind is Kind.HARD_LINK:
            directory.children[name] = self._link_target(entry, directory, name)
            return
        existing = directory.children.get(name)
        if existing and existing.kind is Kind.DIRECTORY and entry.kind is Kind.DIRECTORY:
            self._describe(existing, entry)
            return
        directory.children[name] = self._describe(self._inode(entry.kind), entry)

    def _link_target(self, entry: Entry, directory: Inode, name: bytes) -> Inode:
        parts = self._clean(entry.target)
        found = self._find(parts[:-1]) if parts else None
        inode = found[-1][1].children.get(parts[-1]) if found else None
        if inode is None:
            raise ImageError(f"hard link {show(entry.name)} to {show(entry.target)}: no such file")
        if inode.kind is Kind.DIRECTORY:
            raise ImageError(f"hard link {show(entry.name)} to the directory {show(entry.target)}")
        inode.linked = inode.linked or directory.children.get(name) is not inode
        return inode

    def _white_out(self, parent: list[bytes], name: bytes) -> None:
        found = self._find(parent)
        if name == _OPAQUE:
            if found is not None:
                self._drop_lower(found[-1][1])
            return
        if name.startswith(_WHITEOUT_META):
            return
        victim = name.removeprefix(_WHITEOUT)
        if victim in (b"", b".", b".."):
            raise ImageError(f"layer has the impossible whiteout {show(name)}")
        if found is None:
            return
        directory = found[-1][1]
        inode = directory.children.get(victim)
        if inode is None:
            return
        if (directory.number, victim) not in self._touched:
            del directory.children[victim]
        elif inode.kind is Kind.DIRECTORY:
            self._drop_lower(inode)

    def _drop_lower(self, top: Inode) -> None:
        """Remove what lower layers left below `top`; keep what this layer has put there."""
        pending = [top]
        while pending:
            directory = pending.pop()
            if directory.number in self._cleared:
                continue
            self._cleared.add(directory.number)
            self._budget.step(len(directory.children))
            for name, child in list(directory.children.items()):
                if (directory.number, name) not in self._touched:
                    del directory.children[name]
                elif child.kind is Kind.DIRECTORY:
                    pending.append(child)

    # -- paths -------------------------------------------------------------------------------

    def _walk(self, parts: list[bytes], name: bytes) -> list[tuple[bytes, Inode]]:
        """The real path of `parts`, symlinks followed inside the root, missing parts created."""
        found = self._resolve(parts, create=True)
        if found is not None and len(found) - 1 > limits.MAX_DEPTH:
            raise ImageError(
                f"layer entry {show(name)} is more than {limits.MAX_DEPTH} directories deep"
            )
        if found is None:
            raise ImageError(f"layer entry {show(name)}: its parent is not a directory")
        if sum(len(part) + 1 for part, _ in found) > limits.MAX_PATH_BYTES:
            raise ImageError(f"layer entry {show(name)}: its real path is too long")
        return found

    def _find(self, parts: list[bytes]) -> list[tuple[bytes, Inode]] | None:
        return self._resolve(parts, create=False)

    def _resolve(self, parts: list[bytes], *, create: bool) -> list[tuple[bytes, Inode]] | None:
        stack = [(b"", self.root)]
        pending = parts[::-1]
        followed = steps = 0
        while pending:
            part = pending.pop()
            steps += 1
            if followed > limits.MAX_SYMLINKS or steps > limits.MAX_PATH_STEPS:
                raise ImageError(
                    f"layer path {show(b'/'.join(parts))} leads through too many symlinks, or more "
                    f"than {limits.MAX_PATH_STEPS} names"
                )
            if part in (b"", b"."):
                continue
            if part == b"..":
                del stack[max(1, len(stack) - 1) :]
                continue
            directory = stack[-1][1]
            child = directory.children.get(part)
            if child is None:
                if not create:
                    return None
                _check_name(part)
                self._budget.retain(len(part))
                child = directory.children[part] = self._implied()
            if child.kind is Kind.SYMLINK:
                followed += 1
                if child.target.startswith(b"/"):
                    del stack[1:]
                pending.extend(child.target.split(b"/")[::-1])
            elif child.kind is Kind.DIRECTORY:
                stack.append((part, child))
            else:
                return None
        self._budget.step(steps)
        return stack

    def _touch(self, path: list[tuple[bytes, Inode]], name: bytes) -> None:
        directory = self.root
        for part, inode in path[1:]:
            self._touched.add((directory.number, part))
            directory = inode
        self._touched.add((directory.number, name))

    # -- inodes ------------------------------------------------------------------------------

    def _inode(self, kind: Kind, *, mode: int = 0) -> Inode:
        self._inodes += 1
        children = {} if kind is Kind.DIRECTORY else _NO_CHILDREN
        return Inode(self._inodes, kind, mode, 0, 0, 0, _NO_XATTRS, children)

    def _implied(self) -> Inode:
        """A directory that no entry is for, only those of its children."""
        self._budget.entry()
        return self._inode(Kind.DIRECTORY, mode=0o755)

    def _describe(self, inode: Inode, entry: Entry) -> Inode:
        """Give the inode all that the entry says of it; a directory keeps its children."""
        inode.mode = 0o777 if entry.kind is Kind.SYMLINK else entry.mode
        inode.uid, inode.gid, inode.mtime_ns = entry.uid, entry.gid, entry.mtime_ns
        inode.xattrs = self._kept_xattrs(entry.xattrs) if entry.xattrs else _NO_XATTRS
        self._budget.retain(len(entry.target) + _PIECE_BYTES * len(entry.pieces))
        inode.layer, inode.offset, inode.size = self._layer, entry.offset, entry.size
        inode.pieces = entry.pieces
        inode.target, inode.major, inode.minor = entry.target, entry.major, entry.minor
        if entry.kind is Kind.SYMLINK and not 0 < len(entry.target) < limits.MAX_PATH_BYTES:
            raise ImageError(f"symlink {show(entry.name)} has no target, or one that is too long")
        return inode

    def _kept_xattrs(self, xattrs: dict[bytes, bytes]) -> dict[bytes, bytes]:
        """These attributes, kept once for all files that have the same."""
        kept = {key: xattrs[key] for key in sorted(xattrs) if not key.startswith(_OVERLAY_XATTRS)}
        known = self._xattrs.get(tuple(kept.items()))
        if known is not None:
            return known
        self._budget.retain(sum(len(k) + len(v) + _XATTR_BYTES for k, v in kept.items()))
        self._xattrs[tuple(kept.items())] = kept
        return kept

    # -- the result --------------------------------------------------------------------------

    def walk(self) -> Iterator[tuple[bytes, Inode]]:
        """Every file as (path, inode): parents before children, names sorted, the root as b""."""
        yield b"", self.root
        # Iterators, and no list of paths: those of one large directory would not fit into memory.
        pending = [(b"", _by_name(self.root))]
        while pending:
            prefix, children = pending[-1]
            for name, inode in children:
                path = prefix + name
                try:
                    self._budget.path(len(path))
                except Exhausted as error:
                    raise Exhausted(f"file {show(path)}: {error}") from error
                yield path, inode
                if inode.kind is Kind.DIRECTORY:
                    pending.append((path + b"/", _by_name(inode)))
                    break
            else:
                pending.pop()

    def _clean(self, name: bytes) -> list[bytes]:
        """The name's parts from the root, with "." and ".." resolved as text.

        A name that climbs out of the root is refused, as docker does: nothing honest has one.
        """
        parts: list[bytes] = []
        pieces = name.split(b"/")
        self._budget.step(len(pieces))
        for part in pieces:
            if part in (b"", b"."):
                continue
            if part == b"..":
                if not parts:
                    raise ImageError(f"layer entry {show(name)} points outside the root")
                parts.pop()
                continue
            _check_name(part)
            parts.append(part)
        return parts


def _by_name(directory: Inode) -> Iterator[tuple[bytes, Inode]]:
    return iter(sorted(directory.children.items(), key=_name_of))


def _name_of(item: tuple[bytes, Inode]) -> bytes:
    return item[0]


def _check_name(part: bytes) -> None:
    if len(part) > limits.MAX_NAME_BYTES:
        raise ImageError(f"layer has a file name of {len(part)} bytes: {show(part)}")


def show(name: bytes) -> str:
    """A name that a stranger chose, for an error message."""
    text = repr(name)[1:]
    return text if len(text) <= 200 else text[:200] + "...'"
