"""A machine's network: what QEMU gives it, and what PID 1 makes of it. Pure.

QEMU's user network is a small network of the machine's own, always the same: this host is
10.0.2.2, a name server that asks this host's is 10.0.2.3. What the guest dials is dialled by QEMU.
"""

import socket
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from microguest.guest.boot.network import Interface, Network, Route
from microguest.guest.record import RecordError
from microguest.host_client.errors import MachineError

__all__ = ["MAC", "check_network", "network_of"]

MAC: Final = "52:54:00:12:34:56"  # QEMU's own default; nobody else is on this network
ADDRESS: Final = "10.0.2.15/24"
GATEWAY: Final = "10.0.2.2"
NAME_SERVER: Final = "10.0.2.3"
OPTIONS: Final = {"nameservers": "dns", "search": "dns_search", "options": "dns_options"}
HOST_GATEWAY: Final = "host-gateway"  # docker's word for the address of the host


class Asked(Protocol):
    """What a machine's settings say of its network; see `MachineOptions`."""

    @property
    def network(self) -> str:
        """ "none" or "user"."""

    @property
    def dns(self) -> Sequence[str]:
        """Addresses of name servers."""

    @property
    def dns_search(self) -> Sequence[str]:
        """Domains."""

    @property
    def dns_options(self) -> Sequence[str]:
        """As in resolv.conf(5)."""

    @property
    def hosts(self) -> Mapping[str, str]:
        """Addresses by name."""


def check_network(settings: Asked) -> None:
    """MachineError for what a guest would refuse after its boot, naming the option."""
    for server in settings.dns:
        check_address(server, f"dns {server!r:.60}", "10.0.0.53")
    for name, address in settings.hosts.items():
        about = f"hosts: {name!r:.60} at {address!r:.60}"
        if address != HOST_GATEWAY:
            check_address(address, about, "10.0.0.5")
        elif settings.network != "user":
            raise MachineError(f"{about}: only a machine with network user can reach this host")
    try:
        network_of(settings)
    except RecordError as error:
        field, _, wrong = str(error).partition(": ")
        raise MachineError(f"{OPTIONS.get(field, field)}: {wrong}") from None


def check_address(text: str, about: str, example: str) -> None:
    """As PID 1 takes it. MachineError."""
    try:
        socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
    except (OSError, ValueError):
        raise MachineError(f"{about}: not an IP address, as {example} or fd00::5") from None


def network_of(settings: Asked) -> Network:
    """RecordError for words that cannot be in the files that are written."""
    wired = settings.network == "user"
    eth0 = Interface(name="eth0", mac=MAC, addresses=(ADDRESS,), routes=(Route(via=GATEWAY),))
    hosts: dict[str, tuple[str, ...]] = {}
    for name, address in settings.hosts.items():
        where = GATEWAY if address == HOST_GATEWAY and wired else address
        hosts[where] = (*hosts.get(where, ()), name)
    return Network(
        interfaces=(eth0,) if wired else (),
        nameservers=tuple(settings.dns) or ((NAME_SERVER,) if wired else ()),
        search=tuple(settings.dns_search),
        options=tuple(settings.dns_options),
        hosts=hosts,
    )
