"""What pages and docstrings name is there, and pages can be read: lines and cells have an end.

Files of the project are named by their path from its top, or, where a page is about one folder, by
their last part alone.
"""

import ast
import fnmatch
import functools
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path, PurePath

import pytest

PROJECT = Path(__file__).parent.parent
DEVELOPING = PROJECT / "docs" / "developing"
LONGEST = 120  # characters of a line outside tables and blocks of code, and of a table's cell

TOP = r"(?:agent|init_shim|guest|host_client|build|tests|benchmarks|docs|src|\.github|\.ci)"
# A path from the top, not one of another project or below another folder.
PATH = re.compile(rf"(?<![\w/.$}}-]){TOP}/[\w./*{{}},-]*[\w/*}}]")
# A module by its last part alone. Headers, and most JSON, are somebody else's.
NAME = re.compile(r"(?<![\w/.*-])[A-Za-z_]\w*\.(?:py|toml)\b")
# A module by its import name, written out or without the first part; not what an object has.
MODULE = re.compile(r"(?<![\w./])(?:microguest\.)?(?:guest|agent|init_shim|host_client)(?:\.\w+)+")

# A test, and a maximum of one of the two modules that have them.
TEST = re.compile(r"\b(test_\w+\.py)::(\w+)")
MAXIMUM = re.compile(r"(?<![\w.])(bounds|limits)\.([A-Z][A-Z_]+)")
MAXIMA = {"bounds": "guest/bounds.py", "limits": "host_client/images/limits.py"}

OF_OTHERS = {  # documents of QEMU's, files of a user's, and what stands for a name
    "docs/interop/qmp-spec.rst",
    "docs/interop/vhost-user.rst",
    "Packages.py",
    "OUTPUT.py",
    "first.py",
    "Cargo.toml",
}


