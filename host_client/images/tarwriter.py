"""The tar format, written: one merged root as a stream for the makers of disks and directories."""

from microguest.host_client.images.tarformat import BLOCK, XATTR_RECORD, Entry, Kind

END_OF_ARCHIVE = bytes(2 * BLOCK)


def header_bytes(entry: Entry) -> bytes:
    """The header blocks of `entry`; its data, padded with `padding`, follow in the stream.

    Long names go into GNU headers, not pax records: GNU tar would recode the latter, and names
    need not be text. Pax records carry only extended attributes and fractions of a second.
    """
    blocks = []
    records = [(XATTR_RECORD + key, value) for key, value in sorted(entry.xattrs.items())]
    seconds, nanoseconds = divmod(entry.mtime_ns, 1_000_000_000)
    if nanoseconds and seconds >= 0:
        records.append((b"mtime", b"%d.%09d" % (seconds, nanoseconds)))
    if records:
        blocks.append(_long_header(b"x", b"".join(_pax_record(*record) for record in records)))
    if len(entry.target) > 100:
        blocks.append(_long_header(b"K", entry.target + b"\0"))
    if len(entry.name) > 100:
        blocks.append(_long_header(b"L", entry.name + b"\0"))
    blocks.append(_block(entry, entry.kind.value, seconds))
    return b"".join(blocks)


def padding(size: int) -> bytes:
    """The zeros that follow `size` bytes of data."""
    return bytes(-size % BLOCK)


def _long_header(flag: bytes, payload: bytes) -> bytes:
    entry = Entry(name=b"././@LongLink", kind=Kind.FILE, mode=0o644, size=len(payload))
    return _block(entry, flag, 0) + payload + padding(len(payload))


def _pax_record(key: bytes, value: bytes) -> bytes:
    body = len(key) + len(value) + 3  # the space, the equals sign and the newline
    length = body + len(str(body))
    if len(str(length)) > len(str(body)):
        length += 1
    return b"%d %s=%s\n" % (length, key, value)


def _block(entry: Entry, flag: bytes, seconds: int) -> bytes:
    head = b"".join(
        (
            entry.name[:100].ljust(100, b"\0"),
            _field(entry.mode, 8),
            _field(entry.uid, 8),
            _field(entry.gid, 8),
            _field(entry.size, 12),
            _field(seconds, 12),
            b" " * 8,
            flag,
            entry.target[:100].ljust(100, b"\0"),
            b"ustar  \0",
            bytes(64),
            _field(entry.major, 8),
            _field(entry.minor, 8),
        )
    ).ljust(BLOCK, b"\0")
    return head[:148] + b"%06o\0 " % sum(head) + head[156:]


def _field(value: int, width: int) -> bytes:
    if 0 <= value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    return (value & ((1 << (8 * width - 1)) - 1) | 1 << (8 * width - 1)).to_bytes(width, "big")
