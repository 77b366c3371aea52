"""microguest: boot machines and run programs in them.

    from microguest import boot

    with boot("oci:dist/demo:busybox") as machine:
        print(machine.agent.exec(["uname", "-a"]).stdout.decode())

Names are imported when they are first used: this package costs next to nothing, and PID 1 of a
guest, which has no host's side, imports it too.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from microguest import aio, errors, seccomp
    from microguest.guest import __version__
    from microguest.guest.boot.network import Interface, Route
    from microguest.guest.record import RecordError
    from microguest.guest.report import AgentExited, Step, WorkloadExited, WorkloadFailed
    from microguest.guest.report import BootFailed as BootFailure
    from microguest.guest.wire.messages import (
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
    from microguest.guest.wire.renewal import Renewed
    from microguest.host_client.client.address import HybridAddress, UnixAddress, VsockAddress
    from microguest.host_client.client.agent import Agent
    from microguest.host_client.client.clock import GuestClock
    from microguest.host_client.client.process import Process, ProcessStream
    from microguest.host_client.client.request import Options
    from microguest.host_client.client.result import CommandFailed, Result
    from microguest.host_client.connecting import connect
    from microguest.host_client.errors import (
        BootConfigError,
        BootFailed,
        ConnectError,
        ConnectionLost,
        DeadlineExceeded,
        IdTaken,
        ImageError,
        LocalProtocolError,
        MachineError,
        ManifestError,
        MicroguestError,
        NoSuchProcess,
        NotReady,
        OperationError,
        OutputStalled,
        OutputTooLarge,
        ProgramNotFound,
        ProtocolError,
        RemoteProtocolError,
        ShuttingDown,
        StartError,
        StdinTaken,
        TooBusy,
        Unauthorized,
    )
    from microguest.host_client.images import Progress
    from microguest.host_client.machines.boot import boot
    from microguest.host_client.machines.machine import Machine
    from microguest.host_client.machines.mounts import Mount
    from microguest.host_client.machines.named import MachineInfo, NamedMachine, find, list_machines
    from microguest.host_client.machines.plan import Event, MachineState
    from microguest.host_client.machines.settings import MachineOptions

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
    "IdTaken",
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
    "NoSuchProcess",
    "NotReady",
    "OperationError",
    "Options",
    "OutputStalled",
    "OutputTooLarge",
    "PingResult",
    "Process",
    "ProcessInfo",
    "ProcessStream",
    "ProgramNotFound",
    "Progress",
    "ProtocolError",
    "RecordError",
    "RemoteProtocolError",
    "Renewed",
    "Result",
    "Route",
    "ShuttingDown",
    "StagedFile",
    "Start",
    "StartError",
    "StdinTaken",
    "Step",
    "TooBusy",
    "Unauthorized",
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
    "microguest.guest": ("__version__",),
    "microguest.guest.wire.messages": (
        *("Attach", "Exited", "InfoResult", "Keep", "Limits", "PingResult", "ProcessInfo"),
        *("StagedFile", "Start", "Winsize"),
    ),
    "microguest.guest.boot.network": ("Interface", "Route"),
    "microguest.guest.record": ("RecordError",),
    "microguest.guest.wire.renewal": ("Renewed",),
    "microguest.guest.report": ("AgentExited", "Step", "WorkloadExited", "WorkloadFailed"),
    "microguest.host_client.client.address": ("HybridAddress", "UnixAddress", "VsockAddress"),
    "microguest.host_client.client.agent": ("Agent",),
    "microguest.host_client.connecting": ("connect",),
    "microguest.host_client.errors": (
        *("BootConfigError", "BootFailed", "ConnectError", "ConnectionLost", "DeadlineExceeded"),
        *("IdTaken", "ImageError", "LocalProtocolError", "MachineError", "ManifestError"),
        *("MicroguestError", "NoSuchProcess", "NotReady", "OperationError", "OutputStalled"),
        *("OutputTooLarge", "ProgramNotFound", "ProtocolError", "RemoteProtocolError"),
        *("ShuttingDown", "StartError", "StdinTaken", "TooBusy", "Unauthorized"),
    ),
    "microguest.host_client.images": ("Progress",),
    "microguest.host_client.machines.boot": ("boot",),
    "microguest.host_client.machines.machine": ("Machine",),
    "microguest.host_client.machines.mounts": ("Mount",),
    "microguest.host_client.machines.named": (
        "MachineInfo",
        "NamedMachine",
        "find",
        "list_machines",
    ),
    "microguest.host_client.machines.plan": ("Event", "MachineState"),
    "microguest.host_client.machines.settings": ("MachineOptions",),
    "microguest.host_client.client.process": ("Process", "ProcessStream"),
    "microguest.host_client.client.clock": ("GuestClock",),
    "microguest.host_client.client.request": ("Options",),
    "microguest.host_client.client.result": ("CommandFailed", "Result"),
}
# What the guest says of a failed boot, beside the error of that name.
_RENAMED = {"BootFailure": ("microguest.guest.report", "BootFailed")}

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
    return sorted({*globals(), *__all__} - {"TYPE_CHECKING"})
