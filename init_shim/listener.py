"""The socket that the agent serves, opened by PID 1 before anything slow and never closed.

A host that connects early waits in the backlog; a crashed agent loses no connection attempt; no
process of the guest can take the port.
"""

import _socket
import os

from microguest.guest import bounds
from microguest.guest.boot.config import Endpoint
from microguest.init_shim.failure import call

__all__ = ["VMADDR_CID_HOST", "address_of", "open_listener", "socket_for"]

VMADDR_CID_ANY = 0xFFFFFFFF  # vsock(7)
VMADDR_CID_HOST = 2


def open_listener(endpoint: Endpoint) -> _socket.socket:
    """Bind and listen. A Unix socket is for this user only. Raises Failure."""
    where = address_of(endpoint)
    with call("socket", where, hint="does the kernel have vsock?"):
        listener = socket_for(endpoint)
    with call("bind", where):
        if endpoint.transport == "vsock":
            listener.bind((VMADDR_CID_ANY, endpoint.port))
        else:
            former = os.umask(0o177)
            try:
                listener.bind(endpoint.path)
            finally:
                os.umask(former)
    with call("listen", where):
        listener.listen(bounds.LISTEN_BACKLOG)
    return listener


def socket_for(endpoint: Endpoint) -> _socket.socket:
    """A new stream socket of the endpoint's family."""
    family = _socket.AF_VSOCK if endpoint.transport == "vsock" else _socket.AF_UNIX
    return _socket.socket(family, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)


def address_of(endpoint: Endpoint) -> str:
    """The endpoint as a person would write it, for messages."""
    return f"vsock:{endpoint.port}" if endpoint.transport == "vsock" else endpoint.path
