"""Every maximum that reading an image obeys, in one place. An image is written by strangers.

Imports nothing of this project.
"""

from dataclasses import dataclass

MAX_JSON_BYTES = 4 << 20
"""An index, manifest or config; registries refuse manifests above 4 MiB."""

MAX_INDEX_DEPTH = 4
"""Indexes inside indexes."""

MAX_LAYERS = 256
"""Twice what overlayfs-based engines can stack."""

MAX_PATH_BYTES = 4096
MAX_NAME_BYTES = 255
"""PATH_MAX and NAME_MAX of Linux."""

MAX_SYMLINKS = 40
"""Links followed while one path is resolved, as the kernel does (path_resolution(7))."""

MAX_HEADER_BYTES = 1 << 20
"""One extended tar header: a long name or the pax records of one entry."""

MAX_XATTR_NAME_BYTES = 255
MAX_XATTR_VALUE_BYTES = 64 << 10
MAX_XATTRS = 128
"""XATTR_NAME_MAX and XATTR_SIZE_MAX of Linux; the count is per entry."""

MAX_ARCHIVE_MEMBERS = 100_000
"""Members of an oci-archive that are looked at: blobs and their directories."""

CHUNK_BYTES = 1 << 20
"""What is read, hashed or written at a time."""

COMMAND_SECONDS = 900.0
"""Deadline of one external command; a 1 GB tree takes about 20 s."""

COMMAND_OUTPUT_BYTES = 8 << 10
"""What is kept of an external command's last words."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one image may cost. Tests lower these; there is no reason to raise them in a program.

    entries:    tar entries over all layers (an entry costs about 0.6 KiB of memory).
    bytes:      decompressed bytes over all layers, which is also the temporary disk space.
    """

    entries: int = 1_000_000
    bytes: int = 32 << 30


DEFAULT_LIMITS = Limits()
