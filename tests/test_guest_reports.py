"""Reports and supervision messages: stored lines, real wait statuses, hostile input."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microguest.guest import bounds, report, supervision
from microguest.guest.boot.workload import ImageDefaults
from microguest.guest.record import Catalogue, Record, RecordError
from microguest.guest.report import REPORTS, BootFailed, Ready, Stopping
from microguest.guest.status import ExitStatus, exit_fields
from microguest.guest.supervision import MESSAGES, Configure

VECTORS = json.loads((Path(__file__).parent / "data" / "protocol-vectors.json").read_text())


@pytest.mark.parametrize("vector", VECTORS["reports"], ids=lambda vector: vector["record"])
def test_reports_encode_and_decode_as_stored(vector: dict[str, Any]) -> None:
    record = getattr(report, vector["record"]).from_map(vector["fields"])
    assert REPORTS.encode(record).decode() == vector["line"]
    assert REPORTS.decode(vector["line"]) == record


def test_every_report_has_a_stored_line() -> None:
    stored = {vector["record"] for vector in VECTORS["reports"]}
    assert stored == {record.__name__ for record in REPORTS.records.values()}


@pytest.mark.parametrize(
    ("catalogue", "union"), [(REPORTS, report.Report), (MESSAGES, supervision.Message)]
)
def test_the_catalogue_has_every_member_of_the_union(catalogue: Catalogue, union: Any) -> None:
    assert set(catalogue.records.values()) == set(union.__args__)


def test_a_report_is_one_line_of_ascii_whatever_it_says() -> None:
    failed = BootFailed(step="root", message="a\nb\r\u2028\udcff", path="/\n")
    line = REPORTS.encode(failed)
    assert line.isascii()
    assert len(line.splitlines()) == 1
    assert REPORTS.decode(line) == failed


def test_unknown_fields_of_a_newer_guest_are_ignored() -> None:
    line = '{"stopping":{"status":"done","boot_ms":1,"mood":"good"}}'
    assert REPORTS.decode(line) == Stopping(status="done", boot_ms=1.0)


def test_a_line_that_is_too_long_is_not_read() -> None:
    with pytest.raises(RecordError, match="at most 65536"):
        REPORTS.decode(b" " * (bounds.REPORT_LINE + 1))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "not a JSON document"),
        ("{}", "one entry"),
        ('{"ready":{},"stopping":{}}', "one entry"),
        ('{"party":{}}', "unknown record 'party'"),
        ('{"ready":[]}', "ready: expected a map"),
        ('{"ready":{"steps":[]}}', "missing field ready.token_proof"),
        ('{"workload_exited":{"code":1,"signal":2}}', "workload_exited.code: exactly one"),
        ('{"workload_exited":{"code":256}}', "workload_exited.code: 256 is not"),
        ('{"agent_exited":{"signal":65,"crashes":1,"restart_in":null}}', "signal: 65 is not"),
        ('{"stopping":{"status":"done","boot_ms":NaN}}', "stopping.boot_ms: must be a finite"),
        ('{"stopping":{"status":"done","boot_ms":1e999}}', "stopping.boot_ms: must be a finite"),
    ],
)
def test_a_hostile_line_is_a_record_error(line: str, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        REPORTS.decode(line)


@given(
    st.binary(max_size=60)
    | st.builds(
        lambda name, fields: json.dumps({name: fields}).encode(),
        st.sampled_from(sorted(REPORTS.records)),
        st.dictionaries(
            st.sampled_from(("code", "signal", "steps", "status", "boot_ms", "pid", "message")),
            st.none() | st.integers() | st.floats() | st.text(max_size=4) | st.just([{}]),
        ),
    )
)
def test_arbitrary_lines_raise_nothing_but_the_record_error(line: bytes) -> None:
    try:
        decoded = REPORTS.decode(line)
    except RecordError:
        return
    assert isinstance(decoded, Record)
    assert REPORTS.decode(REPORTS.encode(decoded)) == decoded


def test_the_largest_image_defaults_fit_into_one_supervision_message() -> None:
    env = {"A": "x" * (bounds.IMAGE_DEFAULTS - 100)}
    configure = Configure(
        transport="vsock",
        token="t" * bounds.TOKEN_MAX,
        image=ImageDefaults(env=env),
        starts=1,
        versions={f"part{number}": "1.2.3" for number in range(50)},
    )
    assert MESSAGES.decode(MESSAGES.encode(configure)) == configure


def test_a_ready_report_with_many_steps_fits() -> None:
    steps = tuple(
        report.Step(name=f"a rather long step {n}", start_ms=n + 0.123456, end_ms=n + 1.123456)
        for n in range(300)
    )
    ready = Ready(steps=steps, token_proof="0" * 64)
    assert REPORTS.decode(REPORTS.encode(ready)) == ready


# ── exit statuses of real processes ──────────────────────────────────────────────────────────────


def ended(*argv: str, kill: int = 0) -> int:
    pid = os.posix_spawn(argv[0], argv, {})
    if kill:
        os.kill(pid, kill)
    return os.waitpid(pid, 0)[1]


def test_exit_codes_of_real_processes() -> None:
    for code in (0, 1, 7, 255):
        status = ExitStatus(**exit_fields(ended("/bin/sh", "-c", f"exit {code}")))
        assert status == ExitStatus(code=code)
        assert status.shell_code == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, 64])
def test_signals_of_real_processes(number: int) -> None:
    status = ExitStatus(**exit_fields(ended("/bin/sleep", "60", kill=number)))
    assert status.signal == number
    assert status.code is None
    assert status.shell_code == 128 + number


def test_what_tells_no_end_is_no_exit_status() -> None:
    pid = os.posix_spawn("/bin/sleep", ("sleep", "60"), {})
    try:
        for number in (signal.SIGSTOP, signal.SIGCONT):
            os.kill(pid, number)
            _, status = os.waitpid(pid, os.WUNTRACED | os.WCONTINUED)
            with pytest.raises(ValueError, match="not that of an end"):
                exit_fields(status)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize(
    "fields", [{}, {"code": 0, "signal": 9}, {"code": -1}, {"code": 256}, {"signal": 0}]
)
def test_a_status_is_a_code_or_a_signal(fields: dict[str, Any]) -> None:
    with pytest.raises(RecordError, match=r"^(code|signal): "):
        ExitStatus(**fields)
