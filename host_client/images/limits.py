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

MAX_PATH_STEPS = 4096
"""Looked at while one path is resolved, links included: twice the components of PATH_MAX."""

MAX_DEPTH = 256
"""Directories inside directories: removing a tree takes a descriptor for each, of 1,024 that there
are. The deepest that package managers nest is below 100."""

MAX_LINKS = 65_000
"""Names of one file: ext4's own maximum (EXT4_LINK_MAX)."""

MAX_OWNERS = 65_535
"""Different users and groups in a squashfs: its table has 65,536, and one is that of its maker."""

NAMES_A_STEP = 100
"""Names of a directory that the maker of a disk compares in a step of the budget. For each new name
it goes through all that the directory has: 65,000 names take it 20 s, twice as many 80 s."""

MAX_HEADER_BYTES = 1 << 20
"""One extended tar header: a long name or the pax records of one entry."""

MAX_XATTR_NAME_BYTES = 255
MAX_XATTR_VALUE_BYTES = 64 << 10
MAX_XATTRS = 128
"""XATTR_NAME_MAX and XATTR_SIZE_MAX of Linux; the count is per entry."""

MAX_XATTRS_BYTES = 128 << 10
"""Names and values of one entry together: one value of the largest size, and room beside it."""

MAX_SPARSE_PIECES = 65_536
"""Pieces of data in one sparse file; its map is kept, 24 bytes for each."""

MAX_ARCHIVE_MEMBERS = 100_000
"""Members of an archive of images: blobs, their directories, and links to them."""

MAX_ARCHIVE_IMAGES = 256
"""Images in docker's list of them; the config of each is read."""

MAX_JSON_VALUES = 250_000
"""Values in one JSON file, each of which takes some 200 bytes once it is read."""

MAX_INDEX_ENTRIES = 4096
"""Images in one index: a layout that is a store of many; an index of platforms has a dozen."""

MAX_NESTED_INDEXES = 64
"""Indexes that are read to find a digest somebody has named."""

SPOOL_SLICE_BYTES = 16 << 10
"""What a decompressor is given at a time: it copies what it leaves, once for each small stream."""

UNPACKER_MEMORY = 128 << 20
"""What an xz stream may ask for; zstd's command has the same bound by default."""

HOST_BLOCK = 4096
"""What a file system of the host takes for each directory, and for each file that is not empty."""

CHUNK_BYTES = 1 << 20
"""What is read, hashed or written at a time."""

COMMAND_SECONDS = 900.0
"""Deadline of one external command; a 1 GB tree takes about 20 s."""

COMMAND_OUTPUT_BYTES = 8 << 10
"""What is kept of an external command's last words."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one image may cost. Tests lower these; there is no reason to raise them in a program.

    entries:  tar entries over all layers, and directories that only their names imply (each costs
              about 0.6 KiB of memory).
    text:     bytes retained of names, link targets, extended attributes and maps of sparse files.
    paths:    bytes of all paths of the merged root: each is written in full.
    bytes:    unpacked bytes over all layers, which is also the temporary disk space; again the
              bytes of the layers as they are stored, holes included; and again the bytes of the
              merged root as it is written, in blocks of `HOST_BLOCK` where that is a directory.
    steps:    what is looked at one by one: headers, records, components of paths, children of a
              directory that is emptied, compressed streams, and the names that the maker of a disk
              compares, `NAMES_A_STEP` at a time (a step takes about a microsecond).
    seconds:  for all of it, from the first layer to the finished disk or directory.
    """

    entries: int = 1_000_000
    text: int = 128 << 20
    paths: int = 256 << 20
    bytes: int = 32 << 30
    steps: int = 200_000_000
    seconds: float = 1800.0


DEFAULT_LIMITS = Limits()
