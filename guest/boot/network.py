"""The network that a machine comes up with: part of the boot config. Pure records.

Addresses are checked by PID 1 when it applies them: the socket module's parser costs nothing there.
"""

from microguest.guest import bounds
from microguest.guest.record import Record, RecordError

__all__ = ["Interface", "Network", "Route"]


class Route(Record):
    """One route of an interface.

    to      "default", or as 10.1.0.0/16, fd00:1::/64
    via     the gateway; "": reached directly. It also tells default's family
    metric  the lowest of several routes is taken; 0: the kernel's choice
    """

    to: str = "default"
    via: str = ""
    metric: int = 0

    def check(self) -> None:
        if self.to == "default" and not self.via:
            raise RecordError("via: a default route needs a gateway")
        if not 0 <= self.metric < 2**32:
            raise RecordError("metric: must be 0 to 2**32 - 1")


class Interface(Record):
    """One network interface.

    name       it is found by that; with a `mac` it gets it
    mac        it is found by that, as 52:54:00:12:34:56, where it is given
    addresses  as 10.0.2.15/24, fd00::2/64
    routes     Routes by it
    dhcp       DHCPv4: address, default route and name servers come from the network
    mtu        bytes of its largest packet, 68 to 65535; 0: as it is
    """

    name: str = "eth0"
    mac: str = ""
    addresses: tuple[str, ...] = ()
    routes: tuple[Route, ...] = ()
    dhcp: bool = False
    mtu: int = 0

    def check(self) -> None:
        if not _is_interface_name(self.name):
            raise RecordError(f"name: {self.name!r:.40} cannot be an interface's")
        if self.mac and not _is_mac(self.mac):
            raise RecordError(f"mac: {self.mac!r:.40} is not as 52:54:00:12:34:56")
        if len(self.addresses) > bounds.ADDRESSES or len(self.routes) > bounds.ADDRESSES:
            raise RecordError(f"addresses, routes: at most {bounds.ADDRESSES} each")
        if self.mtu and not 68 <= self.mtu <= 65535:
            raise RecordError("mtu: must be 68 to 65535, or 0")


class Network(Record):
    """Everything about the network. What is not said is left as the image has it.

    `nameservers`, `search` and `options` are written to /etc/resolv.conf if any of them is given
    or DHCP brings name servers, `hosts` (address: names) to /etc/hosts with localhost and the
    host name.
    """

    interfaces: tuple[Interface, ...] = ()
    nameservers: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    options: tuple[str, ...] = ()  # of resolv.conf(5)
    hosts: dict[str, tuple[str, ...]] = {}  # noqa: RUF012  frozen by convention

    def check(self) -> None:
        if len(self.interfaces) > bounds.INTERFACES:
            raise RecordError(f"interfaces: at most {bounds.INTERFACES}")
        called = {interface.name for interface in self.interfaces}
        if len(called) < len(self.interfaces):
            raise RecordError("interfaces: two have the same name")
        for field in ("nameservers", "search", "options"):
            words = getattr(self, field)
            if len(words) > bounds.ADDRESSES or not all(map(_is_word, words)):
                raise RecordError(f"{field}: at most {bounds.ADDRESSES} words without spaces")
        if len(self.hosts) > bounds.HOSTS:
            raise RecordError(f"hosts: at most {bounds.HOSTS} addresses")
        for address, names in self.hosts.items():
            if not (_is_word(address) and names and all(map(_is_word, names))):
                raise RecordError(f"hosts: {address!r:.60} needs names without spaces")


def _is_word(text: str) -> bool:
    """Whether it stays one word in resolv.conf(5) and hosts(5)."""
    printable = text.isascii() and text.isprintable()
    return bool(text) and printable and " " not in text and "#" not in text


def _is_interface_name(text: str) -> bool:
    """What the kernel takes (dev_valid_name), of ASCII."""
    length_fits = 0 < len(text) < 16
    return length_fits and _is_word(text) and text not in (".", "..") and not set(text) & set("/:")


def _is_mac(text: str) -> bool:
    parts = text.split(":")
    digits = "0123456789abcdefABCDEF"
    return len(parts) == 6 and all(len(part) == 2 and set(part) <= set(digits) for part in parts)
