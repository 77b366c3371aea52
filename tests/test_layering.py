"""Who may import whom, read from the sources, lazy imports and type-checking blocks included.

A package that is not in the tree yet has no imports to judge.
"""

import ast
import importlib
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent

STDLIB = set(sys.stdlib_module_names)
NATIVE = {"_guestsys"}

MAY_IMPORT = {
    "guest": {"guest", "msgpack"},
    "init_shim": {"guest", "init_shim", *NATIVE, "_guest_build"},
    "agent": {"guest", "agent", "trio", "msgpack", "pyroute2", *NATIVE},
    "host_client": {"guest", "host_client"},
    "host_client/aio": {"guest", "host_client", "anyio"},
}
# The one place where the frozen program becomes the agent, and the one command with an extra.
EXCEPTIONS = {
    ("init_shim/dispatch.py", "microguest.agent.main"),
    ("host_client/cli/completion.py", "shtab"),
}

PACKAGES = ("guest", "agent", "init_shim", "host_client")

# Which folders of its package a folder may use, or a file that lies beside them. All may use the
# files that lie there. Who is not listed uses none.
MAY_ENTER = {
    "guest/launch.py": {"guest/boot"},
    "guest/privileges.py": {"guest/boot"},
    "guest/supervision.py": {"guest/boot"},
    "guest/wire": {"guest/boot"},
    "agent/main.py": {"agent/process", "agent/system"},
    "agent/operations.py": {"agent/process", "agent/files", "agent/system", "agent/network"},
    "agent/orders.py": {"agent/process"},
    "agent/service.py": {"agent/system"},
    "agent/process": {"agent/files"},
    "agent/system": {"agent/files", "agent/network"},
    "init_shim/dispatch.py": {"init_shim/network"},
    "init_shim/main.py": {
        *("init_shim/root", "init_shim/network", "init_shim/hardening", "init_shim/life"),
    },
    "init_shim/life": {"init_shim/root"},
    "host_client/connecting.py": {"host_client/client", "host_client/machines"},
    "host_client/aio": {"host_client/client", "host_client/images", "host_client/machines"},
    "host_client/cli": {
        *("host_client/client", "host_client/aio", "host_client/images", "host_client/machines"),
    },
    "host_client/machines": {"host_client/client", "host_client/images", "host_client/seccomp"},
    "host_client/monitor": {"host_client/machines", "host_client/vhost_vsock"},
}
# How the machine's end writes out what its life has mounted; the rest of the root is the boot's.
OF_THE_ROOT_FOR_LIFE = {"init_shim/root/write_out.py"}

# Modules that read, write, wait or look at a clock: the contract does none of it.
IO_MODULES = {
    "_socket", "asyncio", "fcntl", "http", "io", "mmap", "multiprocessing", "pathlib", "select",
    "selectors", "shutil", "signal", "socket", "ssl", "subprocess", "tempfile", "threading", "time",
}  # fmt: skip
# What of `os` only computes: wait statuses, names of errors, and paths as text.
OS_NAMES = {
    "WIFEXITED",
    "WIFSIGNALED",
    "WTERMSIG",
    "WCOREDUMP",
    "WEXITSTATUS",
    "fsencode",
    "path",
    "strerror",
}
PATH_NAMES = {"basename", "dirname", "isabs", "join", "normpath"}

# What PID 1 imports before the agent runs. Each of these costs it milliseconds.
HEAVY = {"asyncio", "dataclasses", "inspect", "msgpack", "pathlib", "subprocess", "trio", "typing"}
BOOT_PATH = (
    *("boot/config", "errors", "bounds", "boot/network", "record", "report", "boot/root", "status"),
    *("supervision", "boot/workload"),
)

