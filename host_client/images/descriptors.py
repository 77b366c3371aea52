"""What an image's JSON documents are made of: descriptors and platforms, read and checked.

Sources: descriptor.md and image-index.md of the OCI image spec.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from microguest.host_client.errors import ImageError
from microguest.host_client.images import limits
from microguest.host_client.images.layout import Layout, blob_path, read_json, read_small

_NAMES = ("org.opencontainers.image.ref.name", "io.containerd.image.name")


@dataclass(frozen=True, slots=True)
class Platform:
    """os/architecture[/variant], as in "linux/arm64/v8"."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))

    def accepts(self, other: "Platform") -> bool:
        """Whether an image for `other` runs here; a variant counts only when both name one."""
        return (self.os, self.architecture) == (other.os, other.architecture) and (
            not self.variant or not other.variant or self.variant == other.variant
        )


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A reference to a blob: its digest ("sha256:...") and its size in bytes.

    names: what an index calls it: a tag ("v1"), a name ("docker.io/library/busybox:v1"), or both.
    """

    media_type: str
    digest: str
    size: int
    names: tuple[str, ...] = ()
    platform: Platform | None = None


def parse_platform(text: str) -> Platform:
    """Read os/architecture[/variant]; ImageError when it is something else."""
    parts = text.split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise ImageError(f"platform {text!r} is not os/architecture[/variant], as linux/amd64")
    return Platform(*parts)


def read_verified(layout: Layout, descriptor: Descriptor) -> bytes:
    """A JSON blob whose size and digest are as its descriptor says."""
    data = read_small(layout, blob_path(descriptor.digest))
    if len(data) != descriptor.size:
        raise ImageError(
            f"{layout.name}: blob {descriptor.digest} has {len(data)} bytes, not {descriptor.size}"
        )
    algorithm, _, expected = descriptor.digest.partition(":")
    actual = hashlib.new(algorithm, data).hexdigest()
    if actual != expected:
        raise ImageError(
            f"{layout.name}: blob {descriptor.digest} is corrupt: its digest is {actual}"
        )
    return data


def read_object(layout: Layout, what: str, data: bytes) -> dict[str, Any]:
    """A JSON document that is an object."""
    value = read_json(layout, what, data)
    if not isinstance(value, dict):
        raise ImageError(f"{layout.name}: {what} is not a JSON object")
    return value


def listed(layout: Layout, where: str, field: str, value: object) -> list[Any]:
    """The value, which must be a list."""
    if not isinstance(value, list):
        raise ImageError(f"{layout.name}: the {where} has no list {field}")
    return value


def read_index(layout: Layout, where: str, data: bytes) -> list[Descriptor]:
    """The descriptors of an index; at least one."""
    index = read_object(layout, where, data)
    found = listed(layout, where, "manifests", index.get("manifests"))
    if not found:
        raise ImageError(f"{layout.name}: {where} lists no image")
    if len(found) > limits.MAX_INDEX_ENTRIES:
        raise ImageError(
            f"{layout.name}: {where} lists {len(found)} images, more than "
            f"{limits.MAX_INDEX_ENTRIES}"
        )
    return [read_descriptor(layout, where, item) for item in found]


def read_descriptor(layout: Layout, where: str, value: object) -> Descriptor:
    """One descriptor, checked."""
    if not isinstance(value, dict):
        raise ImageError(f"{layout.name}: {where} lacks a descriptor")
    media_type, digest, size = value.get("mediaType"), value.get("digest"), value.get("size")
    if not isinstance(media_type, str) or not isinstance(digest, str) or type(size) is not int:
        raise ImageError(f"{layout.name}: a descriptor in {where} lacks mediaType, digest or size")
    if size < 0:
        raise ImageError(f"{layout.name}: a descriptor in {where} has the size {size}")
    blob_path(digest)
    annotations = value.get("annotations")
    names = [annotations.get(key) for key in _NAMES] if isinstance(annotations, dict) else []
    return Descriptor(
        media_type,
        digest,
        size,
        tuple(name for name in names if isinstance(name, str) and name),
        _platform(value.get("platform")),
    )


def _platform(value: object) -> Platform | None:
    if not isinstance(value, dict):
        return None
    parts = [value.get(key) for key in ("os", "architecture", "variant")]
    texts = [part if isinstance(part, str) else "" for part in parts]
    return Platform(*texts) if any(texts) else None


def some(names: Iterable[str]) -> str:
    """Names that a stranger chose, for an error message: few, short, without terminal codes."""
    shown = (name[:160] if name.isprintable() else ascii(name[:160]) for name in names)
    return ", ".join(sorted(shown)[:20]) or "none"
