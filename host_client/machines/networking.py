"""A machine's network: what QEMU gives it, and what PID 1 makes of it. Pure.

QEMU's user network is a small network of the machine's own, always the same: this host is
10.0.2.2, a name server that asks this host's is 10.0.2.3. What the guest dials is dialled by QEMU.
"""

from typing import Final

from guest.netplan import Interface, Network, Route
from host_client.machines.settings import Settings

__all__ = ["MAC", "network_of"]

MAC: Final = "52:54:00:12:34:56"  # QEMU's own default; nobody else is on this network
ADDRESS: Final = "10.0.2.15/24"
GATEWAY: Final = "10.0.2.2"
NAME_SERVER: Final = "10.0.2.3"
HOST_GATEWAY: Final = "host-gateway"  # docker's word for the address of the host


def network_of(settings: Settings) -> Network:
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
