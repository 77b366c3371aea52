"""From a layout and a tag to one manifest: index, platform, config and layer descriptors, checked.

Sources: image-index.md, manifest.md, descriptor.md and config.md of the OCI image spec; Docker's
Image Manifest V2 Schema 2.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from host_client.errors import ImageError
from host_client.images import limits
from host_client.images.layout import Layout, blob_path, read_small
from host_client.images.process import ImageConfig

_INDEXES = frozenset(
    {
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
    }
)
_MANIFESTS = frozenset(
    {
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    }
)
_CONFIGS = frozenset(
    {
        "application/vnd.oci.image.config.v1+json",
        "application/vnd.docker.container.image.v1+json",
    }
)
LAYER_COMPRESSION = {
    "application/vnd.oci.image.layer.v1.tar": "",
    "application/vnd.oci.image.layer.v1.tar+gzip": "gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd": "zstd",
    "application/vnd.docker.image.rootfs.diff.tar": "",
    "application/vnd.docker.image.rootfs.diff.tar.gzip": "gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd": "zstd",
}
_REF_NAME = "org.opencontainers.image.ref.name"


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
    """A reference to a blob: its digest ("sha256:...") and its size in bytes."""

    media_type: str
    digest: str
    size: int
    ref_name: str | None = None
    platform: Platform | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer: `blob` as stored, `compression` ("", "gzip", "zstd"), `diff_id` once unpacked."""

    blob: Descriptor
    compression: str
    diff_id: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What was chosen: `digest` is the manifest's own."""

    digest: str
    config: ImageConfig
    layers: tuple[Layer, ...]


def parse_platform(text: str) -> Platform:
    """Read os/architecture[/variant]; ImageError when it is something else."""
    parts = text.split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise ImageError(f"platform {text!r} is not os/architecture[/variant], as linux/amd64")
    return Platform(*parts)


def resolve(layout: Layout, tag: str | None, platform: Platform) -> Manifest:
    """Find the manifest for a tag and platform, and read its config. ImageError says what lacks."""
    top = _json(layout, "index.json", read_small(layout, "index.json"))
    chosen = _pick_tag(layout, _descriptors(layout, "index.json", top), tag)
    descriptor = _pick_platform(layout, chosen, platform)
    manifest = _json(layout, descriptor.digest, _verified(layout, descriptor))
    config_at = _descriptor(layout, "manifest", manifest.get("config"))
    if config_at.media_type not in _CONFIGS:
        raise ImageError(
            f"{layout.name}: the manifest's config is {config_at.media_type!r:.120}: this is no "
            "image but some other artifact"
        )
    config = _json(layout, config_at.digest, _verified(layout, config_at))
    _check_platform(layout, config, platform)
    layers = _layers(layout, manifest, config)
    return Manifest(descriptor.digest, _config(layout, config.get("config") or {}), layers)


# -- choosing --------------------------------------------------------------------------------


def _pick_tag(layout: Layout, found: list[Descriptor], tag: str | None) -> list[Descriptor]:
    """The descriptors of the tag; without one, the only image, or else `latest`."""
    names = {descriptor.ref_name for descriptor in found}
    if tag is None and len(names) == 1:
        return found
    wanted = "latest" if tag is None else tag
    chosen = [descriptor for descriptor in found if descriptor.ref_name == wanted]
    if not chosen:
        known = _some(name for name in names if name)
        if tag is None:
            raise ImageError(f"{layout.name} has several images: name one of the tags {known}")
        raise ImageError(f"{layout.name} has no tag {tag!r}; its tags: {known}")
    return chosen


def _pick_platform(layout: Layout, found: list[Descriptor], platform: Platform) -> Descriptor:
    """Go down nested indexes until there is one manifest for the platform."""
    for _ in range(limits.MAX_INDEX_DEPTH):
        fitting = [d for d in found if d.platform is None or platform.accepts(d.platform)]
        if not fitting:
            known = _some({str(d.platform) for d in found})
            raise ImageError(f"{layout.name} has no image for {platform}; it has: {known}")
        exact = [d for d in fitting if d.platform == platform]
        named = [d for d in fitting if d.platform is not None]
        descriptor = (exact or named or fitting)[0]
        if descriptor.media_type in _MANIFESTS:
            return descriptor
        if descriptor.media_type not in _INDEXES:
            raise ImageError(
                f"{layout.name}: {descriptor.digest} is {descriptor.media_type!r:.120}, neither a "
                "manifest nor an index"
            )
        nested = _json(layout, descriptor.digest, _verified(layout, descriptor))
        found = _descriptors(layout, descriptor.digest, nested)
    raise ImageError(f"{layout.name}: indexes are nested more than {limits.MAX_INDEX_DEPTH} deep")


def _some(names: Iterable[str]) -> str:
    """Names that a stranger chose, for an error message: few, short, without terminal codes."""
    shown = (name[:80] if name.isprintable() else ascii(name[:80]) for name in names)
    return ", ".join(sorted(shown)[:20]) or "none"


