"""When a console's lines came: the index beside its log, and moments as people write them."""

import datetime as dt
import os
import time
from pathlib import Path

import pytest

from microguest.host_client.machines import moments
from microguest.host_client.machines.console import LogReader, RotatingLog
from microguest.host_client.machines.moments import COALESCED, MOMENTS_MAX
from microguest.host_client.machines.when import moment, stamp

ENTRY = 16  # bytes


def lines_of(path: Path) -> list[tuple[bytes, int | None]]:
    """Each write of these tests, which are lines of eight bytes, and when it came."""
    reader = LogReader(str(path), timed=True)
    found = []
    for piece in reader.pieces():
        for at in range(0, len(piece.data), 8):
            when = None if piece.moments is None else piece.moments.at(piece.offset + at)
            found.append((piece.data[at : at + 8], when))
    reader.close()
    return found


def test_each_half_has_its_moments(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    log = RotatingLog(str(path), half_max=80, timed=True)
    written = []
    for number in range(35):
        before = time.time_ns()
        log.write(b"%07d\n" % number)
        written.append((before, time.time_ns()))
        time.sleep(COALESCED)  # apart, so that each has its own
    log.close()
    found = lines_of(path)
    assert 10 <= len(found) <= 20
    for text, when in found:
        before, behind = written[int(text)]
        assert when is not None
        assert before <= when <= behind
    assert sorted(os.listdir(tmp_path)) == [
        *("console.log", "console.log.1", "console.times", "console.times.1"),
    ]


def test_moments_of_what_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    log = RotatingLog(str(path), half_max=80, timed=True)
    reader = LogReader(str(path), timed=True)
    seen = []
    for number in range(35):
        before = time.time_ns()
        log.write(b"%07d\n" % number)
        if number % 3 == 0:
            time.sleep(COALESCED)
        for piece in reader.pieces():
            if piece.data:
                assert piece.moments is not None
                when = piece.moments.at(piece.offset)
                assert when is not None
                assert before - 2 * COALESCED * 1e9 <= when <= time.time_ns()
                seen.append(piece.data)
    reader.close()
    log.close()
    assert b"".join(seen) == b"".join(b"%07d\n" % number for number in range(35))


def test_a_flood_costs_a_bounded_index(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    log = RotatingLog(str(path), timed=True)
    began = time.monotonic()
    for _ in range(20_000):
        log.write(b"a\nb\n")
    spent = time.monotonic() - began
    size = (tmp_path / "console.times").stat().st_size
    assert size <= ENTRY * (2 + spent / COALESCED)
    for _ in range(1000):
        log.write(b"no line " * 100)
    log.write(b"\n")
    assert (tmp_path / "console.times").stat().st_size <= size + ENTRY
    log.close()


def test_a_half_ends_when_its_index_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MOMENTS_MAX * ENTRY == 2 * 1024 * 1024
    monkeypatch.setattr(moments, "MOMENTS_MAX", 5)
    monkeypatch.setattr(moments, "COALESCED", 0.0)
    path = tmp_path / "console.log"
    log = RotatingLog(str(path), timed=True)
    for number in range(23):
        log.write(b"%07d\n" % number)
    log.close()
    found = lines_of(path)
    assert [int(text) for text, _ in found] == list(range(15, 23))
    assert len({when for _, when in found}) == 8
    for name in ("console.times", "console.times.1"):
        assert (tmp_path / name).stat().st_size <= ENTRY * 6


def test_a_line_came_when_it_began(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    log = RotatingLog(str(path), timed=True)
    log.write(b"1234")
    began = time.time_ns()
    time.sleep(2 * COALESCED)
    log.write(b"567\n")
    log.write(b"next on\n")
    log.close()
    (_, first), (_, second) = lines_of(path)
    assert first is not None
    assert second is not None
    assert first <= began < second


def test_an_index_of_another_log_is_none(tmp_path: Path) -> None:
    """Its times would be wrong."""
    path = tmp_path / "console.log"
    log = RotatingLog(str(path), timed=True)
    log.write(b"1234567\n")
    log.close()
    (tmp_path / "other").write_bytes(b"abcdefg\n")
    (tmp_path / "other").rename(path)
    assert lines_of(path) == [(b"abcdefg\n", None)]


def test_times_on_a_full_disk(tmp_path: Path) -> None:
    """Where the index cannot be made it is tried again, and the log is written."""
    path = tmp_path / "console.log"
    (tmp_path / "console.times").mkdir()
    log = RotatingLog(str(path), timed=True)
    log.write(b"1234567\n")
    (tmp_path / "console.times").rmdir()
    before = time.time_ns()
    log.write(b"7654321\n")
    log.close()
    (first, earlier), (second, when) = lines_of(path)
    assert (first, second) == (b"1234567\n", b"7654321\n")
    assert when is not None
    assert earlier == when >= before


# ── moments as people write them ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("1136073845", 1136073845 * 10**9),
        ("1136073845.000000001", 1136073845 * 10**9 + 1),
        ("1136073845.5", 1136073845 * 10**9 + 5 * 10**8),
        ("2006-01-02T15:04:05Z", 1136214245 * 10**9),
        ("2006-01-02T15:04:05.123456789Z", 1136214245 * 10**9 + 123456789),
        ("2006-01-02T15:04:05+07:00", (1136214245 - 7 * 3600) * 10**9),
        ("2006-01-02T15:04-01:30", (1136214240 + 5400) * 10**9),
        ("2006-01-02T15Z", 1136214000 * 10**9),
        ("2006-01-02Z", 1136160000 * 10**9),
        ("2006-01-02", 1136214000 * 10**9 - 20 * 3600 * 10**9),
        ("2006-01-02T15:04:05", 1136214245 * 10**9 - 5 * 3600 * 10**9),
    ],
)
def test_dates_and_seconds(text: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a zone it is the local one: here five hours before UTC's."""
    monkeypatch.setenv("TZ", "XXX-5")
    time.tzset()
    try:
        assert moment(text, "since") == expected
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("text", "ago"),
    [
        ("10m", 600.0),
        ("1h30m", 5400.0),
        ("1.5h", 5400.0),
        ("300ms", 0.3),
        ("2m3.5s", 123.5),
        ("1us", 1e-6),
        ("1\u00b5s1ns", 1e-6),
        ("-10m", -600.0),
        ("+1s", 1.0),
    ],
)
def test_durations_are_before_now(text: str, ago: float) -> None:
    before = time.time_ns()
    found = moment(text, "since")
    assert found is not None
    assert before - 1000 <= found + ago * 1e9 <= time.time_ns() + 1000


@pytest.mark.parametrize(
    "text",
    [
        *("now", "1h 30m", "10 m", "5d", "2006-1-2", "2006-13-01", "2006-01-02T25", "1.2.3"),
        *("\u0661\u0660m", "9" * 5000, "9" * 5000 + "h", "1h" * 5000 + "x", "0x10", "1e5", "--1"),
    ],
)
def test_what_is_no_moment(text: str) -> None:
    with pytest.raises(ValueError, match=r"since: .* is no time: write 10m") as caught:
        moment(text, "since")
    assert len(str(caught.value)) < 250


def test_stamps() -> None:
    assert stamp(1136214245 * 10**9 + 5) == b"2006-01-02T15:04:05.000000005Z"
    date = dt.datetime(2006, 1, 2, 15, 4, 5, 7, tzinfo=dt.UTC)
    assert moment(date, "since") == 1136214245 * 10**9 + 7000
    assert moment(None, "since") is moment("", "since") is None
    assert moment(1.5, "since") == 1_500_000_000
