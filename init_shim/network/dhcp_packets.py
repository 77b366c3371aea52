"""DHCPv4's messages (RFC 2131, 2132, 3396, 3442) and the IP and UDP around them. No I/O, no clock.

Everything that is parsed comes from whoever is on the network: it is a `Reply` with sound values,
or None.
"""

import struct

__all__ = [
    "ACK", "DISCOVER", "FOREVER", "NAK", "OFFER", "REQUEST", "Reply", "datagram", "message",
    "parse_datagram", "parse_message",
]  # fmt: skip

CLIENT_PORT, SERVER_PORT = 68, 67
DISCOVER, OFFER, REQUEST, ACK, NAK = 1, 2, 3, 5, 6
FOREVER = 0xFFFFFFFF  # a lease without an end

HEADER = struct.Struct("!BBBBIHH4s4s4s4s16s64s128s")
BOOT_REQUEST, BOOT_REPLY, ETHERNET = 1, 2, 1
BROADCAST_FLAG = 0x8000
COOKIE = b"\x63\x82\x53\x63"
LARGEST = 1500  # bytes of a message that is offered and accepted
SMALLEST = 300  # bytes of a message; relays drop shorter ones (RFC 1542, 2.1)

# RFC 2132
PAD, END = 0, 255
MASK, ROUTERS, SERVERS, HOST_NAME, DOMAIN, MTU = 1, 3, 6, 12, 15, 26
ADDRESS, LEASE_TIME, OVERLOAD, TYPE, SERVER, WANTED = 50, 51, 52, 53, 54, 55
LONGEST_MESSAGE, RENEWAL, REBINDING, CLIENT_ID, CLASSLESS_ROUTES = 57, 58, 59, 61, 121
ASKED_FOR = bytes(
    (MASK, CLASSLESS_ROUTES, ROUTERS, SERVERS, DOMAIN, MTU, LEASE_TIME, RENEWAL, REBINDING)
)

SHORTEST_LEASE = 4  # seconds; what is shorter cannot be kept
MOST_SERVERS = 3  # all that resolv.conf(5) takes
MOST_ROUTES = 32
SMALLEST_MTU = 576  # RFC 2132 has 68; smaller than this breaks what every host must take
DOMAIN_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")


class Reply:
    """What a server said, checked. For a NAK only `kind` and `server` mean anything.

    Times are seconds; `lease` may be FOREVER. `routes` are (destination, length, gateway).
    """

    def __init__(self, kind: int, address: bytes, server: bytes) -> None:
        self.kind = kind
        self.address = address
        self.server = server
        self.length = 32  # of the network
        self.lease = 0
        self.renewal = 0
        self.rebinding = 0
        self.routes: tuple[tuple[bytes, int, bytes], ...] = ()
        self.nameservers: tuple[bytes, ...] = ()
        self.domain = ""
        self.mtu = 0


def message(
    kind: int,
    transaction: int,
    mac: bytes,
    *,
    seconds: int = 0,
    hostname: str = "",
    own: bytes = bytes(4),
    wanted: bytes = b"",
    server: bytes = b"",
) -> bytes:
    """A client's message.

    own: the address that it has and answers to already. wanted: the one that it asks for, of
    `server`.
    """
    flags = 0 if own != bytes(4) else BROADCAST_FLAG
    none = bytes(4)
    header = HEADER.pack(
        BOOT_REQUEST, ETHERNET, len(mac), 0, transaction, min(seconds, 0xFFFF), flags,
        own, none, none, none, mac, b"", b"",
    )  # fmt: skip
    options = [
        (TYPE, bytes((kind,))),
        (CLIENT_ID, bytes((ETHERNET,)) + mac),
        (ADDRESS, wanted),
        (SERVER, server),
        (LONGEST_MESSAGE, LARGEST.to_bytes(2, "big")),
        (HOST_NAME, hostname.encode("ascii", "ignore")[:64]),
        (WANTED, ASKED_FOR),
    ]
    packed = b"".join(bytes((code, len(value))) + value for code, value in options if value)
    return (header + COOKIE + packed + bytes((END,))).ljust(SMALLEST, b"\0")


