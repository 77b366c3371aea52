"""The boot config: a whole one is read as written, and every mistake is named by its path."""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import GenericAlias, UnionType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microguest.guest import bounds
from microguest.guest.boot import config as bootconfig
from microguest.guest.boot.config import BootConfig, parse
from microguest.guest.boot.workload import signal_number
from microguest.guest.errors import BootConfigError
from microguest.guest.record import Record, RecordError

DOCUMENT = (Path(__file__).parent.parent / "docs" / "reference" / "boot-config.md").read_text()

FULL: dict[str, Any] = {
    "schema": 1,
    "machine": "vm",
    "root": {
        "lower": [
            {"kind": "disk", "serial": "layer0", "fstype": "erofs"},
            {"kind": "directory", "path": "/lower"},
        ],
        "upper": {"kind": "tmpfs", "size": "64m"},
        "read_only": True,
        "writable": ["/var"],
    },
    "mode": "supervise",
    "volumes": [{"kind": "tmpfs", "target": "/tmp", "size": "10m", "read_only": False}],
    "agent": {
        "listen": {"transport": "vsock", "port": 1024},
        "token": "0123456789abcdef0123456789abcdef",
    },
    "report": {"transport": "unix", "path": "/run/report"},
    "workload": {
        "argv": ["/bin/sh", "-c", "exit 3"],
        "env": {"LANG": "C"},
        "cwd": "/srv",
        "user": "daemon",
        "stdio": "console",
        "capabilities": {"bounding": ["chown"], "permitted": ["chown"]},
        "rlimits": {"nofile": [1024, 4096]},
        "restart": {"policy": "on-failure", "limit": 3},
    },
    "image": {"env": {"PATH": "/bin"}, "cwd": "/", "user": "0:0"},
    "hostname": "demo",
    "network": {
        "interfaces": [
            {"addresses": ["10.0.2.15/24"], "routes": [{"to": "default", "via": "10.0.2.2"}]}
        ],
        "nameservers": ["10.0.2.3"],
        "hosts": {"10.0.2.2": ["host"]},
    },
    "hardening": {"profile": "strict", "sysctls": {"kernel.sysrq": "0"}},
    "modules": False,
}


def records_in(kind: object) -> Iterator[type[Record]]:
    if isinstance(kind, UnionType | GenericAlias):
        for choice in kind.__args__:
            yield from records_in(choice)
    elif isinstance(kind, type) and issubclass(kind, Record):
        yield kind


def walk(record: type[Record], path: tuple[str | int, ...]) -> Iterator[tuple[Any, ...]]:
    """Every record of the document, with the path of one place where FULL has it."""
    yield path, record
    for name, kind in record._fields.items():
        step: tuple[str | int, ...] = (name, 0) if isinstance(kind, GenericAlias) else (name,)
        for inner in records_in(kind):
            yield from walk(inner, (*path, *step))


PLACES = list(walk(BootConfig, ()))
FIELDS = [(path, record, name) for path, record in PLACES for name in record._fields]


def dotted(path: tuple[str | int, ...]) -> str:
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")


def changed(path: tuple[str | int, ...], /, **changes: object) -> str:
    document = copy.deepcopy(FULL)
    place: Any = document
    for step in path:
        place = place[step]
    place.update(changes)
    return json.dumps(document)


def refusal(text: str | bytes) -> str:
    with pytest.raises(BootConfigError) as caught:
        parse(text)
    return str(caught.value)


def test_a_whole_document_is_read_as_written() -> None:
    config = parse(json.dumps(FULL))
    assert parse(config.to_json()) == config
    assert config.root.lower[0].serial == "layer0"
    assert config.workload is not None
    assert config.workload.argv == ("/bin/sh", "-c", "exit 3")
    assert config.report == bootconfig.Endpoint(transport="unix", path="/run/report")


def test_the_smallest_document() -> None:
    config = parse(json.dumps({"root": FULL["root"], "agent": FULL["agent"]}))
    assert config.workload is None
    assert config.report is None
    assert config.hostname == "microguest"
    assert config.schema == bootconfig.SCHEMA


def test_bytes_that_are_not_utf_8_survive() -> None:
    argv = ["/bin/echo", "\udcff"]
    config = parse(changed(("workload",), argv=argv))
    assert config.workload is not None
    assert config.workload.argv == tuple(argv)
    assert parse(config.to_json()) == config


