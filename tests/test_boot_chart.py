"""The picture of a boot: from a real machine's timeline, and from a hostile guest's."""

import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from machinekit import demo_image
from patience import PATIENCE

import microguest
from microguest.guest.record import RecordError
from microguest.guest.report import REPORTS, Step
from microguest.host_client.cli.boot_chart import replace
from microguest.host_client.machines.chart import ROWS_MAX, boot_chart
from microguest.host_client.machines.plan import MachineState
from microguest.host_client.monitor.boottime import BootTimeline

SVG = "{http://www.w3.org/2000/svg}"


def texts(chart: str) -> list[str]:
    return [node.text or "" for node in ET.fromstring(chart).iter(f"{SVG}text")]


def step(name: str, start: float, end: float) -> Step:
    return Step(name=name, start_ms=start, end_ms=end)


def command(*arguments: str, under: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*under, sys.executable, "-m", "microguest", "boot-chart", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )


def test_every_step_has_a_bar_as_long_as_it_took() -> None:
    chart = boot_chart(
        [step("launch", 0, 2), step("kernel", 100, 400), step("config", 400, 500)], title="Boot"
    )
    bars = {}
    for node in ET.fromstring(chart).iter(f"{SVG}rect"):
        title = node.find(f"{SVG}title")
        if title is not None:
            bars[(title.text or "").partition(":")[0]] = node
    assert set(bars) == {"launch", "kernel", "config", "VMM and firmware"}
    width, start = (
        {n: float(bar.get(key, "")) for n, bar in bars.items()} for key in ("width", "x")
    )
    assert width["kernel"] == pytest.approx(3 * width["config"], rel=0.01)
    assert start["config"] == pytest.approx(start["kernel"] + width["kernel"], abs=0.2)
    assert "kernel (300.0 ms)" in texts(chart)


def test_a_guest_cannot_write_markup() -> None:
    name = "</text><script>alert(1)</script>\x00\udcff\n"
    chart = boot_chart([step(name, 0, 1)] * 1000, title=name, subtitle=name)
    chart.encode("ascii")
    assert "<script" not in chart
    assert len([text for text in texts(chart) if "alert(1)" in text]) == ROWS_MAX + 2


def test_a_guest_s_moments_stay_numbers_whatever_they_are() -> None:
    """As the largest of both signs that a report can have; larger ones are no report."""
    line = b'{"ready":{"steps":[{"name":"a","start_ms":9.2e18,"end_ms":-9.2e18}],"token_proof":""}}'
    with pytest.raises(RecordError, match="start_ms"):
        REPORTS.decode(line.replace(b"e18", b"e307"))
    timeline = BootTimeline(shared_clock=False)
    timeline.launched(time.monotonic())
    assert timeline.take(REPORTS.decode(line))
    assert "kernel" in MachineState(name="m", timeline=timeline.steps).to_json()
    assert "svg" in boot_chart(timeline.steps, title="Boot")


@pytest.mark.parametrize("end", [0.0, 0.4, 1.0, 9.99, 10.0, 123.4, 59_000.0, 1e9])
def test_the_axis_has_about_ten_numbers(end: float) -> None:
    chart = boot_chart([step("boot", 0, end)], title="Boot")
    numbers = [text for text in texts(chart) if text.removesuffix(" ms").replace(".", "").isdigit()]
    assert 4 <= len(numbers) <= 2 * 12


def test_no_steps_are_no_chart() -> None:
    with pytest.raises(ValueError, match="no steps"):
        boot_chart([], title="Boot")


def test_chart_and_steps_of_a_machine(tmp_path: Path) -> None:
    with microguest.boot(demo_image(), machine="namespaces") as machine:
        machine.agent.exec(["true"])
        name = machine.name
        drawn, steps = command(name), command(name, "--json")
        target = tmp_path / "boot.svg"
        written = command(name, "-o", str(target))
    assert (drawn.returncode, steps.returncode, written.returncode) == (0, 0, 0), drawn.stderr
    names = [entry["name"] for entry in json.loads(steps.stdout)["steps"]]
    assert names[:1] == ["launch"]
    assert {"api-mounts", "switch-root", "workload", "agent-ready", "ready"} < set(names)
    assert f"Boot of {name}" in texts(drawn.stdout)
    assert "agent starts up" in target.read_text()
    assert os.listdir(tmp_path) == ["boot.svg"]


def test_what_cannot_be_drawn_or_written_is_one_line(tmp_path: Path) -> None:
    unknown = command("no-such-machine")
    assert (unknown.returncode, unknown.stdout) == (125, "")
    assert "no machine named no-such-machine" in unknown.stderr
    with microguest.boot(demo_image(), machine="namespaces") as machine:
        refused = command(machine.name, "-o", str(tmp_path / "missing" / "boot.svg"))
        picture, link = tmp_path / "boot.svg", tmp_path / "link"
        picture.write_text("the one before")
        link.symlink_to(picture)
        full = command(machine.name, "-o", str(link), under=("prlimit", "--fsize=64"))
        assert picture.read_text() == "the one before"
        special = command(machine.name, "-o", "/dev/stdout")
        assert command(machine.name, "-o", str(link)).returncode == 0
    assert sorted(os.listdir(tmp_path)) == ["boot.svg", "link"]
    assert link.is_symlink()
    assert picture.read_text() == special.stdout != ""
    assert (full.returncode, full.stderr.count("\n")) == (125, 1)
    assert refused.returncode == 125
    assert refused.stderr.count("\n") == 1
    assert f"cannot write {tmp_path}/missing/boot.svg: " in refused.stderr


def test_no_link_of_others_is_followed_beside_the_picture(tmp_path: Path) -> None:
    """As another user can make in /tmp, where the name of what is being written can be guessed."""
    victim, picture = tmp_path / "victim", tmp_path / "boot.svg"
    victim.write_bytes(b"mine")
    (tmp_path / f"boot.svg.{os.getpid()}").symlink_to(victim)
    replace(str(picture), b"<svg/>")
    assert (victim.read_bytes(), picture.read_bytes()) == (b"mine", b"<svg/>")
    assert not picture.is_symlink()