@functools.cache
def tracked() -> frozenset[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        return frozenset(path for path in listed.stdout.splitlines() if (PROJECT / path).exists())
    files = (path for path in PROJECT.rglob("*") if path.is_file())  # an unpacked archive
    return frozenset(str(path.relative_to(PROJECT)) for path in files)


@functools.cache
def folders() -> frozenset[str]:
    return frozenset(str(folder) for path in tracked() for folder in PurePath(path).parents)


@functools.cache
def last_parts() -> frozenset[str]:
    return frozenset(PurePath(path).name for path in tracked())


def pages() -> list[str]:
    """All that people read but the list of changes, which is about the past."""
    return sorted(
        path
        for path in tracked()
        if path.endswith(".md") and path != "CHANGELOG.md" and not path.startswith("tests/data/")
    )


def texts_of_page(path: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate((PROJECT / path).read_text().splitlines(), 1):
        yield f"{path}:{number}", line


def texts_of_module(path: str) -> Iterator[tuple[str, str]]:
    """Its comments and docstrings."""
    with open(PROJECT / path, encoding="utf-8") as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type == tokenize.COMMENT:
                yield f"{path}:{token.start[0]}", token.string
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse((PROJECT / path).read_text())):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            yield f"{path}:{getattr(node, 'lineno', 1)}", text


@functools.cache
def texts() -> tuple[tuple[str, str], ...]:
    """Everything that is written for people, with where it stands."""
    return tuple(read_texts())


def read_texts() -> Iterator[tuple[str, str]]:
    for path in pages():
        yield from texts_of_page(path)
    for path in sorted(tracked()):
        if path.endswith(".py") and not path.startswith("build/standins/"):
            yield from texts_of_module(path)
        elif path.endswith((".c", ".toml")):
            yield from texts_of_page(path)
    yield from (text for text in texts_of_page("Makefile") if text[1].startswith("#"))


# ── what is named ────────────────────────────────────────────────────────────────────────────────


def is_there(path: str) -> bool:
    """A file, a folder, or a pattern that something fits. In braces: several of them."""
    if braces := re.search(r"\{([^}]*)\}", path):
        before, after = path[: braces.start()], path[braces.end() :]
        return all(is_there(f"{before}{each.strip()}{after}") for each in braces[1].split(","))
    if "*" in path:
        pattern = path.replace("**/", "*")
        return any(fnmatch.fnmatch(each, pattern) for each in tracked())
    if path.startswith("src/microguest/"):
        return (PROJECT / path).exists()  # through a link, as editors show it
    return path.rstrip("/") in folders() or path in tracked()


def missing_paths(text: str) -> list[str]:
    found = [each for each in PATH.findall(text) if not is_there(each)]
    found += [each for each in NAME.findall(text) if each not in last_parts()]
    return [each for each in found if each not in OF_OTHERS]


def missing_modules(text: str) -> list[str]:
    """Names of modules that lead nowhere: a module, or a name that a module of ours defines."""
    return [each for each in MODULE.findall(text) if not is_module(each)]


def is_module(name: str) -> bool:
    parts = name.removeprefix("microguest.").split(".")
    for length in range(len(parts), 0, -1):
        path = "/".join(parts[:length])
        if f"{path}.py" in tracked():
            rest = parts[length : length + 1]
            return not rest or re.search(rf"\b{rest[0]}\b", source(f"{path}.py")) is not None
    if "/".join(parts) in folders():
        return True
    # In examples and code an agent is called so: `agent.exec(…)`.
    return name.startswith("agent.") and f"agent/{parts[1]}" not in folders()


def missing_names(text: str) -> list[str]:
    """Tests and maxima that their files do not have."""
    found = [
        f"{file}::{name}" for file, name in TEST.findall(text) if name not in defined_tests(file)
    ]
    found += [
        f"{module}.{name}"
        for module, name in MAXIMUM.findall(text)
        if not re.search(rf"(?m)^{name}\b", source(MAXIMA[module]))
    ]
    return found


@functools.cache
def defined_tests(file: str) -> frozenset[str]:
    places = (path for path in tracked() if PurePath(path).name == file)
    found = (re.findall(r"(?m)^(?:async )?def (\w+)\(", source(path)) for path in places)
    return frozenset(name for names in found for name in names)


@functools.cache
def source(path: str) -> str:
    return (PROJECT / path).read_text()


def test_files_that_are_named_are_there() -> None:
    wrong = [f"{where}: {each}" for where, text in texts() for each in missing_paths(text)]
    assert not wrong, "\n".join(wrong)


def test_modules_that_are_named_are_there() -> None:
    wrong = [
        f"{where}: {each}"
        for where, text in texts()
        if not where.startswith(("tests/", "pyproject.toml"))
        for each in missing_modules(text)
    ]
    assert not wrong, "\n".join(wrong)


def test_tests_and_maxima_that_are_named_are_there() -> None:
    wrong = [
        f"{where}: {each}"
        for where, text in texts()
        if not where.startswith("tests/test_pages.py")
        for each in missing_names(text)
    ]
    assert not wrong, "\n".join(wrong)


def test_a_test_or_maximum_that_is_gone_is_found() -> None:
    text = "`test_pages.py::test_links_lead_somewhere`, `test_pages.py::test_none`"
    assert missing_names(text) == ["test_pages.py::test_none"]
    text = "bounds.VOLUMES, limits.MAX_OWNERS, limits.VOLUMES, self.limits.VOLUMES"
    assert missing_names(text) == ["limits.VOLUMES"]


def test_a_file_or_module_that_is_gone_is_found() -> None:
    assert missing_paths("see `agent/processes.py`, agent/main.py and tests/test_*.py.") == [
        "agent/processes.py"
    ]
    assert missing_paths("`loop.py` and `device.py`, `{a,b}` of guest/{errors,none}.py") == [
        "guest/{errors,none}.py",
        "loop.py",
    ]
    assert missing_paths("tests/none_*.py, docs/, /work/agent/x.py, other/guest/x.py") == [
        "tests/none_*.py"
    ]
    named = (
        "`guest.messages.Ping`, `microguest.agent.process.child`, agent.exec, guest.record.None_"
    )
    assert missing_modules(named) == ["guest.messages.Ping", "guest.record.None_"]


# ── links ────────────────────────────────────────────────────────────────────────────────────────

LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"(?m)^#+ (.+)$")


def anchors(path: str) -> set[str]:
    """What a heading can be reached by, as the usual readers of Markdown make it."""
    text = re.sub(r"(?ms)^```.*?^```$", "", source(path))
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in HEADING.findall(text))
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page: str) -> None:
    wrong = []
    for where, line in texts_of_page(page):
        for link in LINK.findall(re.sub(r"`[^`]*`", "", line)):
            path, _, anchor = link.partition("#")
            if ":" in path:
                continue  # another site's
            target = (PROJECT / page).parent / path if path else PROJECT / page
            inside = target.resolve().is_relative_to(PROJECT.resolve())
            if not (inside and target.exists()):
                wrong.append(f"{where}: {link}")
            elif anchor and anchor not in anchors(str(target.resolve().relative_to(PROJECT))):
                wrong.append(f"{where}: {link} has no such heading")
    assert not wrong, "\n".join(wrong)


def test_each_page_is_in_the_index() -> None:
    """With a line that says for whom it is; the site has what the folders have."""
    rows = re.findall(r"(?m)^\| \[[^]]+\]\(([\w/.-]+)\) \| \w", source("docs/index.md"))
    listed = sorted(f"docs/{row}" for row in rows if row.endswith(".md"))
    assert listed == [page for page in pages() if re.fullmatch(r"docs/\w+/.*", page)]


# ── how they look ────────────────────────────────────────────────────────────────────────────────


