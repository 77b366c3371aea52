"""Who may import whom, read from the sources, lazy imports and type-checking blocks included.

A package that is not in the tree yet has no imports to judge.
"""

import ast
import importlib
import sys
from collections.abc import Iterator
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
EXCEPTIONS = {("init_shim/dispatch.py", "agent.main"), ("host_client/cli/completion.py", "shtab")}

# Modules that read, write, wait or look at a clock: the contract does none of it.
IO_MODULES = {
    "_socket", "asyncio", "fcntl", "http", "io", "mmap", "multiprocessing", "pathlib", "select",
    "selectors", "shutil", "signal", "socket", "ssl", "subprocess", "tempfile", "threading", "time",
}  # fmt: skip
# What of `os` only computes: wait statuses, names of errors, and paths as text.
OS_NAMES = {"WIFSIGNALED", "WTERMSIG", "WCOREDUMP", "WEXITSTATUS", "fsencode", "path", "strerror"}
PATH_NAMES = {"basename", "dirname", "isabs", "join", "normpath"}

# What PID 1 imports before the agent runs. Each of these costs it milliseconds.
HEAVY = {"asyncio", "dataclasses", "inspect", "msgpack", "pathlib", "subprocess", "trio", "typing"}
BOOT_PATH = (
    *("bootconfig", "errors", "limits", "netplan", "record", "report", "rootplan", "status"),
    *("supervision", "workload"),
)

PUBLIC = {
    "guest": ["__version__"],
    "guest.bootconfig": [
        "AGENT_PORT", "PATH", "REPORT_PORT", "SCHEMA", "AgentSettings", "BootConfig", "Endpoint",
        "Hardening", "parse",
    ],
    "guest.connection": [
        "Connection", "Control", "Data", "End", "Event", "Request", "Response", "Role", "State",
    ],
    "guest.errors": [
        "START_CODES", "BootConfigError", "LocalProtocolError", "ManifestError", "MicroguestError",
        "OperationError", "ProtocolError", "RemoteProtocolError", "StartError", "operation_error",
        "printable", "raised_at",
    ],
    "guest.frames": [
        "HEADER", "MAGIC", "PREFACE_SIZE", "VERSION", "FrameHeader", "Kind", "preface",
    ],
    "guest.messages": [
        "CONTROLS", "CREDIT", "FEATURES", "HOST_FEATURES", "OPERATIONS", "PROCESS_OPERATIONS",
        "STREAMS", "Acknowledge", "Attach", "Credit", "Detach", "Exited", "Failure", "Forget",
        "ForgetResult", "Hello", "Info", "InfoResult", "Keep", "Limits", "ListProcesses", "Ping",
        "PingResult", "ProcessInfo", "ProcessList", "Resize", "Shutdown", "ShutdownResult",
        "Signal", "SignalProcess", "SignalResult", "StagedFile", "Start", "Started", "Wait",
        "Welcome", "Winsize", "pack", "unpack",
    ],
    "guest.netplan": ["Interface", "Network", "Route"],
    "guest.record": ["Catalogue", "Record", "RecordError", "misfit"],
    "guest.report": [
        "CONSOLE_MARK", "REPORTS", "AgentExited", "AgentServes", "BootFailed", "FirstExec",
        "HandedOff", "OomKilled", "Ready", "Report", "Step", "Stopping", "WorkloadExited",
        "WorkloadFailed", "WorkloadStarted", "line_mark",
    ],
    "guest.rootplan": ["Lower", "Root", "Upper", "Volume", "check_size"],
    "guest.status": ["ExitStatus", "exit_fields"],
    "guest.supervision": [
        "AGENT_FD", "AGENT_ID", "MESSAGES", "AgentReady", "AreYouThere", "Configure", "Deposit",
        "ExecStarted",
        "Here", "KeptExited", "KeptStatus", "MainCollected", "MainExited", "MainReader",
        "MainStarted", "Message", "Restored", "RootReady", "ShutdownRequest", "Taken", "Withdraw",
    ],
    "guest.workload": [
        "Capabilities", "ImageDefaults", "Restart", "Workload", "check_init", "check_limits",
        "signal_number",
    ],
    "host_client": [
        "Agent", "AgentExited", "Attach", "BootConfigError", "BootFailed", "BootFailure",
        "CommandFailed", "ConnectError", "ConnectionLost", "DeadlineExceeded", "Event",
        "Exited", "GuestClock", "HybridAddress", "ImageError", "InfoResult", "Interface",
        "Keep", "Limits", "LocalProtocolError", "Machine", "MachineError", "MachineInfo",
        "MachineOptions", "MachineState", "ManifestError", "MicroguestError", "Mount",
        "NamedMachine", "OperationError", "Options", "OutputStalled", "OutputTooLarge",
        "PingResult", "Process", "ProcessInfo", "ProcessStream", "Progress",
        "ProtocolError", "RemoteProtocolError", "Renewed", "Result", "Route", "StagedFile",
        "Start", "StartError", "Step", "UnixAddress", "VsockAddress", "Winsize",
        "WorkloadExited", "WorkloadFailed", "__version__", "aio", "boot", "connect",
        "errors", "find", "list_machines", "seccomp",
    ],
    "host_client.aio": [
        "Agent", "Machine", "NamedMachine", "Process", "boot", "connect", "find",
        "list_machines",
    ],
}  # fmt: skip


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every module that a file imports, wherever in the file, with the line."""
    package = ".".join(path.relative_to(PROJECT).parent.parts)
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


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_only_what_their_layer_may(package: str) -> None:
    wrong = []
    for path in sources(package):
        name = str(path.relative_to(PROJECT))
        if any(name.startswith(f"{inner}/") for inner in MAY_IMPORT if len(inner) > len(package)):
            continue  # it has rules of its own
        for line, module in imports(path):
            top = module.partition(".")[0]
            excepted = any(name == file and module.startswith(to) for file, to in EXCEPTIONS)
            if top not in STDLIB | MAY_IMPORT[package] and not excepted:
                wrong.append(f"{name}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


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
