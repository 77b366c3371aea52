"""DHCPv4 as PID 1 sees it: a child for each interface, which keeps the lease as long as it lives.

The client is the same program under another name: it parses what strangers send, so it shares no
memory with PID 1, and it outlives PID 1's change into an image's own init.
"""

import os
import time

import _guestsys

from microguest.guest import bounds
from microguest.guest.boot.network import Network
from microguest.guest.privileges import capability_mask
from microguest.guest.record import Record
from microguest.init_shim.failure import Failure, call
from microguest.init_shim.mounts import READ_ONLY
from microguest.init_shim.signals import Signals

__all__ = ["NAME", "Order", "start_clients"]

NAME = "dhcp"  # argv[0]: how the program knows what it is to be
SPARE = 1024 * 1024  # bytes that are left of an /etc which can be written to
ANSWER = 1024  # bytes of the client's line

# What it does as root: netlink, raw packets, port 68, and files of an /etc that may be anybody's.
CAPABILITIES = ("net_admin", "net_raw", "net_bind_service", "chown", "dac_override", "fowner")
MOUNTING = ("sys_admin",)  # over a file in an /etc that takes none


class Order(Record):
    """What a client is started with, as JSON in its argv[1]."""

    interface: str
    hostname: str = ""  # told to the server; "": nothing
    mtu: bool = True  # take the one that the server gives
    resolv_conf: bool = True  # write it with the server's addresses
    search: tuple[str, ...] = ()  # instead of the server's domain
    options: tuple[str, ...] = ()  # for the same file


def start_clients(plan: Network, hostname: str, signals: Signals, *, read_only: bool) -> None:
    """A client for each interface that has `dhcp`, and a lease for each. Raises Failure.

    Name servers come from the config, or else from the first interface with DHCP. `read_only`: the
    root will be. Returns sooner where the machine is told to end.
    """
    waiting: dict[str, int] = {}
    write = not plan.nameservers
    capabilities = CAPABILITIES + (MOUNTING if read_only or takes_little("/etc") else ())
    try:
        for interface in plan.interfaces:
            if interface.dhcp:
                order = Order(
                    interface=interface.name,
                    hostname=hostname,
                    mtu=not interface.mtu,
                    resolv_conf=write,
                    search=plan.search,
                    options=plan.options,
                )
                waiting[interface.name] = start_client(order, capabilities)
                write = False
        deadline = time.monotonic() + bounds.DHCP_WAIT
        for name, pipe in waiting.items():
            await_lease(name, pipe, deadline, signals)
    finally:
        for pipe in waiting.values():
            os.close(pipe)


def takes_little(folder: str) -> bool:
    """Whether what it is on is read-only or all but full, as far as can be told."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return True
    full = found.f_blocks and found.f_bavail * found.f_frsize < SPARE
    return bool(found.f_flag & READ_ONLY or full or (found.f_files and not found.f_favail))


def start_client(order: Order, capabilities: tuple[str, ...]) -> int:
    """Start one, with these capabilities and for ever no other; returns where it answers."""
    kept = capability_mask(capabilities)
    with call("pipe2", NAME):
        reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        with call("spawn", NAME):
            _, pidfd = _guestsys.spawn(
                (NAME.encode(), order.to_json().encode()),
                (),
                candidates=(b"/proc/self/exe",),
                cwd=b"/",
                fds=(0, writer, 2),
                oom_score_adj=-1000,
                no_new_privs=True,
                capability_sets=(kept, kept, kept, 0, 0),
            )
        os.close(pidfd)
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    return reader


def await_lease(interface: str, pipe: int, deadline: float, signals: Signals) -> None:
    """Until the client says `bound`, or the machine is told to end.

    Raises Failure with what it says instead, or with the time.
    """
    while not signals.stop_requested:
        left = deadline - time.monotonic()
        if pipe in signals.wait(max(0.0, left), read=(pipe,)):
            line = os.read(pipe, ANSWER).decode("utf-8", "replace").strip()
            if line.startswith("bound "):
                return
            why = line or "the DHCP client ended; what it said is on the console"
        elif left > 0:
            continue  # a signal, or a millisecond too soon
        else:
            why = f"no DHCP server gave a lease within {bounds.DHCP_WAIT:g} s"
        raise Failure(f"network interface {interface}: {why}", syscall="dhcp", path=interface)
