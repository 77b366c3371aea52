"""Which Python modules go into the ELF, and their code as blobs.

PyInstaller's Analysis follows the import statements of the application into the standard library
and the packages; `prune.toml` takes out what is reached but never used; `native/freezer.py`
compiles. The application's own modules always all go in, and are frozen apart from the rest: they
change with every edit, the rest hardly ever.
"""

import ast
import json
import os
import re
import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass

from interpreter import Interpreter
from pins import Pins, digest_of
from sources import install_packages
from stages import BuildError, Cache, file_sha256, read_bytes, run, tree_sha256
from toolchain import STABLE_ENVIRONMENT

HERE = os.path.dirname(os.path.abspath(__file__))
PROJECT = os.path.dirname(HERE)
NATIVE = os.path.join(HERE, "native")
STANDINS = os.path.join(HERE, "standins")
# Those for the standard library go before it on the search path; one for a package's own module is
# copied over it, because a folder on the search path would hide the rest of the package.
STDLIB_STANDINS = os.path.join(STANDINS, "stdlib")
PACKAGE_STANDINS = os.path.join(STANDINS, "packages")
ORIGINALS = os.path.join(STANDINS, "originals.toml")
# Modules of the standard library whose stand-in imports the original on demand, as _stdlib_NAME.
BEHIND_A_FRONT = ("inspect",)
PRUNE_FILE = os.path.join(HERE, "prune.toml")
GRAPH_SPEC = os.path.join(NATIVE, "graph.spec")
FREEZER = os.path.join(NATIVE, "freezer.py")
RECORDER = os.path.join(NATIVE, "recorder.py")
COMPILE_LOOKUP = os.path.join(NATIVE, "_guest_compile.py")

# Folders of ours that go in, as parts of the one package that everything is imported from.
PACKAGE = "microguest"
PACKAGE_INIT = os.path.join(PROJECT, "src", PACKAGE, "__init__.py")
APPLICATION = ("agent", "guest", "init_shim")
# Modules that exist only inside the binary.
INSIDE_ONLY = {"_guest_build", "_guest_check", "_guest_compile", "_guest_compiled", "_guestsys"}
# What the guest offers beyond what its source imports today, as import statements.
ALWAYS = (
    "import encodings",
    "import hashlib",
    "import msgpack",
    "import random",
    "import trio",
    "from pyroute2.netlink.rtnl import ifaddrmsg, ifinfmsg, ndmsg, rtmsg",
)


# C modules whose importers do without, or belong to codecs that prune.toml leaves out.
OPTIONAL_EXTENSIONS = frozenset(
    ["_hashlib", "_multibytecodec"]
    + [f"_codecs_{region}" for region in ("cn", "hk", "iso2022", "jp", "kr", "tw")]
)


@dataclass(frozen=True, kw_only=True)
class FrozenModule:
    """Where one module's code lies in its blob."""

    name: str
    offset: int
    size: int
    is_package: bool


@dataclass(frozen=True, kw_only=True)
class Blob:
    """A file of marshalled code and what is where in it."""

    path: str
    modules: tuple[FrozenModule, ...]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A module to be frozen; `path` is "" for a package without an __init__.py."""

    name: str
    path: str
    is_package: bool


def freeze_runtime(
    cache: Cache, pins: Pins, interpreter: Interpreter, msgpack: str, roots: str
) -> tuple[str, Blob]:
    """Freeze the standard library and the packages that the import statements `roots` reach.

    Returns the stage's folder (whose name is a digest of all inputs) and the blob in it.
    """
    key = digest_of(
        [pins.analysis, pins.guest, pins.sdist, interpreter, roots, read_bytes(PRUNE_FILE)],
        [read_bytes(path) for path in (GRAPH_SPEC, FREEZER, RECORDER, COMPILE_LOOKUP, ORIGINALS)],
        tree_sha256(STANDINS, (".py",)),
        read_bytes(os.path.abspath(__file__)),
    )

    def make(folder: str) -> None:
        python = _analysis_python(cache, pins, interpreter, msgpack)
        sources = _module_graph(python, roots, interpreter)
        with tempfile.TemporaryDirectory(prefix="microguest-record-") as work:
            sources.append(_recorded_code(python, work))
            freeze(interpreter, sources, folder, "runtime")

    folder = cache.stage("runtime-modules", key, make)
    cache.keep_newest("runtime-modules", 4)
    return folder, load_blob(folder, "runtime")


def application_sources() -> list[Source]:
    """Every module of the application's packages, under the name that it is imported by."""
    sources = [Source(name=PACKAGE, path=PACKAGE_INIT, is_package=True)]
    for package in APPLICATION:
        for where, folders, files in os.walk(os.path.join(PROJECT, package)):
            folders[:] = sorted(name for name in folders if name != "__pycache__")
            inner = os.path.relpath(where, PROJECT).replace(os.sep, ".")
            dotted = f"{PACKAGE}.{inner}"
            init = os.path.join(where, "__init__.py") if "__init__.py" in files else ""
            sources.append(Source(name=dotted, path=init, is_package=True))
            sources += [
                Source(
                    name=f"{dotted}.{name[:-3]}", path=os.path.join(where, name), is_package=False
                )
                for name in sorted(files)
                if name.endswith(".py") and name not in {"__init__.py", "__main__.py"}
            ]
    return sources


