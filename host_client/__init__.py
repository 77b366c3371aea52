"""The host's side: connect to an agent, boot machines, run programs in them.

    from host_client import boot

    with boot("oci:dist/demo:busybox") as machine:
        print(machine.agent.exec(["uname", "-a"]).stdout.decode())

Names are imported when they are first used, so that importing this package costs next to nothing.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest import __version__
    from guest.messages import (
        Attach,
        Exited,
        InfoResult,
        Keep,
        Limits,
        PingResult,
        ProcessInfo,
        StagedFile,
        Start,
        Winsize,
    )
    from guest.netplan import Interface, Route
    from guest.renewal import Renewed
    from guest.report import AgentExited, Step, WorkloadExited, WorkloadFailed
    from guest.report import BootFailed as BootFailure
    from host_client import aio, errors, seccomp
    from host_client.address import HybridAddress, UnixAddress, VsockAddress
    from host_client.agent import Agent
    from host_client.connecting import connect
    from host_client.errors import (
        BootConfigError,
        BootFailed,
        ConnectError,
        ConnectionLost,
        DeadlineExceeded,
        ImageError,
        LocalProtocolError,
        MachineError,
        ManifestError,
        MicroguestError,
        OperationError,
        OutputStalled,
        OutputTooLarge,
        ProtocolError,
        RemoteProtocolError,
        StartError,
    )
    from host_client.images import Progress
    from host_client.machines.boot import boot
    from host_client.machines.machine import Machine
    from host_client.machines.mounts import Mount
    from host_client.machines.named import MachineInfo, NamedMachine, find, list_machines
    from host_client.machines.plan import Event, MachineState
    from host_client.machines.settings import MachineOptions
    from host_client.process import Process, ProcessStream
    from host_client.renewal import GuestClock
    from host_client.request import Options
    from host_client.result import CommandFailed, Result

__all__ = [
    "Agent",
    "AgentExited",
    "Attach",
    "BootConfigError",
    "BootFailed",
    "BootFailure",
    "CommandFailed",
    "ConnectError",
    "ConnectionLost",
    "DeadlineExceeded",
    "Event",
    "Exited",
    "GuestClock",
    "HybridAddress",
    "ImageError",
    "InfoResult",
    "Interface",
    "Keep",
    "Limits",
    "LocalProtocolError",
    "Machine",
    "MachineError",
    "MachineInfo",
    "MachineOptions",
    "MachineState",
    "ManifestError",
    "MicroguestError",
    "Mount",
    "NamedMachine",
    "OperationError",
    "Options",
    "OutputStalled",
    "OutputTooLarge",
    "PingResult",
    "Process",
    "ProcessInfo",
    "ProcessStream",
    "Progress",
    "ProtocolError",
    "RemoteProtocolError",
    "Renewed",
    "Result",
    "Route",
    "StagedFile",
    "Start",
    "StartError",
    "Step",
    "UnixAddress",
    "VsockAddress",
    "Winsize",
    "WorkloadExited",
    "WorkloadFailed",
    "__version__",
    "aio",
    "boot",
    "connect",
    "errors",
    "find",
    "list_machines",
    "seccomp",
]

_MODULES = ("aio", "errors", "seccomp")
_HOMES = {
    "guest": ("__version__",),
    "guest.messages": (
        *("Attach", "Exited", "InfoResult", "Keep", "Limits", "PingResult", "ProcessInfo"),
        *("StagedFile", "Start", "Winsize"),
    ),
    "guest.netplan": ("Interface", "Route"),
    "guest.renewal": ("Renewed",),
    "guest.report": ("AgentExited", "Step", "WorkloadExited", "WorkloadFailed"),
    "host_client.address": ("HybridAddress", "UnixAddress", "VsockAddress"),
    "host_client.agent": ("Agent",),
    "host_client.connecting": ("connect",),
    "host_client.errors": (
        *("BootConfigError", "BootFailed", "ConnectError", "ConnectionLost"),
        *("DeadlineExceeded", "ImageError", "LocalProtocolError", "MachineError", "ManifestError"),
        *("MicroguestError", "OperationError", "OutputStalled", "OutputTooLarge", "ProtocolError"),
        *("RemoteProtocolError", "StartError"),
    ),
    "host_client.images": ("Progress",),
    "host_client.machines.boot": ("boot",),
    "host_client.machines.machine": ("Machine",),
    "host_client.machines.mounts": ("Mount",),
    "host_client.machines.named": ("MachineInfo", "NamedMachine", "find", "list_machines"),
    "host_client.machines.plan": ("Event", "MachineState"),
    "host_client.machines.settings": ("MachineOptions",),
    "host_client.process": ("Process", "ProcessStream"),
    "host_client.renewal": ("GuestClock",),
    "host_client.request": ("Options",),
    "host_client.result": ("CommandFailed", "Result"),
}
# What the guest says of a failed boot, beside the error of that name.
_RENAMED = {"BootFailure": ("guest.report", "BootFailed")}

if not TYPE_CHECKING:  # who reads the types shall not take any name for one of ours

    def __getattr__(name):
        import importlib

        if name in _MODULES:
            return importlib.import_module(f"{__name__}.{name}")
        home, known = _RENAMED.get(name, ("", name))
        for module, names in _HOMES.items():
            home = module if name in names else home
        if not home:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(home), known)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