@pytest.mark.parametrize(("path", "record", "name"), FIELDS, ids=str)
def test_a_wrong_type_names_the_field(
    path: tuple[str | int, ...], record: type[Record], name: str
) -> None:
    wrong: object = 5 if isinstance(record._fields[name], GenericAlias) else ["x"]
    place = dotted((*path, name))
    assert refusal(changed(path, **{name: wrong})).startswith(f"boot config: {place}: expected ")


@pytest.mark.parametrize(("path", "record"), PLACES, ids=str)
def test_an_unknown_field_is_named(path: tuple[str | int, ...], record: type[Record]) -> None:
    place = dotted((*path, "colour"))
    assert refusal(changed(path, colour=1)) == f"boot config: unknown field {place}"


@pytest.mark.parametrize(
    ("path", "record", "name"),
    [(path, record, name) for path, record, name in FIELDS if not hasattr(record, name)],
    ids=str,
)
def test_a_missing_field_is_named(
    path: tuple[str | int, ...], record: type[Record], name: str
) -> None:
    document = copy.deepcopy(FULL)
    place: Any = document
    for step in path:
        place = place[step]
    del place[name]
    assert refusal(json.dumps(document)) == (f"boot config: missing field {dotted((*path, name))}")


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        ((), "schema", 2),
        ((), "machine", "toaster"),
        ((), "hostname", ""),
        ((), "hostname", "x" * 65),
        ((), "hostname", "two\nlines"),
        ((), "hostname", "ä"),
        (("root",), "lower", []),
        (("root",), "lower", [FULL["root"]["lower"][1]] * 65),
        (("root",), "upper", None),
        (("root",), "writable", ["relative"]),
        (("root",), "writable", ["/"]),
        (("root",), "writable", ["/a/../b"]),
        (("root",), "writable", ["/x"] * 65),
        (("root", "upper"), "kind", "tape"),
        (("root", "upper"), "format", "if-blank"),
        (("root", "upper"), "format", "always"),
        (("root", "upper"), "size", ""),
        (("root", "upper"), "size", "10,exec"),
        (("root", "upper"), "size", "-1"),
        (("root", "upper"), "size", "5kk"),
        (("root", "lower", 0), "kind", "tape"),
        (("root", "lower", 0), "fstype", "ntfs"),
        (("root", "lower", 0), "serial", ""),
        (("root", "lower", 1), "path", "lower"),
        (("agent",), "token", "short"),
        (("agent",), "token", "ä" * 20),
        (("agent",), "token", "x" * 257),
        (("agent", "listen"), "transport", "pigeon"),
        (("agent", "listen"), "port", 0),
        (("agent", "listen"), "port", 2**32 - 1),
        (("report",), "path", "relative"),
        (("report",), "path", "/nul\0"),
        (("root", "lower", 0), "serial", "nul\0"),
        (("root", "lower", 1), "path", "/nul\0"),
        (("workload",), "argv", []),
        (("workload",), "argv", [""]),
        (("workload",), "stdio", "telepathy"),
        (("workload",), "rows", 0),
        (("workload",), "umask", 0o1000),
        (("workload",), "memory", 0),
        (("workload",), "cpu", 0.001),
        (("workload",), "processes", 0),
        (("workload",), "masked", ["proc/kcore"]),
        (("workload",), "read_only_paths", ["/proc/../etc"]),
        (("workload",), "stop_signal", "SIGNONE"),
        (("workload", "restart"), "policy", "sometimes"),
        (("workload", "restart"), "limit", -1),
        (("workload", "restart"), "delay", 61),
        ((), "mode", "both"),
        ((), "machine_id", "x" * 32),
        ((), "volumes", FULL["volumes"] * 65),
        (("volumes", 0), "kind", "floppy"),
        (("volumes", 0), "target", "tmp"),
        (("volumes", 0), "target", "/tmp/.."),
        (("volumes", 0), "mode", 0o4755),
        (("network", "interfaces", 0), "name", "much-too-long-a-name"),
        (("network", "interfaces", 0), "name", "a:b"),
        (("network", "interfaces", 0), "mac", "52:54"),
        (("network", "interfaces", 0), "mac", "52:54:00:12:34:zz"),
        (("network", "interfaces", 0), "mtu", 5),
        (("network",), "nameservers", ["10.0.2.3 10.0.2.4"]),
        (("network",), "hosts", {"10.0.0.1": []}),
        (("hardening",), "profile", "paranoid"),
        (("hardening",), "sysctls", {"../etc/passwd": "1"}),
        (("hardening",), "sysctls", {"kernel/../../x": "1"}),
        (("image",), "env", {"A": "x" * bounds.IMAGE_DEFAULTS}),
    ],
)
def test_a_value_that_cannot_be_used_names_the_field(
    path: tuple[str | int, ...], name: str, value: object
) -> None:
    message = refusal(changed(path, **{name: value}))
    assert message.startswith(f"boot config: {dotted((*path, name))}")
    assert len(message) < 400


