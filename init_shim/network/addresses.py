"""IP addresses and networks of both families: as text, as bytes, what is inside what. No I/O."""

import _socket

from microguest.init_shim.failure import Failure

TYPE_CHECKING = False  # typing itself is too heavy for PID 1
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Prefix", "check", "packed_address", "parse_prefix", "resolver_address", "text_address"]


class Prefix:
    """An address with the length of its network part, as 10.0.2.15/24."""

    def __init__(self, family: int, address: bytes, length: int) -> None:
        self.family = family
        self.address = address
        self.length = length

    @property
    def broadcast(self) -> bytes:
        """IPv4: the network's last address."""
        bits = len(self.address) * 8
        number = int.from_bytes(self.address, "big") | ((1 << (bits - self.length)) - 1)
        return number.to_bytes(len(self.address), "big")

    @property
    def network(self) -> bytes:
        """The network's first address."""
        bits = len(self.address) * 8
        number = int.from_bytes(self.address, "big")
        return (number >> (bits - self.length) << (bits - self.length)).to_bytes(bits // 8, "big")

    def has(self, address: bytes) -> bool:
        """Whether `address` is inside the network."""
        same = len(address) == len(self.address)
        return same and Prefix(self.family, address, self.length).network == self.network

    def __str__(self) -> str:
        return f"{text_address(self.address)}/{self.length}"


def family_of(text: str) -> int:
    """The address family that a text looks like."""
    return _socket.AF_INET6 if ":" in text else _socket.AF_INET


def packed_address(text: str) -> bytes:
    """4 or 16 bytes. Raises Failure for what is no address."""
    try:
        return _socket.inet_pton(family_of(text), text)
    except (OSError, ValueError):
        raise Failure(f"{text!r:.60} is not an IP address") from None


def resolver_address(text: str) -> bytes:
    """As packed_address; a link-local one may name its link, as fe80::1%eth0 in resolv.conf(5)."""
    address, _, link = text.partition("%")
    return packed_address(address if link else text)


def check(where: str, parse: "Callable[[str], object]", text: str) -> None:
    """Refuse by its field's name what `parse` refuses. Raises Failure."""
    try:
        parse(text)
    except Failure as failure:
        raise Failure(f"{where}: {failure.message}") from None


def text_address(packed: bytes) -> str:
    """An address as people write it."""
    return _socket.inet_ntop(_socket.AF_INET if len(packed) == 4 else _socket.AF_INET6, packed)


def parse_prefix(text: str) -> Prefix:
    """10.0.2.15/24 or fd00::2/64; without a length, the one address. Raises Failure."""
    address, slash, length = text.partition("/")
    packed = packed_address(address)
    bits = len(packed) * 8
    if slash and not (length.isascii() and length.isdigit() and len(length) < 4):
        raise Failure(f"{text!r:.60} is not an address and a length, as 10.0.2.15/24")
    number = int(length) if slash else bits
    if number > bits:
        raise Failure(f"{text!r:.60}: the length of the network is at most {bits}")
    return Prefix(family_of(address), packed, number)
