"""Other addresses and routes for an interface of a running guest, by rtnetlink(7).

What is new is there before what is old goes, so that what is in both never leaves. Imported only
where it is used: of pyroute2 just the message classes, over a trio socket.
"""

import errno
import fcntl
import os
import socket
import struct
import sys
from typing import Any

import trio
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from microguest.guest.boot.network import Interface, Route

__all__ = ["readdress"]

RECEIVE = 256 * 1024  # bytes; one packet of a dump has at most 32 KiB
LINK = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change
IFLA_MTU = struct.Struct("=HHI")  # struct rtattr with its value: length, type, value
SIOCGIFHWADDR = 0x8927  # linux/sockios.h
HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
# linux/netlink.h, linux/rtnetlink.h, linux/if_link.h, linux/if.h, linux/if_addr.h
NLMSG_ERROR, NLMSG_DONE = 2, 3
REQUEST, ACK, REPLACE, DUMP, CREATE = 0x1, 0x4, 0x100, 0x300, 0x400
NEWLINK = 16
MTU = 4
NEWADDR, DELADDR, GETADDR = 20, 21, 22
NEWROUTE, DELROUTE, GETROUTE = 24, 25, 26
IFF_UP = 0x1
NODAD = 0x2  # IPv6: usable at once, without asking who else has it
PROTO_KERNEL, PROTO_STATIC = 2, 4
SCOPE_GLOBAL, SCOPE_LINK = 0, 253
TABLE_MAIN = 254
UNICAST = 1
FAMILIES = (socket.AF_INET, socket.AF_INET6)

Network = tuple[int, str, int]  # family, address, length of the prefix
Way = tuple[int, str, int, str, int]  # family, destination, its prefix, gateway or "", metric


async def readdress(interface: Interface) -> None:
    """Give it these addresses and routes, and take all others away. Raises OSError, ValueError.

    Its link-local IPv6 addresses and the routes that the kernel makes by itself stay.
    """
    addresses = [network(text) for text in interface.addresses]
    ways = [way(route) for route in interface.routes]
    with trio.socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        await sock.bind((0, 0))
        link = Link(sock, find(interface))
        await link.bring_up(interface.mtu)
        await link.add(addresses, ways)
        await link.remove_others(addresses, ways)
        await link.add(addresses, ways)  # what has gone together with an old address


class Link:
    """One interface, by its number."""

    def __init__(self, sock: trio.socket.SocketType, index: int) -> None:
        self._sock = sock
        self._index = index

    async def bring_up(self, mtu: int) -> None:
        """And set its MTU; 0: leave that."""
        link = LINK.pack(socket.AF_UNSPEC, 0, self._index, IFF_UP, IFF_UP)
        link += IFLA_MTU.pack(IFLA_MTU.size, MTU, mtu) if mtu else b""
        header = HEADER.pack(HEADER.size + len(link), NEWLINK, REQUEST | ACK, 0, 0)
        await self._sock.send(header + link)
        await replies(self._sock)

    async def add(self, addresses: list[Network], ways: list[Way]) -> None:
        """All of them; what is there already stays as it is."""
        for address in addresses:
            await change(self._sock, ifaddrmsg, NEWADDR, self._address(address), CREATE | REPLACE)
        for each in ways:
            await change(self._sock, rtmsg, NEWROUTE, self._route(each), CREATE | REPLACE)

    async def remove_others(self, addresses: list[Network], ways: list[Way]) -> None:
        """Routes first: they may need the addresses."""
        for route in await dump(self._sock, rtmsg, GETROUTE):
            found = known_way(route)
            if route.get_attr("RTA_OIF") == self._index and found and found not in ways:
                await change(self._sock, rtmsg, DELROUTE, self._route(found))
        for entry in await dump(self._sock, ifaddrmsg, GETADDR):
            mine = entry["index"] == self._index and entry["scope"] < SCOPE_LINK
            text = entry.get_attr("IFA_LOCAL") or entry.get_attr("IFA_ADDRESS")
            address = (entry["family"], text, entry["prefixlen"])
            if mine and address not in addresses:
                await change(self._sock, ifaddrmsg, DELADDR, self._address(address))

    def _address(self, address: Network) -> dict[str, Any]:
        family, text, prefix = address
        attributes = [("IFA_LOCAL", text), ("IFA_ADDRESS", text)]
        return {
            "family": family,
            "prefixlen": prefix,
            "flags": NODAD if family == socket.AF_INET6 else 0,
            "index": self._index,
            "attrs": attributes,
        }

    def _route(self, asked: Way) -> dict[str, Any]:
        family, to, prefix, via, metric = asked
        attributes: list[tuple[str, object]] = [("RTA_OIF", self._index)]
        attributes += [("RTA_DST", to)] if prefix else []
        attributes += [("RTA_GATEWAY", via)] if via else []
        attributes += [("RTA_PRIORITY", metric)] if metric else []
        return {
            "family": family,
            "dst_len": prefix,
            "table": TABLE_MAIN,
            "proto": PROTO_STATIC,
            "scope": SCOPE_GLOBAL if via or family == socket.AF_INET6 else SCOPE_LINK,
            "type": UNICAST,
            "attrs": attributes,
        }


