"""From a layout and a reference to one image: its manifest, config and layers, checked.

Sources: manifest.md and config.md of the OCI image spec; Docker's Image Manifest V2 Schema 2; and
for archives of docker, image/spec/v1.2.md of moby.
"""

import hashlib
import os
import re
from dataclasses import dataclass
from typing import Any

from microguest.host_client.errors import ImageError
from microguest.host_client.images import limits
from microguest.host_client.images.choosing import MANIFESTS, choose
from microguest.host_client.images.config import ImageConfig
from microguest.host_client.images.descriptors import (
    Descriptor,
    Platform,
    listed,
    read_descriptor,
    read_index,
    read_object,
    read_verified,
    some,
)
from microguest.host_client.images.layout import Layout, blob_path, read_json, read_small
from microguest.host_client.images.reference import ImageReference

_CONFIGS = frozenset(
    {
        "application/vnd.oci.image.config.v1+json",
        "application/vnd.docker.container.image.v1+json",
    }
)
# What comes behind says how it is compressed, and is not believed: see `layers`.
_LAYER = re.compile(
    r"application/vnd\.(?:oci\.image\.layer\.(?P<kept>nondistributable\.)?v1\.tar"
    r"|docker\.image\.rootfs\.(?P<foreign>foreign\.)?diff\.tar)(?:[+.](?:gzip|zstd|xz|bzip2))?"
)
_DOCKER_LIST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer: the file at `path` in the layout, and its `diff_id` once it is unpacked.

    blob: what the manifest says of the file; None in an archive of docker, which says nothing.
    """

    path: str
    diff_id: str
    blob: Descriptor | None = None

    @property
    def name(self) -> str:
        """How error messages call it."""
        return self.blob.digest if self.blob else self.diff_id


@dataclass(frozen=True, slots=True)
class Manifest:
    """What was chosen: `digest` is the manifest's own, or in an archive of docker the config's."""

    digest: str
    config: ImageConfig
    layers: tuple[Layer, ...]


def resolve(layout: Layout, reference: ImageReference, platform: Platform) -> Manifest:
    """Find the image for a reference and platform, and read its config; or say what lacks."""
    if layout.docker:
        return _resolve_docker(layout, reference, platform)
    top = read_index(layout, "index.json", read_small(layout, "index.json"))
    descriptor = choose(layout, top, reference, platform)
    if descriptor.media_type not in MANIFESTS:
        raise ImageError(
            f"{layout.name}: {descriptor.digest} is {descriptor.media_type!r:.120}, neither a "
            "manifest nor an index"
        )
    manifest = read_object(layout, descriptor.digest, read_verified(layout, descriptor))
    config_at = read_descriptor(layout, "manifest", manifest.get("config"))
    if config_at.media_type not in _CONFIGS:
        raise ImageError(
            f"{layout.name}: the manifest's config is {config_at.media_type!r:.120}: this is no "
            "image but some other artifact"
        )
    config = read_object(layout, config_at.digest, read_verified(layout, config_at))
    _check_platform(layout, config, platform)
    blobs = [
        _layer_blob(layout, read_descriptor(layout, "layers", item))
        for item in _bounded(layout, listed(layout, "manifest", "layers", manifest.get("layers")))
    ]
    layers = tuple(
        Layer(blob_path(blob.digest), diff_id, blob)
        for blob, diff_id in zip(blobs, _diff_ids(layout, config, len(blobs)), strict=True)
    )
    return Manifest(descriptor.digest, _config(layout, config.get("config") or {}), layers)


# -- docker's archives -----------------------------------------------------------------------


def _resolve_docker(layout: Layout, reference: ImageReference, platform: Platform) -> Manifest:
    """As `resolve`, by docker's own list. An image's digest is that of its config, its "id"."""
    items = read_json(layout, _DOCKER_LIST, read_small(layout, _DOCKER_LIST))
    items = listed(layout, _DOCKER_LIST, "of images", items)
    if not items:
        raise ImageError(f"{layout.name}: {_DOCKER_LIST} lists no image")
    if len(items) > limits.MAX_ARCHIVE_IMAGES:
        raise ImageError(f"{layout.name} has more than {limits.MAX_ARCHIVE_IMAGES} images")
    found: dict[Descriptor, dict[str, Any]] = {}
    for item in items:
        if not isinstance(item, dict):
            raise ImageError(f"{layout.name}: {_DOCKER_LIST} lists something that is no image")
        descriptor = _docker_descriptor(layout, item)
        found.setdefault(descriptor, item)
    chosen = choose(layout, list(found), reference, platform)
    item = found[chosen]
    data = read_small(layout, _docker_path(layout, "Config", item.get("Config")))
    if _digest(data) != chosen.digest:  # else the image would be kept as another's
        raise ImageError(f"{layout.name}: somebody writes to it while it is read: try once more")
    config = read_object(layout, "the image's config", data)
    _check_platform(layout, config, platform)
    paths = [
        _docker_path(layout, "Layers", path)
        for path in _bounded(layout, listed(layout, _DOCKER_LIST, "Layers", item.get("Layers")))
    ]
    diff_ids = _diff_ids(layout, config, len(paths))
    layers = tuple(Layer(path, diff_id) for path, diff_id in zip(paths, diff_ids, strict=True))
    return Manifest(chosen.digest, _config(layout, config.get("config") or {}), layers)


def _docker_descriptor(layout: Layout, item: dict[str, Any]) -> Descriptor:
    """One image of docker's list in the form that `choose` knows."""
    data = read_small(layout, _docker_path(layout, "Config", item.get("Config")))
    names = listed(layout, _DOCKER_LIST, "RepoTags", item.get("RepoTags") or [])
    return Descriptor(
        media_type="application/vnd.docker.container.image.v1+json",
        digest=_digest(data),
        size=len(data),
        names=tuple(name for name in names if isinstance(name, str) and name),
    )


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _docker_path(layout: Layout, field: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ImageError(f"{layout.name}: {_DOCKER_LIST} has a {field} that names no file")
    return os.path.normpath(value)


# -- layers ----------------------------------------------------------------------------------


def _bounded(layout: Layout, layers: list[Any]) -> list[Any]:
    if len(layers) > limits.MAX_LAYERS:
        raise ImageError(f"{layout.name}: {len(layers)} layers, more than {limits.MAX_LAYERS}")
    return layers


def _diff_ids(layout: Layout, config: dict[str, Any], count: int) -> list[str]:
    rootfs = config.get("rootfs")
    found = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    diff_ids = listed(layout, "config", "rootfs.diff_ids", found)
    if len(diff_ids) != count:
        raise ImageError(
            f"{layout.name}: manifest has {count} layers but config {len(diff_ids)} diff_ids"
        )
    for diff_id in diff_ids:
        if not isinstance(diff_id, str):
            raise ImageError(f"{layout.name}: a diff_id is not a string")
        blob_path(diff_id)
    return diff_ids


def _layer_blob(layout: Layout, blob: Descriptor) -> Descriptor:
    """The blob, if it is a layer that can be read here."""
    match = _LAYER.fullmatch(blob.media_type)
    if match is None:
        hint = ""
        if blob.media_type.endswith("+encrypted"):
            hint = ": decrypt it first, with skopeo copy --decryption-key"
        raise ImageError(
            f"{layout.name}: a layer has the unsupported type {blob.media_type!r:.120}{hint}"
        )
    if (match["kept"] or match["foreign"]) and not layout.has(blob_path(blob.digest)):
        raise ImageError(
            f"{layout.name}: layer {blob.digest} is not in the image: its type is "
            f"{blob.media_type}, which tools leave out; make the copy anew with that layer"
        )
    return blob


def _check_platform(layout: Layout, config: dict[str, Any], platform: Platform) -> None:
    """Refuse an image made for another machine: its programs could not start."""
    system, architecture = config.get("os"), config.get("architecture")
    if not isinstance(system, str) or not isinstance(architecture, str):
        return
    actual = Platform(system, architecture)
    if system and architecture and not platform.accepts(actual):
        raise ImageError(
            f"{layout.name}: the image is for {some([str(actual)])}, not for {platform}"
        )


# -- the config ------------------------------------------------------------------------------


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
    if not isinstance(value, str) or "\0" in value or not _is_utf8(value):
        raise _wrong(layout, key)
    return value


def _is_utf8(text: str) -> bool:
    """JSON can spell halves of surrogate pairs, which no environment or path can hold."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _wrong(layout: Layout, key: str) -> ImageError:
    return ImageError(f"{layout.name}: the {key} of the image's config is not what it should be")
