"""User specifications against passwd and group files, as docker resolves them."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microguest.guest.errors import StartError
from microguest.guest.users import MAXIMUM_ID, Identity, resolve

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


@pytest.mark.parametrize("unusable", [None, b"app:x:1000:1000::/:/bin/sh\n" * 100_000])
def test_only_names_need_files_that_cannot_be_read(unusable: bytes | None) -> None:
    for spec, ids in (("", (0, 0)), ("0", (0, 0)), ("1000", (1000, 0)), ("12:34", (12, 34))):
        assert resolve(spec, unusable, unusable) == Identity(
            uid=ids[0], gid=ids[1], groups=(ids[1],), home="/"
        )
    assert resolve("1000", PASSWD, unusable).groups == (1000,)
    assert resolve("app:63", PASSWD, unusable).groups == (63,)
    assert resolve("1000:audio", unusable, GROUP).groups == (63,)
    assert resolve("12:34", unusable, unusable, more_groups=("5",)).groups == (34, 5)
    for spec, passwd, group in (
        ("app", unusable, GROUP),
        ("app:63", unusable, GROUP),
        ("app", PASSWD, unusable),  # whose other groups would be left out without a word
        ("1000:audio", PASSWD, unusable),
    ):
        with pytest.raises(StartError, match=r"cannot be read.*larger than.*1000:1000") as caught:
            resolve(spec, passwd, group)
        assert caught.value.code == "bad_user"


MANY = 20_000


def test_large_files_are_searched_and_not_taken_apart() -> None:
    passwd = b"".join(b"u%d:x:%d:7::/home/u%d:/bin/sh\n" % (n, n, n) for n in range(MANY))
    group = b"".join(b"g%d:x:%d:u%d\n" % (n, n, n) for n in range(MANY))
    last = MANY - 1
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    for spec, gid in (("0:0", 0), (f"{last}", 7), (f"u{last}", 7), (f"u{last}:g{last}", last)):
        sys.setprofile(count)
        try:
            identity = resolve(spec, passwd, group)
        finally:
            sys.setprofile(None)
        assert identity.gid == gid
        assert identity.home == f"/home/u{identity.uid}"
    assert calls < MANY / 10


def test_a_name_among_others_of_its_line_is_no_match() -> None:
    passwd = b" app :x:5:5::/no:/bin/sh\nx:app:6:6::/no:/bin/sh\n app:x:9:9::/yes:/bin/sh \n"
    assert resolve("app", passwd, b"").home == "/yes"
    assert resolve("09", b"z:x:009:1::/z:/bin/sh\n", b"").home == "/z"
    assert resolve("app", passwd, b"a:x:1:xapp\nb:x:2: app \nc:x:3:app,x").groups == (9, 2, 3)


CONTENT = st.none() | st.binary(max_size=200)


@given(st.text(max_size=20), CONTENT, CONTENT)
def test_any_input_gives_an_identity_or_the_typed_error(
    spec: str, passwd: bytes | None, group: bytes | None
) -> None:
    try:
        identity = resolve(spec, passwd, group)
    except StartError:
        return
    assert 0 <= identity.uid <= MAXIMUM_ID
    assert identity.groups[0] == identity.gid
