"""The examples of the pages: programs run as they stand, but for the machine; commands are parsed.

A program that cannot run here has `<!-- not run: REASON -->` in the line before it; it compiles,
and what it takes from our packages is there.
"""

import ast
import contextlib
import importlib
import re
import shlex
import socket
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

import microguest
from microguest import aio
from microguest.errors import StartError
from microguest.host_client.cli.arguments import parse

PROJECT = Path(__file__).parent.parent
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").rglob("*.md"))]
PAGE = PROJECT / "docs" / "reference" / "host.md"
IMAGE = re.compile(r'"oci:dist/demo:busybox"(, memory="512M")?')
PROGRAM = re.compile(r"(?m)^(?:<!-- not run: (.+) -->\n)?```python\n((?:.*\n)*?)```$")
NOT_RUN = {"restore.md"}  # pages whose programs say why they are not run
IN_GUIDE = {"getting-started.md", "python.md", "troubleshooting.md"}  # tests/test_guide.py
RUN = {"README.md", "host.md", "images.md", "vsock-device.md", *IN_GUIDE}  # each with a test here


def programs(page: Path) -> list[str]:
    """Those that run."""
    return [program for reason, program in PROGRAM.findall(page.read_text()) if not reason]


def here(program: str, image: str) -> str:
    """The same with a machine that every host can have."""
    return IMAGE.sub(f'{image!r}, machine="namespaces"', program)


def test_every_program_is_run_or_says_why_not() -> None:
    for page in PAGES:
        found = PROGRAM.findall(page.read_text())
        assert len(found) == page.read_text().count("```python"), page.name
        assert bool(programs(page)) == (page.name in RUN), page.name
        assert any(reason for reason, _ in found) == (page.name in NOT_RUN), page.name


