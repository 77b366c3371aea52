"""The examples of docs/host.md run as they stand, but for the kind of machine."""

import re
from pathlib import Path

import machinekit
import pytest

PAGE = Path(__file__).parent.parent / "docs" / "host.md"
IMAGE = '"oci:images/demo:busybox", memory="512M"'


def test_examples(
    elf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from host_client import boot

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(examples) >= 5
    here = f'{machinekit.demo_image()!r}, machine="namespaces"'
    with boot(machinekit.demo_image(), machine="namespaces") as machine:
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
