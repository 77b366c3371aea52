"""Who this machine is: its host name and its machine-id, given anew. All paths stay in its root."""

import os
import socket
import stat

from microguest.agent.files.staging import Written
from microguest.guest.users import Identity
from microguest.guest.wire.messages import StagedFile

__all__ = ["set_hostname", "set_machine_id"]

HOSTNAME_FILE = "/etc/hostname"
MACHINE_ID = "/etc/machine-id"
DBUS_MACHINE_ID = "/var/lib/dbus/machine-id"  # a link to the other one, or a copy of it
READ_ONLY = 0o444
ROOT = Identity()


def set_hostname(name: str) -> str:
    """In the kernel, and in the image's file where it has one. Returns it. Raises OSError."""
    socket.sethostname(name)
    if is_file(HOSTNAME_FILE):
        write(HOSTNAME_FILE, name, 0o644)
    return name


def set_machine_id(wanted: str) -> str:
    """32 hexadecimal digits, or new ones for "random", in every file that has it: machine-id(5).

    Returns it. Raises OSError. Programs that run have read the old one and go on with that.
    """
    machine_id = random_id() if wanted == "random" else wanted
    write(MACHINE_ID, machine_id, READ_ONLY)
    if is_file(DBUS_MACHINE_ID):
        write(DBUS_MACHINE_ID, machine_id, READ_ONLY)
    return machine_id


def random_id() -> str:
    """Of the random kind of UUID, as systemd makes them."""
    data = bytearray(os.urandom(16))
    data[6] = data[6] & 0x0F | 0x40
    data[8] = data[8] & 0x3F | 0x80
    return data.hex()


def is_file(path: str) -> bool:
    """Whether the root has a file there, and neither a link nor nothing."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def write(path: str, line: str, mode: int) -> None:
    """One line, in place of the old file and all at once."""
    written = Written(os.fsencode(path), ROOT)
    try:
        written.fill(StagedFile(path=path, data=f"{line}\n".encode("ascii"), mode=mode))
        written.put_in_place()
    except BaseException:
        written.remove()
        raise
    finally:
        written.close()
