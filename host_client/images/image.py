"""An opened image, and what a machine boots from: a disk or a directory.

The story of the package: reference -> layout -> manifest -> layers -> tree -> tar stream -> disk.
"""

import contextlib
import errno
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from microguest.host_client.errors import ImageError
from microguest.host_client.images import recipes
from microguest.host_client.images.budget import Budget
from microguest.host_client.images.cache import Cache, Lease, default_directory
from microguest.host_client.images.config import ImageConfig
from microguest.host_client.images.descriptors import parse_platform
from microguest.host_client.images.export import Merged
from microguest.host_client.images.layers import spool_layer
from microguest.host_client.images.layout import Layout, open_layout
from microguest.host_client.images.limits import DEFAULT_LIMITS, Limits
from microguest.host_client.images.manifest import Layer, resolve
from microguest.host_client.images.progress import OnProgress, Progress, Step
from microguest.host_client.images.reference import ImageReference, parse_reference
from microguest.host_client.images.tarformat import read_entries
from microguest.host_client.images.tools import no_space
from microguest.host_client.images.tree import Tree
from microguest.host_client.shortage import explain
from microguest.host_client.values import absolute_path

_Recipe = Callable[[Merged, str], None]
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

    digest: of the manifest, "sha256:...", or of the config where the image is from docker's own
    archive, which has no manifests; None for a `dir`.  layers: lowest first; () for a `dir`.
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

    @property
    def stored_bytes(self) -> int:
        """Bytes of the layers as they are stored; 0 where the image does not say."""
        return sum(layer.blob.size for layer in self.layers if layer.blob)

    @contextlib.contextmanager
    def merged(self, work: str, limits: Limits, progress: OnProgress | None) -> Iterator[Merged]:
        """All layers verified and applied, with one budget for everything."""
        assert self._layout is not None
        budget = Budget(limits)
        tree = Tree(budget)
        with contextlib.ExitStack() as stack:
            spools: list[BinaryIO] = []
            read = 0

            def told_of(count: int) -> None:
                nonlocal read
                read += count
                self._tell(progress, "unpacking", read, self.stored_bytes)

            told_of(0)
            for layer in self.layers:
                try:
                    spool = stack.enter_context(
                        spool_layer(self._layout, layer, work, budget, told_of)
                    )
                    length = os.fstat(spool.fileno()).st_size
                    tree.apply(read_entries(spool.fileno(), 0, length, budget))
                except ImageError as error:
                    raise ImageError(f"layer {layer.name}: {error}") from error
                spools.append(spool)

            def told() -> None:
                done = min(budget.written, budget.unpacked)
                self._tell(progress, "making", done, budget.unpacked)

            told()
            yield Merged(tree, spools, budget, told)

    def _tell(self, progress: OnProgress | None, step: Step, done: int, total: int) -> None:
        if progress is not None:
            progress(Progress(step, str(self.reference), done, total))

    def lease(
        self,
        cache: Cache,
        kind: str,
        make: _Recipe,
        limits: Limits,
        progress: OnProgress | None = None,
    ) -> Lease:
        """The cache entry of this image in one form, by `make` if it is not there yet.

        kind: names the form in the entry's key.  make: (root, path) -> the form at path.
        """
        assert self.digest is not None
        assert self._layout is not None

        def build(work: str, content: str) -> None:
            target = os.path.join(content, _CONTENT)
            with self.merged(work, limits, progress) as merged:
                make(merged, target)

        def wait() -> None:
            self._tell(progress, "waiting", 0, 0)

        # An id of docker's is a config's digest: kept apart from those of manifests.
        digest = f"{'id-' if self._layout.docker else ''}{self.digest.replace(':', '-')}"
        key = f"{digest}-{kind}-{recipes.VERSION}"
        with _readable_errors(f"{self.reference}"):
            lease = cache.obtain(key, build, wait)
        self._leases.append(lease)
        return lease

    def disk_of_directory(
        self, stem: str, progress: OnProgress | None
    ) -> tuple[str, recipes.Fstype]:
        """Of a `dir`: the new file STEM.FSTYPE, and its type."""

        def told() -> None:
            self._tell(progress, "making", 0, 0)

        told()
        return recipes.make_disk_of_directory(str(self.path), stem, told)


def open_image(text: str, platform: str = "linux/amd64") -> Image:
    """Find an image and read what it says of itself.

    text: as `parse_reference` takes it.  platform: os/architecture[/variant] of the guest.
    Raises ImageError for a missing or broken image, a missing tag, or another platform. An opened
    image holds no file open and makes no file: only `as_disk` and `as_directory` do.
    """
    reference = parse_reference(text)
    wanted = parse_platform(platform)
    with _readable_errors(f"{reference}"):
        path = Path(absolute_path(reference.path))
    if reference.transport == "dir":
        return Image(reference, _checked_root(path), config=ImageConfig())
    with _readable_errors(f"{reference}"):
        layout = open_layout(reference.transport, str(path))
        manifest = resolve(layout, reference, wanted)
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
    progress: OnProgress | None = None,
) -> Disk:
    """The image's root as a read-only file system in a file, for virtio-blk.

    An OCI image's disk comes from the cache, made at first use; a `dir` is made anew in `work_dir`
    on each call and takes no `fstype`. `progress` is told of each step while the disk is made, and
    not at all where it is there; what it raises ends the making. Raises ImageError, and leaves
    nothing behind then.
    """
    if image.digest is None:
        if Path(work_dir).resolve().is_relative_to(image.path.resolve()):
            raise ImageError(f"{image.reference} holds {work_dir}, where its disk is to be made")
        with _readable_errors(f"{image.reference}"):
            stem = os.path.join(absolute_path(work_dir), "root")
            path, made = image.disk_of_directory(stem, progress)
        return Disk(Path(path), made)
    fstype = fstype or recipes.disk_format()
    make = functools.partial(recipes.make_disk, fstype=fstype)
    lease = image.lease(cache or Cache(default_directory()), fstype, make, limits, progress)
    return Disk(Path(lease.path, _CONTENT), fstype, lease)


def as_directory(
    image: Image,
    work_dir: str | os.PathLike[str],
    *,
    cache: Cache | None = None,
    limits: Limits = DEFAULT_LIMITS,
    progress: OnProgress | None = None,
) -> Path:
    """The image's root as a directory; never write to it: it is the cache's, or the user's own.

    Keep the Image open while it is used. Made by a user other than root, all files belong to that
    user, and device nodes and privileged extended attributes are missing. `work_dir` is unused by
    images that the cache can hold. `progress` as in `as_disk`. Raises ImageError, and leaves
    nothing behind then.
    """
    if image.digest is None:
        return image.path
    kind = "directory" if os.geteuid() == 0 else "directory-of-user"
    cache = cache or Cache(default_directory())
    lease = image.lease(cache, kind, recipes.make_directory, limits, progress)
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
        raise ImageError(f"{what}: {explain(error)}") from error