def long_lines(text: str) -> int:
    """Those outside tables and outside blocks of code, which have the width of what they show."""
    prose = re.sub(r"(?ms)^ *```.*?^ *```$", "", text).splitlines()
    return sum(len(line) > LONGEST and not line.startswith(("|", "    ")) for line in prose)


def long_cells(text: str) -> int:
    rows = (line for line in text.splitlines() if line.startswith("|"))
    cells = (cell.strip() for row in rows for cell in re.split(r"(?<!\\)\|", row))
    return sum(len(cell) > LONGEST for cell in cells)


# What is left of older pages. These numbers may only fall, and a page that is not here has none.
LONG_LINES: dict[str, int] = {}
LONG_CELLS: dict[str, int] = {
    "boot-config.md": 12,
    "boot.md": 10,
    "building.md": 3,
    "cli.md": 8,
    "compatibility.md": 3,
    "dependencies.md": 4,
    "exec-syscalls.md": 3,
    "handoff.md": 3,
    "host.md": 23,
    "images.md": 4,
    "network.md": 2,
    "performance.md": 1,
    "processes.md": 7,
    "protocol.md": 40,
    "restore.md": 1,
    "roots.md": 6,
    "security.md": 15,
    "workload.md": 8,
}


def test_no_page_grows_long_lines_or_cells() -> None:
    """A paragraph under the table says what no cell has room for."""
    for most, count in ((LONG_LINES, long_lines), (LONG_CELLS, long_cells)):
        # By the last part of a name: a page may move to another folder, and its debt with it.
        found = {page: count(source(page)) for page in pages()}
        wrong = {
            page: (number, most.get(PurePath(page).name, 0))
            for page, number in found.items()
            if number > most.get(PurePath(page).name, 0)
        }
        assert not wrong, f"{count.__name__}: more than is written here: {wrong}"


def test_a_long_line_and_a_long_cell_are_counted() -> None:
    long = "x" * (LONGEST + 1)
    assert long_lines(f"{long}\n\n```\n{long}\n```\n    {long}\n| {long} |\n{long[1:]}\n") == 1
    assert long_cells(f"| a | {long} |\n| {long[1:]} |\n{long}\n") == 1


# ── docs/developing ──────────────────────────────────────────────────────────────────────────────

ROW = re.compile(r"(?m)^\| `([\w/]+\.(?:py|c))` \| `([\w.]+)` \|")
CODE_MAP = DEVELOPING / "code-map.md"


def defined(path: str, name: str) -> bool:
    """Whether a file has a function, a class, or a method of a class, of this name."""
    if path.endswith(".c"):
        return re.search(rf"(?m)^(?:[\w *]+ \*?)?{name}\(", source(path)) is not None
    body: list[ast.stmt] = ast.parse(source(path)).body
    for part in name.split("."):
        kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [node for node in body if isinstance(node, kinds) and node.name == part]
        if not found:
            return False
        body = found[0].body
    return True


@pytest.mark.parametrize(("path", "name"), sorted(set(ROW.findall(CODE_MAP.read_text()))))
def test_each_hop_of_the_code_map_is_there(path: str, name: str) -> None:
    assert path in tracked()
    assert defined(path, name), f"{path} has no {name}"


def test_the_code_map_goes_all_the_way() -> None:
    rows = ROW.findall(CODE_MAP.read_text())
    for way in (
        ("Agent.exec", "serve_connection", "Starting.spawn", "clone3_child", "Result.of"),
        ("Monitor._launch", "bootstrap", "start_main", "start_workload", "sys_spawn"),
    ):
        names = iter(name for _, name in rows)
        assert all(hop in names for hop in way), way
    tables = re.findall(r"(?m)^\| `", CODE_MAP.read_text())
    assert len(rows) == len(tables)  # none is passed over because it is written otherwise


def test_a_hop_that_is_gone_is_found() -> None:
    assert defined("agent/service.py", "serve_connection")
    assert defined("build/native/guestsys.c", "main")
    assert not defined("agent/service.py", "serve_connections")
    assert not defined("agent/process/plain.py", "Exchange.serve_connection")
    assert not defined("build/native/guestsys.c", "clone4_child")


def test_each_helper_of_the_tests_is_in_their_page() -> None:
    page = (DEVELOPING / "tests.md").read_text().partition("\n## Helpers\n")[2]
    listed = set(re.findall(r"(?m)^\| `(tests/\S+\.py)` \|", page))
    there = {
        path
        for path in tracked()
        if path.startswith("tests/") and path.endswith(".py") and "/test_" not in path
    }
    assert listed == there


READ = [page for page in pages() if re.fullmatch(r"docs/\w+/.*", page)]


@pytest.mark.parametrize("page", READ)
def test_a_page_says_first_for_whom_it_is(page: str) -> None:
    first = source(page).split("\n\n")[1].replace("\n", " ")
    assert first.startswith("For "), first
    assert "afterwards you " in first, first
