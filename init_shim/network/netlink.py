"""Links, addresses and routes by rtnetlink(7): what PID 1 and its DHCP client tell the kernel.

Every request is acknowledged or fails with the kernel's own sentence; answers have a stated size.
Imported only where there is something to set up.
"""

import _socket
import errno
import os
import struct

from microguest.init_shim.failure import Failure, call
from microguest.init_shim.network.addresses import Prefix, text_address

__all__ = ["FOREVER", "FROM_DHCP", "Link", "Netlink"]

# linux/netlink.h, linux/rtnetlink.h
ROUTE = 0  # NETLINK_ROUTE
SOL_NETLINK, CAP_ACK, EXT_ACK = 270, 10, 11
REQUEST, ACK, DUMP, REPLACE, CREATE = 0x1, 0x4, 0x300, 0x100, 0x400
ERROR, DONE = 2, 3
ACK_TLVS, ACK_MESSAGE = 0x200, 1  # NLM_F_ACK_TLVS, NLMSGERR_ATTR_MSG
NEW_LINK, GET_LINK, NEW_ADDRESS, DELETE_ADDRESS, GET_ADDRESS = 16, 18, 20, 21, 22
NEW_ROUTE, DELETE_ROUTE = 24, 25
NAMES = {
    NEW_LINK: "RTM_NEWLINK",
    GET_LINK: "RTM_GETLINK",
    NEW_ADDRESS: "RTM_NEWADDR",
    DELETE_ADDRESS: "RTM_DELADDR",
    GET_ADDRESS: "RTM_GETADDR",
    NEW_ROUTE: "RTM_NEWROUTE",
    DELETE_ROUTE: "RTM_DELROUTE",
}

# linux/if.h, linux/if_link.h, linux/if_addr.h
UP, LOOPBACK = 0x1, 0x8
CARRIER = 0x10040  # IFF_LOWER_UP is the cable, IFF_RUNNING that the kernel has acted on it
LINK_ADDRESS, LINK_NAME, LINK_MTU = 1, 3, 4  # IFLA_*
ADDRESS, LOCAL, BROADCAST, CACHE_INFO = 1, 2, 4, 6  # IFA_*
NO_DAD = 0x02  # IFA_F_NODAD

# linux/rtnetlink.h
DESTINATION, OUTPUT, GATEWAY, PRIORITY, SOURCE = 1, 4, 5, 6, 7  # RTA_*
TABLE_MAIN, UNICAST, ON_LINK = 254, 1, 0x4
SCOPE_UNIVERSE, SCOPE_LINK = 0, 253
STATIC, FROM_DHCP = 4, 16  # RTPROT_*

HEADER = struct.Struct("=IHHII")
ATTRIBUTE = struct.Struct("=HH")
LINK = struct.Struct("=BxHiII")
ANSWER = 64 * 1024  # bytes; the kernel's dumps come in pieces of at most 32 KiB
ANSWERS = 256  # messages of one request's answer, pieces of dumps included
PATIENCE = 5.0  # seconds for the kernel to answer

FOREVER = 0xFFFFFFFF  # of a lifetime


class Link:
    """One interface as the kernel lists it. `mac` is "" for what has none."""

    def __init__(self, index: int, name: str, mac: str, flags: int) -> None:
        self.index = index
        self.name = name
        self.mac = mac
        self.is_up = bool(flags & UP)
        self.is_loopback = bool(flags & LOOPBACK)
        self.has_carrier = flags & CARRIER == CARRIER


