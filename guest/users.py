"""Who a process runs as: docker's user specification against the image's passwd and group files.

Pure text in, identity out; reading the files is the caller's. PID 1 and the agent both use it, so
it imports nothing but the contract's cheap parts. The rules are those of docker and runc, as
described at https://docs.docker.com/reference/dockerfile/#user.
"""

from guest import limits
from guest.errors import OperationError, operation_error
from guest.record import Record

__all__ = ["GROUPS_FILE", "MAXIMUM_ID", "USERS_FILE", "Identity", "resolve"]

USERS_FILE = "/etc/passwd"
GROUPS_FILE = "/etc/group"
MAXIMUM_ID = 2**31 - 1  # docker's bound; the kernel would allow up to 2**32 - 2
SUPPLEMENTARY_GROUPS = 65536  # NGROUPS_MAX of Linux


class Identity(Record):
    """The ids for setgroups, setresgid and setresuid, and what HOME and logs need to know."""

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = (0,)  # supplementary; the primary one is always among them
    home: str = "/"
    name: str = ""  # "" where the uid is not in passwd


class _Account(Record):
    name: str
    uid: int
    gid: int
    home: str


class _Group(Record):
    name: str
    gid: int
    members: tuple[str, ...]


def resolve(
    spec: str,
    passwd: bytes | None = b"",
    group: bytes | None = b"",
    *,
    more_groups: tuple[str, ...] = (),
) -> Identity:
    """The identity for "", "name", "uid", "name:group" or "uid:gid".

    `passwd` and `group` are the contents of the image's files, b"" where there is none, None where
    what is there cannot be read. A number is always an id, never a name. An explicit group leaves
    out the supplementary ones of the file, not `more_groups`. A uid or gid that is in neither file
    is fine; a name that is in neither is a StartError, code bad_user.

    Only names need the files: with one that cannot be read, "" and numbers are as without it.
    """
    user, _, wanted_group = spec.partition(":")
    uid = _number(user) if user else 0
    if uid is None:
        account = _named_account(spec, user, passwd)
    else:
        known = [entry for entry in _accounts(passwd) if entry.uid == uid]
        account = known[0] if known else _Account(name="", uid=uid, gid=0, home="/")
    if wanted_group:
        gid, others = _explicit_group(spec, wanted_group, group), list[int]()
    else:
        if uid is None and not _is_usable(group):
            raise _bad_user(spec, _unusable(GROUPS_FILE))
        gid = account.gid
        others = [g.gid for g in _groups(group) if account.name and account.name in g.members]
    others += [_explicit_group(spec, wanted, group) for wanted in more_groups]
    return Identity(
        uid=account.uid,
        gid=gid,
        groups=tuple(dict.fromkeys([gid, *others]))[:SUPPLEMENTARY_GROUPS],
        home=account.home or "/",
        name=account.name,
    )


def _named_account(spec: str, name: str, text: bytes | None) -> _Account:
    if not _is_usable(text):
        raise _bad_user(spec, _unusable(USERS_FILE))
    for account in _accounts(text):
        if account.name == name:
            return account
    raise _bad_user(spec, f"no user {name!r:.200} in the image's {USERS_FILE}")


def _explicit_group(spec: str, wanted: str, text: bytes | None) -> int:
    gid = _number(wanted)
    if gid is not None:
        return gid
    if not _is_usable(text):
        raise _bad_user(spec, _unusable(GROUPS_FILE))
    for entry in _groups(text):
        if entry.name == wanted:
            return entry.gid
    raise _bad_user(spec, f"no group {wanted!r:.200} in the image's {GROUPS_FILE}")


def _accounts(text: bytes | None) -> list[_Account]:
    """The well-formed lines of passwd(5), in order."""
    found = []
    for fields in _lines(text):
        if len(fields) >= 6:
            uid, gid = _number(fields[2]), _number(fields[3])
            if fields[0] and uid is not None and gid is not None:
                found.append(_Account(name=fields[0], uid=uid, gid=gid, home=fields[5]))
    return found


def _groups(text: bytes | None) -> list[_Group]:
    """The well-formed lines of group(5), in order."""
    found = []
    for fields in _lines(text):
        if len(fields) >= 4:
            gid = _number(fields[2])
            if fields[0] and gid is not None:
                members = tuple(member.strip() for member in fields[3].split(","))
                found.append(_Group(name=fields[0], gid=gid, members=members))
    return found


def _lines(text: bytes | None) -> list[list[str]]:
    if text is None or not _is_usable(text):
        return []
    lines = text.decode("utf-8", "surrogateescape").split("\n")
    return [line.strip().split(":") for line in lines if line.strip()[:1] not in ("", "#")]


def _is_usable(text: bytes | None) -> bool:
    return text is not None and len(text) <= limits.ACCOUNT_FILE


def _unusable(path: str) -> str:
    return (
        f"the image's {path} cannot be read: it is no file, or larger than {limits.ACCOUNT_FILE} "
        "bytes; give numeric ids, as 1000:1000"
    )


def _number(text: str) -> int | None:
    """A decimal id in range, or None. No sign, no spaces, no digits of other scripts."""
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        return None
    return int(text) if int(text) <= MAXIMUM_ID else None


def _bad_user(spec: str, reason: str) -> OperationError:
    return operation_error(
        "bad_user", f"user {spec!r:.200}: {reason}", {"user": spec[: limits.ERROR_MESSAGE]}
    )