@pytest.mark.parametrize("page", [page for page in PAGES if page.name in NOT_RUN])
def test_programs_that_are_not_run(page: Path) -> None:
    for reason, program in PROGRAM.findall(page.read_text()):
        if not reason:
            continue
        for node in ast.walk(ast.parse(program)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "microguest":
                assert hasattr(microguest, node.attr)


def test_examples(image: str, machines_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from microguest import boot

    examples = programs(PAGE)
    assert len(examples) >= 5
    with boot(image, machine="namespaces") as machine:
        names = {"machine": machine, "agent": machine.agent}
        for number, example in enumerate(examples):
            program = here(example, image)
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


def test_programs_of_the_readme(
    image: str, machines_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = programs(PROJECT / "README.md")
    exec(compile(here(first, image), "README.md", "exec"), {})
    shown = [line.partition("# ")[2] for line in first.splitlines() if "print(" in line]
    assert capsys.readouterr().out.splitlines() == shown
    with microguest.boot(image, machine="namespaces", name="box") as machine:
        # What is about limits is its last line: not every host lends a machine cgroups.
        refused = (
            contextlib.nullcontext() if has_cgroups(machine) else contextlib.suppress(StartError)
        )
        with refused:
            exec(compile(second, "README.md", "exec"), {"microguest": microguest})
        (left,) = [each for each in machine.agent.processes() if each.kept]
        assert left.argv == ("sh",)


def has_cgroups(machine: microguest.Machine) -> bool:
    """Whether a process in it can have limits."""
    try:
        machine.agent.exec(["true"], limits=microguest.Limits(processes=20))
    except StartError as error:
        return error.code != "cgroup_unavailable"
    return True


def test_program_of_images(image: str, tmp_path: Path) -> None:
    (program,) = programs(PROJECT / "docs" / "design" / "images.md")
    names: dict[str, Any] = {"work_dir": tmp_path}
    exec(compile(IMAGE.sub(repr(image), program), "images.md", "exec"), names)
    assert names["disk"].path.is_file()
    assert (names["root"] / "bin").exists()
    assert names["argv"] == ("sh", "-c", "exit 7")


def test_program_of_the_vsock_device(tmp_path: Path) -> None:
    (program,) = programs(PROJECT / "docs" / "design" / "vsock-device.md")
    ours, theirs = socket.socketpair()
    failures: list[str] = []
    with ours, theirs, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "dial"))
        listener.listen()
        names = {"ours": ours, "listener": listener, "end_the_machine": failures.append}
        begin, run = program.rsplit("loop.run()")
        ended = "loop.call_later(0.05, loop.stop)\nloop.run()\ndevice.close()\nloop.close()"
        exec(compile(f"{begin}{ended}{run}", "vsock-device.md", "exec"), names)
    assert failures == []


def test_examples_in_docstrings(
    image: str, machines_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(compile(here(indented(microguest.__doc__), image), "microguest", "exec"), {})
    assert capsys.readouterr().out.startswith("Linux m-")
    awaited = textwrap.indent(indented(aio.__doc__), "    ")
    names: dict[str, Any] = {}
    exec(compile(f"async def main():\n{awaited}\n    return result", "aio", "exec"), names)
    with microguest.boot(image, machine="namespaces", name="demo"):
        assert anyio.run(names["main"]).stdout.startswith(b"Linux")


def indented(text: str | None) -> str:
    """The lines that four spaces make code."""
    lines = (text or "").splitlines()
    code = [number for number, line in enumerate(lines) if line.startswith("    ")]
    return textwrap.dedent("\n".join(lines[code[0] : code[-1] + 1]))


# ── command lines ────────────────────────────────────────────────────────────────────────────────

BLOCK = re.compile(r"(?m)^```(?:console|sh)\n((?:.*\n)*?)```$")
SPAN = re.compile(r"`((?:\.venv/bin/)?microguest [^`]+)`")
OF_THE_GUEST = {
    "namespaces",
    "--self-check",
}  # names that the guest's program has, which is called so, too
ENDS = {"|", ";", "&", "&&", "||", ">", ">>", "<"}


def command_lines(page: str) -> Iterator[list[str]]:
    """The words behind each `microguest` that somebody is to type."""
    typed = [
        line[2:] for block in BLOCK.findall(page) for line in joined(block) if line[:2] == "$ "
    ]
    typed += [line.strip() for line in re.findall(r"(?m)^    (?:\$ )?(?:.* )?microguest .*$", page)]
    for line in (*typed, *SPAN.findall(page)):
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
        for at, word in enumerate(words):
            named = "=" not in word and word.rpartition("/")[2] == "microguest"
            if named and words[at + 1 : at + 2]:  # and not a variable that is a path
                rest = words[at + 1 :]
                end = next((n for n, each in enumerate(rest) if each in ENDS), len(rest))
                yield rest[:end]


def joined(block: str) -> list[str]:
    """Lines with those that a backslash goes on in."""
    return block.replace("\\\n", " ").splitlines()


def test_command_lines() -> None:
    found = 0
    for page in PAGES:
        text = page.read_text()
        if page.name == "cli.md":  # its synopsis has brackets: tests/test_cli_page.py
            text = text.split("```\n", 2)[2]
        for words in command_lines(text):
            if words[0] in OF_THE_GUEST:
                continue
            found += 1
            try:
                parse(placed(words))
            except SystemExit as error:
                pytest.fail(f"{page.name}: microguest {shlex.join(words)}: {error}")
    assert found >= 10


def placed(words: list[str]) -> list[str]:
    """A command that is only named, with what it needs."""
    needs = {"stop": ["NAME"], "pause": ["NAME"], "run": ["IMAGE"], "boot-chart": ["NAME"]}
    needs["completion"] = ["bash"]
    return [*words, *needs.get(words[0], [])] if len(words) == 1 else words


# ── docs/design/handoff.md ────────────────────────────────────────────────────────────────────────

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
    from microguest import boot

    page = (PROJECT / "docs" / "design" / "handoff.md").read_text()
    (example,) = re.findall(r"(?m)^(?:    .*\n)+", page[: page.index("## In order")])
    started = 'boot("oci:debian:systemd", handoff=True, memory="1G")'
    assert started in example
    with boot(image, machine="namespaces") as machine:
        install = "cat >/usr/bin/systemctl && chmod 755 /usr/bin/systemctl"
        machine.agent.exec(shell=install, input=SYSTEMCTL.encode(), check=True)
        program = textwrap.dedent(example).replace(started, "contextlib.nullcontext(machine)")
        exec(compile(program, "handoff.md", "exec"), {"machine": machine, "contextlib": contextlib})
    assert capsys.readouterr().out == "b'degraded\\n'\n"
