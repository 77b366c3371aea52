"""`ip=` of the kernel's command line, for kernels that leave it alone (Documentation: nfsroot.txt).

ip=<client>:<server>:<gateway>:<netmask>:<hostname>:<device>:<autoconf>:<dns0>:<dns1>:<ntp>
"""

from microguest.guest.boot.network import Interface, Network, Route
from microguest.guest.record import RecordError
from microguest.init_shim.failure import Failure
from microguest.init_shim.network.addresses import packed_address
from microguest.init_shim.network.netlink import Link, Netlink

__all__ = ["planned"]

FIELDS = 10
DHCP = ("dhcp", "on", "any", "both")
NOTHING = ("", "off", "none")


def planned(value: str, plan: Network) -> tuple[Network, str]:
    """`plan` with the interface that `ip=value` describes, and the host name in it, or "".

    Nothing is added where the kernel has given the interface an address already. Name servers of
    `plan` win. Raises Failure for what the kernel's documentation does not know: a machine with
    another network than was asked for is worse than none.
    """
    parts = value.split(":")
    if len(parts) == 1 and (value in DHCP or value in NOTHING):  # the short form
        parts = ["", "", "", "", "", "", value]
    if len(parts) > FIELDS:
        raise wrong(value, f"it has {len(parts)} fields, at most {FIELDS}")
    parts += [""] * (FIELDS - len(parts))
    client, _, gateway, mask, hostname, device, autoconf, first, second, _ = parts
    if autoconf not in DHCP + NOTHING:
        raise wrong(
            value, f"autoconf {autoconf!r:.20} is not one of dhcp, on, any, both, off, none"
        )
    dhcp = autoconf in DHCP
    if not client and not dhcp:
        return plan, hostname
    link = find_device(value, device)
    if link is None:
        return plan, hostname
    try:
        interface = Interface(
            name=link.name,
            addresses=(f"{client}/{mask_length(value, client, mask)}",) if client else (),
            routes=(Route(via=address(value, gateway)),) if gateway else (),
            dhcp=dhcp and not client,
        )
        servers = tuple(address(value, text) for text in (first, second) if text)
        changed = plan.replace(interfaces=(interface,), nameservers=plan.nameservers or servers)
    except RecordError as error:
        raise wrong(value, str(error)) from None
    return changed, hostname


def find_device(value: str, device: str) -> Link | None:
    """The named interface, or the first; None where the kernel has configured it."""
    netlink = Netlink()
    try:
        links = [link for link in netlink.links() if not link.is_loopback]
        found = next((link for link in links if device in ("", link.name)), None)
        if found is None:
            raise wrong(value, f"there is no network interface {device}".rstrip())
        return None if netlink.has_address(found.index) else found
    finally:
        netlink.close()


def mask_length(value: str, client: str, mask: str) -> int:
    """The length of a netmask; without one, that of the address's class, as the kernel has it."""
    first = int.from_bytes(ipv4(value, client)[:1], "big")
    if not mask:
        return 8 if first < 128 else 16 if first < 192 else 24
    bits = f"{int.from_bytes(ipv4(value, mask), 'big'):032b}"
    if "01" in bits:
        raise wrong(value, f"{mask!r:.60} is not a netmask")
    return bits.count("1")


def address(value: str, text: str) -> str:
    ipv4(value, text)
    return text


def ipv4(value: str, text: str) -> bytes:
    try:
        packed = packed_address(text)
    except Failure as failure:
        raise wrong(value, failure.message) from None
    if len(packed) != 4:
        raise wrong(value, f"{text!r:.60} is not an IPv4 address")
    return packed


def wrong(value: str, why: str) -> Failure:
    return Failure(f"ip={value:.200} on the kernel's command line: {why}", path="/proc/cmdline")
