"""The guide: it does what it shows, what it names exists, and it can be read.

A console block is typed into a shell, and what it prints is compared; `…` stands for anything. One
that cannot run here has `<!-- not run: REASON -->` in the line before it. Its links and the files
that it names are looked at in tests/test_pages.py.
"""

import ast
import builtins
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

import pytest
from test_host_docs import here, programs

import microguest
from microguest import aio
from microguest.host_client.cli.arguments import parse

PROJECT = Path(__file__).parent.parent
GUIDE = sorted((PROJECT / "docs" / "guide").glob("*.md"))
READ = [PROJECT / "README.md", *GUIDE]
LINE = 120  # characters, also of a cell
WORDS = 25  # of a sentence
FENCE = re.compile(r"(?ms)^(?:<!-- not run: .+? -->\n)?```.*?^```$\n?")
CONSOLE = re.compile(r"(?m)^(<!-- not run: .+ -->\n)?```console\n((?:.*\n)*?)```$")
SPAN = re.compile(r"`([^`\n]+)`")
each_page = pytest.mark.parametrize("page", READ, ids=lambda page: page.name)


# ── how it reads ─────────────────────────────────────────────────────────────────────────────────


def prose(text: str) -> Iterator[str]:
    """Paragraphs, items of lists and cells, without code blocks; a span of code is one word."""
    bare = FENCE.sub("\n", text)
    bare = SPAN.sub("code", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", bare))
    for block in re.split(r"\n\s*\n|\n(?=[*#|] ?|\d+\. )", bare):
        if block.lstrip().startswith("|"):
            yield from (cell.strip() for cell in block.strip().strip("|").split("|"))
        else:
            yield " ".join(block.split())


def long_sentences(text: str) -> list[str]:
    sentences = [each for block in prose(text) for each in re.split(r"(?<=[.!?:]) +", block)]
    return [each for each in sentences if len(re.findall(r"\w[\w'-]*", each)) > WORDS]


@each_page
def test_sentences_and_lines_are_short(page: Path) -> None:
    text = page.read_text()
    assert long_sentences(text) == []
    rows = [line for line in FENCE.sub("", text).splitlines() if line.startswith("|")]
    wide = [line for line in text.splitlines() if len(line) > LINE and line not in rows]
    assert wide == []
    cells = [cell.strip() for row in rows for cell in re.split(r"(?<!\\)\|", row)]
    assert [cell for cell in cells if len(cell) > LINE] == []


def test_long_sentences_are_found() -> None:
    assert long_sentences("Short one. " + "word " * 26 + "end.\n\nShort.") != []
    assert long_sentences("| a | " + "word " * 26 + "|\n|---|---|\n") != []
    assert long_sentences("Seen: " + "word " * 24 + "\n\n```\n" + "word " * 30 + "\n```\n") == []


@pytest.mark.parametrize("page", GUIDE, ids=lambda page: page.name)
def test_the_first_line_says_for_whom_and_what_for(page: Path) -> None:
    title, empty, first, *_ = page.read_text().splitlines()
    assert title.startswith("# ")
    assert empty == ""
    assert first.startswith("For ")
    assert "afterwards you" in first


# ── what it names ────────────────────────────────────────────────────────────────────────────────


def spans(page: Path) -> list[str]:
    return SPAN.findall(FENCE.sub("", page.read_text()))


ERROR = re.compile(r"(?<![\w.])([A-Z][a-z]\w*(?:Error|Lost|Failed|Exceeded|TooLarge|Stalled))\b")
SNAKE = re.compile(r"[a-z]+(?:_[a-z]+)+")


@each_page
def test_errors_that_it_names_exist(page: Path) -> None:
    named = set(ERROR.findall(page.read_text()))
    unknown = [each for each in named if not hasattr(builtins, each)]
    assert [each for each in unknown if each not in microguest.errors.__all__] == []


def error_codes() -> set[str]:
    """All that the protocol has."""
    (page,) = (PROJECT / "docs").rglob("protocol.md")
    table = page.read_text().partition("## Error codes")[2].partition("\n## ")[0]
    return set(re.findall(r"(?m)^\| `(\w+)` \|", table))


def api_names() -> set[str]:
    """Names of ours in Python: functions, their parameters, and what results and errors have."""
    found: set[str] = set()
    for face in (microguest, aio):
        for name in face.__all__:
            value = getattr(face, name)
            found |= {name} | names_of(value)
            if isinstance(value, type):
                found |= set(getattr(value, "__annotations__", ())) | set(dir(value))
                for member in vars(value).values():
                    found |= names_of(member)
    return found


def names_of(value: object) -> set[str]:
    return set(inspect.signature(value).parameters) if isinstance(value, FunctionType) else set()


@each_page
def test_codes_and_names_that_it_names_exist(page: Path) -> None:
    codes = error_codes()
    assert {"not_ready", "cgroup_unavailable"} <= codes
    known = codes | api_names()
    named = {span for span in spans(page) if SNAKE.fullmatch(span)}
    assert named - known == set()


def messages() -> set[str]:
    """Every text in the host's, the agent's and PID 1's code; `…` is what is filled in."""
    found = set()
    for folder in ("host_client", "agent", "init_shim", "guest"):
        for path in (PROJECT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.add("".join(getattr(part, "value", "…") if isinstance(part, ast.Constant)
                                      else "…" for part in node.values))  # fmt: skip
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
    return found


def test_symptoms_are_what_the_code_says() -> None:
    """Those of the first column of each table that has a column *what you see*."""
    texts = "\n".join(messages()) + "\n" + "\n".join(map(os.strerror, range(1, 134)))
    seen = 0
    for page in GUIDE:
        for symptom in symptoms(page.read_text()):
            for part in re.split("…|: ", symptom):
                seen += 1
                assert re.sub(r"\b(?:box|site)\b", "…", part.strip()) in texts, f"{page}: {symptom}"
    assert seen > 0


def symptoms(text: str) -> Iterator[str]:
    """Code spans of more than one word in the columns *what you see*."""
    for table in re.findall(r"(?m)(?:^\|.*\n)+", text):
        head, _, *rows = table.splitlines()
        titles = [cell.strip() for cell in head.split("|")]
        if "what you see" in titles:
            for row in rows:
                cell = row.split("|")[titles.index("what you see")]
                yield from (span for span in SPAN.findall(cell) if " " in span)


PRINTED = re.compile(r"(?m)^ *print\(.*\)  # (.+)$")

# ── what it shows ────────────────────────────────────────────────────────────────────────────────


def typed(block: str) -> Iterator[tuple[str, str]]:
    """Each command of a console block, and what the page says that it prints."""
    for part in re.split(r"(?m)^\$ ", block)[1:]:
        command, _, printed = part.replace("\\\n", " ").partition("\n")
        yield command, printed


def as_here(text: str, image: str) -> str:
    """With a machine that every host can have."""
    text = text.replace(".venv/bin/microguest", "microguest").replace(
        "oci:dist/demo:busybox", image
    )
    return re.sub(r"\bmicroguest run\b", "microguest run --machine namespaces", text)


def pattern(printed: str, image: str) -> re.Pattern[str]:
    """Of what is printed, but for the width of columns."""
    lines = as_here(printed, image).replace("qemu", "namespaces").splitlines()
    words = [" ".join(map(re.escape, line.split())).replace("…", ".*") for line in lines]
    return re.compile("\n".join(words), re.DOTALL)


def shell(command: str, cwd: Path) -> str:
    """What it prints, on both outputs, with single spaces."""
    program = f'microguest() {{ "{sys.executable}" -m microguest "$@"; }}; {command}'
    done = subprocess.run(
        ["bash", "-c", program], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )
    return "\n".join(" ".join(line.split()) for line in (done.stdout + done.stderr).splitlines())


def check_console(block: str, image: str, cwd: Path) -> None:
    for command, printed in typed(block):
        said = shell(as_here(command, image), cwd)
        assert pattern(printed, image).fullmatch(said), f"$ {command}\n{said}"


def test_programs_of_the_python_page(
    image: str,
    machines_home: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the comments behind `print` say is printed, in that order."""
    monkeypatch.chdir(PROJECT)  # where its README.md is
    first, *others = programs(PROJECT / "docs" / "guide" / "python.md")
    with microguest.boot(image, machine="namespaces") as machine:
        exec(compile(here(first, image), "python.md", "exec"), {})
        names = {"microguest": microguest, "machine": machine, "agent": machine.agent}
        shown = capsys.readouterr().out.splitlines()
        for number, program in enumerate(others):
            exec(compile(program, f"python.md {number}", "exec"), names)
            shown += capsys.readouterr().out.splitlines()
    promised = [line for each in (first, *others) for line in PRINTED.findall(each)]
    assert len(promised) > 10
    left = iter(shown)
    for line in promised:
        assert line in left, f"{line!r} is not printed, or not where it should be: {shown}"


def test_copying_files(image: str, machines_home: Path, tmp_path: Path) -> None:
    """As the page of questions says, into a machine that runs."""
    text = (PROJECT / "docs" / "guide" / "faq.md").read_text()
    with microguest.boot(image, machine="namespaces", name="box"):
        for reason, block in CONSOLE.findall(text):
            if not reason:
                check_console(block, image, tmp_path)


def test_units_of_the_deploying_page() -> None:
    """Their commands are ours, and systemd finds nothing wrong where it is there to be asked."""
    text = (PROJECT / "docs" / "guide" / "deploying.md").read_text()
    units = re.findall(r"(?m)^```ini\n((?:.*\n)*?)```$", text)
    commands = [line for unit in units for line in re.findall(r"(?m)^Exec\w+=(.*)$", unit)]
    assert len(units) == 2
    for command in commands:
        program, *words = shlex.split(command)
        assert program.endswith("/microguest")
        assert parse(words)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd here")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    text = (PROJECT / "docs" / "guide" / "deploying.md").read_text()
    unit = tmp_path / "microguest-web.service"
    (whole, *_) = re.findall(r"(?m)^```ini\n((?:.*\n)*?)```$", text)
    unit.write_text(whole.replace("/usr/local/bin/microguest", shutil.which("true") or ""))
    done = subprocess.run(
        ["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False
    )
    assert "microguest-web.service" not in done.stderr, done.stderr


def test_the_boot_that_troubleshooting_lets_fail(
    image: str, machines_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for program in programs(PROJECT / "docs" / "guide" / "troubleshooting.md"):
        if "logging" in program:  # which would last
            compile(program, "troubleshooting.md", "exec")
        else:
            exec(compile(here(program, image), "troubleshooting.md", "exec"), {})
    first, *console = capsys.readouterr().out.splitlines()
    assert first == "volumes openat2 /nope/x"
    assert any("boot_failed" in line for line in console)


def test_getting_started(image: str, machines_home: Path, tmp_path: Path) -> None:
    """From top to bottom, its program before the machine is stopped."""
    text = (PROJECT / "docs" / "guide" / "getting-started.md").read_text()
    before, _, after = text.partition("```python\n")
    program, _, rest = after.partition("```\n")
    for reason, block in CONSOLE.findall(before):
        if not reason:
            check_console(block, image, tmp_path)
    (tmp_path / "first.py").write_text(program)
    said = shell(f"{sys.executable} first.py", tmp_path)
    assert said.splitlines() == [r"b'hello\n' 7", r"b'5\n'"]
    assert all(f"`{line}`" in rest for line in said.splitlines())
    for reason, block in CONSOLE.findall(rest):
        if not reason:
            check_console(block, image, tmp_path)
