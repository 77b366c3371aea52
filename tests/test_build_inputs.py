"""How the build chooses its inputs: mirrors, module order, what the module graph starts from."""

import os
import subprocess
import sys

import pytest

BUILD = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "build")
sys.path.insert(0, BUILD)  # the build's modules import each other by bare name

from archive import MAIN_ARCHIVE, SECURITY_ARCHIVE, mirror_in_lines, mirror_in_stanzas  # noqa: E402
from freeze import Source, imported_modules, imports_of  # noqa: E402
from kernel import kernel_source, load_order  # noqa: E402
from pins import load_pins  # noqa: E402
from stages import BuildError, Cache, open_cache, run  # noqa: E402

STANZAS = """\
Types: deb
URIs: https://tools.example/debian
Suites: stable
Components: extra

Types: deb
# a comment
URIs: http://mirror.example/debian/
Suites: bookworm bookworm-updates
Components: main

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
"""
LINES = """\
# deb http://commented.example/debian bookworm main
deb https://other.example/apt stable main
deb [arch=amd64 signed-by=/x.gpg] http://mirror.example/debian bookworm main contrib
deb http://mirror.example/debian-security bookworm-security main
"""


def test_mirror_from_deb822_sources():
    assert mirror_in_stanzas(STANZAS, MAIN_ARCHIVE) == "http://mirror.example/debian/"
    assert mirror_in_stanzas(STANZAS, SECURITY_ARCHIVE) == "http://mirror.example/debian-security"
    disabled = STANZAS.replace("Types:", "Enabled: no\nTypes:")
    assert mirror_in_stanzas(disabled, MAIN_ARCHIVE) is None


def test_mirror_from_one_line_sources():
    assert mirror_in_lines(LINES, MAIN_ARCHIVE) == "http://mirror.example/debian"
    assert mirror_in_lines(LINES, SECURITY_ARCHIVE) == "http://mirror.example/debian-security"
    assert mirror_in_lines("deb http://mirror.example/ubuntu noble main", MAIN_ARCHIVE) is None


def test_modules_are_loaded_after_what_they_depend_on():
    depends = {"a": ("b", "c"), "b": ("c", "built_in"), "c": (), "d": ("c",), "unused": ()}
    assert load_order(("d", "a", "not_there"), depends) == ["c", "d", "b", "a"]


def test_module_graph_starts_from_imports_not_from_code(tmp_path):
    source = tmp_path / "module.py"
    source.write_text(
        "import os\nfrom agent.main import x\nfrom select import epoll, poll\n"
        "if TYPE_CHECKING:\n    import typing\n"
        "def f():\n    import shutil as other\n    return 1\n"
    )
    sources = [Source(name="module", path=str(source), is_package=False)]
    before = imports_of(sources)
    assert {"os", "select", "shutil", "trio"} <= set(imported_modules(before))
    assert not {"typing", "agent.main"} & set(imported_modules(before))
    source.write_text(source.read_text().replace("return 1", "return 2"))
    assert imports_of(sources) == before


def test_every_package_is_pinned_by_hash():
    pins = load_pins()
    packages = pins.toolchain + pins.analysis + pins.guest + pins.sdist
    assert len(packages) > 10
    for pin in packages:
        assert pin.sha256
        assert all(len(digest) == 64 for digest in pin.sha256)


def test_unknown_kernel_spec_is_refused():
    with pytest.raises(BuildError, match="unknown kernel"):
        kernel_source("mainline", load_pins())


def test_a_failed_stage_leaves_nothing(tmp_path):
    cache = Cache(root=str(tmp_path))

    def fail(folder):
        with open(os.path.join(folder, "half"), "w", encoding="utf-8"):
            raise BuildError("no space")

    with pytest.raises(BuildError, match="no space"):
        cache.stage("thing", "0" * 64, fail)
    assert os.listdir(tmp_path) == []


def test_an_interrupted_stage_is_swept_and_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("MICROGUEST_CACHE", str(tmp_path))
    os.makedirs(tmp_path / "build" / "partial-thing-killed")
    with open_cache() as cache:
        assert "partial-thing-killed" not in os.listdir(cache.root)
        made = []
        for _ in range(2):
            cache.stage("thing", "1" * 64, made.append)
        assert len(made) == 1


def test_two_builds_take_turns(tmp_path, monkeypatch):
    monkeypatch.setenv("MICROGUEST_CACHE", str(tmp_path))
    script = "import sys; sys.path.insert(0, sys.argv[1]); import stages\n"
    script += "with stages.open_cache(): print('entered', flush=True)"
    with open_cache():
        other = subprocess.Popen(
            [sys.executable, "-c", script, BUILD],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert "waiting for another build" in other.stderr.readline()
        assert other.poll() is None
    said, _ = other.communicate(timeout=20)
    assert said == "entered\n"


def test_a_failed_command_can_be_pasted_into_a_shell(tmp_path):
    with pytest.raises(BuildError) as caught:
        run(["sh", "-c", "echo why >&2; exit 3"], cwd=str(tmp_path))
    assert f"cd {tmp_path} && sh -c 'echo why >&2; exit 3'" in str(caught.value)
    assert "exit 3" in str(caught.value)
    assert "why" in str(caught.value)