@pytest.mark.parametrize(
    ("path", "changes", "blamed"),
    [
        (("root",), {"read_only": False}, "writable"),
        (("root", "lower", 0), {"kind": "9p"}, "tag"),
        (("root", "lower", 0), {"kind": "virtiofs", "tag": "a,b"}, "tag"),
        (("root", "lower", 0), {"kind": "virtiofs", "tag": "nul\0"}, "tag"),
        (("root", "upper"), {"kind": "disk"}, "serial"),
        (("volumes", 0), {"kind": "bind"}, "path"),
        (("volumes", 0), {"kind": "virtiofs"}, "tag"),
        (("volumes", 0), {"kind": "disk", "serial": "x"}, "fstype"),
        (("workload",), {"stdio": "attached"}, "restart"),
        (("workload", "restart"), {"policy": "always"}, "limit"),
        (("network", "interfaces", 0, "routes", 0), {"via": ""}, "via"),
        ((), {"mode": "handoff", "workload": None}, "mode"),
        ((), {"mode": "handoff"}, "workload.rlimits"),
    ],
)
def test_fields_that_need_each_other_name_one(
    path: tuple[str | int, ...], changes: dict[str, object], blamed: str
) -> None:
    message = refusal(changed(path, **changes))
    assert message.startswith(f"boot config: {dotted((*path, blamed))}: ")


@pytest.mark.parametrize("size", ["50%", "64m", "2g", "100k", "1048576", "1G"])
def test_sizes_that_tmpfs_takes(size: str) -> None:
    upper = parse(changed(("root", "upper"), size=size)).root.upper
    assert upper is not None
    assert upper.size == size


@pytest.mark.parametrize(
    ("name", "number"),
    [("TERM", 15), ("sigquit", 3), ("9", 9), ("RTMIN", 34), ("SIGRTMIN+3", 37), ("RTMAX-1", 63)],
)
def test_signals_have_names_and_numbers(name: str, number: int) -> None:
    assert signal_number(name) == number


@pytest.mark.parametrize(
    "name",
    [
        *("", "SIG", "0", "65", "TERM+1", "RTMIN+31", "RTMIN-1", "RTMAX+1", "RTMIN+", "-9", "٣"),
        *("9" * 5000, "0" * 5000, "RTMIN+" + "9" * 5000, "RTMAX-" + "0" * 5000),
    ],
)
def test_what_is_no_signal_is_refused(name: str) -> None:
    with pytest.raises(RecordError, match="not a signal"):
        signal_number(name)


@given(st.integers(0, len(json.dumps(FULL)) - 1))
def test_a_truncated_document_is_refused(length: int) -> None:
    assert refusal(json.dumps(FULL)[:length]).startswith("boot config: not a JSON document")


@given(st.text(max_size=40) | st.binary(max_size=40))
def test_garbage_is_a_boot_config_error(garbage: str | bytes) -> None:
    assert refusal(garbage).startswith("boot config: ")


def test_a_document_that_is_too_long_is_not_parsed() -> None:
    assert refusal(" " * (bootconfig.CONFIG_SIZE + 1)).endswith("at most 4194304")


def test_every_field_is_documented_in_its_records_section() -> None:
    sections = dict(
        re.findall(r"^## `(\w+)`\n(.*?)(?=^## |\Z)", DOCUMENT, re.DOTALL | re.MULTILINE)
    )
    missing = [
        f"{record.__name__}.{name}"
        for _, record, name in FIELDS
        if f"| `{name}` |" not in sections.get(record.__name__, "")
    ]
    assert not missing
    for constant in (bootconfig.PATH, bootconfig.AGENT_PORT, bootconfig.REPORT_PORT):
        assert f"`{constant}`" in DOCUMENT


def test_the_documented_example_is_a_boot_config() -> None:
    (example,) = re.findall(r"```json\n(.*?)```", DOCUMENT, re.DOTALL)
    assert parse(example).workload is not None
