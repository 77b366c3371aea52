"""Files with holes, as tar stores them: only the pieces that have data, and a map of where they go.

GNU tar has written four forms: a map in the header (type S), and in pax records as 0.0, 0.1 and
1.0 (GNU tar manual, "Storing Sparse Files"). All are read here; none is ever written.
"""

import array
import os
from collections.abc import Callable, Iterator, Sequence

from microguest.host_client.images import limits

_ZEROS = bytes(limits.CHUNK_BYTES)
_MAX_DIGITS = 18  # of a number in a map: less than 2**63

Pieces = Sequence[int]
"""Three numbers for each piece: where it goes in the file, its length, where it is in the archive.
Empty for a file without holes."""


class BadMap(ValueError):
    """The map of a sparse file makes no sense; the text says why, as the end of a sentence."""


def pieces_of(pairs: Sequence[int], start: int, stored: int, size: int) -> Pieces:
    """The map for a file of `size` bytes, whose `stored` bytes of data begin at `start`.

    pairs: offset and length of each piece, in turn.
    """
    if len(pairs) % 2:
        raise BadMap("a map of a sparse file with an odd count of numbers")
    if len(pairs) // 2 > limits.MAX_SPARSE_PIECES:
        raise BadMap(f"a sparse file of more than {limits.MAX_SPARSE_PIECES} pieces")
    pieces = array.array("q")
    end = taken = 0
    for offset, length in zip(pairs[::2], pairs[1::2], strict=True):
        if offset < end or offset + length > size:
            raise BadMap("a sparse file whose pieces overlap or lie behind its end")
        if length:
            pieces.extend((offset, length, start + taken))
        end = offset + length
        taken += length
    if taken != stored:
        raise BadMap(f"a sparse file with {stored} bytes of data and a map for {taken}")
    return pieces or array.array("q", (0, 0, start))


def numbers(text: bytes, separator: bytes) -> list[int]:
    """Decimal numbers of a map. BadMap for anything else, and for too many."""
    parts = text.split(separator, 2 * limits.MAX_SPARSE_PIECES + 2)
    if any(not part.isdigit() or len(part) > _MAX_DIGITS for part in parts):
        raise BadMap("a map of a sparse file that is not made of numbers")
    return [int(part) for part in parts]


def map_before_data(read: Callable[[int], bytes], room: int) -> tuple[list[int], int]:
    """The map of form 1.0, which stands before the data: the pairs, and how many bytes it takes.

    read: gives the next block of the member, b"" at its end.  room: the member's bytes.
    """
    lines: list[bytes] = []
    rest = b""
    taken = 0
    wanted = 1
    while len(lines) < wanted:
        block = read(taken)
        taken += len(block)
        if not block or taken > room:
            raise BadMap("a sparse file whose map is cut short")
        *found, rest = (rest + block).split(b"\n")
        lines += found
        if lines:
            wanted = 1 + 2 * numbers(lines[0], b"\n")[0]
        if wanted > 1 + 2 * limits.MAX_SPARSE_PIECES:
            raise BadMap(f"a sparse file of more than {limits.MAX_SPARSE_PIECES} pieces")
        if len(lines) < wanted and len(rest) > _MAX_DIGITS:
            raise BadMap("a map of a sparse file that is not made of numbers")
    return [number for line in lines[1:wanted] for number in numbers(line, b"\n")], taken


def stored_bytes(fd: int, offset: int, size: int, pieces: Pieces = ()) -> Iterator[bytes]:
    """The file's bytes in chunks, its holes as zeros. A chunk is b"" where `fd` ends too early."""
    at = 0
    for number in range(0, len(pieces) or 3, 3):
        goes, length, where = pieces[number : number + 3] if pieces else (0, size, offset)
        yield from _zeros(goes - at)
        end = where + length
        while where < end:
            chunk = os.pread(fd, min(limits.CHUNK_BYTES, end - where), where)
            yield chunk
            if not chunk:
                return
            where += len(chunk)
        at = goes + length
    yield from _zeros(size - at)


def _zeros(count: int) -> Iterator[bytes]:
    while count > 0:
        yield _ZEROS[:count]
        count -= limits.CHUNK_BYTES
