"""What a share's virtiofsd, which is root on this host, may not do for the guest's root.

It makes whatever the guest asks for, with the guest's owner and mode: a set-user-id program of
root's, which any user of this host then runs, or a node of this host's disk. The capabilities that
would let it make nodes and file capabilities, and keep set-user-id bits of what is overwritten, are
taken from it; setting such a bit is refused by a filter, as an owner needs no capability for that.
Extended attributes that give rights, as POSIX ACLs do, are none of a share's: a filter cannot read
their names, virtiofsd's own rules do.
"""

import base64
import os
from typing import Any, Final

from microguest.host_client.seccomp import profile

__all__ = ["ATTRIBUTE_RULES", "capability_changes", "share_filter"]

# For `xattrmap` of QEMU's own virtiofsd. An ACL widens the mode of a set-user-id program, and lets
# it keep that bit. File capabilities can be read, and want CAP_SETFCAP to be set: virtiofsd does
# not start under rules that leave them out.
ATTRIBUTE_RULES: Final = (
    ":ok:all:user.:user.::ok:all:security.capability:security.capability::unsupported:all:::"
)
SET_IDS: Final = (0o4000, 0o2000)
O_CREAT: Final = 0o100
ENOSYS: Final = 38
# Calls with a mode, by the number of that argument. mkdir(2) takes no such bits.
MODES: Final = {
    "chmod": 1,
    "fchmod": 1,
    "fchmodat": 2,
    "fchmodat2": 2,
    "creat": 1,
    "mknod": 1,
    "mknodat": 2,
}
OPENS: Final = {"open": 1, "openat": 2}  # the number of the flags; the mode follows
# Their arguments are in memory, where no filter looks: who tries them goes on with the others.
HIDING: Final = ("openat2", "io_uring_setup")


def capability_changes(*, suid: bool, dev: bool) -> str:
    """For `modcaps` of either virtiofsd; "" where it may keep what it has."""
    taken = (*(() if dev else ("mknod",)), *(() if suid else ("setfcap", "fsetid")))
    return ":".join(f"-{name}" for name in taken)


def share_filter(*, suid: bool) -> str:
    """The compiled filter as base64; "" for none."""
    if suid:
        return ""
    document = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": list(rules())}
    program = profile.profile(document, arch=os.uname().machine)
    return base64.b64encode(program).decode("ascii")


def rules() -> list[dict[str, Any]]:
    """Of the filter, in the OCI runtime spec's words."""
    found = [rule(name, has_bit(place, bit)) for name, place in MODES.items() for bit in SET_IDS]
    found += [
        rule(name, has_bit(place, O_CREAT), has_bit(place + 1, bit))
        for name, place in OPENS.items()
        for bit in SET_IDS
    ]
    hidden = {"names": list(HIDING), "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS}
    return [*found, hidden]


def rule(name: str, *conditions: dict[str, Any]) -> dict[str, Any]:
    """EPERM where all conditions hold."""
    return {"names": [name], "action": "SCMP_ACT_ERRNO", "args": list(conditions)}


def has_bit(place: int, bit: int) -> dict[str, Any]:
    """Whether that argument has it."""
    return {"index": place, "value": bit, "valueTwo": bit, "op": "SCMP_CMP_MASKED_EQ"}
