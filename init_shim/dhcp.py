"""DHCPv4 as PID 1 sees it: a child for each interface, which keeps the lease as long as it lives.

The client is the same program under another name: it parses what strangers send, so it shares no
memory with PID 1, and it outlives PID 1's change into an image's own init.
"""

import os
import select
import time

from guest import limits
from guest.netplan import Network
from guest.record import Record
from init_shim.failure import Failure, call
from init_shim.reporter import say

TYPE_CHECKING = False  # typing itself is too heavy for PID 1
if TYPE_CHECKING:
    from typing import NoReturn

__all__ = ["NAME", "Order", "start_clients"]

NAME = "dhcp"  # argv[0]: how the program knows what it is to be
ANSWER = 1024  # bytes of the client's line


class Order(Record):
    """What a client is started with, as JSON in its argv[1]."""

    interface: str
    hostname: str = ""  # told to the server; "": nothing
    mtu: bool = True  # take the one that the server gives
    resolv_conf: bool = True  # write it with the server's addresses
    search: tuple[str, ...] = ()  # instead of the server's domain
    options: tuple[str, ...] = ()  # for the same file


def start_clients(plan: Network, hostname: str) -> None:
    """A client for each interface that has `dhcp`, and a lease for each. Raises Failure.

    Name servers come from the config, or else from the first interface with DHCP.
    """
    waiting: dict[str, int] = {}
    write = not plan.nameservers
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
                waiting[interface.name] = start_client(order)
                write = False
        deadline = time.monotonic() + limits.DHCP_WAIT
        for name, pipe in waiting.items():
            await_lease(name, pipe, deadline)
    finally:
        for pipe in waiting.values():
            os.close(pipe)


def start_client(order: Order) -> int:
    """Fork and exec; returns where the client says that it has a lease."""
    with call("pipe", NAME):
        reader, writer = os.pipe2(os.O_CLOEXEC)
    with call("fork", NAME):
        pid = os.fork()
    if pid == 0:
        become_client(order, writer)
    os.close(writer)
    return reader


def become_client(order: Order, writer: int) -> "NoReturn":
    """In the child: the pipe as stdout, no environment. Never returns."""
    try:
        os.setsid()
        os.dup2(writer, 1)
        os.execve("/proc/self/exe", [NAME, order.to_json()], {})  # noqa: S606
    except BaseException as error:  # noqa: BLE001  nothing may run on as a second PID 1
        say(f"cannot start the DHCP client: {error}")
    finally:
        os._exit(127)


def await_lease(interface: str, pipe: int, deadline: float) -> None:
    """Until the client says `bound`. Raises Failure with what it says instead, or with the time."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    if not poll.poll(max(0, int((deadline - time.monotonic()) * 1000))):
        why = f"no DHCP server gave a lease within {limits.DHCP_WAIT:g} s"
    else:
        line = os.read(pipe, ANSWER).decode("utf-8", "replace").strip()
        if line.startswith("bound "):
            return
        why = line or "the DHCP client ended; what it said is on the console"
    raise Failure(f"network interface {interface}: {why}", syscall="dhcp", path=interface)