class Netlink:
    """A socket to the kernel's routing tables. Every method raises Failure."""

    def __init__(self) -> None:
        with call("socket", "netlink"):
            kind = _socket.SOCK_RAW | _socket.SOCK_CLOEXEC
            self._socket = _socket.socket(_socket.AF_NETLINK, kind, ROUTE)
            self._socket.bind((0, 0))
            self._socket.settimeout(PATIENCE)
            for option in (CAP_ACK, EXT_ACK):
                self._socket.setsockopt(SOL_NETLINK, option, 1)
        self._sequence = 0

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    # ── looking ──────────────────────────────────────────────────────────────────────────────────

    def links(self) -> list[Link]:
        """Every interface, by index."""
        found = []
        for body in self._ask(GET_LINK, DUMP, LINK.pack(0, 0, 0, 0, 0), "links"):
            _, _, index, flags, _ = LINK.unpack_from(body)
            fields = attributes(body[LINK.size :])
            name = fields.get(LINK_NAME, b"").rstrip(b"\0").decode("utf-8", "replace")
            found.append(Link(index, name, fields.get(LINK_ADDRESS, b"").hex(":"), flags))
        return sorted(found, key=lambda link: link.index)

    def has_address(self, index: int) -> bool:
        """Whether an interface has an IPv4 address."""
        body = struct.pack("=BBBBi", _socket.AF_INET, 0, 0, 0, 0)
        answers = self._ask(GET_ADDRESS, DUMP, body, "addresses")
        return any(struct.unpack_from("=i", answer, 4)[0] == index for answer in answers)

    # ── changing ─────────────────────────────────────────────────────────────────────────────────

    def rename(self, link: Link, name: str) -> None:
        """Call an interface otherwise; it is taken down for it if it is up."""
        if link.is_up:
            self._change_link(link, f"{link.name} down", up=False)
        self._change_link(link, f"rename {link.name} to {name}", name=name)
        link.name = name

    def set_mtu(self, link: Link, mtu: int) -> None:
        """The largest packet, in bytes."""
        self._change_link(link, f"MTU {mtu} of {link.name}", mtu=mtu)

    def bring_up(self, link: Link) -> None:
        """Like `ip link set up`."""
        self._change_link(link, f"{link.name} up", up=True)

    def set_address(self, link: Link, prefix: Prefix, lifetime: int = FOREVER) -> None:
        """Give an interface an address, or an address it has another lifetime, in seconds.

        An IPv6 address can be bound to at once: no duplicate is looked for (IFA_F_NODAD).
        """
        fields = [(LOCAL, prefix.address), (ADDRESS, prefix.address)]
        flags = 0
        if prefix.family == _socket.AF_INET6:
            flags = NO_DAD
        elif prefix.length < 31:  # RFC 3021: a link between two has no broadcast
            fields.append((BROADCAST, prefix.broadcast))
        fields.append((CACHE_INFO, struct.pack("=IIII", lifetime, lifetime, 0, 0)))
        body = self._address_body(link, prefix, flags, fields)
        self._ask(NEW_ADDRESS, CREATE | REPLACE | ACK, body, f"address {prefix} on {link.name}")

    def remove_address(self, link: Link, prefix: Prefix) -> None:
        """Take an address away; one that is not there is fine."""
        body = self._address_body(link, prefix, 0, [(LOCAL, prefix.address)])
        try:
            self._ask(DELETE_ADDRESS, ACK, body, f"no address {prefix} on {link.name}")
        except Failure as failure:
            if failure.errno != errno.EADDRNOTAVAIL:
                raise

    def set_route(
        self,
        link: Link,
        to: Prefix,
        via: bytes = b"",
        *,
        metric: int = 0,
        source: bytes = b"",
        on_link: bool = False,
        origin: int = STATIC,
    ) -> None:
        """Add a route, or replace the one to the same place with the same metric.

        via: b"" for what is reached directly. on_link: `via` is on this link whatever the addresses
        say.
        """
        body = self._route_body(
            link, to, via, origin, metric=metric, source=source, on_link=on_link
        )
        self._ask(NEW_ROUTE, CREATE | REPLACE | ACK, body, route_text(link, to, via))

    def remove_route(
        self, link: Link, to: Prefix, via: bytes = b"", *, origin: int = STATIC
    ) -> None:
        """Take a route away; one that is not there is fine."""
        body = self._route_body(link, to, via, origin)
        try:
            self._ask(DELETE_ROUTE, ACK, body, f"no {route_text(link, to, via)}")
        except Failure as failure:
            if failure.errno != errno.ESRCH:
                raise

    # ── messages ─────────────────────────────────────────────────────────────────────────────────

    def _change_link(
        self, link: Link, what: str, *, up: bool | None = None, name: str = "", mtu: int = 0
    ) -> None:
        body = LINK.pack(0, 0, link.index, UP if up else 0, UP if up is not None else 0)
        if name:
            body += attribute(LINK_NAME, os.fsencode(name) + b"\0")
        if mtu:
            body += attribute(LINK_MTU, struct.pack("=I", mtu))
        self._ask(NEW_LINK, ACK, body, what)

    def _address_body(
        self, link: Link, prefix: Prefix, flags: int, fields: list[tuple[int, bytes]]
    ) -> bytes:
        start = struct.pack("=BBBBi", prefix.family, prefix.length, flags, 0, link.index)
        return start + b"".join(attribute(kind, value) for kind, value in fields)

    def _route_body(
        self,
        link: Link,
        to: Prefix,
        via: bytes,
        origin: int,
        *,
        metric: int = 0,
        source: bytes = b"",
        on_link: bool = False,
    ) -> bytes:
        direct = to.family == _socket.AF_INET and not via
        scope = SCOPE_LINK if direct else SCOPE_UNIVERSE
        numbers = (to.family, to.length, 0, 0, TABLE_MAIN, origin, scope, UNICAST)
        body = struct.pack("=BBBBBBBBI", *numbers, ON_LINK if on_link else 0)
        body += attribute(OUTPUT, struct.pack("=i", link.index))
        if to.length:
            body += attribute(DESTINATION, to.network)
        if via:
            body += attribute(GATEWAY, via)
        if metric:
            body += attribute(PRIORITY, struct.pack("=I", metric))
        if source:
            body += attribute(SOURCE, source)
        return body

    def _ask(self, kind: int, flags: int, body: bytes, what: str) -> list[bytes]:
        """Send one request; returns the bodies of the answer, without the end marks."""
        self._sequence += 1
        header = HEADER.pack(HEADER.size + len(body), kind, REQUEST | flags, self._sequence, 0)
        try:
            self._socket.sendto(header + body, (0, 0))
            return self._answer()
        except OSError as error:
            number = error.errno or errno.ETIMEDOUT  # a socket's TimeoutError has none
            reason = os.strerror(number)
            if error.strerror and error.errno and error.strerror != reason:
                reason += f" ({error.strerror})"
            raise Failure(
                f"{what}: {reason}", syscall=f"netlink {NAMES[kind]}", path=what, errno=number
            ) from error

    def _answer(self) -> list[bytes]:
        bodies: list[bytes] = []
        for _ in range(ANSWERS):
            data, sender = self._socket.recvfrom(ANSWER)
            if sender[0] != 0:
                continue  # another program's: only port 0 is the kernel
            for kind, flags, sequence, body in messages(data):
                if sequence != self._sequence:
                    continue
                if kind == ERROR:
                    check_acknowledged(body, flags)
                    return bodies
                if kind == DONE:
                    return bodies
                bodies.append(body)
        raise OSError(errno.EMSGSIZE, "the kernel's answer has no end")


