"""What a user imports: every error and record is there, typed, and goes through pickle and copy.

Nothing is listed by hand: the tests walk over what the packages define and what their public
functions give.
"""

import concurrent.futures
import copy
import dataclasses
import importlib
import inspect
import multiprocessing
import pickle
import pkgutil
import pydoc
import re
import subprocess
import sys
import tomllib
import types
import typing
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import metadata
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext
from pathlib import Path
from typing import Any

import msgpack
import pytest
from agentharness import TOKEN, AgentProcess

import microguest
from microguest import aio, guest, host_client
from microguest.guest.errors import MicroguestError
from microguest.guest.record import Record

PROJECT = Path(__file__).parent.parent
IN_POOL = 60.0  # seconds for a worker to start and answer


def definitions() -> Iterator[type]:
    """Every class that our packages define."""
    for package in (guest, host_client):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                for value in vars(importlib.import_module(module.name)).values():
                    if isinstance(value, type) and value.__module__ == module.name:
                        yield value


CLASSES = sorted(set(definitions()), key=lambda each: (each.__module__, each.__qualname__))
ERRORS = [each for each in CLASSES if issubclass(each, MicroguestError | ValueError)]
RECORDS = [each for each in CLASSES if issubclass(each, Record) and each is not Record]
PUBLIC = [getattr(microguest, name) for name in microguest.__all__]
FROZEN = [each for each in PUBLIC if dataclasses.is_dataclass(each)]


def hints_of(value: Any) -> dict[str, Any]:
    """Its annotations, also those that name what is only imported for type checkers."""
    known = {each.__name__: each for each in CLASSES} | {"Any": Any, "Self": object}
    missing: dict[str, Any] = {}
    while True:
        try:
            return typing.get_type_hints(value, localns=missing or None)
        except NameError as error:
            missing[error.name] = known[error.name]


# ── making one of anything ───────────────────────────────────────────────────────────────────────


