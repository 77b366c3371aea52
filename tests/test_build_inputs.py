"""How the build chooses its inputs: mirrors, module order, what the module graph starts from."""

import builtins
import importlib.util
import inspect
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import imagefactory
import pytest

BUILD = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "build")
sys.path.insert(0, BUILD)  # the build's modules import each other by bare name

from archive import MAIN_ARCHIVE, SECURITY_ARCHIVE, mirror_in_lines, mirror_in_stanzas  # noqa: E402
from freeze import Source, imported_modules, imports_of  # noqa: E402
from kernel import kernel_source, load_order  # noqa: E402
from patience import PATIENCE  # noqa: E402
from pins import load_pins  # noqa: E402
from sources import cpython_source  # noqa: E402
from stages import BuildError, Cache, open_cache, remove_partial, run  # noqa: E402

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
        "import os\nfrom microguest.agent.main import x\nfrom select import epoll, poll\n"
        "if TYPE_CHECKING:\n    import typing\n"
        "def f():\n    import shutil as other\n    return 1\n"
    )
    sources = [Source(name="module", path=str(source), is_package=False)]
    before = imports_of(sources)
    assert {"os", "select", "shutil", "trio"} <= set(imported_modules(before))
    assert not {"typing", "microguest.agent.main"} & set(imported_modules(before))
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


def test_a_source_that_is_not_the_pinned_one_is_refused(tmp_path, monkeypatch):
    wrong = tmp_path / "cpython.tar.xz"
    wrong.write_bytes(b"not this")
    monkeypatch.setenv("MICROGUEST_CPYTHON_SOURCE", str(wrong))
    (tmp_path / "cache").mkdir()
    with pytest.raises(BuildError, match="SHA-256") as caught:
        cpython_source(Cache(root=str(tmp_path / "cache")), load_pins())
    assert str(wrong) in str(caught.value)
    assert os.listdir(tmp_path / "cache") == []


def kernel_package(tmp_path: Path, *files: str) -> Path:
    """A Debian package with empty files; none of Debian's kernels is as small."""
    root = tmp_path / "package"
    for name in ("DEBIAN/control", *files):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "DEBIAN/control").write_text(
        "Package: linux-image-test\nVersion: 1\nArchitecture: all\n"
        "Maintainer: nobody <nobody@example.org>\nDescription: a kernel\n"
    )
    package = tmp_path / "linux-image-test.deb"
    run(["dpkg-deb", "--root-owner-group", "--build", str(root), str(package)])
    return package


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds no kernel image"),
        (["boot/vmlinuz-1"], "has no lib/modules/1/modules.builtin"),
        (["boot/vmlinuz-1", "lib/modules/1/x.ko"], "has no lib/modules/1/modules.builtin"),
        (["boot/vmlinuz-1", "lib/modules/1/modules.builtin"], "the kernel has no .*virtio_blk"),
    ],
)
def test_a_package_that_is_no_whole_kernel(tmp_path, files, message):
    imagefactory.require("dpkg-deb")
    source = kernel_source(str(kernel_package(tmp_path, *files)), load_pins())
    with pytest.raises(BuildError, match=message):
        source.make(Cache(root=str(tmp_path)), "x86_64")
    assert not list(tmp_path.glob("kernel-*"))


