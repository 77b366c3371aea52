"""Which image of several is meant: by its tag, its name, its digest, and the platform.

A name that means two images is an error that lists what can be said instead. The short forms of
names are docker's: "busybox" is "docker.io/library/busybox:latest".
"""

from collections.abc import Callable, Sequence

from microguest.host_client.errors import ImageError
from microguest.host_client.images import limits
from microguest.host_client.images.descriptors import (
    Descriptor,
    Platform,
    read_index,
    read_verified,
    some,
)
from microguest.host_client.images.layout import Layout
from microguest.host_client.images.reference import ImageReference

INDEXES = frozenset(
    {
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
    }
)
MANIFESTS = frozenset(
    {
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    }
)
_DEFAULT_TAG = "latest"
_SHOWN_IMAGES = 20  # in an error
_SHOWN_NAMES = 4  # of one image that are tried
_SHOWN_DIGITS = 12  # of a digest, where an error names one


def choose(
    layout: Layout, found: Sequence[Descriptor], reference: ImageReference, platform: Platform
) -> Descriptor:
    """The one manifest that the reference means; ImageError when there is none, or more than one.

    found: what the top index lists; what has no index is one that lists only manifests.
    """
    named = _named(layout, found, reference.tag)
    if reference.digest is not None:
        named = [_by_digest(layout, named, reference.digest)]
    fitting = _fitting(layout, named, platform)
    if len({descriptor.digest for descriptor in fitting}) > 1:
        raise _several(layout, fitting, named if reference.tag is None else found)
    return _descend(layout, fitting[0], platform)


# -- by name ---------------------------------------------------------------------------------


def _named(layout: Layout, found: Sequence[Descriptor], tag: str | None) -> Sequence[Descriptor]:
    """What the tag or name means; without one, everything, or the `latest` of one repository."""
    if tag is not None:
        matching = _matching(found, tag)
        if not matching:
            known = some({label for one in found for label in _labels(one)})
            raise ImageError(f"{layout.name} has no tag {tag!r}; it has: {known}")
        return matching
    if len({descriptor.names for descriptor in found}) == 1:
        return found  # one name, or none at all: the platform has to decide
    if len({_repository(descriptor) for descriptor in found}) == 1:
        return _matching(found, _DEFAULT_TAG) or found
    return found


def _matching(found: Sequence[Descriptor], text: str) -> list[Descriptor]:
    """The images of that name: as it stands, else as docker would complete it, else by the tag."""
    ways: tuple[Callable[[str], bool], ...] = (
        lambda name: name == text,
        lambda name: _is_full(name) and complete(name) == complete(text),
        lambda name: _is_full(name) and complete(name).rpartition(":")[2] == text,
    )
    for way in ways:
        matching = [descriptor for descriptor in found if any(map(way, descriptor.names))]
        if matching:
            return matching
    return []


def complete(name: str) -> str:
    """A name with its registry and tag, by docker's rules: "busybox" is a short form."""
    name = name.partition("@")[0]
    registry, slash, rest = name.partition("/")
    if not slash or not ("." in registry or ":" in registry or registry == "localhost"):
        registry, rest = "docker.io", name
    if registry in ("docker.io", "index.docker.io"):
        registry, rest = "docker.io", rest if "/" in rest else f"library/{rest}"
    return f"{registry}/{rest}" if ":" in rest else f"{registry}/{rest}:{_DEFAULT_TAG}"


def _is_full(name: str) -> bool:
    """A name with a repository, and not only a tag."""
    return "/" in name or ":" in name


def _repository(descriptor: Descriptor) -> str:
    full = [name for name in descriptor.names if _is_full(name)]
    return complete(full[0]).rpartition(":")[0] if full else ""


def _labels(descriptor: Descriptor) -> list[str]:
    """What the image can be called, the best first; its digest always is one."""
    full = [complete(name) for name in descriptor.names if _is_full(name)]
    short = [name.removeprefix("docker.io/").removeprefix("library/") for name in full]
    tags = [name for name in descriptor.names if not _is_full(name)]
    return [*short, *tags] or [_shown_digest(descriptor)]


def _shown_digest(descriptor: Descriptor) -> str:
    algorithm, _, digits = descriptor.digest.partition(":")
    return f"@{algorithm}:{digits[:_SHOWN_DIGITS]}"


def _several(layout: Layout, found: Sequence[Descriptor], of: Sequence[Descriptor]) -> ImageError:
    """For more than one image: lists for each a name that means no other, or else its digest."""
    known = []
    for descriptor in found[:_SHOWN_IMAGES]:  # each name is compared with all, so not all names are
        digests = {descriptor.digest}
        single = [
            label
            for label in _labels(descriptor)[:_SHOWN_NAMES]
            if {one.digest for one in _matching(of, label)} == digests
        ]
        known.append(single[0] if single else _shown_digest(descriptor))
    return ImageError(f"{layout.name} has several images: name one of: {some(set(known))}")


# -- by digest -------------------------------------------------------------------------------


def _by_digest(layout: Layout, found: Sequence[Descriptor], prefix: str) -> Descriptor:
    """The image whose digest begins so, in the index itself or in those that it lists."""
    read = 0
    level = list(found)
    for _ in range(limits.MAX_INDEX_DEPTH):
        matching = {one.digest: one for one in level if one.digest.startswith(prefix)}
        if len(matching) == 1:
            return next(iter(matching.values()))
        if matching:
            raise ImageError(
                f"{layout.name}: several digests begin with {prefix}: {some(matching)}"
            )
        indexes = [one for one in level if one.media_type in INDEXES]
        read += len(indexes)
        if read > limits.MAX_NESTED_INDEXES:
            raise ImageError(f"{layout.name} has more than {limits.MAX_NESTED_INDEXES} indexes")
        level = [inner for one in indexes for inner in _inside(layout, one)]
    known = some(_shown_digest(descriptor) for descriptor in found)
    raise ImageError(f"{layout.name} has no image {prefix}; it has: {known}")


def _inside(layout: Layout, index: Descriptor) -> list[Descriptor]:
    return read_index(layout, index.digest, read_verified(layout, index))


# -- by platform -----------------------------------------------------------------------------


def _fitting(
    layout: Layout, found: Sequence[Descriptor], platform: Platform
) -> Sequence[Descriptor]:
    """Those made for the platform, or that do not say; ImageError when there is none."""
    fitting = [d for d in found if d.platform is None or platform.accepts(d.platform)]
    if not fitting:
        known = some({str(d.platform) for d in found})
        raise ImageError(f"{layout.name} has no image for {platform}; it has: {known}")
    exact = [d for d in fitting if d.platform == platform]
    named = [d for d in fitting if d.platform is not None]
    return exact or named or fitting


def _descend(layout: Layout, descriptor: Descriptor, platform: Platform) -> Descriptor:
    """Go down nested indexes until there is one manifest for the platform.

    Of several for one platform the first is taken, as engines do: they differ in what the platform
    does not say. Of several that name none, nobody could tell which it is.
    """
    for _ in range(limits.MAX_INDEX_DEPTH):
        if descriptor.media_type not in INDEXES:
            return descriptor
        fitting = _fitting(layout, _inside(layout, descriptor), platform)
        if fitting[0].platform is None and len({one.digest for one in fitting}) > 1:
            raise _several(layout, fitting, ())
        descriptor = fitting[0]
    raise ImageError(f"{layout.name}: indexes are nested more than {limits.MAX_INDEX_DEPTH} deep")