def _check_platform(layout: Layout, config: dict[str, Any], platform: Platform) -> None:
    """Refuse an image made for another machine: its programs could not start."""
    system, architecture = config.get("os"), config.get("architecture")
    if not isinstance(system, str) or not isinstance(architecture, str):
        return
    actual = Platform(system, architecture)
    if system and architecture and not platform.accepts(actual):
        raise ImageError(
            f"{layout.name}: the image is for {_some([str(actual)])}, not for {platform}"
        )


def _layers(layout: Layout, manifest: dict[str, Any], config: dict[str, Any]) -> tuple[Layer, ...]:
    listed = _list(layout, "manifest", "layers", manifest.get("layers"))
    rootfs = config.get("rootfs")
    diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    diff_ids = _list(layout, "config", "rootfs.diff_ids", diff_ids)
    if len(listed) != len(diff_ids):
        raise ImageError(
            f"{layout.name}: manifest has {len(listed)} layers but config {len(diff_ids)} diff_ids"
        )
    if len(listed) > limits.MAX_LAYERS:
        raise ImageError(f"{layout.name}: {len(listed)} layers, more than {limits.MAX_LAYERS}")
    return tuple(
        _layer(layout, _descriptor(layout, "layers", item), diff_id)
        for item, diff_id in zip(listed, diff_ids, strict=True)
    )


def _layer(layout: Layout, blob: Descriptor, diff_id: object) -> Layer:
    compression = LAYER_COMPRESSION.get(blob.media_type)
    if compression is None:
        foreign = "foreign" in blob.media_type or "nondistributable" in blob.media_type
        hint = ": its bytes are not in the image" if foreign else ""
        raise ImageError(
            f"{layout.name}: a layer has the unsupported type {blob.media_type!r:.120}{hint}"
        )
    if not isinstance(diff_id, str):
        raise ImageError(f"{layout.name}: a diff_id is not a string")
    blob_path(diff_id)
    return Layer(blob, compression, diff_id)


# -- reading JSON ----------------------------------------------------------------------------


def _verified(layout: Layout, descriptor: Descriptor) -> bytes:
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


def _json(layout: Layout, what: str, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"{layout.name}: {what} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ImageError(f"{layout.name}: {what} is not a JSON object")
    return value


def _list(layout: Layout, where: str, field: str, value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ImageError(f"{layout.name}: the {where} has no list {field}")
    return value


def _descriptors(layout: Layout, where: str, index: dict[str, Any]) -> list[Descriptor]:
    listed = _list(layout, where, "manifests", index.get("manifests"))
    if not listed:
        raise ImageError(f"{layout.name}: {where} lists no image")
    return [_descriptor(layout, where, item) for item in listed]


def _descriptor(layout: Layout, where: str, value: object) -> Descriptor:
    if not isinstance(value, dict):
        raise ImageError(f"{layout.name}: {where} lacks a descriptor")
    media_type, digest, size = value.get("mediaType"), value.get("digest"), value.get("size")
    if not isinstance(media_type, str) or not isinstance(digest, str) or type(size) is not int:
        raise ImageError(f"{layout.name}: a descriptor in {where} lacks mediaType, digest or size")
    if size < 0:
        raise ImageError(f"{layout.name}: a descriptor in {where} has the size {size}")
    blob_path(digest)
    annotations = value.get("annotations")
    name = annotations.get(_REF_NAME) if isinstance(annotations, dict) else None
    return Descriptor(
        media_type,
        digest,
        size,
        name if isinstance(name, str) else None,
        _platform(value.get("platform")),
    )


def _platform(value: object) -> Platform | None:
    if not isinstance(value, dict):
        return None
    parts = [value.get(key) for key in ("os", "architecture", "variant")]
    texts = [part if isinstance(part, str) else "" for part in parts]
    return Platform(*texts) if any(texts) else None


def _config(layout: Layout, value: object) -> ImageConfig:
    if not isinstance(value, dict):
        raise ImageError(f"{layout.name}: the image's config is not an object")

    return ImageConfig(
        env=_texts(layout, value, "Env"),
        entrypoint=_texts(layout, value, "Entrypoint"),
        cmd=_texts(layout, value, "Cmd"),
        working_dir=_text(layout, value, "WorkingDir"),
        user=_text(layout, value, "User"),
        exposed_ports=tuple(_pairs(layout, value, "ExposedPorts")),
        volumes=tuple(_pairs(layout, value, "Volumes")),
        stop_signal=_text(layout, value, "StopSignal"),
        labels=tuple(
            (key, _string(layout, "Labels", text))
            for key, text in _pairs(layout, value, "Labels").items()
        ),
    )


def _text(layout: Layout, config: dict[str, Any], key: str) -> str:
    return _string(layout, key, config.get(key) or "")


def _texts(layout: Layout, config: dict[str, Any], key: str) -> tuple[str, ...]:
    value = config.get(key) or []
    if not isinstance(value, list):
        raise _wrong(layout, key)
    return tuple(_string(layout, key, item) for item in value)


def _pairs(layout: Layout, config: dict[str, Any], key: str) -> dict[str, object]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise _wrong(layout, key)
    return {_string(layout, key, name): value[name] for name in sorted(value)}


def _string(layout: Layout, key: str, value: object) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise _wrong(layout, key)
    return value


def _wrong(layout: Layout, key: str) -> ImageError:
    return ImageError(f"{layout.name}: the {key} of the image's config is not what it should be")
