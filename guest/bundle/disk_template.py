"""An empty file system in little space: what of its blocks is not zero, and where it goes.

The build packs one, made by mke2fs, into the initramfs; PID 1 writes it to blank disks. The layout:
MAGIC, then the file system's size in bytes (8 bytes, little-endian), then pieces to the end, each
with its offset (8 bytes) and length (4 bytes) before its data, and within one BLOCK. Pure.
"""

TYPE_CHECKING = False  # typing itself is too heavy for PID 1
if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["BLOCK", "LABEL", "MAGIC", "PATH", "UNIT", "pack", "unpack"]

PATH = "/microguest/ext4"  # in the initramfs
MAGIC = b"microguest disk template 1\n"
LABEL = "microguest"  # the file system's volume name: such a one grows with its disk
BLOCK = 4096  # bytes of a block of the file system
UNIT = 512  # bytes that are left out where they are all zero: a disk's sector


def pack(image: bytes) -> bytes:
    """The template of a file system's image, whose size is a multiple of BLOCK."""
    parts = [MAGIC, len(image).to_bytes(8, "little")]
    blank = bytes(UNIT)
    begin = 0
    while begin < len(image):
        end = begin
        while image[end : end + UNIT] not in (blank, b""):
            end += UNIT
            if end % BLOCK == 0:
                break
        if end > begin:
            parts += [begin.to_bytes(8, "little"), (end - begin).to_bytes(4, "little")]
            parts.append(image[begin:end])
        begin = max(end, begin + UNIT)
    return b"".join(parts)


def unpack(template: bytes) -> "tuple[int, Iterator[tuple[int, bytes]]]":
    """(size in bytes, pieces as (offset, data) by ascending offset). Raises ValueError."""
    if not template.startswith(MAGIC):
        raise ValueError("it is no disk template of this version")
    start = len(MAGIC) + 8
    return int.from_bytes(template[len(MAGIC) : start], "little"), pieces(template, start)


def pieces(template: bytes, start: int) -> "Iterator[tuple[int, bytes]]":
    while start < len(template):
        offset = int.from_bytes(template[start : start + 8], "little")
        size = int.from_bytes(template[start + 8 : start + 12], "little")
        start += 12
        yield offset, template[start : start + size]
        start += size