def imports_of(sources: list[Source]) -> str:
    """The import statements of the application that lead out of it, one a line, sorted.

    This text, not the source files, is what the module graph depends on: most edits leave it as it
    is. Imports for type checkers only are left out.
    """
    statements = {*ALWAYS, *(f"import _stdlib_{name}" for name in BEHIND_A_FRONT)}
    for source in sources:
        if source.path:
            tree = ast.parse(read_bytes(source.path), source.path)
            statements.update(ast.unparse(node) for node in _imports(tree))
    return "\n".join(sorted(statements)) + "\n"


def _imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for statement in node.orelse:
                yield from _imports(statement)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if _leads_out(alias.name):
                    yield ast.Import(names=[ast.alias(name=alias.name)])
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0 and node.module and _leads_out(node.module):
                names = sorted({alias.name for alias in node.names})
                yield ast.ImportFrom(node.module, [ast.alias(name=name) for name in names], 0)
        else:
            yield from _imports(node)


def _leads_out(module: str) -> bool:
    return module.partition(".")[0] not in {PACKAGE, *INSIDE_ONLY, "__future__"}


def imported_modules(roots: str) -> list[str]:
    """The modules that the statements in `roots` name."""
    names: set[str] = set()
    for node in ast.parse(roots).body:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return sorted(names)


def freeze(interpreter: Interpreter, sources: list[Source], folder: str, name: str) -> Blob:
    """Compile `sources` into `folder`/`name`.bin and .json."""
    listing = os.path.join(folder, f"{name}.sources.json")
    with open(listing, "w", encoding="utf-8") as file:
        json.dump([[item.name, item.path, item.is_package] for item in sources], file)
    blob = os.path.join(folder, f"{name}.bin")
    table = os.path.join(folder, f"{name}.json")
    # Not isolated (-I): sets of strings are marshalled in hash order, and the seed is a variable.
    command = [interpreter.native_python, "-s", "-P", FREEZER, listing, blob, table]
    run(command, env=STABLE_ENVIRONMENT)
    os.unlink(listing)
    return load_blob(folder, name)


def load_blob(folder: str, name: str) -> Blob:
    """The blob that `freeze` left in `folder`."""
    with open(os.path.join(folder, f"{name}.json"), encoding="utf-8") as file:
        rows = json.load(file)
    modules = tuple(
        FrozenModule(name=module, offset=offset, size=size, is_package=is_package)
        for module, offset, size, is_package in rows
    )
    return Blob(path=os.path.join(folder, f"{name}.bin"), modules=modules)


def _analysis_python(cache: Cache, pins: Pins, interpreter: Interpreter, msgpack: str) -> str:
    """A virtual environment of the guest's Python with PyInstaller and the guest's packages."""
    key = digest_of(
        pins.analysis,
        pins.guest,
        msgpack,
        interpreter.native_python,
        tree_sha256(PACKAGE_STANDINS, (".py",)),
        read_bytes(ORIGINALS),
        BEHIND_A_FRONT,
    )

    def make(folder: str) -> None:
        run([interpreter.native_python, "-I", "-m", "venv", "--without-pip", folder])
        site = os.path.join(folder, "lib", "python3.13", "site-packages")
        install_packages([*pins.analysis, *pins.guest], site, "3.13")
        shutil.copytree(os.path.join(msgpack, "msgpack"), os.path.join(site, "msgpack"))
        for original, expected in tomllib.loads(read_bytes(ORIGINALS).decode()).items():
            if file_sha256(os.path.join(site, original)) != expected:
                raise BuildError(
                    f"{original} has changed upstream: review its stand-in, {ORIGINALS}"
                )
            shutil.copy(os.path.join(PACKAGE_STANDINS, original), os.path.join(site, original))
        stdlib = os.path.join(os.path.dirname(interpreter.native_python), "../lib/python3.13")
        for name in BEHIND_A_FRONT:
            shutil.copy(
                os.path.join(stdlib, f"{name}.py"), os.path.join(site, f"_stdlib_{name}.py")
            )

    folder = cache.stage("analysis", key, make)
    return os.path.join(folder, "bin", "python3")