def messages(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """(type, flags, sequence, body) of each message in a datagram; what is cut short is left."""
    found = []
    while len(data) >= HEADER.size:
        length, kind, flags, sequence, _ = HEADER.unpack_from(data)
        if not HEADER.size <= length <= len(data):
            break
        found.append((kind, flags, sequence, data[HEADER.size : length]))
        data = data[(length + 3) & ~3 :]
    return found


def check_acknowledged(body: bytes, flags: int) -> None:
    """Raise what an NLMSG_ERROR says, with the kernel's own sentence where there is one."""
    number = -struct.unpack_from("=i", body)[0]
    if number == 0:
        return
    sentence = b""
    if flags & ACK_TLVS:  # behind the error and the header of the request (NETLINK_CAP_ACK)
        sentence = attributes(body[4 + HEADER.size :]).get(ACK_MESSAGE, b"")
    raise OSError(number, sentence.rstrip(b"\0").decode("utf-8", "replace")[:200])


def attribute(kind: int, value: bytes) -> bytes:
    """One rtattr, padded."""
    length = ATTRIBUTE.size + len(value)
    return ATTRIBUTE.pack(length, kind) + value + bytes(-length % 4)


def attributes(data: bytes) -> dict[int, bytes]:
    """The rtattrs in `data` by type; what is cut short is left."""
    found = {}
    while len(data) >= ATTRIBUTE.size:
        length, kind = ATTRIBUTE.unpack_from(data)
        if not ATTRIBUTE.size <= length <= len(data):
            break
        found[kind & 0x3FFF] = data[ATTRIBUTE.size : length]
        data = data[(length + 3) & ~3 :]
    return found


def route_text(link: Link, to: Prefix, via: bytes) -> str:
    """A route as people write it."""
    place = str(to) if to.length else "default"
    gateway = f" via {text_address(via)}" if via else ""
    return f"route {place}{gateway} on {link.name}"