def parse_message(data: bytes, transaction: int, mac: bytes) -> Reply | None:
    """A server's answer to our transaction; None for anything else, and for a useless one."""
    if not HEADER.size + len(COOKIE) <= len(data) <= LARGEST:
        return None
    fields = HEADER.unpack_from(data)
    operation, _, _, _, number, _, _, _, address, _, _, hardware, file_name, server_name = (
        *fields[:12], fields[13], fields[12],
    )  # fmt: skip
    ours = operation == BOOT_REPLY and number == transaction and hardware[: len(mac)] == mac
    if not ours or data[HEADER.size : HEADER.size + 4] != COOKIE:
        return None
    options = parse_options(data[HEADER.size + 4 :], file_name, server_name)
    kind, server = options.get(TYPE, b""), options.get(SERVER, b"")
    if len(kind) != 1 or kind[0] not in (OFFER, ACK, NAK) or not is_host(server):
        return None
    reply = Reply(kind[0], address, server)
    if reply.kind == NAK:
        return reply
    return reply if is_host(address) and fill(reply, options) else None


def parse_options(data: bytes, file_name: bytes, server_name: bytes) -> dict[int, bytes]:
    """The options by code, also those in the two fields lent to them (RFC 2132, 9.3).

    One that comes in several pieces is put together (RFC 3396); one cut short ends the list.
    """
    options: dict[int, bytes] = {}
    read_options(data, options)
    lent = options.get(OVERLOAD, b"\0")[:1]
    for bit, field in ((1, file_name), (2, server_name)):
        if lent and lent[0] & bit:
            read_options(field, options)
    return options


def read_options(data: bytes, options: dict[int, bytes]) -> None:
    at = 0
    while at < len(data) and data[at] != END:
        if data[at] == PAD:
            at += 1
            continue
        value = data[at + 2 : at + 2 + data[at + 1]] if at + 1 < len(data) else None
        if value is None or len(value) != data[at + 1]:
            return
        options[data[at]] = options.get(data[at], b"") + value
        at += 2 + len(value)


def fill(reply: Reply, options: dict[int, bytes]) -> bool:
    """Take the options that are sound; False without a mask or a lease that can be kept."""
    length = mask_length(options.get(MASK, b""))
    reply.lease = number(options, LEASE_TIME)
    if length is None or reply.lease < SHORTEST_LEASE:
        return False
    reply.length = length
    times(reply, number(options, RENEWAL), number(options, REBINDING))
    routers = [address for address in addresses(options.get(ROUTERS, b"")) if is_host(address)]
    if CLASSLESS_ROUTES in options:  # the other option does not count then (RFC 3442)
        reply.routes = parse_routes(options[CLASSLESS_ROUTES])
    elif routers:
        reply.routes = ((bytes(4), 0, routers[0]),)
    servers = addresses(options.get(SERVERS, b""))
    reply.nameservers = tuple(filter(is_usable, servers))[:MOST_SERVERS]
    reply.domain = parse_domain(options.get(DOMAIN, b""))
    mtu = int.from_bytes(options.get(MTU, b""), "big") if len(options.get(MTU, b"")) == 2 else 0
    reply.mtu = mtu if mtu >= SMALLEST_MTU else 0
    return True


def times(reply: Reply, renewal: int, rebinding: int) -> None:
    """When to renew and to rebind; the RFC's fractions where a server says nothing sensible."""
    if reply.lease == FOREVER:
        reply.renewal = reply.rebinding = FOREVER
    elif 0 < renewal < rebinding < reply.lease:
        reply.renewal, reply.rebinding = renewal, rebinding
    else:
        reply.renewal, reply.rebinding = reply.lease // 2, reply.lease * 7 // 8


