"""The root directory of a finished squashfs: sqfstar 4.5 cannot be told its owner and time.

It takes them from its own process, and ignores its options for them; an image made by a user
would have "/" belong to that user. So they are set in the file, which needs the inode and id
tables stored uncompressed (-noI). Format: Documentation/filesystems/squashfs.rst of Linux, and
fs/squashfs/squashfs_fs.h.
"""

import os
import struct

from microguest.host_client.errors import ImageError

_SUPERBLOCK = struct.Struct("<IIIIIHHHHHHQQQQQQQQ")
_MAGIC = 0x73717368
_INODE_HEAD = struct.Struct("<HHHHI")  # type, mode, index of uid, index of gid, mtime
_METADATA_BYTES = 8192
_HEADER_BYTES = 2  # before each metadata block: its length, and whether it is stored as it is
_UNCOMPRESSED = 0x8000


def set_root(path: str, *, mode: int, uid: int, gid: int, mtime: int) -> None:
    """Set what the root directory of the squashfs at `path` is. `mtime`: seconds since 1970.

    An owner must be one that some other file has, as user or as group; ImageError otherwise.
    """
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        super_block = _SUPERBLOCK.unpack(os.pread(fd, _SUPERBLOCK.size, 0))
        if super_block[0] != _MAGIC:
            raise ImageError(f"{path} is not a squashfs: sqfstar made something else")
        ids = _read_ids(fd, path, count=super_block[8], table=super_block[13])
        block, offset = super_block[11] >> 16, super_block[11] & 0xFFFF
        table = super_block[15]
        places = _places(fd, path, table + block, offset, _INODE_HEAD.size)
        head = b"".join(os.pread(fd, 1, place) for place in places)
        kind, *_ = _INODE_HEAD.unpack(head)
        owner = [_index(ids, number) for number in (uid, gid)]
        for place, byte in zip(places, _INODE_HEAD.pack(kind, mode, *owner, mtime), strict=True):
            os.pwrite(fd, bytes([byte]), place)
    finally:
        os.close(fd)


def _read_ids(fd: int, path: str, *, count: int, table: int) -> list[int]:
    """The owners' numbers: blocks of them, whose places stand at `table`."""
    blocks = -(-count * 4 // _METADATA_BYTES)
    starts = struct.unpack(f"<{blocks}Q", os.pread(fd, blocks * 8, table))
    raw = b"".join(_stored_block(fd, path, start) for start in starts)
    return list(struct.unpack(f"<{count}I", raw[: count * 4]))


def _stored_block(fd: int, path: str, start: int) -> bytes:
    (header,) = struct.unpack("<H", os.pread(fd, _HEADER_BYTES, start))
    if not header & _UNCOMPRESSED:
        raise ImageError(f"{path}: sqfstar compressed a table in spite of -noI")
    return os.pread(fd, header & ~_UNCOMPRESSED, start + _HEADER_BYTES)


def _places(fd: int, path: str, start: int, offset: int, count: int) -> list[int]:
    """Where in the file the bytes are that begin at `offset` in the metadata block at `start`.

    What does not fit into one block goes on in the next, after that one's header.
    """
    _stored_block(fd, path, start)
    return [
        start + _HEADER_BYTES + place + place // _METADATA_BYTES * _HEADER_BYTES
        for place in range(offset, offset + count)
    ]


def _index(ids: list[int], number: int) -> int:
    if number not in ids:
        raise ImageError(
            f"image's root directory belongs to {number}, whom no file in it belongs to: such an "
            "image needs erofs-utils 1.7 or newer on this host"
        )
    return ids.index(number)
