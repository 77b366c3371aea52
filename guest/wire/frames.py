"""The frame header: eight bytes before every payload. Layout in docs/reference/protocol.md.

0      4     5     6        8
┌──────┬─────┬─────┬────────┬───────────
│length│kind │  0  │channel │ payload …
└──────┴─────┴─────┴────────┴───────────     integers are big-endian
"""

import struct

from microguest.guest import bounds
from microguest.guest.errors import RemoteProtocolError

__all__ = ["HEADER", "MAGIC", "PREFACE_SIZE", "VERSION", "FrameHeader", "Kind", "preface"]

MAGIC = b"\x89mgst\n"  # not ASCII, not UTF-8, and a newline that text-mode transports would change
VERSION = 1
PREFACE_SIZE = 8
HEADER = struct.Struct(">IBBH")


class Kind:
    """Frame kinds. Values never change their meaning; new ones come with a new protocol version."""

    HELLO = 1
    WELCOME = 2
    REQUEST = 3
    RESPONSE = 4
    ERROR = 5
    DATA = 6
    END = 7
    CONTROL = 8
    EXITED = 9
    CREDIT = 10  # only between two sides that both name the feature "credit"


# The longest payload of each kind; a kind that is not here does not exist.
MAX_PAYLOAD = {
    Kind.HELLO: bounds.HELLO_PAYLOAD,
    Kind.WELCOME: bounds.HELLO_PAYLOAD,
    Kind.REQUEST: bounds.CONTROL_PAYLOAD,
    Kind.RESPONSE: bounds.RESPONSE_PAYLOAD,
    Kind.ERROR: bounds.ERROR_PAYLOAD,
    Kind.DATA: bounds.DATA_PAYLOAD,
    Kind.END: 0,
    Kind.CONTROL: bounds.HELLO_PAYLOAD,
    Kind.EXITED: bounds.HELLO_PAYLOAD,
    Kind.CREDIT: bounds.HELLO_PAYLOAD,
}


class FrameHeader:
    """A parsed header: `length` of the payload in bytes, `kind`, `channel` (a stream's number)."""

    __slots__ = ("channel", "kind", "length")

    def __init__(self, length: int, kind: int, channel: int) -> None:
        self.length = length
        self.kind = kind
        self.channel = channel

    @classmethod
    def parse(cls, data: bytes | bytearray, offset: int = 0) -> "FrameHeader":
        """Parse and check eight bytes. Raises RemoteProtocolError before a payload is awaited."""
        length, kind, zero, channel = HEADER.unpack_from(data, offset)
        maximum = MAX_PAYLOAD.get(kind)
        if maximum is None:
            raise RemoteProtocolError(f"frame of unknown kind {kind}")
        if zero:
            raise RemoteProtocolError(f"frame header with reserved byte {zero:#x}, must be 0")
        if length > maximum:
            raise RemoteProtocolError(
                f"frame of kind {kind} announces {length} bytes, at most {maximum} are allowed",
                code="frame_too_large",
            )
        if channel and kind not in (Kind.DATA, Kind.END):
            raise RemoteProtocolError(f"frame of kind {kind} on channel {channel}, must be 0")
        return cls(length, kind, channel)


def header(length: int, kind: int, channel: int = 0) -> bytes:
    """The eight bytes before a payload of `length` bytes."""
    return HEADER.pack(length, kind, 0, channel)


def preface(version: int = VERSION) -> bytes:
    """What each side sends first: magic and protocol version."""
    return MAGIC + version.to_bytes(2, "big")
