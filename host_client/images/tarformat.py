"""The tar format, strictly and with bounds: reading a layer. `tarwriter` has the other way.

Not the standard library's tarfile: that stops silently at a damaged header in mid-archive, takes
sizes below zero, reads extended headers of any length into memory and recurses through chains of
them. Names here are bytes from end to end, as they are in the kernel. Sources: pax(1) in
POSIX.1-2017, the GNU tar manual ("Basic Tar Format"), and Go's archive/tar, whose reading of
unclear cases is what container engines agree on.
"""

import enum
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from microguest.host_client.errors import ImageError
from microguest.host_client.images import limits
from microguest.host_client.images.budget import Budget
from microguest.host_client.images.sparse import BadMap, Pieces, map_before_data, numbers, pieces_of

BLOCK = 512
_ZERO_BLOCK = bytes(BLOCK)
XATTR_RECORD = b"SCHILY.xattr."
_SPARSE = b"GNU.sparse."
_BYTES_A_STEP = 4096  # what a step of the budget buys of bytes that are only copied
_MAX_ID = 0xFFFFFFFE  # (uid_t)-1 means "no change" to the kernel


class Kind(enum.Enum):
    """What an entry is; the values are the tar type flags."""

    FILE = b"0"
    HARD_LINK = b"1"
    SYMLINK = b"2"
    CHAR_DEVICE = b"3"
    BLOCK_DEVICE = b"4"
    DIRECTORY = b"5"
    FIFO = b"6"


@dataclass(frozen=True, slots=True)
class Entry:
    """One member of an archive.

    name: as stored, not yet made safe.  mode: the twelve permission bits.  mtime_ns: nanoseconds
    since 1970, may be negative.  offset, size: where a FILE's bytes are in the archive.
    pieces: of a sparse FILE, whose `size` includes its holes; () for any other.
    target: of a SYMLINK or HARD_LINK.  major, minor: of a device.
    """

    name: bytes
    kind: Kind
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    size: int = 0
    offset: int = 0
    pieces: Pieces = ()
    target: bytes = b""
    major: int = 0
    minor: int = 0
    xattrs: dict[bytes, bytes] = field(default_factory=dict)


def read_entries(fd: int, start: int, length: int, budget: Budget) -> Iterator[Entry]:
    """Yield the members of the archive in `fd` at bytes [start, start+length).

    Raises ImageError for anything that is not a well-formed archive and for types that no layer may
    hold. An archive may end without its two zero blocks, as engines allow.
    """
    archive = _Archive(fd, start, start + length, budget)
    extra = _Extra(budget)
    while (header := archive.next_header(extra)) is not None:
        if header.flag in _EXTENDED:
            if header.size > limits.MAX_HEADER_BYTES:
                raise header.bad(f"an extended header of {header.size} bytes")
            payload = archive.read(header.size)
            if len(payload) < header.size:
                raise header.bad("an extended header that is cut short")
            extra.add(header, payload)
            archive.position += _padded(header.size)
            continue
        entry, stored = extra.entry(header, archive)
        if archive.position + stored > archive.end:
            raise header.bad(f"{stored} bytes of data, more than the archive has")
        yield entry
        archive.position += _padded(stored)
        extra = _Extra(budget)


_EXTENDED = (b"x", b"L", b"K", b"g")