def sample(kind: Any) -> Any:
    """A value of that type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return sample(next(each for each in arguments if each is not type(None)))
    if origin is typing.Literal:
        return arguments[0]
    if origin is tuple:
        fixed = [each for each in arguments if each is not Ellipsis]
        return tuple(map(sample, fixed))
    if origin in (dict, Mapping):
        return {sample(arguments[0]): sample(arguments[1])}
    if origin in (list, Sequence):
        return [sample(arguments[0])]
    plain = {str: "text", int: 3, float: 0.5, bool: True, bytes: b"\0\xff", type(None): None}
    if kind in plain:
        return plain[kind]
    return made(kind)


def made(kind: type) -> Any:
    """One with every field set, without asking its checks, which want values that fit together."""
    value = object.__new__(kind)
    hints = hints_of(kind)
    if issubclass(kind, Record):
        vars(value).update({name: sample(hints[name]) for name in kind._fields})
        return value
    if dataclasses.is_dataclass(kind):
        for field in dataclasses.fields(kind):
            object.__setattr__(value, field.name, sample(hints[field.name]))
        return value
    pytest.fail(f"no sample of {kind}: teach this test to make one")


def raised(kind: type[Exception]) -> Exception:
    """An error made as its own code makes it, with a note and a field that somebody has added."""
    given: dict[str, Any] = {}
    words: list[Any] = []
    if not inspect.isfunction(kind.__init__):
        words.append("what happened")
    else:
        hints = hints_of(kind.__init__)
        for name, parameter in list(inspect.signature(kind).parameters.items()):
            value = sample(hints.get(name, str))
            if parameter.kind is parameter.KEYWORD_ONLY:
                given[name] = value
            elif parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                words.append(value)
            else:
                words.append("what happened")
                break
    error = kind(*words, **given)
    error.add_note("a note")
    if issubclass(kind, MicroguestError):
        error.later = "a field"  # type: ignore[attr-defined]
    return error


COPIES: dict[str, Callable[[Any], Any]] = {
    **{
        f"pickle {protocol}": lambda value, protocol=protocol: pickle.loads(
            pickle.dumps(value, protocol)
        )
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)
    },
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


def is_same(one: BaseException, other: BaseException) -> None:
    assert type(one) is type(other)
    assert str(one) == str(other)
    assert one.args == other.args
    assert vars(one) == vars(other)


# ── pickle and copy ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ERRORS, ids=lambda each: each.__name__)
def test_errors_survive(kind: type[Exception]) -> None:
    error = raised(kind)
    for way in COPIES.values():
        is_same(way(error), error)


def test_properties_of_an_error_survive() -> None:
    error = microguest.StartError("bad_cwd", "no such directory", {"step": "chdir", "errno": 2})
    again = pickle.loads(pickle.dumps(error))
    assert (again.code, again.step, again.errno) == ("bad_cwd", "chdir", 2)
    late = copy.deepcopy(microguest.DeadlineExceeded("late", seconds=1.5, stdout=b"so far"))
    assert isinstance(late, TimeoutError)
    assert (late.seconds, late.stdout) == (1.5, b"so far")


@pytest.mark.parametrize("kind", RECORDS + FROZEN, ids=lambda each: each.__name__)
def test_records_survive(kind: type) -> None:
    record = made(kind)
    for way in COPIES.values():
        again = way(record)
        assert type(again) is kind
        assert again == record
        assert hash(again) == hash(record)
        assert repr(again) == repr(record)


def works_in_pool(name: str) -> None:
    """In a worker: raise the error of that name."""
    kinds = {each.__name__: each for each in ERRORS}
    raise raised(kinds[name])


def asks_agent(path: str, program: str) -> bytes:
    """In a worker: what an agent says of a program."""
    with microguest.connect(f"unix://{path}", token=TOKEN) as agent:
        return agent.exec([program], check=True, timeout=30).stdout


IN_THE_TREE = microguest.errors.__all__
PUBLIC_ERRORS = [each.__name__ for each in ERRORS if issubclass(each, MicroguestError)]


@pytest.fixture(scope="module")
def spawn() -> SpawnContext:
    """How workers start. What multiprocessing keeps beside them lives as long as we do."""
    resource_tracker.ensure_running()
    return multiprocessing.get_context("spawn")


def test_errors_come_back_from_worker_processes(spawn: SpawnContext) -> None:
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as executor:
        for name in PUBLIC_ERRORS:
            error = executor.submit(works_in_pool, name).exception(IN_POOL)
            assert type(error).__name__ == name
    with spawn.Pool(1) as pool:
        waiting = {name: pool.apply_async(works_in_pool, (name,)) for name in PUBLIC_ERRORS}
        for name, result in waiting.items():
            with pytest.raises(MicroguestError) as caught:
                result.get(IN_POOL)
            assert type(caught.value).__name__ == name
        pool.close()
        pool.join()


def test_failures_of_commands_come_back_from_worker_processes(
    elf: Path, spawn: SpawnContext
) -> None:
    with (
        AgentProcess() as agent,
        concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as executor,
    ):
        missing = executor.submit(asks_agent, agent.path, "no-such-program").exception(IN_POOL)
        failed = executor.submit(asks_agent, agent.path, "false").exception(IN_POOL)
    assert isinstance(missing, microguest.StartError)
    assert (missing.code, missing.step) == ("not_found", "exec")
    assert isinstance(failed, microguest.CommandFailed)
    assert failed.result.returncode == 1


# ── what can be imported ─────────────────────────────────────────────────────────────────────────


def given_by(value: Any, seen: set[Any]) -> None:
    """Collect every class of ours in the annotations of a public function or class.

    A ProcessStream gives the protocol's own events, which are `guest.wire.connection`'s.
    """
    if typing.get_args(value):
        for each in (*typing.get_args(value), typing.get_origin(value)):
            given_by(each, seen)
    elif inspect.isfunction(value):
        for hint in hints_of(value).values():
            given_by(hint, seen)
    elif isinstance(value, property | classmethod):
        given_by(value.fget if isinstance(value, property) else value.__func__, seen)
    elif isinstance(value, type) and value.__module__.startswith(
        ("microguest.guest.", "microguest.host_client.")
    ):
        if value in seen or value is microguest.ProcessStream:
            return
        seen.add(value)
        if is_record(value) or typing.is_typeddict(value):
            for hint in hints_of(value).values():
                given_by(hint, seen)
        if value in PUBLIC or value.__module__.startswith("microguest.host_client.aio."):
            for name in filter(lambda name: not name.startswith("_"), dir(value)):
                given_by(inspect.getattr_static(value, name), seen)


def is_record(kind: type) -> bool:
    return issubclass(kind, Record) or dataclasses.is_dataclass(kind)


@pytest.mark.parametrize("face", [microguest, aio], ids=["blocking", "aio"])
def test_what_public_functions_take_and_give_can_be_imported(face: types.ModuleType) -> None:
    seen: set[Any] = set()
    for name in face.__all__:
        given_by(getattr(face, name), seen)
    assert len(seen) > 10
    hidden = [each for each in seen if is_record(each) and each not in PUBLIC]
    assert not hidden


def test_all_errors_are_public() -> None:
    """But for those that are told apart inside only, and are caught as a public one."""
    own = [each for each in ERRORS if issubclass(each, MicroguestError)]
    assert set(IN_THE_TREE) <= {each.__name__ for each in own}
    assert set(IN_THE_TREE) <= set(microguest.__all__)
    inside = [each for each in own if each.__name__ not in IN_THE_TREE]
    assert [each for each in inside if each.__base__ in (MicroguestError, Exception)] == []


def test_errors_are_documented() -> None:
    page = (PROJECT / "docs" / "reference" / "host.md").read_text()
    assert [name for name in IN_THE_TREE if f"`{name}`" not in page] == []


@pytest.mark.parametrize("face", [microguest, aio], ids=["blocking", "aio"])
def test_every_public_name_is_documented(face: types.ModuleType) -> None:
    page = (PROJECT / "docs" / "reference" / "host.md").read_text()
    assert [name for name in face.__all__ if not re.search(rf"(?<!\w){name}(?!\w)", page)] == []


def test_out_of_range_records_are_documented() -> None:
    """With an error that a caller of this library can catch, and that says what may be."""
    page = (PROJECT / "docs" / "reference" / "host.md").read_text()
    for call in ("Keep(buffer=1)", "Limits(cpu=0)", "Winsize(rows=0, columns=80)"):
        assert f"`{call}`" in page
        with pytest.raises(ValueError, match=r"\w+: must be [0-9.]+ to [0-9]+"):
            eval(call, dict(vars(guest.wire.messages)))


OWN_RECORDS = [each for each in PUBLIC if isinstance(each, type) and is_record(each)]


def fields_of(kind: type) -> dict[str, Any]:
    """By name, the default; `empty` where there is none, `...` where each one gets its own."""
    if issubclass(kind, Record):
        return {name: kind._defaults.get(name, inspect.Parameter.empty) for name in kind._fields}
    found = {}
    for field in dataclasses.fields(kind):
        made_anew = field.default_factory is not dataclasses.MISSING
        none = ... if made_anew else inspect.Parameter.empty
        found[field.name] = none if field.default is dataclasses.MISSING else field.default
    return found


@pytest.mark.parametrize("kind", OWN_RECORDS, ids=lambda each: each.__name__)
def test_help_says_what_a_record_has(kind: type) -> None:
    """`help` and `inspect.signature`: each field with its type and default, and what it is."""
    parameters = inspect.signature(kind).parameters
    fields = fields_of(kind)
    assert list(parameters) == list(fields)
    for name, default in fields.items():
        assert default is ... or parameters[name].default == default
        assert parameters[name].annotation is not inspect.Parameter.empty
    if issubclass(kind, Record):
        assert {each.kind for each in parameters.values()} <= {inspect.Parameter.KEYWORD_ONLY}
    shown = pydoc.plain(pydoc.render_doc(kind))
    assert "*unnamed" not in shown.split("Methods defined here")[0].split("Method resolution")[0]
    about = inspect.getdoc(kind) or ""
    unsaid = [name for name in fields if not re.search(rf"(?<![\w.]){name}(?!\w)", about)]
    assert not unsaid, about


def test_packages_say_what_is_in_them() -> None:
    for package in (microguest, aio):
        named = {name for name in dir(package) if not name.startswith("_")}
        inside = {name for name, value in vars(package).items() if inspect.ismodule(value)}
        assert named - inside <= set(package.__all__)
        assert set(package.__all__) <= set(dir(package))
        for name in package.__all__:
            assert getattr(package, name) is not None
    version = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]
    assert microguest.__version__ == guest.__version__ == version


def test_what_aio_needs_is_said_where_it_is_not_there(tmp_path: Path) -> None:
    """By a Python that has nothing but the project and msgpack."""
    (tmp_path / "msgpack").symlink_to(Path(msgpack.__file__).parent)
    for use in ("aio.connect", "aio.Process"):
        program = f"from microguest import aio; print(aio.__doc__ and dir(aio)); {use}"
        said = subprocess.run(
            [sys.executable, "-S", "-c", program],
            env={"PYTHONPATH": f"{PROJECT / 'src'}:{tmp_path}"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert "connect" in said.stdout
        last = said.stderr.splitlines()[-1]
        assert last.startswith("ModuleNotFoundError: "), said.stderr
        assert last.endswith("needs anyio: pip install 'microguest[aio]'"), said.stderr


def test_the_package_says_where_it_is_from() -> None:
    """What `pip show -v` shows, and an index of packages."""
    about = metadata("microguest")
    assert about["Author"] == "The microguest authors"
    assert about["License-Expression"] == "Apache-2.0"
    links = dict(each.split(", ", 1) for each in about.get_all("Project-URL") or [])
    assert set(links) == {"Documentation", "Source", "Changelog", "Issues"}
    assert all(each.startswith(links["Source"]) for each in links.values())
    assert any(each.startswith("Topic :: ") for each in about.get_all("Classifier") or [])


# ── an installed wheel ───────────────────────────────────────────────────────────────────────────

PROGRAM = """
import pickle
from microguest.guest.wire.messages import Start
import microguest
from microguest import (
    DeadlineExceeded, Keep, Limits, MachineState, OperationError, ProcessInfo, Result, StartError,
    boot, connect,
)