def _recorded_code(python: str, work: str) -> Source:
    """The module of code that attrs would compile at every start."""
    output = os.path.join(work, "_guest_compiled.py")
    environment = {
        **STABLE_ENVIRONMENT,
        "PYTHONPATH": f"{STDLIB_STANDINS}:{NATIVE}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    run([python, "-s", "-P", RECORDER, output], cwd=work, env=environment)
    return Source(name="_guest_compiled", path=output, is_package=False)


def _module_graph(python: str, roots: str, interpreter: Interpreter) -> list[Source]:
    with tempfile.TemporaryDirectory(prefix="microguest-graph-") as work:
        roots_file = os.path.join(work, "roots.py")
        with open(roots_file, "w", encoding="utf-8") as file:
            file.write(roots)
        pruned, codecs = _prune_rules(imported_modules(roots))
        output = os.path.join(work, "graph.json")
        environment = {
            **STABLE_ENVIRONMENT,
            "HOME": work,  # PyInstaller keeps a cache there that outlives what it describes
            "GRAPH_ROOTS": roots_file,
            "GRAPH_STANDINS": STDLIB_STANDINS,
            "GRAPH_EXCLUDES": json.dumps(pruned),
            "GRAPH_OUTPUT": output,
        }
        command = [python, "-s", "-P", "-m", "PyInstaller", "--noconfirm", "--log-level=WARN"]
        command += ["--workpath", os.path.join(work, "w"), "--distpath", os.path.join(work, "d")]
        run([*command, GRAPH_SPEC], cwd=work, env=environment)
        with open(output, encoding="utf-8") as file:
            graph = json.load(file)
    _refuse_missing_extensions(graph["extensions"], interpreter)
    return _kept(graph["modules"], pruned, codecs)


def _prune_rules(imported: list[str]) -> tuple[list[str], frozenset[str]]:
    """Names to leave out, and the codecs to keep."""
    rules = tomllib.loads(read_bytes(PRUNE_FILE).decode())
    named = [name for rule in rules["prune"] for name in rule["modules"]]
    wanted = {".".join(name.split(".")[: end + 1]) for name in imported for end in range(9)}
    return sorted(set(named) - wanted), frozenset(rules["encodings"]["keep"])


def _kept(modules: list[list[str]], pruned: list[str], codecs: frozenset[str]) -> list[Source]:
    left_out = re.compile("(?:" + "|".join(map(re.escape, pruned)) + r")(?:\.|$)")
    sources = []
    for name, path in modules:
        package, _, codec = name.partition(".")
        if package == "encodings" and codec and codec not in codecs:
            continue
        if left_out.match(name) or package.startswith(("pyi", "_pyi", "PyInstaller")):
            continue
        is_package = os.path.basename(path) == "__init__.py" or not os.path.isfile(path)
        source = path if os.path.isfile(path) else ""
        sources.append(Source(name=name, path=_standin(name) or source, is_package=is_package))
    return sources


def _standin(name: str) -> str | None:
    """The file that replaces a module of the standard library, whichever one the graph found."""
    base = os.path.join(STDLIB_STANDINS, *name.split("."))
    for path in (base + ".py", os.path.join(base, "__init__.py")):
        if os.path.exists(path):
            return path
    return None


def _refuse_missing_extensions(wanted: list[str], interpreter: Interpreter) -> None:
    missing = set(wanted) - interpreter.builtin_modules - OPTIONAL_EXTENSIONS
    if missing:
        raise BuildError(
            f"the module graph reaches C modules that are not linked in: "
            f"{', '.join(sorted(missing))}; add them to build/native/Setup.local or prune what "
            "imports them"
        )
