"""Who a process runs as: docker's user specification against the image's passwd and group files.

Pure text in, identity out; reading the files is the caller's. PID 1 and the agent both use it, so
it imports nothing but the contract's cheap parts. The rules are those of docker and runc, as
described at https://docs.docker.com/reference/dockerfile/#user.
"""

from microguest.guest import bounds
from microguest.guest.errors import OperationError, operation_error
from microguest.guest.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

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
    account = _named_account(spec, user, passwd) if uid is None else _numbered_account(uid, passwd)
    if wanted_group:
        gid, others = _explicit_group(spec, wanted_group, group), list[int]()
    else:
        if uid is None and not _is_usable(group):
            raise _bad_user(spec, _unusable(GROUPS_FILE))
        gid = account.gid
        others = _memberships(account.name, group)
    others += [_explicit_group("", wanted, group) for wanted in more_groups]
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
    for fields in _lines(text, f"{name}:"):
        if fields[0] == name and (account := _account(fields)):
            return account
    raise _bad_user(spec, f"no user {name!r:.200} in the image's {USERS_FILE}")


def _numbered_account(uid: int, text: bytes | None) -> _Account:
    for fields in _lines(text, f"{uid}:"):
        if len(fields) > 2 and _number(fields[2]) == uid and (account := _account(fields)):
            return account
    return _Account(name="", uid=uid, gid=0, home="/")


def _memberships(name: str, text: bytes | None) -> list[int]:
    """The groups that say they have this member."""
    found = []
    for fields in _lines(text, name) if name else ():
        gid = _group(fields)
        if gid is not None and name in (member.strip() for member in fields[3].split(",")):
            found.append(gid)
    return found


def _explicit_group(spec: str, wanted: str, text: bytes | None) -> int:
    """spec: of the user whose it is; "" where it is one of its own."""
    gid = _number(wanted)
    if gid is not None:
        return gid
    if not _is_usable(text):
        raise _bad_user(spec, _unusable(GROUPS_FILE), wanted)
    for fields in _lines(text, f"{wanted}:"):
        if fields[0] == wanted and (found := _group(fields)) is not None:
            return found
    raise _bad_user(spec, f"no group {wanted!r:.200} in the image's {GROUPS_FILE}", wanted)


def _account(fields: list[str]) -> _Account | None:
    """A line of passwd(5), where it is well-formed."""
    if len(fields) < 6 or not fields[0]:
        return None
    uid, gid = _number(fields[2]), _number(fields[3])
    if uid is None or gid is None:
        return None
    return _Account(name=fields[0], uid=uid, gid=gid, home=fields[5])


def _group(fields: list[str]) -> int | None:
    """The id in a line of group(5), where it is well-formed."""
    return _number(fields[2]) if len(fields) >= 4 and fields[0] else None


def _lines(text: bytes | None, part: str) -> "Iterator[list[str]]":
    """The fields of the lines that have this text anywhere, in order.

    The file is searched as a whole: to take every line of a megabyte apart costs an emulated
    processor seconds.
    """
    if text is None or not _is_usable(text):
        return
    try:
        wanted = part.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # which no file decodes to
        return
    position = 0
    while (found := text.find(wanted, position)) >= 0:
        start = text.rfind(b"\n", 0, found) + 1
        end = text.find(b"\n", found)
        position = len(text) if end < 0 else end + 1
        line = text[start:position].decode("utf-8", "surrogateescape").strip()
        if line[:1] not in ("", "#"):
            yield line.split(":")


def _is_usable(text: bytes | None) -> bool:
    return text is not None and len(text) <= bounds.ACCOUNT_FILE


def _unusable(path: str) -> str:
    return (
        f"the image's {path} cannot be read: it is no file, or larger than {bounds.ACCOUNT_FILE} "
        "bytes; give numeric ids, as 1000:1000"
    )


def _number(text: str) -> int | None:
    """A decimal id in range, or None. No sign, no spaces, no digits of other scripts."""
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        return None
    return int(text) if int(text) <= MAXIMUM_ID else None


def _bad_user(spec: str, reason: str, group: str = "") -> OperationError:
    """group: what is wrong where there is no user in it."""
    named = f"user {spec!r:.200}" if spec or not group else f"group {group!r:.200}"
    return operation_error(
        "bad_user", f"{named}: {reason}", {"user": (spec or group)[: bounds.ERROR_MESSAGE]}
    )
