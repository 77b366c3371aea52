"""Where an image's files are: an OCI layout directory, or a tar archive, never unpacked.

Sources: image-layout.md of the OCI image spec. A path inside a layout comes only from a constant
here, from a digest whose syntax was checked, or, in an archive, from a list of its own members: so
it cannot leave the layout.
"""

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from microguest.host_client.errors import ImageError
from microguest.host_client.images import limits
from microguest.host_client.images.budget import Budget
from microguest.host_client.images.sparse import Pieces, stored_bytes
from microguest.host_client.images.tarformat import BLOCK, Entry, Kind, begins_archive, read_entries
from microguest.host_client.shortage import reason

_MAX_DIGITS = 20  # of a number: more than 64 bits hold
_DIGEST = re.compile(r"sha256:[a-f0-9]{64}|sha512:[a-f0-9]{128}")


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes [start, start+length) of the open file `fd`, or what `pieces` make of them."""

    fd: int
    start: int
    length: int
    pieces: Pieces = ()

    def chunks(self) -> Iterator[bytes]:
        """The bytes, up to a mebibyte at a time; less than `length` where the file is cut."""
        for chunk in stored_bytes(self.fd, self.start, self.length, self.pieces):
            if not chunk:
                return
            yield chunk


class Layout(Protocol):
    """An opened image store.

    name: how error messages call it.  docker: it has a list of images of docker's, manifest.json,
    instead of OCI's index.json.
    """

    name: str
    docker: bool

    def has(self, path: str) -> bool:
        """Whether there is such a file."""
        ...

    def open(self, path: str) -> contextlib.AbstractContextManager[Extent]:
        """The file at `path` inside the layout; ImageError when it is missing."""
        ...


def open_layout(transport: str, path: str) -> Layout:
    """Open `path` as an `oci` directory or an archive; ImageError when it is neither.

    An archive of either name may be OCI's or docker's; one that is both is what it is called.
    """
    layout: Layout
    layout = _Directory(path) if transport == "oci" else _Archive(path, transport)
    if not layout.docker:
        _check_version(layout)
    return layout


def blob_path(digest: str) -> str:
    """Where the blob of a digest is. ImageError when the digest is not sha256 or sha512."""
    if not _DIGEST.fullmatch(digest):
        raise ImageError(f"image has {digest[:160]!r} where a sha256 or sha512 digest belongs")
    return "blobs/" + digest.replace(":", "/")


def read_small(layout: Layout, path: str) -> bytes:
    """A whole JSON file of the layout."""
    with layout.open(path) as extent:
        if extent.length > limits.MAX_JSON_BYTES:
            raise ImageError(
                f"{layout.name}: {path} has {extent.length} bytes, more than the "
                f"{limits.MAX_JSON_BYTES} that are read"
            )
        data = b"".join(extent.chunks())
    if len(data) < extent.length:
        raise ImageError(f"{layout.name}: {path} is cut short")
    return data


def read_json(layout: Layout, what: str, data: bytes) -> Any:
    """A JSON document. ImageError where it is none, or has more in it than any honest one."""
    if data.count(b",") + data.count(b"[") + data.count(b"{") > limits.MAX_JSON_VALUES:
        raise ImageError(
            f"{layout.name}: {what} has more than {limits.MAX_JSON_VALUES} values in it"
        )
    try:
        return json.loads(data, parse_int=_whole_number, parse_constant=_no_number)
    except RecursionError as error:
        raise ImageError(f"{layout.name}: {what} has values nested too deep") from error
    except ValueError as error:
        raise ImageError(f"{layout.name}: {what} is not valid JSON: {error}") from error


def _whole_number(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _no_number(name: str) -> None:
    raise ValueError(f"{name}, which Python takes and no engine")


def _check_version(layout: Layout) -> None:
    document = read_json(layout, "oci-layout", read_small(layout, "oci-layout"))
    version = document.get("imageLayoutVersion") if isinstance(document, dict) else None
    if not isinstance(version, str) or not version.startswith("1."):
        raise ImageError(f"{layout.name}: unknown layout version {version!r:.40}, need 1.x")


class _Directory:
    docker = False

    def __init__(self, path: str) -> None:
        self.name = path
        if os.path.isfile(path):
            raise ImageError(
                f"{path} is a file: name it as oci-archive:{path} or docker-archive:{path}"
            )
        if not os.path.isdir(path):
            raise ImageError(f"no image directory {path}: an OCI layout directory is needed")
        if not os.path.exists(os.path.join(path, "oci-layout")):
            raise ImageError(f"{path} is not an OCI layout: it has no file oci-layout")

    def has(self, path: str) -> bool:
        return os.path.exists(os.path.join(self.name, path))

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[Extent]:
        full = os.path.join(self.name, path)
        fd = _open_regular(full, f"{self.name}: {path}")
        try:
            yield Extent(fd, 0, os.fstat(fd).st_size)
        finally:
            os.close(fd)


_PACKED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\0", b"BZh")
_WRITERS = {
    "docker-archive": "docker save or podman save",
    "oci-archive": "skopeo copy ... oci-archive:FILE",
}
_MEMBER_BYTES = 300  # what a listed member takes beside its name


class _Archive:
    """A tar of a layout. Members that are links, as of two tags with one layer, are followed."""

    def __init__(self, path: str, transport: str) -> None:
        self.name = path
        self._members: dict[str, tuple[int, int, Pieces]] = {}
        self._links: dict[str, str] = {}
        with self._file() as (fd, length):
            if os.pread(fd, 6, 0).startswith(_PACKED):
                raise ImageError(f"{path} is compressed: an archive is a plain tar, unpack it")
            if not begins_archive(os.pread(fd, BLOCK, 0)):
                raise ImageError(
                    f"{path} is no tar archive: {transport} takes what {_WRITERS[transport]} writes"
                )
            self._index(fd, length)
        lists = [name for name in ("oci-layout", "manifest.json") if self.has(name)]
        if not lists:
            raise ImageError(
                f"{path} is no archive of images: it has neither OCI's member oci-layout nor "
                "docker's manifest.json"
            )
        self.docker = lists[-1 if transport == "docker-archive" else 0] == "manifest.json"

    def _index(self, fd: int, length: int) -> None:
        budget = Budget(limits.Limits(entries=limits.MAX_ARCHIVE_MEMBERS))
        try:
            for entry in read_entries(fd, 0, length, budget):
                budget.entry()
                budget.retain(_MEMBER_BYTES + len(entry.name) + len(entry.target))
                budget.retain(8 * len(entry.pieces))
                self._take(entry)
        except ImageError as error:
            raise ImageError(f"{self.name}: {error}") from error

    def _take(self, entry: Entry) -> None:
        name = os.path.normpath(os.fsdecode(entry.name))
        target = os.fsdecode(entry.target)
        self._members.pop(name, None)
        self._links.pop(name, None)
        if entry.kind is Kind.FILE:
            self._members[name] = (entry.offset, entry.size, entry.pieces)
        elif entry.kind is Kind.HARD_LINK:
            self._links[name] = os.path.normpath(target)
        elif entry.kind is Kind.SYMLINK:
            self._links[name] = os.path.normpath(os.path.join(os.path.dirname(name), target))

    def _find(self, path: str) -> tuple[int, int, Pieces] | None:
        for _ in range(limits.MAX_SYMLINKS):
            if path not in self._links:
                break
            path = self._links[path]
        return self._members.get(path)

    def has(self, path: str) -> bool:
        return self._find(path) is not None

    @contextlib.contextmanager
    def _file(self) -> Iterator[tuple[int, int]]:
        fd = _open_regular(self.name, f"image archive {self.name}")
        try:
            yield fd, os.fstat(fd).st_size
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[Extent]:
        found = self._find(path)
        if found is None:
            raise ImageError(f"{self.name}: {ascii(path)[1:-1]:.200} is missing")
        start, length, pieces = found
        with self._file() as (fd, _):
            yield Extent(fd, start, length, pieces)


def _open_regular(path: str, what: str) -> int:
    """Open for reading; never wait for a FIFO or a device that lies where a file belongs."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError:
        raise ImageError(f"{what} is missing") from None
    except OSError as error:
        raise ImageError(f"{what} cannot be opened: {reason(error)}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ImageError(f"{what} is not a regular file")
    return fd
