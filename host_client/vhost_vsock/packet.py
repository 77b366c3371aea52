"""The vsock packet header (virtio 1.2, section 5.10.6) and the constants that go with it.

Numbers and one Struct: no state, no I/O, no imports beyond the standard library.
"""

import struct
from typing import Final

HEADER: Final = struct.Struct("<QQIIIHHIII")
"""src_cid dst_cid src_port dst_port len type op flags buf_alloc fwd_cnt."""
HEADER_SIZE: Final = 44

HOST_CID: Final = 2
STREAM: Final = 1

REQUEST: Final = 1
RESPONSE: Final = 2
RST: Final = 3
SHUTDOWN: Final = 4
RW: Final = 5
CREDIT_UPDATE: Final = 6
CREDIT_REQUEST: Final = 7

SHUT_RECEIVE: Final = 1
"""The sender of this SHUTDOWN flag takes no more data."""
SHUT_SEND: Final = 2
"""The sender of this SHUTDOWN flag sends no more data."""
SHUT_BOTH: Final = 3

PORT_MAX: Final = 0xFFFFFFFE
MASK32: Final = 0xFFFFFFFF
