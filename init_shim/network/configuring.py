"""What the guest's network has before the workload starts: loopback, names, and what is asked for.

Loopback and the host's name are all that most machines have, and all that is imported here. The
modules behind interfaces, DHCP and the files in /etc are loaded where the config needs them.
"""

import _socket
import fcntl
import sys

from microguest.guest.boot.config import BootConfig
from microguest.guest.boot.network import Network
from microguest.init_shim.failure import call
from microguest.init_shim.signals import Signals

__all__ = ["configure"]

# linux/sockios.h, linux/if.h
SIOCGIFFLAGS = 0x8913
SIOCSIFFLAGS = 0x8914
IFF_UP = 0x1
IFREQ_NAME = 16  # bytes; the flags follow
IFREQ = 40
KERNEL_LINE = "/proc/cmdline"
LONGEST_LINE = 4096  # bytes; COMMAND_LINE_SIZE is at most that


def configure(config: BootConfig, signals: Signals) -> None:
    """Everything about the network, in place when this returns. Raises Failure.

    The files in /etc are complete before DHCP is waited for, and its name servers are there when it
    is done. A machine that is told to end meanwhile does not wait for its leases.
    """
    loopback_up()
    plan, hostname = config.network, config.hostname
    named = hostname != BootConfig.hostname
    if config.machine == "vm" and not plan.interfaces:  # a namespace's command line is its host's
        plan, given = with_kernel_line(plan)
        if given and not named:
            hostname, named = given, True
    set_hostname(hostname)
    if plan.nameservers or plan.hosts:
        check_names(plan)
    if plan.interfaces:
        from microguest.init_shim.network.interfaces import set_up

        set_up(plan)
    if named or config.machine_id or plan.nameservers or plan.search or plan.options or plan.hosts:
        write_files(plan, hostname if named else "", hostname, config.machine_id)
    if any(interface.dhcp for interface in plan.interfaces):
        from microguest.init_shim.network.dhcp import start_clients

        name = hostname if named else ""
        start_clients(plan, name, signals, read_only=config.root.read_only)


def loopback_up() -> None:
    """Bring `lo` up; the kernel gives it 127.0.0.1 and ::1 then (netdevice(7))."""
    with call("socket", "AF_INET"):
        control = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
    try:
        name = b"lo".ljust(IFREQ_NAME, b"\0")
        with call("ioctl SIOCGIFFLAGS", "lo"):
            answer = fcntl.ioctl(control.fileno(), SIOCGIFFLAGS, name.ljust(IFREQ, b"\0"))
        flags = int.from_bytes(answer[IFREQ_NAME : IFREQ_NAME + 2], sys.byteorder) | IFF_UP
        request = (name + flags.to_bytes(2, sys.byteorder)).ljust(IFREQ, b"\0")
        with call("ioctl SIOCSIFFLAGS", "lo"):
            fcntl.ioctl(control.fileno(), SIOCSIFFLAGS, request)
    finally:
        control.close()


def set_hostname(name: str) -> None:
    """sethostname(2)."""
    with call("sethostname", name):
        _socket.sethostname(name)


def with_kernel_line(plan: Network) -> tuple[Network, str]:
    """`plan` with what `ip=` on the kernel's command line adds, and the host name there."""
    with call("open", KERNEL_LINE), open(KERNEL_LINE, "rb", buffering=0) as file:
        line = (file.read(LONGEST_LINE) or b"").decode("utf-8", "replace")
    words = [word[3:] for word in line.split() if word.startswith("ip=")]
    if not words:
        return plan, ""
    from microguest.init_shim.network.kernel_line import planned

    return planned(words[-1], plan)  # the last one counts, as for the kernel


def check_names(plan: Network) -> None:
    """Refuse what is no address by its field's name: resolvers pass it over without a word."""
    from microguest.init_shim.network.addresses import check, resolver_address

    for at, text in enumerate(plan.nameservers):
        check(f"network.nameservers[{at}]", resolver_address, text)
    for text in plan.hosts:
        check("network.hosts", resolver_address, text)


def write_files(plan: Network, given_name: str, hostname: str, machine_id: str) -> None:
    """The files of /etc that the config has something for. `given_name`: "" if nobody chose it."""
    from microguest.init_shim.network import etcfiles

    earlier = etcfiles.name_there() if given_name else ""
    if given_name:
        etcfiles.write("hostname", f"{given_name}\n")
    if machine_id:
        etcfiles.write("machine-id", f"{machine_id}\n", 0o444)
    if plan.nameservers or plan.search or plan.options:
        text = etcfiles.resolv_conf_text(plan.nameservers, plan.search, plan.options)
        etcfiles.write("resolv.conf", text)
    addresses = [a.partition("/")[0] for i in plan.interfaces for a in i.addresses]
    own = next((address for address in addresses if ":" not in address), "")
    if plan.hosts:
        etcfiles.write("hosts", etcfiles.hosts_text(hostname, own, plan.hosts))
    elif given_name:
        etcfiles.name_host(given_name, own, earlier)
