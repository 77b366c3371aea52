"""How a user names an image: `oci:DIR`, `oci-archive:FILE`, `docker-archive:FILE`, `dir:ROOTFS`.

Behind the path of all but the last may stand `:TAG`, `@sha256:DIGEST`, or both.

Only text is looked at here; whether the file exists is found out when the image is opened.
"""

import re
from dataclasses import dataclass
from typing import Literal

from microguest.host_client.errors import ImageError

Transport = Literal["oci", "oci-archive", "docker-archive", "dir"]
FORMS = (
    "oci:DIR[:TAG][@DIGEST], oci-archive:FILE[:TAG][@DIGEST], docker-archive:FILE[:NAME][@DIGEST] "
    "or dir:ROOTFS"
)

_TRANSPORTS: dict[str, Transport] = {
    "oci": "oci",
    "oci-archive": "oci-archive",
    "docker-archive": "docker-archive",
    "dir": "dir",
}

# The grammar of org.opencontainers.image.ref.name (OCI image spec, annotations.md), and the two
# underscores that docker's names may have.
_TAG = re.compile(r"[A-Za-z0-9]+(?:(?:[-._:@+]|--|__|/)[A-Za-z0-9]+)*")
_MAX_TAG_CHARS = 512
_DIGEST = re.compile(r"(?P<rest>.*)@(?P<digest>(?:sha256|sha512):[0-9a-f]{4,128})")


@dataclass(frozen=True, slots=True)
class ImageReference:
    """A parsed IMAGE. A `dir` has neither tag nor digest.

    tag: a tag or a name, None when none was given.  digest: "sha256:" and the first digits, at
    least four, of the digest that the image must have, or None.
    """

    transport: Transport
    path: str
    tag: str | None = None
    digest: str | None = None

    def __str__(self) -> str:
        tail = "" if self.tag is None else f":{self.tag}"
        tail += "" if self.digest is None else f"@{self.digest}"
        return f"{self.transport}:{self.path}{tail}"


def parse_reference(text: str) -> ImageReference:
    """Read an IMAGE as typed; raise ImageError when it is none of the four forms.

    As in skopeo, the path of all but `dir` ends at the first colon and the rest is the tag, so a
    path with a colon in it cannot be named there. A `dir` takes everything after its prefix.
    """
    word, colon, rest = text.partition(":")
    if "\0" in text or not text.isprintable():
        raise ImageError(f"image reference {text!r} contains a control character")
    transport = _TRANSPORTS.get(word)
    if not colon or transport is None:
        raise ImageError(
            f"image reference {text!r} is none of {FORMS}; to use an image of a registry or an "
            "engine, copy it first, for instance with: skopeo copy docker://NAME oci:DIR:TAG"
        )
    if transport == "dir":
        _require_path(text, rest)
        return ImageReference("dir", rest)
    match = _DIGEST.fullmatch(rest)
    digest = match["digest"] if match else None
    path, colon, tag = (match["rest"] if match else rest).partition(":")
    _require_path(text, path)
    if not colon:
        return ImageReference(transport, path, None, digest)
    if len(tag) > _MAX_TAG_CHARS or not _TAG.fullmatch(tag):
        raise ImageError(f"image reference {text!r} has the tag {tag!r}, which is not a valid tag")
    return ImageReference(transport, path, tag, digest)


def _require_path(text: str, path: str) -> None:
    if not path:
        raise ImageError(f"image reference {text!r} names no path")
