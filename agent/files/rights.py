"""The rights of a process's user, for what the agent does in its name before it runs.

The image's paths lead where its users have made them lead. What follows them with root's rights
writes for a user what the user may not write. So the thread that does it has the user's rights for
as long, and the kernel judges each step: nothing is looked at first and used later.
"""

import contextlib
import os
from collections.abc import Iterator

import _guestsys

from microguest.guest.users import Identity

__all__ = ["acting_as"]


@contextlib.contextmanager
def acting_as(identity: Identity, capabilities: int = -1) -> Iterator[None]:
    """Open, make and rename files as this user, in this thread alone: never in trio's own.

    `capabilities` are those that root would have as this process; -1: all. Raises OSError where
    this user namespace has no such user.
    """
    own = (os.geteuid(), os.getegid(), os.getgroups())
    if identity.uid == own[0] and capabilities < 0:
        yield  # root may do everything, whatever its groups are
        return
    try:
        _guestsys.act_as(identity.uid, identity.gid, identity.groups, capabilities)
        yield
    finally:
        _guestsys.act_as(*own)