def test_a_kernel_package_that_is_written_to_while_it_is_read(tmp_path, monkeypatch):
    """Else what was read of it is kept under the name of what it was before."""
    imagefactory.require("dpkg-deb")
    package = kernel_package(tmp_path, "boot/vmlinuz-1")
    wrapper = tmp_path / "dpkg-deb"
    wrapper.write_text(f'#!/bin/sh\n{shutil.which("dpkg-deb")} "$@" && echo >>{package}\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(BuildError, match="was written to while it was read"):
        kernel_source(str(package), load_pins()).make(Cache(root=str(tmp_path)), "x86_64")


def test_an_error_of_the_system_is_one_line(tmp_path):
    """As of a full disk: whoever builds gets no traceback."""
    imagefactory.require("prlimit")
    command = ["prlimit", "--fsize=0", sys.executable, os.path.join(BUILD, "make.py"), "guest"]
    environment = {**os.environ, "MICROGUEST_CACHE": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "build: failed: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path / "build") == ["lock"]


def test_an_interrupted_build_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("MICROGUEST_CACHE", str(tmp_path))
    command = [sys.executable, os.path.join(BUILD, "make.py"), "guest"]
    with open_cache(), subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        assert "waiting for another build" in child.stderr.readline()
        child.send_signal(signal.SIGINT)
        said = child.stderr.read()
    assert child.returncode == 130
    assert said.startswith("build: interrupted; what was finished is in the cache")
    assert "Traceback" not in said


def test_a_failed_stage_leaves_nothing(tmp_path):
    cache = Cache(root=str(tmp_path))

    def fail(folder):
        with open(os.path.join(folder, "half"), "w", encoding="utf-8"):
            raise BuildError("no space")

    with pytest.raises(BuildError, match="no space"):
        cache.stage("thing", "0" * 64, fail)
    assert os.listdir(tmp_path) == []


def test_a_stage_says_how_long_it_may_take(tmp_path, capfd):
    Cache(root=str(tmp_path)).stage("thing", "0" * 64, lambda _: None)
    said = "".join(capfd.readouterr())
    assert "thing: building, which takes up to two minutes" in said


def test_an_interrupted_stage_is_swept_and_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("MICROGUEST_CACHE", str(tmp_path))
    os.makedirs(tmp_path / "build" / "partial-thing-killed")
    with open_cache() as cache:
        assert "partial-thing-killed" not in os.listdir(cache.root)
        made = []
        for _ in range(2):
            cache.stage("thing", "1" * 64, made.append)
        assert len(made) == 1


def test_what_a_killed_build_left_is_removed(tmp_path, monkeypatch):
    """Also its temporary files, which would fill /tmp, and the half of a file of the bundle."""
    monkeypatch.setenv("MICROGUEST_CACHE", str(tmp_path / "cache"))
    script = "import sys, tempfile; sys.path.insert(0, sys.argv[1]); import stages\n"
    script += "with stages.open_cache(): print(tempfile.mkdtemp(), flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, BUILD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        scratch = child.stdout.readline().decode().strip()
        assert os.path.isdir(scratch)
        child.kill()
    with open_cache() as cache:
        assert not os.path.exists(scratch)
        assert tempfile.mkdtemp().startswith(cache.root + "/")
    assert os.listdir(cache.root) == ["lock"]
    assert not tempfile.gettempdir().startswith(cache.root)


def test_the_half_of_a_file_is_removed(tmp_path):
    script = "import os, sys; sys.path.insert(0, sys.argv[1]); import stages\n"
    script += "os.replace = lambda *_: os.kill(os.getpid(), 9)\n"
    script += "stages.write_atomically(sys.argv[2], b'x')"
    subprocess.run([sys.executable, "-c", script, BUILD, str(tmp_path / "f")], check=False)
    (tmp_path / "kept").touch()
    assert len(os.listdir(tmp_path)) == 2
    remove_partial(str(tmp_path))
    assert os.listdir(tmp_path) == ["kept"]


def test_a_cache_that_others_can_write_to_is_refused(tmp_path, monkeypatch):
    """What is in there is run, with our rights."""
    monkeypatch.setenv("MICROGUEST_CACHE", str(tmp_path))
    (tmp_path / "build").mkdir()
    (tmp_path / "build").chmod(0o777)
    with pytest.raises(BuildError, match=r"can be written by other users.*set MICROGUEST_CACHE"):
        open_cache().__enter__()
    (tmp_path / "build").chmod(0o755)
    with open_cache():
        pass


def test_a_failure_shows_the_end_of_its_own_log(tmp_path):
    """Several commands write one log after another, and the first may have said more."""
    log = str(tmp_path / "log")
    run(["seq", "1000"], log=log)
    with pytest.raises(BuildError, match=r"\nthis failed\n$"):
        run(["sh", "-c", "echo this failed; exit 3"], log=log)


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
    said, _ = other.communicate(timeout=PATIENCE)
    assert said == "entered\n"


def test_a_failed_command_can_be_pasted_into_a_shell(tmp_path):
    with pytest.raises(BuildError) as caught:
        run(["sh", "-c", "echo why >&2; exit 3"], cwd=str(tmp_path))
    assert f"cd {tmp_path} && sh -c 'echo why >&2; exit 3'" in str(caught.value)
    assert "exit 3" in str(caught.value)
    assert "why" in str(caught.value)


def load(path, name):
    spec = importlib.util.spec_from_file_location(name, os.path.join(BUILD, path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_full_disk_says_what_to_do():
    with pytest.raises(BuildError, match=r"^no space left .* MICROGUEST_CACHE .*: dd if="):
        run(["dd", "if=/dev/zero", "of=/dev/full", "count=1"], env={**os.environ, "LC_ALL": "C"})


def test_the_front_of_inspect_agrees_with_the_original():
    front = load("standins/stdlib/inspect.py", "inspect_front")
    states = []

    @types.coroutine
    def pause():
        yield

    async def job():
        states.append((front.getcoroutinestate(coroutine), inspect.getcoroutinestate(coroutine)))
        await pause()

    async def generator():
        yield

    def compare():
        states.append((front.getcoroutinestate(coroutine), inspect.getcoroutinestate(coroutine)))

    coroutine = job()
    compare()
    coroutine.send(None)
    compare()
    coroutine.close()
    compare()
    assert [one for one, _ in states] == [other for _, other in states]
    assert {one for one, _ in states} == {
        front.CORO_CREATED,
        front.CORO_RUNNING,
        front.CORO_SUSPENDED,
        front.CORO_CLOSED,
    }
    for value in (coroutine, job, generator, generator(), 1):
        assert front.iscoroutine(value) == inspect.iscoroutine(value)
        assert front.isasyncgen(value) == inspect.isasyncgen(value)


@pytest.fixture
def lookup(monkeypatch):
    """`_guest_compile`, installed, with a record of one source."""
    module = load("native/_guest_compile.py", "_guest_compile")
    record = types.ModuleType("_guest_compiled")
    record.CODES = {
        module.key_of("x = 1", "<attrs generated a>"): compile("x = 'recorded'", "r", "exec"),
        module.key_of("y = 1", "<attrs generated b>"): compile("y = 'recorded'", "r", "exec"),
    }
    monkeypatch.setitem(sys.modules, "_guest_compiled", record)
    monkeypatch.setattr("builtins.compile", module.looked_up)
    return module


def test_recorded_code_is_used_once_and_then_the_lookup_is_gone(lookup):
    assert eval_of("x", compile("x = 1", "<attrs generated a>", "exec")) == "recorded"
    assert eval_of("x", compile("x = 1", "<attrs generated a>", "exec")) == 1
    assert builtins.compile is not lookup.real_compile
    assert eval_of("y", compile("y = 1", "<attrs generated b>", "exec")) == "recorded"
    assert builtins.compile is lookup.real_compile


@pytest.mark.parametrize(
    ("source", "filename"), [("x = 2", "<attrs generated a>"), ("x = 2", "<stdin>")]
)
@pytest.mark.usefixtures("lookup")
def test_other_code_goes_to_the_compiler(source, filename):
    assert eval_of("x", compile(source, filename, "exec")) == 2


@pytest.mark.usefixtures("lookup")
def test_the_callers_future_statements_count_and_no_others():
    namespace = {}
    source = "def f(x: nowhere): pass"
    caller = "from __future__ import annotations\nexec(compile(source, 'f', 'exec'), namespace)"
    exec(caller, {"source": source, "namespace": namespace})
    assert namespace["f"].__annotations__ == {"x": "nowhere"}
    with pytest.raises(NameError):
        exec("exec(compile(source, 'f', 'exec'), {})", {"source": source})


def test_the_key_leaves_out_only_the_number_of_a_hash(lookup):
    def source(number, field):
        return (
            f"def __hash__(self):\n    return hash((\n        {number},\n        self.{field},\n))"
        )

    key_of = lookup.key_of
    assert key_of(source(1, "a"), "f") == key_of(source(-2, "a"), "f")
    assert key_of(source(1, "a"), "f") != key_of(source(1, "b"), "f")
    assert key_of("a = 1", "f") != key_of("a = 2", "f")


def eval_of(name, code):
    namespace = {}
    exec(code, namespace)
    return namespace[name]