class _Archive:
    """The archive's bytes, and how far they have been read."""

    def __init__(self, fd: int, start: int, end: int, budget: Budget) -> None:
        self.position = start
        self.end = end
        self._fd = fd
        self._start = start
        self._budget = budget

    def read(self, count: int, ahead: int = 0) -> bytes:
        """Up to `count` bytes from `ahead` of the position on; fewer where the archive ends."""
        position = self.position + ahead
        self._budget.step(1 + count // _BYTES_A_STEP)
        return os.pread(self._fd, max(0, min(count, self.end - position)), position)

    def next_header(self, extra: "_Extra") -> "_Header | None":
        """None at the end of the archive, which may not come between `extra` and its member."""
        block = self.read(BLOCK)
        where = self.position - self._start
        if not block and extra.empty:
            return None
        if len(block) < BLOCK:
            raise ImageError(f"tar archive is cut short in the header at byte {where}")
        if block == _ZERO_BLOCK:
            return None
        self.position += BLOCK
        return _Header(block, where)

    def next_map_block(self, header: "_Header") -> bytes:
        """A block between a header of type S and its data, with more of the map."""
        block = self.read(BLOCK)
        if len(block) < BLOCK:
            raise header.bad("a sparse file whose map is cut short")
        self.position += BLOCK
        return block


def begins_archive(block: bytes) -> bool:
    """Whether a file whose first BLOCK bytes these are can be a tar archive."""
    if block == _ZERO_BLOCK:
        return True
    try:
        return len(block) == BLOCK and bool(_Header(block, 0))
    except ImageError:
        return False


def _padded(size: int) -> int:
    return (size + BLOCK - 1) // BLOCK * BLOCK


class _Header:
    """The 512 bytes before a member, checked."""

    def __init__(self, block: bytes, where: int) -> None:
        self.where = where
        self.block = block
        stored = self.number(block[148:156], "checksum")
        if stored != _checksum(block) and stored != _signed_checksum(block):
            raise self.bad("a wrong checksum: this is not a tar archive, or it is damaged")
        self.name = _string(block[0:100])
        self.mode = self.number(block[100:108], "mode") & 0o7777
        self.uid = self.number(block[108:116], "uid")
        self.gid = self.number(block[116:124], "gid")
        self.size = self.number(block[124:136], "size")
        self.mtime = self.number(block[136:148], "mtime")
        self.flag = block[156:157]
        self.target = _string(block[157:257])
        magic = block[257:263]
        self.major = self.minor = 0
        if magic in (b"ustar\0", b"ustar "):
            self.major = self.number(block[329:337], "device major")
            self.minor = self.number(block[337:345], "device minor")
        if magic == b"ustar\0" and (prefix := _string(block[345:500])):
            self.name = prefix + b"/" + self.name
        if self.size < 0:
            raise self.bad("a size below zero")

    def number(self, text: bytes, what: str) -> int:
        """Octal, or GNU's base 256 for what octal has no room for. Empty counts as 0, as in Go."""
        if text[0] & 0x80:
            value = int.from_bytes(text, "big") & ((1 << (8 * len(text) - 1)) - 1)
            if text[0] & 0x40:
                value -= 1 << (8 * len(text) - 1)
            return value
        digits = text.strip(b" \0").partition(b"\0")[0].strip()
        if not re.fullmatch(rb"[0-7]*", digits):
            raise self.bad(f"the {what} {text!r}, which is not a number")
        return int(digits or b"0", 8)

    def bad(self, what: str) -> ImageError:
        return ImageError(f"tar archive has, in the header at byte {self.where}, {what}")


def _checksum(block: bytes) -> int:
    """The sum of all bytes, those of the checksum itself counted as spaces."""
    return sum(block) - sum(block[148:156]) + 8 * 0x20


def _signed_checksum(block: bytes) -> int:
    """As some historic tars summed: with signed bytes."""
    return _checksum(block) - 256 * sum(b > 127 for b in block[:148] + block[156:])


def _string(raw: bytes) -> bytes:
    return raw.partition(b"\0")[0]


_KINDS = {kind.value: kind for kind in Kind}
_KINDS |= {b"\0": Kind.FILE, b"7": Kind.FILE, b"S": Kind.FILE}


class _Extra:
    """What extended headers say about the next member."""

    def __init__(self, budget: Budget) -> None:
        self.long_name: bytes | None = None
        self.long_target: bytes | None = None
        self.records: dict[bytes, bytes] = {}
        self._budget = budget

    @property
    def empty(self) -> bool:
        return self.long_name is None and self.long_target is None and not self.records

    def add(self, header: _Header, payload: bytes) -> None:
        if header.flag == b"L":
            self.long_name = _string(payload)
        elif header.flag == b"K":
            self.long_target = _string(payload)
        elif header.flag == b"x":
            self.records = _pax_records(header, payload, self._budget)
        # A global header (g) changes nothing: engines that unpack layers ignore it too.

    def entry(self, header: _Header, archive: _Archive) -> tuple[Entry, int]:
        """The member, and how many bytes it takes in the archive from the position on."""
        records = self.records
        kind = _KINDS.get(header.flag)
        if kind is None:
            raise header.bad(f"an entry of the unknown type {header.flag!r}")
        name = records.get(_SPARSE + b"name") or records.get(b"path") or self.long_name
        name = name or header.name
        if kind is Kind.FILE and header.flag == b"\0" and name.endswith(b"/"):
            kind = Kind.DIRECTORY  # how tar before POSIX.1-1988 marked one
        stored = _record_number(header, records, b"size", header.size)
        stored = size = stored if kind is Kind.FILE else 0
        pieces: Pieces = ()
        if kind is Kind.FILE:
            try:
                size, pieces = _holes(header, records, archive, stored)
            except BadMap as error:
                raise header.bad(str(error)) from error
        entry = Entry(
            name=name,
            kind=kind,
            mode=header.mode,
            uid=_record_number(header, records, b"uid", header.uid),
            gid=_record_number(header, records, b"gid", header.gid),
            mtime_ns=_record_time(header, records),
            size=size,
            offset=archive.position,
            pieces=pieces,
            target=records.get(b"linkpath") or self.long_target or header.target,
            major=header.major,
            minor=header.minor,
            xattrs=_record_xattrs(header, records),
        )
        _check_entry(header, entry)
        return entry, stored


def _holes(
    header: _Header, records: dict[bytes, bytes], archive: _Archive, stored: int
) -> tuple[int, Pieces]:
    """A file's size with its holes, and its map; ends at the first byte of data."""
    if header.flag == b"S":
        size = header.number(header.block[483:495], "size of a sparse file")
        pairs = _old_map(header, header.block[386:482])
        more = header.block[482]
        while more and len(pairs) <= 2 * limits.MAX_SPARSE_PIECES:
            block = archive.next_map_block(header)
            pairs += _old_map(header, block[:504])
            more = block[504]
        return size, pieces_of(pairs, archive.position, stored, size)
    if not any(key.startswith(_SPARSE) for key in records):
        return stored, ()
    size = _record_number(header, records, _SPARSE + b"size", stored)
    size = _record_number(header, records, _SPARSE + b"realsize", size)
    if records.get(_SPARSE + b"major") == b"1":
        pairs, taken = map_before_data(lambda at: archive.read(BLOCK, at), stored)
        return size, pieces_of(pairs, archive.position + taken, stored - taken, size)
    text = records.get(_SPARSE + b"map")
    pairs = numbers(text, b",") if text else []
    return size, pieces_of(pairs, archive.position, stored, size)


def _old_map(header: _Header, fields: bytes) -> list[int]:
    """Offset and length, each 12 bytes, up to the first that is empty."""
    pairs: list[int] = []
    for at in range(0, len(fields), 24):
        if not fields[at]:
            break
        pairs.append(header.number(fields[at : at + 12], "offset in a map"))
        pairs.append(header.number(fields[at + 12 : at + 24], "length in a map"))
        if min(pairs[-2:]) < 0:
            raise header.bad("a map of a sparse file with a number below zero")
    return pairs


def _pax_records(header: _Header, payload: bytes, budget: Budget) -> dict[bytes, bytes]:
    """Records of the form "LENGTH KEY=VALUE\\n", where LENGTH counts the whole record."""
    records: dict[bytes, bytes] = {}
    pairs: list[bytes] = []  # sparse form 0.0 gives these as records of their own, repeated
    at = 0
    while at < len(payload):
        budget.step()
        digits, space, _ = payload[at : at + 20].partition(b" ")
        if not space or not digits.isdigit():
            raise header.bad("a pax record without a length")
        stop = at + int(digits)
        record = payload[at + len(digits) + 1 : stop]
        key, equals, value = record.partition(b"=")
        if stop > len(payload) or not record.endswith(b"\n") or not equals or not key:
            raise header.bad("a malformed pax record")
        if key in (_SPARSE + b"offset", _SPARSE + b"numbytes"):
            pairs.append(value[:-1])
        records[key] = value[:-1]
        at = stop
    if pairs:
        records[_SPARSE + b"map"] = b",".join(pairs)
    return records


def _record_number(header: _Header, records: dict[bytes, bytes], key: bytes, default: int) -> int:
    text = records.get(key)
    if not text:
        return default
    if not re.fullmatch(rb"[0-9]{1,19}", text):
        raise header.bad(f"the pax {key.decode()} {text[:40]!r}, which is not a number")
    return int(text)


def _record_time(header: _Header, records: dict[bytes, bytes]) -> int:
    text = records.get(b"mtime")
    if not text:
        return header.mtime * 1_000_000_000
    match = re.fullmatch(rb"(-?)([0-9]{1,18})(?:\.([0-9]*))?", text)
    if match is None:
        raise header.bad(f"the pax mtime {text[:40]!r}, which is not a time")
    fraction = (match[3] or b"")[:9].ljust(9, b"0")
    value = int(match[2]) * 1_000_000_000 + int(fraction)
    return -value if match[1] else value


def _record_xattrs(header: _Header, records: dict[bytes, bytes]) -> dict[bytes, bytes]:
    xattrs = {
        key[len(XATTR_RECORD) :]: value
        for key, value in records.items()
        if key.startswith(XATTR_RECORD)
    }
    if len(xattrs) > limits.MAX_XATTRS:
        raise header.bad(f"{len(xattrs)} extended attributes, more than {limits.MAX_XATTRS}")
    for key, value in xattrs.items():
        if not 0 < len(key) <= limits.MAX_XATTR_NAME_BYTES or b"\0" in key:
            raise header.bad("an extended attribute with an impossible name")
        if len(value) > limits.MAX_XATTR_VALUE_BYTES:
            raise header.bad(f"an extended attribute of {len(value)} bytes")
    total = sum(len(key) + len(value) for key, value in xattrs.items())
    if total > limits.MAX_XATTRS_BYTES:
        raise header.bad(
            f"{total} bytes of extended attributes, more than {limits.MAX_XATTRS_BYTES}"
        )
    return xattrs


def _check_entry(header: _Header, entry: Entry) -> None:
    for what, text in (("name", entry.name), ("link target", entry.target)):
        if b"\0" in text:
            raise header.bad(f"a {what} with a NUL byte in it")
        if len(text) > limits.MAX_PATH_BYTES:
            raise header.bad(f"a {what} of {len(text)} bytes, more than {limits.MAX_PATH_BYTES}")
    if not (0 <= entry.uid <= _MAX_ID and 0 <= entry.gid <= _MAX_ID):
        raise header.bad(f"the impossible owner {entry.uid}:{entry.gid}")
    if not (0 <= entry.major < 1 << 12 and 0 <= entry.minor < 1 << 20):
        raise header.bad(f"the impossible device {entry.major}:{entry.minor}")