def look(agent: microguest.Agent, state: MachineState, info: ProcessInfo) -> None:
    reveal_type(agent.exec(["true"]))
    reveal_type(agent.exec(["true"]).dropped)
    reveal_type(agent.processes())
    reveal_type(agent.info().versions)
    reveal_type(agent.start(["cat"], keep=Keep(), limits=Limits(memory=1)).stdout.read())
    reveal_type(state.workload_exited)
    reveal_type(state.timeline[0].start_ms)
    reveal_type(info.exited)
    reveal_type(Start(argv=("true",)).seccomp)
    reveal_type(boot)
    reveal_type(connect)
    try:
        pass
    except StartError as error:
        reveal_type(error)
        reveal_type(error.fields)
        reveal_type(error.errno)
    except DeadlineExceeded as late:
        reveal_type(late.stdout)

if __name__ == "__main__":
    error = pickle.loads(pickle.dumps(StartError("not_found", "none", {"errno": 2})))
    print(microguest.__version__, error.errno, "boot" in dir(microguest))
"""


@pytest.mark.slow
def test_types_of_an_installed_wheel(tmp_path: Path) -> None:
    """In a virtual environment that has nothing but the wheel and msgpack."""
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    build += ["--no-build-isolation", "--disable-pip-version-check", "--wheel-dir", str(tmp_path)]
    subprocess.run([*build, str(PROJECT)], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("microguest-*.whl")
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin" / "python"
    (site,) = venv.glob("lib/python3.*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert {"microguest/py.typed", "microguest/guest/errors.py"} <= set(names)
        assert [name for name in names if "/agent/" in name or "/init_shim/" in name] == []
        assert {name.split("/")[0].split("-")[0] for name in names} == {"microguest"}
        archive.extractall(site)
    (site / "msgpack").symlink_to(Path(msgpack.__file__).parent)

    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    said = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--python-executable", python,
         "--cache-dir", tmp_path / "cache", program],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    revealed = [line for line in said.stdout.splitlines() if "Revealed type" in line]
    assert said.returncode == 0, said.stdout
    assert len(revealed) == PROGRAM.count("reveal_type(")
    assert not [line for line in revealed if "Any" in line]

    wrong = tmp_path / "wrong.py"
    wrong.write_text("import microguest\nmicroguest.nonsense\nmicroguest.Keep(bufer=1)\n")
    said = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--python-executable", python,
         "--cache-dir", tmp_path / "cache", wrong],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert '"nonsense"' in said.stdout
    assert '"bufer"' in said.stdout

    # A user's own modules beside his program are his own affair.
    for name in ("guest", "agent", "host_client"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported by name')")
    ran = subprocess.run([python, program], capture_output=True, text=True, check=True)
    assert ran.stdout == f"{microguest.__version__} 2 True\n"
