"""What a forked child must not share with its parent: connections, locks, and what they stand for.

A socket that two processes read gives each of them the other's answers, and one that a child only
holds never ends. So everything of that kind is named here when it is made. A child of os.fork (also
of multiprocessing) closes its copies, without a word on the connection, and makes its own when it
needs some. For a fork that Python does not know of, owners compare process ids.
"""

import os
import socket
import weakref
from typing import NoReturn, Protocol

__all__ = ["Owner", "Rooted", "close_in_children", "tell_children"]


class Owner(Protocol):
    """Something with descriptors or locks."""

    def forked(self) -> None:
        """Called in a child that was forked: no other thread is there, and nothing here is ours."""


_sockets: "weakref.WeakSet[socket.socket]" = weakref.WeakSet()
_owners: "weakref.WeakSet[Owner]" = weakref.WeakSet()


class Rooted:
    """What has connections of this process, and can be neither pickled nor copied. A base class."""

    _elsewhere = "connect by the machine's name, or its URL, in the other process"

    def __reduce__(self) -> NoReturn:
        """For pickle and copy alike: TypeError."""
        raise TypeError(
            f"{type(self).__name__} cannot be pickled or copied, as it has connections of this "
            f"process: {self._elsewhere}"
        )


def close_in_children(sock: socket.socket) -> socket.socket:
    """The socket, of which no forked child keeps a copy."""
    _sockets.add(sock)
    return sock


def tell_children(owner: Owner) -> None:
    """Have `owner.forked` called in every child, while there is such an owner."""
    _owners.add(owner)


def _after_fork() -> None:
    for sock in list(_sockets):
        sock.close()  # no shutdown: that would end the parent's connection
    for owner in list(_owners):
        owner.forked()


os.register_at_fork(after_in_child=_after_fork)
