"""Network interfaces as the config wants them: found, named, up, with addresses and routes.

Everything here is done when the workload starts: addresses can be bound to and packets leave.
"""

import _socket
import errno
import time

from microguest.guest import bounds
from microguest.guest.boot.network import Interface, Network, Route
from microguest.init_shim.failure import Failure
from microguest.init_shim.network.addresses import Prefix, check, packed_address, parse_prefix
from microguest.init_shim.network.netlink import Link, Netlink

__all__ = ["set_up"]

LOOK_AGAIN = 0.005  # seconds


def set_up(plan: Network) -> None:
    """All interfaces of the plan, then all routes. Raises Failure."""
    check_addresses(plan)
    netlink = Netlink()
    try:
        links = find_links(netlink, plan.interfaces)
        name_links(netlink, plan.interfaces, links)
        for interface, link in zip(plan.interfaces, links, strict=True):
            if interface.mtu:
                netlink.set_mtu(link, interface.mtu)
            netlink.bring_up(link)
            for text in interface.addresses:
                netlink.set_address(link, parse_prefix(text))
        for interface, link in zip(plan.interfaces, links, strict=True):
            for route in interface.routes:
                add_route(netlink, interface, link, route)
        await_carrier(netlink, links)
    finally:
        netlink.close()


def check_addresses(plan: Network) -> None:
    """Refuse what is none by its field's name, before anything is changed."""
    for at, interface in enumerate(plan.interfaces):
        where = f"network.interfaces[{at}]"
        for number, text in enumerate(interface.addresses):
            check(f"{where}.addresses[{number}]", parse_prefix, text)
        for number, route in enumerate(interface.routes):
            if route.to != "default":
                check(f"{where}.routes[{number}].to", parse_prefix, route.to)
            if route.via:
                check(f"{where}.routes[{number}].via", packed_address, route.via)


def find_links(netlink: Netlink, interfaces: tuple[Interface, ...]) -> list[Link]:
    """The link of each interface, waiting LINK_WAIT for those that are not there yet."""
    deadline = time.monotonic() + bounds.LINK_WAIT
    while True:
        there = netlink.links()
        found = [match(interface, there) for interface in interfaces]
        links = [link for link in found if link is not None]
        if len(links) == len(found):
            break
        if time.monotonic() > deadline:
            missing = interfaces[found.index(None)]
            known = ", ".join(f"{link.name} ({link.mac})" for link in there if not link.is_loopback)
            raise Failure(
                f"no network interface {missing.mac or missing.name} after "
                f"{bounds.LINK_WAIT:g} s; interfaces: {known or 'none'}",
                syscall="netlink RTM_GETLINK",
                path=missing.mac or missing.name,
                errno=errno.ENODEV,
            )
        time.sleep(LOOK_AGAIN)
    for at, link in enumerate(links):
        if any(link.index == other.index for other in links[:at]):
            raise Failure(f"network.interfaces[{at}] is {link.name}, which is another one's too")
    return links


def match(interface: Interface, links: list[Link]) -> Link | None:
    if interface.mac:
        return next((link for link in links if link.mac == interface.mac.lower()), None)
    return next((link for link in links if link.name == interface.name), None)


def name_links(netlink: Netlink, interfaces: tuple[Interface, ...], links: list[Link]) -> None:
    """Give the links their names; who has one of those already steps aside, as link2, link3, …"""
    wrong = {i.name: link for i, link in zip(interfaces, links, strict=True) if i.name != link.name}
    if not wrong:
        return
    ours = {link.index: link for link in links}
    for link in netlink.links():
        if link.name in wrong:
            netlink.rename(ours.get(link.index, link), f"link{link.index}")
    for name, link in wrong.items():
        netlink.rename(link, name)


def add_route(netlink: Netlink, interface: Interface, link: Link, route: Route) -> None:
    """One route. A gateway outside the interface's networks is on its link all the same."""
    via = packed_address(route.via) if route.via else b""
    if route.to == "default":
        family = _socket.AF_INET6 if ":" in route.via else _socket.AF_INET
        to = Prefix(family, bytes(len(via)), 0)
    else:
        to = parse_prefix(route.to)
    near = any(parse_prefix(text).has(via) for text in interface.addresses)
    on_link = bool(via) and not near and to.family == _socket.AF_INET
    netlink.set_route(link, to, via, metric=route.metric, on_link=on_link)


def await_carrier(netlink: Netlink, links: list[Link]) -> None:
    """Until every link carries packets, for at most CARRIER_WAIT: a cable may be pulled out.

    The kernel drops what is sent before, and repeats its questions for a neighbour after 1 s only.
    """
    wanted = {link.index for link in links}
    deadline = time.monotonic() + bounds.CARRIER_WAIT
    while time.monotonic() < deadline:
        ready = {link.index for link in netlink.links() if link.has_carrier}
        if wanted <= ready:
            return
        time.sleep(LOOK_AGAIN)
