"""User specifications against passwd and group files, as docker resolves them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest import limits
from guest.errors import StartError
from guest.users import MAXIMUM_ID, Identity, resolve

PASSWD = b"""\
root:x:0:0:root:/root:/bin/sh
# a comment
broken line
nouid:x::5::/home/nouid:/bin/sh
app:x:1000:1000:The app:/srv/app:/bin/sh
7:x:1234:1234:a number as name:/seven:/bin/sh
homeless:x:1001:1001:::/bin/sh
second:x:1000:7:same uid as app:/second:/bin/sh
"""
GROUP = b"""\
root:x:0:
wheel:x:10:root,app
audio:x:63:app
app:x:1000:
bad:x:minus:app
empty
docker:x:999: app , other
"""


def who(spec: str) -> Identity:
    return resolve(spec, PASSWD, GROUP)


@pytest.mark.parametrize(
    ("spec", "uid", "gid", "groups", "home"),
    [
        ("", 0, 0, (0, 10), "/root"),
        ("root", 0, 0, (0, 10), "/root"),
        ("0", 0, 0, (0, 10), "/root"),
        ("app", 1000, 1000, (1000, 10, 63, 999), "/srv/app"),
        ("1000", 1000, 1000, (1000, 10, 63, 999), "/srv/app"),
        ("app:audio", 1000, 63, (63,), "/srv/app"),
        ("app:63", 1000, 63, (63,), "/srv/app"),
        ("app:", 1000, 1000, (1000, 10, 63, 999), "/srv/app"),
        (":audio", 0, 63, (63,), "/root"),
        ("4711", 4711, 0, (0,), "/"),
        ("4711:4712", 4711, 4712, (4712,), "/"),
        ("7", 7, 0, (0,), "/"),  # a number is an id, although there is a user of that name
        ("homeless", 1001, 1001, (1001,), "/"),
        (str(MAXIMUM_ID), MAXIMUM_ID, 0, (0,), "/"),
    ],
)
def test_resolves_as_docker_does(
    spec: str, uid: int, gid: int, groups: tuple[int, ...], home: str
) -> None:
    identity = who(spec)
    assert (identity.uid, identity.gid, identity.groups, identity.home) == (uid, gid, groups, home)


def test_works_without_files() -> None:
    assert resolve("") == Identity(uid=0, gid=0, groups=(0,), home="/")
    assert resolve("12:34") == Identity(uid=12, gid=34, groups=(34,), home="/")


@pytest.mark.parametrize(
    "spec",
    ["nobody", "app:nogroup", "nouid", "-1", str(MAXIMUM_ID + 1), "1 000", "٣", "app:-1", "0x0"],
)
def test_unknown_names_are_typed_errors(spec: str) -> None:
    with pytest.raises(StartError) as caught:
        who(spec)
    assert caught.value.code == "bad_user"
    assert caught.value.fields["user"] == spec


def test_huge_file_is_refused_not_parsed() -> None:
    with pytest.raises(StartError, match="larger than"):
        resolve("app", b"x" * (limits.ACCOUNT_FILE + 1))


@given(st.text(max_size=20), st.binary(max_size=200), st.binary(max_size=200))
def test_any_input_gives_an_identity_or_the_typed_error(
    spec: str, passwd: bytes, group: bytes
) -> None:
    try:
        identity = resolve(spec, passwd, group)
    except StartError:
        return
    assert 0 <= identity.uid <= MAXIMUM_ID
    assert identity.groups[0] == identity.gid
