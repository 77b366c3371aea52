"""Where an image's files are: an OCI layout directory, or a tar archive of one, never unpacked.

Sources: image-layout.md of the OCI image spec. A path inside a layout comes only from a constant
here or from a digest whose syntax was checked, so it cannot leave the layout.
"""

import contextlib
import itertools
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from host_client.errors import ImageError
from host_client.images import limits
from host_client.images.tarformat import Kind, read_entries

_DIGEST = re.compile(r"sha256:[a-f0-9]{64}|sha512:[a-f0-9]{128}")


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes [start, start+length) of the open file `fd`."""

    fd: int
    start: int
    length: int


class Layout(Protocol):
    """An opened image store. `name` is how error messages call it."""

    name: str

    def open(self, path: str) -> contextlib.AbstractContextManager[Extent]:
        """The file at `path` inside the layout; ImageError when it is missing."""
        ...


def open_layout(transport: str, path: str) -> Layout:
    """Open `path` as an `oci` directory or an `oci-archive`; ImageError when it is neither."""
    layout = _Directory(path) if transport == "oci" else _Archive(path)
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
        data = os.pread(extent.fd, extent.length, extent.start)
    if len(data) < extent.length:
        raise ImageError(f"{layout.name}: {path} is cut short")
    return data


def _check_version(layout: Layout) -> None:
    try:
        version = json.loads(read_small(layout, "oci-layout"))["imageLayoutVersion"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ImageError(f"{layout.name}: its file oci-layout is not valid") from error
    if not isinstance(version, str) or not version.startswith("1."):
        raise ImageError(f"{layout.name}: unknown layout version {version!r:.40}, need 1.x")


class _Directory:
    def __init__(self, path: str) -> None:
        self.name = path
        if not os.path.isdir(path):
            raise ImageError(f"no image directory {path}: an OCI layout directory is needed")
        if not os.path.exists(os.path.join(path, "oci-layout")):
            raise ImageError(f"{path} is not an OCI layout: it has no file oci-layout")

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[Extent]:
        full = os.path.join(self.name, path)
        fd = _open_regular(full, f"{self.name}: {path}")
        try:
            yield Extent(fd, 0, os.fstat(fd).st_size)
        finally:
            os.close(fd)


class _Archive:
    def __init__(self, path: str) -> None:
        self.name = path
        self._members: dict[str, tuple[int, int]] = {}
        with self._file() as (fd, length):
            if os.pread(fd, 2, 0) == b"\x1f\x8b" or os.pread(fd, 4, 0) == b"\x28\xb5\x2f\xfd":
                raise ImageError(f"{path} is compressed: an oci-archive is a plain tar, unpack it")
            self._index(fd, length)
        if "oci-layout" not in self._members:
            raise ImageError(f"{path} is not an OCI archive: it has no member oci-layout")

    def _index(self, fd: int, length: int) -> None:
        bounded = itertools.islice(read_entries(fd, 0, length), limits.MAX_ARCHIVE_MEMBERS)
        try:
            for entry in bounded:
                if entry.kind is Kind.FILE:
                    name = os.path.normpath(os.fsdecode(entry.name))
                    self._members[name] = (entry.offset, entry.size)
        except ImageError as error:
            raise ImageError(f"{self.name}: {error}") from error

    @contextlib.contextmanager
    def _file(self) -> Iterator[tuple[int, int]]:
        fd = _open_regular(self.name, f"image archive {self.name}")
        try:
            yield fd, os.fstat(fd).st_size
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[Extent]:
        if path not in self._members:
            raise ImageError(f"{self.name}: {path} is missing")
        start, length = self._members[path]
        with self._file() as (fd, _):
            yield Extent(fd, start, length)


def _open_regular(path: str, what: str) -> int:
    """Open for reading; never wait for a FIFO or a device that lies where a file belongs."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError:
        raise ImageError(f"{what} is missing") from None
    except OSError as error:
        raise ImageError(f"{what} cannot be opened: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ImageError(f"{what} is not a regular file")
    return fd
