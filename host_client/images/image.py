"""An opened image, and what a machine boots from: a disk or a directory.

The story of the package: reference -> layout -> manifest -> layers -> tree -> tar stream -> disk.
"""

import contextlib
import errno
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from host_client.errors import ImageError
from host_client.images import recipes
from host_client.images.cache import Cache, Lease, default_directory
from host_client.images.command import no_space
from host_client.images.layers import spool_layer
from host_client.images.layout import Layout, open_layout
from host_client.images.limits import DEFAULT_LIMITS, Limits
from host_client.images.manifest import Layer, parse_platform, resolve
from host_client.images.process import ImageConfig
from host_client.images.reference import ImageReference, parse_reference
from host_client.images.tarformat import read_entries
from host_client.images.tree import Tree

_Recipe = Callable[[Tree, Sequence[BinaryIO], str], None]
_CONTENT = "root"  # the disk or directory in its cache entry


@dataclass(frozen=True, slots=True)
class Disk:
    """A read-only file system in a file. `fstype`: "erofs" or "squashfs", as mount(8) says it.

    Keep the object (or the Image) while a machine uses the file: it holds the cache entry.
    """

    path: Path
    fstype: recipes.Fstype
    _lease: Lease | None = None


class Image:
    """An image whose manifest and config have been read and checked; its layers not yet.

    digest: of the manifest, "sha256:..."; None for a `dir`.  layers: lowest first; () for a `dir`.
    Close it, or leave its `with` block, when no machine uses its disk or directory any more: until
    then they stay in the cache.
    """

    def __init__(
        self,
        reference: ImageReference,
        path: Path,
        *,
        config: ImageConfig,
        digest: str | None = None,
        layers: tuple[Layer, ...] = (),
        layout: Layout | None = None,
    ) -> None:
        self.reference = reference
        self.path = path
        self.config = config
        self.digest = digest
        self.layers = layers
        self._layout = layout
        self._leases: list[Lease] = []

    def close(self) -> None:
        """Let the cache evict what `as_disk` and `as_directory` gave. May be called twice."""
        while self._leases:
            self._leases.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_how: object) -> None:
        self.close()

    @contextlib.contextmanager
    def merged(self, work: str, limits: Limits) -> Iterator[tuple[Tree, list[BinaryIO]]]:
        """All layers verified and applied: the tree, and the spooled archives with its bytes."""
        assert self._layout is not None
        tree = Tree(limits)
        room = limits.bytes
        with contextlib.ExitStack() as stack:
            spools: list[BinaryIO] = []
            for layer in self.layers:
                spool = stack.enter_context(spool_layer(self._layout, layer, work, room))
                length = os.fstat(spool.fileno()).st_size
                room -= length
                try:
                    tree.apply(read_entries(spool.fileno(), 0, length))
                except ImageError as error:
                    raise ImageError(f"layer {layer.blob.digest}: {error}") from error
                spools.append(spool)
            yield tree, spools

    def lease(self, cache: Cache, kind: str, make: _Recipe, limits: Limits) -> Lease:
        """The cache entry of this image in one form, by `make` if it is not there yet.

        kind: names the form in the entry's key.  make: (tree, layers, path) -> the form at path.
        """
        assert self.digest is not None

        def build(work: str, content: str) -> None:
            target = os.path.join(content, _CONTENT)
            with self.merged(work, limits) as (tree, spools):
                make(tree, spools, target)

        key = f"{self.digest.replace(':', '-')}-{kind}-{recipes.VERSION}"
        with _readable_errors(f"{self.reference}"):
            lease = cache.obtain(key, build)
        self._leases.append(lease)
        return lease


def open_image(text: str, platform: str = "linux/amd64") -> Image:
    """Find an image and read what it says of itself.

    text: as `parse_reference` takes it.  platform: os/architecture[/variant] of the guest.
    Raises ImageError for a missing or broken image, a missing tag, or another platform. An opened
    image holds no file open and makes no file: only `as_disk` and `as_directory` do.
    """
    reference = parse_reference(text)
    wanted = parse_platform(platform)
    path = Path(os.path.abspath(reference.path))
    if reference.transport == "dir":
        return Image(reference, _checked_root(path), config=ImageConfig())
    with _readable_errors(f"{reference}"):
        layout = open_layout(reference.transport, str(path))
        manifest = resolve(layout, reference.tag, wanted)
    return Image(
        reference,
        path,
        config=manifest.config,
        digest=manifest.digest,
        layers=manifest.layers,
        layout=layout,
    )


def as_disk(
    image: Image,
    work_dir: str | os.PathLike[str],
    *,
    fstype: recipes.Fstype | None = None,
    cache: Cache | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Disk:
    """The image's root as a read-only file system in a file, for virtio-blk.

    An OCI image's disk comes from the cache, made at first use; a `dir` is made anew in `work_dir`
    on each call and takes no `fstype`. Raises ImageError, and leaves nothing behind then.
    """
    if image.digest is None:
        if Path(work_dir).resolve().is_relative_to(image.path.resolve()):
            raise ImageError(f"{image.reference} holds {work_dir}, where its disk is to be made")
        with _readable_errors(f"{image.reference}"):
            path, made = recipes.make_disk_of_directory(
                str(image.path), os.path.join(os.path.abspath(work_dir), "root")
            )
        return Disk(Path(path), made)
    fstype = fstype or recipes.disk_format()
    make = functools.partial(recipes.make_disk, fstype=fstype)
    lease = image.lease(cache or Cache(default_directory()), fstype, make, limits)
    return Disk(Path(lease.path, _CONTENT), fstype, lease)


def as_directory(
    image: Image,
    work_dir: str | os.PathLike[str],
    *,
    cache: Cache | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Path:
    """The image's root as a directory; never write to it: it is the cache's, or the user's own.

    Keep the Image open while it is used. Made by a user other than root, all files belong to that
    user, and device nodes and privileged extended attributes are missing. `work_dir` is unused by
    images that the cache can hold. Raises ImageError, and leaves nothing behind then.
    """
    if image.digest is None:
        return image.path
    kind = "directory" if os.geteuid() == 0 else "directory-of-user"
    lease = image.lease(cache or Cache(default_directory()), kind, recipes.make_directory, limits)
    return Path(lease.path, _CONTENT)


def _checked_root(path: Path) -> Path:
    if not path.is_dir():
        raise ImageError(
            f"no directory {path}: dir: takes the root directory of a file system tree"
        )
    if os.path.samefile(path, "/"):
        raise ImageError("dir:/ is the host's own root: give a directory that holds a guest's root")
    return path


@contextlib.contextmanager
def _readable_errors(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_space(what) from error
        raise ImageError(f"{what}: {error.strerror}: {error.filename}") from error
