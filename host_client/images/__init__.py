"""Images for machines: name one, open it, get a disk or a directory to boot from.

    with images.open_image("oci:dist/demo:busybox") as image:
        disk = images.as_disk(image, work_dir)
        argv = images.process_for(image.config, ["sh", "-c", "exit 7"])

Every failure is a `microguest.errors.ImageError`. May import `host_client.errors`, a few modules
beside it that import nothing of the project, and the standard library only.
See docs/design/images.md.
"""

from microguest.host_client.images.cache import Cache
from microguest.host_client.images.config import ImageConfig, process_for
from microguest.host_client.images.descriptors import Descriptor
from microguest.host_client.images.image import Disk, Image, as_directory, as_disk, open_image
from microguest.host_client.images.limits import Limits
from microguest.host_client.images.manifest import Layer
from microguest.host_client.images.progress import OnProgress, Progress
from microguest.host_client.images.reference import ImageReference, parse_reference

__all__ = [
    "Cache",
    "Descriptor",
    "Disk",
    "Image",
    "ImageConfig",
    "ImageReference",
    "Layer",
    "Limits",
    "OnProgress",
    "Progress",
    "as_directory",
    "as_disk",
    "open_image",
    "parse_reference",
    "process_for",
]
