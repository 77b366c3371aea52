"""How a user names an image: `oci:DIR[:TAG]`, `oci-archive:FILE[:TAG]` or `dir:ROOTFS`.

Only text is looked at here; whether the file exists is found out when the image is opened.
"""

import re
from dataclasses import dataclass
from typing import Literal

from host_client.errors import ImageError

Transport = Literal["oci", "oci-archive", "dir"]

# The grammar of org.opencontainers.image.ref.name (OCI image spec, annotations.md).
_TAG = re.compile(r"[A-Za-z0-9]+(?:(?:[-._:@+]|--|/)[A-Za-z0-9]+)*")
_MAX_TAG_CHARS = 512


@dataclass(frozen=True, slots=True)
class ImageReference:
    """A parsed IMAGE. `tag` is None when none was given; a `dir` never has one."""

    transport: Transport
    path: str
    tag: str | None = None

    def __str__(self) -> str:
        tail = "" if self.tag is None else f":{self.tag}"
        return f"{self.transport}:{self.path}{tail}"


def parse_reference(text: str) -> ImageReference:
    """Read an IMAGE as typed; raise ImageError when it is none of the three forms.

    As in skopeo, the path of the oci forms ends at the first colon and the rest is the tag, so a
    path with a colon in it cannot be named there. A `dir` takes everything after its prefix.
    """
    transport, colon, rest = text.partition(":")
    if "\0" in text or not text.isprintable():
        raise ImageError(f"image reference {text!r} contains a control character")
    if not colon or transport not in ("oci", "oci-archive", "dir"):
        raise ImageError(
            f"image reference {text!r} is none of oci:DIR[:TAG], oci-archive:FILE[:TAG], "
            "dir:ROOTFS; to use an image of a registry or an engine, copy it first, for instance "
            "with: skopeo copy docker://NAME oci:DIR:TAG"
        )
    if transport == "dir":
        _require_path(text, rest)
        return ImageReference("dir", rest)
    path, colon, tag = rest.partition(":")
    _require_path(text, path)
    if not colon:
        return ImageReference("oci" if transport == "oci" else "oci-archive", path)
    if len(tag) > _MAX_TAG_CHARS or not _TAG.fullmatch(tag):
        raise ImageError(f"image reference {text!r} has the tag {tag!r}, which is not a valid tag")
    return ImageReference("oci" if transport == "oci" else "oci-archive", path, tag)


def _require_path(text: str, path: str) -> None:
    if not path:
        raise ImageError(f"image reference {text!r} names no path")