def parse_routes(data: bytes) -> tuple[tuple[bytes, int, bytes], ...]:
    """RFC 3442: length, the bytes of the destination that count, gateway. () if any is broken."""
    routes: list[tuple[bytes, int, bytes]] = []
    at = 0
    while at < len(data):
        length = data[at]
        size = (length + 7) // 8
        entry = data[at + 1 : at + 1 + size + 4]
        if length > 32 or len(entry) != size + 4 or len(routes) == MOST_ROUTES:
            return ()
        gateway = entry[size:]
        if gateway != bytes(4) and not is_host(gateway):
            return ()
        routes.append((entry[:size].ljust(4, b"\0"), length, gateway))
        at += 1 + len(entry)
    return tuple(routes)


def number(options: dict[int, bytes], code: int) -> int:
    value = options.get(code, b"")
    return int.from_bytes(value, "big") if len(value) == 4 else 0


def addresses(value: bytes) -> list[bytes]:
    return [value[at : at + 4] for at in range(0, len(value) - len(value) % 4, 4)]


def mask_length(mask: bytes) -> int | None:
    bits = f"{int.from_bytes(mask, 'big'):032b}"
    return bits.count("1") if len(mask) == 4 and "01" not in bits and mask != bytes(4) else None


def is_usable(address: bytes) -> bool:
    """Whether it is one host's, this one included."""
    return len(address) == 4 and 0 < address[0] < 224


def is_host(address: bytes) -> bool:
    """Whether it can be another host's."""
    return is_usable(address) and address[0] != 127


def parse_domain(value: bytes) -> str:
    """It goes into a file that programs trust: letters, digits, hyphens and dots, or nothing."""
    text = value.rstrip(b"\0").decode("ascii", "replace")
    return text if 0 < len(text) <= 253 and DOMAIN_LETTERS.issuperset(text) else ""


# ── the packets around them ──────────────────────────────────────────────────────────────────────


def datagram(payload: bytes, source: bytes = bytes(4)) -> bytes:
    """IPv4 and UDP from `source` to everybody, as who has no address yet must make it itself."""
    target = b"\xff" * 4
    length = 8 + len(payload)
    pseudo = source + target + struct.pack("!BBH", 0, 17, length)
    udp = struct.pack("!HHHH", CLIENT_PORT, SERVER_PORT, length, 0)
    udp = udp[:6] + (checksum(pseudo + udp + payload) or 0xFFFF).to_bytes(2, "big")
    start = struct.pack("!BBHHHBBH", 0x45, 0x10, 20 + length, 0, 0, 64, 17, 0) + source + target
    return start[:10] + checksum(start).to_bytes(2, "big") + start[12:] + udp + payload


def parse_datagram(packet: bytes) -> bytes | None:
    """What a whole IPv4 packet has for our UDP port; None for any other packet.

    UDP's checksum is not looked at: a hypervisor leaves it unfinished where sender and receiver are
    on one machine.
    """
    header = (packet[0] & 0xF) * 4 if packet else 0
    if len(packet) < 28 or packet[0] >> 4 != 4 or not 20 <= header <= len(packet) - 8:
        return None
    total, fragment, protocol = struct.unpack_from("!2xHxxHxB", packet)
    if not header + 8 <= total <= len(packet) or fragment & 0x3FFF or protocol != 17:
        return None
    if checksum(packet[:header]):
        return None
    source, target, length, _ = struct.unpack_from("!HHHH", packet, header)
    if (source, target) != (SERVER_PORT, CLIENT_PORT) or not 8 <= length <= total - header:
        return None
    return packet[header + 8 : header + length]


def checksum(data: bytes) -> int:
    """RFC 1071."""
    data += bytes(len(data) % 2)
    total = sum(int.from_bytes(data[at : at + 2], "big") for at in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF
