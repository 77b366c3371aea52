"""Records: every one survives the wire, and nothing from outside gets past their types."""

import functools
import math
from types import GenericAlias, UnionType
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microguest.guest import bounds, report, status, supervision
from microguest.guest.boot import config, network, root, workload
from microguest.guest.boot.config import Endpoint
from microguest.guest.record import Catalogue, Record, RecordError
from microguest.guest.status import ExitStatus
from microguest.guest.supervision import Deposit, KeptStatus, Restored
from microguest.guest.wire import messages
from microguest.guest.wire.messages import Credit, StagedFile, Start, Started, Welcome

MODULES = (config, messages, network, report, root, status, supervision, workload)
RECORDS = [
    record
    for module in MODULES
    for record in vars(module).values()
    if isinstance(record, type)
    and issubclass(record, Record)
    and record.__module__ == module.__name__
]

# Values that a field's own check asks for.
CHOICES: dict[str, st.SearchStrategy[Any]] = {
    "transport": st.sampled_from(("vsock", "unix")),
    "port": st.integers(1, 2**32 - 2),
    "path": st.just("/x"),
    "fstype": st.sampled_from(("erofs", "squashfs")),
    "kind": st.sampled_from(("disk", "directory")),
    "serial": st.just("disk0"),
    "machine": st.sampled_from(("vm", "namespaces")),
    "stdio": st.sampled_from(("attached", "console")),
    "schema": st.just(1),
    "hostname": st.just("guest"),
    "target": st.sampled_from(("process", "group", "tree")),
    "watchdog": st.floats(0.1, 60),
    "token": st.text("abc0123", min_size=16, max_size=40),
    "timeout": st.floats(0, 1e6),
    "drain_idle": st.floats(0, 10),
    "drain_cap": st.floats(0, 10),
    "grace": st.floats(0, 3600),
    "retain": st.floats(0, 3600),
    "cpu": st.floats(0.01, 1024),
    "rlimits": st.dictionaries(
        st.sampled_from(("nofile", "core")),
        st.lists(st.integers(-1, 2**63 - 1), min_size=2, max_size=2),
    ),
    "buffer": st.integers(bounds.KEEP_BUFFER_MIN, bounds.KEEP_BUFFER_MAX),
    "on_full": st.sampled_from(("block", "drop")),
    "offsets": st.dictionaries(st.sampled_from(("stdout", "stderr")), st.integers(-1, 2**62)),
    "id": st.text("abc0123", min_size=1, max_size=9),
    "meta": st.text('ab{}"', max_size=9),
    "shell": st.none(),
    "seccomp": st.integers(0, 3).map(lambda instructions: bytes(8 * instructions)),
    "stdin": st.just(True),
    "names": st.lists(st.text("abc", min_size=1), max_size=3),
    "cwd": st.just("/"),
    "argv": st.lists(st.just("\udcff") | st.text("abc", min_size=1), min_size=1, max_size=3),
}
TOGETHER = (Endpoint,)  # records whose optional fields need each other
# Those with rules of their own among the fields: whole examples.
EXAMPLES: dict[type[Record], list[dict[str, Any]]] = {
    root.Lower: [
        {"kind": "disk", "serial": "a", "fstype": "erofs"},
        {"kind": "9p", "tag": "share"},
        {"kind": "directory", "path": "/lower"},
    ],
    root.Upper: [{}, {"size": "64m"}, {"kind": "disk", "serial": "u", "format": "if-blank"}],
    root.Root: [
        {"lower": [{"kind": "virtiofs", "tag": "root"}], "upper": None},
        {"lower": [{"kind": "directory", "path": "/a"}] * 2, "read_only": True, "writable": ["/x"]},
    ],
    root.Volume: [
        {"kind": "tmpfs", "target": "/tmp", "size": "1m", "mode": 0o755, "exec": False},
        {"kind": "disk", "target": "/d", "serial": "d", "fstype": "ext4", "format": "if-blank"},
        {"kind": "bind", "target": "/b", "path": "/a", "read_only": True, "create": False},
    ],
    network.Route: [{"via": "10.0.2.2"}, {"to": "fd00::/64", "metric": 7}],
    network.Interface: [
        {},
        {"name": "net0", "mac": "52:54:00:12:34:56", "addresses": ["10.0.2.15/24"], "mtu": 1400},
        {"dhcp": True, "routes": [{"to": "10.1.0.0/16"}]},
    ],
    network.Network: [
        {},
        {"nameservers": ["10.0.2.3"], "search": ["a.test"], "hosts": {"10.0.0.1": ["a", "b"]}},
        {"interfaces": [{"name": "eth1"}], "options": ["ndots:2"]},
    ],
    config.BootConfig: [
        {
            "root": {"lower": [{"kind": "9p", "tag": "root"}]},
            "agent": {"listen": {"transport": "vsock", "port": 1024}, "token": "x" * 16},
        },
        {
            "machine": "namespaces",
            "mode": "handoff",
            "root": {"lower": [{"kind": "directory", "path": "/a"}], "upper": {"size": "1m"}},
            "volumes": [{"kind": "tmpfs", "target": "/tmp"}],
            "agent": {"listen": {"transport": "unix", "path": "/a"}, "token": "x" * 16},
            "report": {"transport": "vsock", "port": 1025},
            "workload": {"argv": ["/sbin/init"]},
            "machine_id": "0123456789abcdef" * 2,
            "network": {"nameservers": ["10.0.2.3"]},
        },
    ],
    config.Hardening: [{}, {"profile": "strict", "sysctls": {"net.core.somaxconn": "128"}}],
    workload.Restart: [{}, {"policy": "on-failure", "limit": 3, "delay": 1, "delay_max": 8}],
    workload.Capabilities: [{}, {"bounding": ["chown"], "ambient": ["net_admin"]}],
    workload.Workload: [
        {"argv": ["/bin/sh"]},
        {"argv": ["\udcff"], "env": {"A": "b"}, "stdio": "terminal", "rows": 5, "umask": 0o77},
        {
            "argv": ["x"],
            "capabilities": {},
            "rlimits": {"nofile": [64, 128]},
            "masked": ["/proc/kcore"],
            "stop_signal": "SIGRTMIN+3",
            "restart": {"policy": "always"},
            "memory": 1 << 20,
            "cpu": 0.5,
            "processes": 9,
        },
    ],
}
BINARY = (StagedFile, Start)  # records with bytes, which JSON does not have
NEEDED = {Start: ("stdin",)}  # by others, though it has a default
OFFSETS = st.dictionaries(st.sampled_from(("stdout", "stderr")), st.integers(0, bounds.OFFSET_MAX))
OWN = {
    (Credit, "stdin"): st.integers(0, bounds.CREDIT_MAX),
    (Start, "id"): st.just(""),
    (Started, "offsets"): OFFSETS,
    (Started, "dropped"): OFFSETS,
    (Welcome, "clock"): st.sampled_from(([], [5, 7])),
}


def values_of(kind: object, name: str = "") -> st.SearchStrategy[Any]:
    """Plain values that fit a field."""
    scalars: dict[object, st.SearchStrategy[Any]] = {
        str: st.text(st.characters(codec="utf-8"), max_size=6) | st.just("\udcff"),
        int: st.integers(1, 64),
        float: st.floats(-1e18, 1e18),
        bool: st.booleans(),
        bytes: st.binary(max_size=6),
        type(None): st.none(),
    }
    if name in CHOICES and kind not in RECORDS and kind != dict[str, str]:
        return CHOICES[name]
    if kind in scalars:
        return scalars[kind]
    if isinstance(kind, UnionType):
        return st.one_of([values_of(choice, name) for choice in kind.__args__])
    if isinstance(kind, GenericAlias):
        item = values_of(kind.__args__[-1 if kind.__origin__ is dict else 0])
        if kind.__origin__ is dict:
            return st.dictionaries(st.text("abc", min_size=1, max_size=4), item, max_size=3)
        return st.lists(item, min_size=1, max_size=3)
    assert isinstance(kind, type)
    return maps_of(kind)


@functools.cache
def maps_of(record: type[Record]) -> st.SearchStrategy[dict[str, Any]]:
    if record in EXAMPLES:
        return st.sampled_from(EXAMPLES[record])
    fields = {
        name: OWN[record, name] if (record, name) in OWN else values_of(kind, name)
        for name, kind in record._fields.items()
    }
    optional = {
        name: value
        for name, value in fields.items()
        if hasattr(record, name) and record not in TOGETHER and name not in NEEDED.get(record, ())
    }
    required = {n: v for n, v in fields.items() if n not in optional}
    if not issubclass(record, ExitStatus):
        return st.fixed_dictionaries(required, optional=optional)
    one_of_both = st.sampled_from(({"code": 7}, {"signal": 9}))
    rest = {n: v for n, v in optional.items() if n not in ("code", "signal")}
    others = st.fixed_dictionaries(required, optional=rest)
    return st.builds(lambda one, other: one | other, one_of_both, others)


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=4)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)

each_record = pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)


@each_record
@settings(max_examples=12)
@given(data=st.data())
def test_every_record_survives_json_and_msgpack(record: type[Record], data: st.DataObject) -> None:
    made = record.from_map(data.draw(maps_of(record)))
    if record not in BINARY:
        assert record.from_json(made.to_json()) == made
    packed = messages.pack(made.to_map())
    assert record.from_map(messages.unpack(packed, "it")) == made
    assert hash(record.from_map(made.to_map())) == hash(made)
    assert made.replace() == made
    assert record.__name__ in repr(made)


@each_record
@settings(max_examples=25)
@given(data=st.data())
def test_nothing_but_a_record_error_comes_out_of_anything(
    record: type[Record], data: st.DataObject
) -> None:
    fields = st.sampled_from([*record._fields, "x"])
    values = data.draw(ANYTHING | st.dictionaries(fields, ANYTHING))
    for ignore_unknown in (False, True):
        try:
            record.from_map(values, ignore_unknown=ignore_unknown, where="somewhere")
        except RecordError:
            continue


@each_record
@settings(max_examples=5)
@given(data=st.data())
def test_one_wrong_field_is_named_by_its_path(record: type[Record], data: st.DataObject) -> None:
    values = data.draw(maps_of(record))
    for name in record._fields:
        with pytest.raises(RecordError, match=rf"^at\.{name}: expected "):
            record.from_map({**values, name: object()}, where="at")
    with pytest.raises(RecordError, match=r"^unknown field at\.colour$"):
        record.from_map({**values, "colour": 1}, where="at")
    assert record.from_map({**values, "colour": 1}, ignore_unknown=True)


class Sample(Record):
    number: float
    maybe: float | None = None
    either: str | int | None = None
    flag: bool = False
    named: dict[str, int] = {}  # noqa: RUF012
    inner: "tuple[str, ...]" = ()


@pytest.mark.parametrize("value", [3, 3.0, -0.0, 2**53])
@pytest.mark.parametrize("field", ["number", "maybe"])
def test_an_integer_is_a_number_wherever_a_number_may_stand(field: str, value: float) -> None:
    made = Sample.from_map({"number": 0.5, field: value})
    assert getattr(made, field) == value
    assert type(getattr(made, field)) is float


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400])
@pytest.mark.parametrize("field", ["number", "maybe"])
def test_numbers_are_finite(field: str, value: float) -> None:
    with pytest.raises(RecordError, match=rf"^{field}: must be a finite number|expected"):
        Sample.from_map({"number": 0.5, field: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "Sample: expected a map, got list"),
        (None, "Sample: expected a map, got null"),
        ({}, "missing field number"),
        ({"number": 1, "colour": 1}, "unknown field colour"),
        ({"number": True}, "number: expected float, got bool"),
        ({"number": 1, "flag": 1}, "flag: expected bool, got int"),
        ({"number": 1, "either": True}, "either: expected str | int | None, got bool"),
        ({"number": 1, "named": {"a": "b"}}, "named[a]: expected int, got str"),
        ({"number": 1, "named": {1: 1}}, "named: keys must be strings"),
    ],
)
def test_errors_say_what_was_expected_where(values: object, message: str) -> None:
    with pytest.raises(RecordError) as caught:
        Sample.from_map(values)
    assert str(caught.value) == message


def test_a_record_cannot_be_changed_or_made_wrongly() -> None:
    made = Sample(number=1.0)
    with pytest.raises(AttributeError, match="frozen"):
        made.number = 2.0  # type: ignore[misc]
    with pytest.raises(TypeError, match="needs number"):
        Sample()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="no field colour"):
        Sample(number=1.0, colour=1)  # type: ignore[call-arg]
    assert made.replace(flag=True).to_map() == {"number": 1.0, "flag": True}


@pytest.mark.parametrize("text", ["", "{", "[1]", "nul", "[" * 100_000, b"\xff", "1" * 5000])
def test_what_is_not_a_json_document_is_a_record_error(text: str | bytes) -> None:
    with pytest.raises(RecordError):
        Sample.from_json(text)
    with pytest.raises(RecordError):
        Catalogue({"sample": Sample}, maximum=200_000).decode(text)


def test_a_catalogue_reads_no_more_than_its_maximum() -> None:
    catalogue = Catalogue({"sample": Sample}, maximum=100)
    line = catalogue.encode(Sample(number=1.0, either="x" * 50))
    assert catalogue.decode(line) == Sample(number=1.0, either="x" * 50)
    with pytest.raises(RecordError, match="at most 100"):
        catalogue.decode(line + b" " * 100)


def test_the_largest_deposit_fits_into_one_message() -> None:
    largest = Restored(
        id='"' * bounds.KEPT_NAME,
        pid=2**31 - 1,
        meta='"' * bounds.KEPT_META,
        names=('"' * bounds.KEPT_NAME,) * (bounds.SUPERVISION_DESCRIPTORS - 1),
        exited=KeptStatus(signal=9, ended_ms=0.1 + 0.2, user_seconds=1e-300, system_seconds=1e-300),
    )
    assert supervision.MESSAGES.decode(supervision.MESSAGES.encode(largest)) == largest


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"meta": "x" * (bounds.KEPT_META + 1)}, "meta"),
        ({"meta": "\n"}, "meta"),
        ({"meta": "ü"}, "meta"),
        ({"id": ""}, "id"),
        ({"id": "x" * (bounds.KEPT_NAME + 1)}, "id"),
        ({"names": ("",)}, "names"),
        ({"names": ("x",) * bounds.SUPERVISION_DESCRIPTORS}, "names"),
    ],
)
def test_a_deposit_has_limits(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(RecordError, match=f"^{field}: must be"):
        Deposit(**{"id": "p1", "pid": 2, "meta": "{}", **changes})
