"""What the guest's network has without being asked: loopback and a host name."""

import _socket
import fcntl
import sys

from guest.bootconfig import BootConfig
from init_shim.failure import call

__all__ = ["configure"]

# linux/sockios.h, linux/if.h
SIOCGIFFLAGS = 0x8913
SIOCSIFFLAGS = 0x8914
IFF_UP = 0x1
IFREQ_NAME = 16  # bytes; the flags follow
IFREQ = 40


def configure(config: BootConfig) -> None:
    """Loopback, host name, and what the config asks for. Raises Failure."""
    loopback_up()
    set_hostname(config.hostname)


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
