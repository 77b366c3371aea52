"""The merged root of an image, in memory: layers are applied to inodes, never to a file system.

A hostile name can therefore reach nothing but this tree. What an entry does is what umoci and
container engines do when they unpack it; the rules are in the OCI image spec, layer.md, and in
docs/images.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from host_client.errors import ImageError
from host_client.images import limits
from host_client.images.tarformat import Entry, Kind

_WHITEOUT = b".wh."
_WHITEOUT_META = b".wh..wh."
_OPAQUE = b".wh..wh..opq"

# Names by which overlayfs keeps its own notes: a layer must not write them into our lower.
_OVERLAY_XATTRS = (b"trusted.overlay.", b"user.overlay.")


@dataclass(slots=True)
class Inode:
    """A file of any kind. `children` is used by directories only; `layer` says whose data it is."""

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
    target: bytes = b""
    major: int = 0
    minor: int = 0
    linked: bool = False


class Tree:
    """A root directory that layers are applied to, lowest first."""

    def __init__(self, bounds: limits.Limits = limits.DEFAULT_LIMITS) -> None:
        self._bounds = bounds
        self._entries = 0
        self._inodes = 0
        self._layer = -1
        # (directory's inode number, name) of all that the current layer has set: its own whiteouts
        # do not touch these (layer.md: "whiteout files MUST only apply to resources in lower").
        self._touched: set[tuple[int, bytes]] = set()
        self.root = self._inode(Kind.DIRECTORY, mode=0o755)

    def apply(self, entries: Iterator[Entry]) -> None:
        """Apply one layer's entries in their order. ImageError for what no root may contain."""
        self._layer += 1
        self._touched = set()
        for entry in entries:
            self._entries += 1
            if self._entries > self._bounds.entries:
                raise ImageError(f"image has more than {self._bounds.entries} entries")
            self._apply(entry)

    def _apply(self, entry: Entry) -> None:
        parts = _clean(entry.name)
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
        if entry.kind is Kind.HARD_LINK:
            directory.children[name] = self._link_target(entry, directory, name)
            return
        existing = directory.children.get(name)
        if existing and existing.kind is Kind.DIRECTORY and entry.kind is Kind.DIRECTORY:
            self._describe(existing, entry)
            return
        directory.children[name] = self._describe(self._inode(entry.kind), entry)

    def _link_target(self, entry: Entry, directory: Inode, name: bytes) -> Inode:
        parts = _clean(entry.target)
        found = self._find(parts[:-1]) if parts else None
        inode = found[-1][1].children.get(parts[-1]) if found else None
        if inode is None:
            raise ImageError(
                f"hard link {_show(entry.name)} to {_show(entry.target)}: no such file"
            )
        if inode.kind is Kind.DIRECTORY:
            raise ImageError(
                f"hard link {_show(entry.name)} to the directory {_show(entry.target)}"
            )
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
            raise ImageError(f"layer has the impossible whiteout {_show(name)}")
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
            for name, child in list(directory.children.items()):
                if (directory.number, name) not in self._touched:
                    del directory.children[name]
                elif child.kind is Kind.DIRECTORY:
                    pending.append(child)

    # -- paths -------------------------------------------------------------------------------

    def _walk(self, parts: list[bytes], name: bytes) -> list[tuple[bytes, Inode]]:
        """The real path of `parts`, symlinks followed inside the root, missing parts created."""
        found = self._resolve(parts, create=True)
        if found is None:
            raise ImageError(f"layer entry {_show(name)}: its parent is not a directory")
        if sum(len(part) + 1 for part, _ in found) > limits.MAX_PATH_BYTES:
            raise ImageError(f"layer entry {_show(name)}: its real path is too long")
        return found

    def _find(self, parts: list[bytes]) -> list[tuple[bytes, Inode]] | None:
        return self._resolve(parts, create=False)

    def _resolve(self, parts: list[bytes], *, create: bool) -> list[tuple[bytes, Inode]] | None:
        stack = [(b"", self.root)]
        pending = parts[::-1]
        followed = 0
        while pending:
            part = pending.pop()
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
                child = directory.children[part] = self._inode(Kind.DIRECTORY, mode=0o755)
            if child.kind is Kind.SYMLINK:
                followed += 1
                if followed > limits.MAX_SYMLINKS:
                    raise ImageError(f"layer path {_show(b'/'.join(parts))}: too many symlinks")
                if child.target.startswith(b"/"):
                    del stack[1:]
                pending.extend(child.target.split(b"/")[::-1])
            elif child.kind is Kind.DIRECTORY:
                stack.append((part, child))
            else:
                return None
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
        if self._inodes > 2 * self._bounds.entries:
            raise ImageError(f"image has more than {2 * self._bounds.entries} files")
        return Inode(self._inodes, kind, mode, 0, 0, 0, {}, {})

    def _describe(self, inode: Inode, entry: Entry) -> Inode:
        """Give the inode all that the entry says of it; a directory keeps its children."""
        inode.mode = 0o777 if entry.kind is Kind.SYMLINK else entry.mode
        inode.uid, inode.gid, inode.mtime_ns = entry.uid, entry.gid, entry.mtime_ns
        inode.xattrs = {
            key: value for key, value in entry.xattrs.items() if not key.startswith(_OVERLAY_XATTRS)
        }
        inode.layer, inode.offset, inode.size = self._layer, entry.offset, entry.size
        inode.target, inode.major, inode.minor = entry.target, entry.major, entry.minor
        if entry.kind is Kind.SYMLINK and not 0 < len(entry.target) < limits.MAX_PATH_BYTES:
            raise ImageError(f"symlink {_show(entry.name)} has no target, or one that is too long")
        return inode

    # -- the result --------------------------------------------------------------------------

    def walk(self) -> Iterator[tuple[bytes, Inode]]:
        """Every file as (path, inode): parents before children, names sorted, the root as b""."""
        pending = [(b"", self.root)]
        while pending:
            path, inode = pending.pop()
            yield path, inode
            prefix = path + b"/" if path else b""
            pending.extend(
                (prefix + name, child)
                for name, child in sorted(inode.children.items(), key=_by_name, reverse=True)
            )


def _by_name(item: tuple[bytes, Inode]) -> bytes:
    return item[0]


def _clean(name: bytes) -> list[bytes]:
    """The name's parts from the root, with "." and ".." resolved as text.

    A name that climbs out of the root is refused, as docker does: nothing honest has one.
    """
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part in (b"", b"."):
            continue
        if part == b"..":
            if not parts:
                raise ImageError(f"layer entry {_show(name)} points outside the root")
            parts.pop()
            continue
        _check_name(part)
        parts.append(part)
    return parts


def _check_name(part: bytes) -> None:
    if len(part) > limits.MAX_NAME_BYTES:
        raise ImageError(f"layer has a file name of {len(part)} bytes: {_show(part)}")


def _show(name: bytes) -> str:
    text = repr(name)[1:]
    return text if len(text) <= 200 else text[:200] + "...'"