def find(interface: Interface) -> int:
    """The number of the interface with this MAC, else of this name. Raises OSError."""
    for index, name in socket.if_nameindex():
        if name == interface.name if not interface.mac else has_mac(name, interface.mac):
            return index
    raise OSError(errno.ENODEV, "there is no such interface", interface.mac or interface.name)


def has_mac(name: str, mac: str) -> bool:
    """By netdevice(7), as a root need not have a /sys."""
    request = struct.pack("16s24x", os.fsencode(name))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        answer = fcntl.ioctl(sock, SIOCGIFHWADDR, request)
    return answer[18:24].hex(":") == mac.lower()


def known_way(route: Any) -> Way | None:
    """A route that somebody made, in the main table; None for the kernel's own."""
    made = route["proto"] != PROTO_KERNEL and route["type"] == UNICAST
    if not made or route["table"] != TABLE_MAIN or route["family"] not in FAMILIES:
        return None
    family, prefix = route["family"], route["dst_len"]
    return (
        family,
        route.get_attr("RTA_DST") or unspecified(family),
        prefix,
        route.get_attr("RTA_GATEWAY") or "",
        route.get_attr("RTA_PRIORITY") or 0,
    )


def way(route: Route) -> Way:
    """As the kernel will tell it. ValueError for what is no address."""
    via = normal(family_of(route.via), route.via) if route.via else ""
    if route.to == "default":
        family, to, prefix = family_of(via), unspecified(family_of(via)), 0
    else:
        family, to, prefix = network(route.to)
    metric = route.metric or (1024 if family == socket.AF_INET6 else 0)  # the kernel's own for IPv6
    return family, to, prefix, via, metric


def network(text: str) -> Network:
    """10.0.2.15/24 as (family, "10.0.2.15", 24). ValueError for anything else."""
    address, slash, length = text.partition("/")
    family = family_of(address)
    longest = 128 if family == socket.AF_INET6 else 32
    if not (slash and length.isdecimal() and len(length) < 4 and int(length) <= longest):
        raise ValueError(f"{text!r:.80} is not an address with a prefix, as 10.0.2.15/24")
    return family, normal(family, address), int(length)


def family_of(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def unspecified(family: int) -> str:
    return "::" if family == socket.AF_INET6 else "0.0.0.0"  # noqa: S104  nothing is bound to it


def normal(family: int, address: str) -> str:
    """As the kernel writes it. ValueError for what is no address."""
    try:
        return socket.inet_ntop(family, socket.inet_pton(family, address))
    except OSError:
        raise ValueError(f"{address!r:.80} is not an address") from None


# ── netlink ──────────────────────────────────────────────────────────────────────────────────────


async def change(
    sock: trio.socket.SocketType, kind: Any, number: int, fields: dict[str, Any], flags: int = 0
) -> None:
    """One request that the kernel acknowledges. Raises OSError."""
    await sock.send(encoded(kind, number, fields, REQUEST | ACK | flags))
    await replies(sock)


async def dump(sock: trio.socket.SocketType, kind: Any, number: int) -> list[Any]:
    """All objects of a kind. Raises OSError."""
    await sock.send(encoded(kind, number, {}, REQUEST | DUMP))
    return [decoded(kind, reply) for reply in await replies(sock)]


def encoded(kind: Any, number: int, fields: dict[str, Any], flags: int) -> bytes:
    message = kind()
    message["header"]["type"] = number
    message["header"]["flags"] = flags
    for name, value in fields.items():
        message[name] = value
    message.encode()
    return bytes(message.data)


def decoded(kind: Any, reply: bytes) -> Any:
    message = kind(reply)
    message.decode()
    return message


async def replies(sock: trio.socket.SocketType) -> list[bytes]:
    """Everything up to the acknowledgement or the end of a dump. Raises OSError.

    The kernel answers in the order of the requests, and no other sender is listened to.
    """
    found: list[bytes] = []
    while True:
        packet = await sock.recv(RECEIVE)
        while packet:
            length, kind, *_ = HEADER.unpack_from(packet)
            message, packet = packet[:length], packet[(length + 3) & ~3 :]
            if kind == NLMSG_ERROR:
                number = -int.from_bytes(message[16:20], sys.byteorder, signed=True)
                if number:
                    raise OSError(number, f"the kernel refuses it: {os.strerror(number)}")
            if kind in (NLMSG_ERROR, NLMSG_DONE):
                return found
            found.append(message)