PUBLIC = {
    "microguest.guest": ["__version__"],
    "microguest.guest.boot.config": [
        "AGENT_PORT", "PATH", "REPORT_PORT", "SCHEMA", "AgentSettings", "BootConfig", "Endpoint",
        "Hardening", "parse",
    ],
    "microguest.guest.wire.connection": [
        "Connection", "Control", "Data", "End", "Event", "Request", "Response", "Role", "State",
    ],
    "microguest.guest.errors": [
        "START_CODES", "BootConfigError", "LocalProtocolError", "ManifestError", "MicroguestError",
        "OperationError", "ProtocolError", "RemoteProtocolError", "StartError", "operation_error",
        "printable", "raised_at",
    ],
    "microguest.guest.wire.frames": [
        "HEADER", "MAGIC", "PREFACE_SIZE", "VERSION", "FrameHeader", "Kind", "preface",
    ],
    "microguest.guest.wire.messages": [
        "CONTROLS", "CREDIT", "FEATURES", "HOST_FEATURES", "OPERATIONS", "PROCESS_OPERATIONS",
        "STREAMS", "Acknowledge", "Attach", "Credit", "Detach", "Exited", "Failure", "Forget",
        "ForgetResult", "Hello", "Info", "InfoResult", "Keep", "Limits", "ListProcesses", "Ping",
        "PingResult", "ProcessInfo", "ProcessList", "Resize", "Shutdown", "ShutdownResult",
        "Signal", "SignalProcess", "SignalResult", "StagedFile", "Start", "Started", "Wait",
        "Welcome", "Winsize", "pack", "unpack",
    ],
    "microguest.guest.boot.network": ["Interface", "Network", "Route"],
    "microguest.guest.record": ["Catalogue", "Record", "RecordError", "misfit"],
    "microguest.guest.report": [
        "CONSOLE_MARK", "REPORTS", "AgentExited", "AgentServes", "BootFailed", "FirstExec",
        "HandedOff", "OomKilled", "Ready", "Report", "Step", "Stopping", "WorkloadExited",
        "WorkloadFailed", "WorkloadStarted", "line_mark",
    ],
    "microguest.guest.boot.root": ["Lower", "Root", "Upper", "Volume", "check_size"],
    "microguest.guest.status": ["ExitStatus", "exit_fields"],
    "microguest.guest.supervision": [
        "AGENT_FD", "AGENT_ID", "MESSAGES", "AgentReady", "AreYouThere", "Configure", "Deposit",
        "ExecStarted",
        "Here", "KeptExited", "KeptStatus", "MainCollected", "MainExited", "MainReader",
        "MainStarted", "Message", "Restored", "RootReady", "ShutdownRequest", "Taken", "Withdraw",
    ],
    "microguest.guest.boot.workload": [
        "Capabilities", "ImageDefaults", "Restart", "Workload", "check_init", "check_limits",
        "signal_number",
    ],
    "microguest": [
        "Agent", "AgentExited", "Attach", "BootConfigError", "BootFailed", "BootFailure",
        "CommandFailed", "ConnectError", "ConnectionLost", "DeadlineExceeded", "Event", "Exited",
        "GuestClock", "HybridAddress", "IdTaken", "ImageError", "InfoResult", "Interface", "Keep",
        "Limits", "LocalProtocolError", "Machine", "MachineError", "MachineInfo", "MachineOptions",
        "MachineState", "ManifestError", "MicroguestError", "Mount", "NamedMachine",
        "NoSuchProcess", "NotReady", "OperationError", "Options", "OutputStalled",
        "OutputTooLarge", "PingResult", "Process", "ProcessInfo", "ProcessStream",
        "ProgramNotFound", "Progress", "ProtocolError", "RecordError", "RemoteProtocolError",
        "Renewed", "Result", "Route", "ShuttingDown", "StagedFile", "Start", "StartError",
        "StdinTaken", "Step", "TooBusy", "Unauthorized", "UnixAddress", "VsockAddress", "Winsize",
        "WorkloadExited", "WorkloadFailed", "aio", "boot", "connect", "errors", "find",
        "list_machines", "seccomp", "__version__",
    ],
    "microguest.aio": [
        "Agent", "Machine", "NamedMachine", "Process", "boot", "connect", "find",
        "list_machines",
    ],
}  # fmt: skip


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every module that a file imports, wherever in the file, with the line."""
    package = ".".join(("microguest", *path.relative_to(PROJECT).parent.parts))
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package if node.level else node.module or ""
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def sources(package: str) -> list[Path]:
    return sorted((PROJECT / package).rglob("*.py"))


def modules() -> dict[str, str]:
    """Our files by the names that they are imported by."""
    paths = [path.relative_to(PROJECT) for package in PACKAGES for path in sources(package)]
    found = {".".join(("microguest", *path.with_suffix("").parts)): str(path) for path in paths}
    for path in sources("src/microguest"):  # not what its links lead to
        found[f"microguest.{path.stem}"] = str(path.relative_to(PROJECT))
    return {name.removesuffix(".__init__"): path for name, path in found.items()}


def imports_of_ours() -> dict[str, dict[str, str]]:
    """By file: the files of ours that it imports, each with where it first does."""
    known = modules()
    found: dict[str, dict[str, str]] = {path: {} for path in known.values()}
    for path, others in found.items():
        for line, name in imports(PROJECT / path):
            module = name
            while module and module not in known:
                module = module.rpartition(".")[0]
            if module and known[module] != path:
                others.setdefault(known[module], f"{path}:{line}")
    return found


def rooms_of(files: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """The same for rooms: a folder is one, and so is each file that lies beside the folders."""

    def room(path: str) -> str:
        folder, _, name = path.rpartition("/")
        return folder if "/" in folder else f"{folder}/{name}"

    found: dict[str, dict[str, str]] = {}
    for path, others in files.items():
        ways = found.setdefault(room(path), {})
        for other, where in others.items():
            if room(other) != room(path):
                ways.setdefault(room(other), where)
    return found


def circle(graph: Mapping[str, Mapping[str, str]]) -> list[str]:
    """One circle of imports, import by import; [] where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        imported = error.args[1]  # each by the next one
        return [
            f"{graph[importer][module]} imports {module}" for module, importer in pairwise(imported)
        ]
    return []


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_only_what_their_layer_may(package: str) -> None:
    wrong = []
    for path in sources(package):
        name = str(path.relative_to(PROJECT))
        if any(name.startswith(f"{inner}/") for inner in MAY_IMPORT if len(inner) > len(package)):
            continue  # it has rules of its own
        for line, module in imports(path):
            top = module.removeprefix("microguest.").partition(".")[0]
            excepted = any(name == file and module.startswith(to) for file, to in EXCEPTIONS)
            if top not in STDLIB | MAY_IMPORT[package] and not excepted:
                wrong.append(f"{name}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_no_files_import_each_other_in_a_circle() -> None:
    """Whichever is needed by the other says what it needs itself: a small Protocol of its own."""
    wrong = circle(imports_of_ours())
    assert not wrong, "\n".join(wrong)


def test_no_rooms_import_each_other_in_a_circle() -> None:
    wrong = circle(rooms_of(imports_of_ours()))
    assert not wrong, "\n".join(wrong)


def test_a_circle_of_files_or_rooms_is_found() -> None:
    files = {
        "p/a.py": {"p/x/b.py": "p/a.py:1"},
        "p/x/b.py": {"p/x/c.py": "p/x/b.py:2"},
        "p/x/c.py": {},
        "p/x/d.py": {"p/a.py": "p/x/d.py:3"},
    }
    assert circle(files) == []
    in_rooms = ["p/a.py:1 imports p/x", "p/x/d.py:3 imports p/a.py"]
    assert sorted(circle(rooms_of(files))) == in_rooms
    in_files = {**files, "p/x/c.py": {"p/a.py": "p/x/c.py:4"}}
    assert len(circle(in_files)) == 3


def test_lazy_and_typing_only_imports_count() -> None:
    ways = imports_of_ours()
    assert "init_shim/life/handoff.py" in ways["init_shim/main.py"]  # inside a function
    assert "host_client/machines/boot.py" in ways["src/microguest/__init__.py"]  # for types


def trespasses(rooms: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Each import of a folder by somebody of the same package who may not use it."""
    return [
        f"{where} imports {other}"
        for room, others in rooms.items()
        for other, where in others.items()
        if room.split("/")[0] == other.split("/")[0]
        and not other.endswith(".py")
        and other not in MAY_ENTER.get(room, ())
    ]


def test_rooms_use_only_what_they_may() -> None:
    ways = imports_of_ours()
    wrong = trespasses(rooms_of(ways))
    wrong += [
        f"{where} imports {other}"
        for path, others in ways.items()
        for other, where in others.items()
        if path.startswith("init_shim/life/")
        and other.startswith("init_shim/root/")
        and other not in OF_THE_ROOT_FOR_LIFE
    ]
    assert not wrong, "\n".join(wrong)


def test_a_room_that_is_used_without_leave_is_found() -> None:
    rooms = {
        "agent/state.py": {
            "agent/process": "agent/state.py:1",
            "agent/link.py": "agent/state.py:2",
        },
        "agent/system": {"agent/files": "agent/system/clock.py:1", "guest/wire": "…"},
        "host_client/machines": {"host_client/monitor": "host_client/machines/boot.py:3"},
    }
    assert trespasses(rooms) == [
        "agent/state.py:1 imports agent/process",
        "host_client/machines/boot.py:3 imports host_client/monitor",
    ]


def test_the_contract_does_no_io() -> None:
    wrong = []
    for path in sources("guest"):
        name = path.name
        wrong += [
            f"{name}:{line} imports {module}"
            for line, module in imports(path)
            if module.partition(".")[0] in IO_MODULES
        ]
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Attribute(value=ast.Name(id="os"), attr=attr) if attr not in OS_NAMES:
                    wrong.append(f"{name}:{node.lineno} uses os.{attr}")
                case ast.Attribute(
                    value=ast.Attribute(value=ast.Name(id="os"), attr="path"), attr=attr
                ) if attr not in PATH_NAMES:
                    wrong.append(f"{name}:{node.lineno} uses os.path.{attr}")
                case ast.Call(func=ast.Name(id="open" | "print" | "input" as called)):
                    wrong.append(f"{name}:{node.lineno} calls {called}()")
                case ast.ImportFrom(module="os"):
                    wrong.append(f"{name}:{node.lineno} imports from os: write os.NAME")
    assert not wrong, "\n".join(wrong)


def test_what_pid_1_imports_from_the_contract_is_light() -> None:
    wrong = []
    for module in BOOT_PATH:
        path = PROJECT / "guest" / f"{module}.py"
        typing_only = _type_checking_lines(path)
        wrong += [
            f"guest/{module}.py:{line} imports {name}"
            for line, name in imports(path)
            if name.partition(".")[0] in HEAVY and line not in typing_only
        ]
    assert not wrong, "\n".join(wrong)


def _type_checking_lines(path: Path) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.If(test=ast.Name(id="TYPE_CHECKING"), body=body):
                for statement in body:
                    lines |= set(range(statement.lineno, (statement.end_lineno or 0) + 1))
    return lines


def test_the_agent_has_one_way_to_a_thread() -> None:
    """It says `resource_limit` where there is none to be had; any other way would not."""
    ways = {"to_thread", "start_thread_soon", "start_new_thread", "Thread", "ThreadPoolExecutor"}
    found = [
        path.name
        for path in sources("agent")
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Attribute) and node.attr in ways)
        or (isinstance(node, ast.Name) and node.id in ways)
        or (isinstance(node, ast.alias) and not ways.isdisjoint(node.name.split(".")))
    ]
    assert set(found) == {"threads.py"}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_pinned(name: str) -> None:
    module = importlib.import_module(name)
    assert sorted(module.__all__) == sorted(PUBLIC[name])
    missing = [public for public in module.__all__ if not hasattr(module, public)]
    assert not missing
