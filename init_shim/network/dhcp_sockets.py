"""The two ways in which a DHCP client talks: to everybody without an address, and to its server.

One payload at a time, of bounded size; the kernel throws away what is not for us.
"""

import _socket
import array
import errno
import select
import struct
import time

from microguest.init_shim.failure import Failure, call
from microguest.init_shim.network import dhcp_packets
from microguest.init_shim.network.addresses import text_address
from microguest.init_shim.network.netlink import Link

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

__all__ = ["Everybody", "OneServer"]

ETHERTYPE_IP = 0x0800
BIND_TO_DEVICE, ATTACH_FILTER = 25, 26  # asm-generic/socket.h: SO_*
PACKET = 2048  # bytes that are read of one; no valid one is longer
LONGEST_POLL = 3600.0  # seconds; poll(2) counts milliseconds in an int

# (code, jump if true, jump if false, value), for packets that begin with their IP header:
# UDP, not a fragment, to port 68.
FILTER = (
    (0x30, 0, 0, 9),  # protocol
    (0x15, 0, 6, 17),
    (0x28, 0, 0, 6),  # fragment
    (0x45, 4, 0, 0x3FFF),
    (0xB1, 0, 0, 0),  # the header's length
    (0x48, 0, 0, 2),  # destination port
    (0x15, 0, 1, dhcp_packets.CLIENT_PORT),
    (0x06, 0, 0, 0xFFFF),
    (0x06, 0, 0, 0),
)


class ClientSocket:
    """A `with` block closes it."""

    socket: _socket.socket

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()


class Everybody(ClientSocket):
    """Broadcast from an interface that may have no address: whole IP packets."""

    def __init__(self, link: Link, own: bytes = bytes(4)) -> None:
        self.link = link
        self.own = own
        with call("socket", "AF_PACKET"):
            kind = _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK
            self.socket = _socket.socket(_socket.AF_PACKET, kind, 0)  # 0: deaf until bound
            attach_filter(self.socket)
            self.socket.bind((link.name, ETHERTYPE_IP))

    def send(self, payload: bytes) -> None:
        """A lost packet is repeated later; so is one that could not be sent."""
        try:
            packet = dhcp_packets.datagram(payload, self.own)
            self.socket.sendto(packet, (self.link.name, ETHERTYPE_IP, 0, 0, b"\xff" * 6))
        except OSError as error:
            give_up_without_device(error, self.link)

    def receive(self, wait: float) -> bytes | None:
        """One payload; None in time, and for a packet that is none."""
        packet = next_packet(self.socket, self.link, wait)
        return None if packet is None else dhcp_packets.parse_datagram(packet)


class OneServer(ClientSocket):
    """From the leased address to the server that leased it."""

    def __init__(self, link: Link, own: bytes, server: bytes) -> None:
        self.link = link
        with call("socket", f"UDP on {link.name}"):
            kind = _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK
            self.socket = _socket.socket(_socket.AF_INET, kind, 0)
            self.socket.setsockopt(_socket.SOL_SOCKET, BIND_TO_DEVICE, link.name.encode() + b"\0")
            self.socket.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
            self.socket.bind((text_address(own), dhcp_packets.CLIENT_PORT))
            self.socket.connect((text_address(server), dhcp_packets.SERVER_PORT))

    def send(self, payload: bytes) -> None:
        """See Everybody."""
        try:
            self.socket.send(payload)
        except OSError as error:
            give_up_without_device(error, self.link)

    def receive(self, wait: float) -> bytes | None:
        """See Everybody."""
        return next_packet(self.socket, self.link, wait)


def next_packet(socket: _socket.socket, link: Link, wait: float) -> bytes | None:
    poll = select.poll()
    poll.register(socket.fileno(), select.POLLIN)
    if not poll.poll(int(min(wait, LONGEST_POLL) * 1000) + 1):
        return None
    try:
        return socket.recv(PACKET)
    except BlockingIOError:
        return None
    except OSError as error:
        give_up_without_device(error, link)
        time.sleep(0.1)  # an error that stays must not become a busy loop
        return None


def give_up_without_device(error: OSError, link: Link) -> None:
    """Only an interface that is gone is the end; all else may pass."""
    if error.errno in (errno.ENODEV, errno.ENXIO):
        raise Failure(f"the interface {link.name} is gone", errno=error.errno) from error


def attach_filter(socket: _socket.socket) -> None:
    """Let the kernel throw away what is not for us (socket(7), SO_ATTACH_FILTER)."""
    program = array.array("B", b"".join(struct.pack("=HBBI", *line) for line in FILTER))
    address, _ = program.buffer_info()
    socket.setsockopt(_socket.SOL_SOCKET, ATTACH_FILTER, struct.pack("@HP", len(FILTER), address))
