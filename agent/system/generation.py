"""The VM generation id: a kernel that has a driver for it says when this machine is another copy.

The driver (Linux 5.18) reseeds the kernel's random numbers itself; since Linux 6.10 it also sends a
uevent. It gives the number to nobody, and there is none on machines without the device.
"""

import os
import socket

import trio

__all__ = ["announces", "listen", "until_new"]

DRIVERS = ("/sys/bus/platform/drivers/vmgenid", "/sys/bus/acpi/drivers/vmgenid")
NETLINK_KOBJECT_UEVENT = 15  # linux/netlink.h
KERNEL_GROUP = 1  # udev repeats them in group 2
KERNEL = 0  # the port that the kernel sends from
UEVENT_MAX = 8192  # bytes: linux/kobject.h has 2048 for the variables, and the path goes before
NEW = b"NEW_VMGENID=1"


def listen() -> socket.socket | None:
    """For `until_new`; None where the kernel has nothing to say."""
    if not any(map(os.path.isdir, DRIVERS)):
        return None
    try:
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_KOBJECT_UEVENT)
        sock.setblocking(False)
        sock.bind((0, KERNEL_GROUP))
    except OSError:
        return None
    return sock


async def until_new(sock: socket.socket) -> None:
    """Until the kernel says that the machine is another copy, or more than can be read."""
    while True:
        await trio.lowlevel.wait_readable(sock)
        try:
            message, (sender, _groups) = sock.recvfrom(UEVENT_MAX)
        except BlockingIOError:
            continue
        except OSError:
            return  # ENOBUFS: something was lost, so that this may have been
        if announces(message, sender):
            return


def announces(message: bytes, sender: int) -> bool:
    """Whether it is the driver's, and the kernel's own: anybody with privileges may send here."""
    return sender == KERNEL and NEW in message.split(b"\0")
