"""The examples of docs/host.md and docs/handoff.md run as they stand, but for the machine."""

import contextlib
import re
import textwrap
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "host.md"
IMAGE = '"oci:dist/demo:busybox", memory="512M"'


def test_examples(image: str, machines_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from host_client import boot

    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(examples) >= 5
    here = f'{image!r}, machine="namespaces"'
    with boot(image, machine="namespaces") as machine:
        names = {"machine": machine, "agent": machine.agent}
        for number, example in enumerate(examples):
            program = example.replace(IMAGE, here)
            exec(compile(program, f"example {number}", "exec"), dict(names))
    shown = capsys.readouterr().out
    for text in (
        "0 b'hello\\n'",
        "hello world",
        "b'bye\\n'",
        "stdout b'1\\n",
        "was killed by signal",
        "job",
        "not_found exec 2",
    ):
        assert text in shown


SYSTEMCTL = """\
#!/bin/sh
# As systemd's answers while it starts: not there yet, no bus yet, and then how it went.
echo asked >>/tmp/asked
case $(grep -c asked /tmp/asked) in
    1) echo offline; exit 1 ;;
    2) echo no bus >&2; exit 1 ;;
    *) echo degraded; exit 1 ;;
esac
"""


def test_first_example_of_handoff(
    image: str, machines_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It waits until there is something to say; with systemd itself in tests/test_vm_handoff.py."""
    from host_client import boot

    page = (PAGE.parent / "handoff.md").read_text()
    (example,) = re.findall(r"(?m)^(?:    .*\n)+", page[: page.index("## In order")])
    started = 'boot("oci:debian:systemd", handoff=True, memory="1G")'
    assert started in example
    with boot(image, machine="namespaces") as machine:
        install = "cat >/usr/bin/systemctl && chmod 755 /usr/bin/systemctl"
        machine.agent.exec(shell=install, input=SYSTEMCTL.encode(), check=True)
        program = textwrap.dedent(example).replace(started, "contextlib.nullcontext(machine)")
        exec(compile(program, "handoff.md", "exec"), {"machine": machine, "contextlib": contextlib})
    assert capsys.readouterr().out == "b'degraded\\n'\n"
