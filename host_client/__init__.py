"""The host's side: connect to an agent, boot machines, run programs in them.

    from host_client import boot

    with boot("oci:images/demo") as machine:
        print(machine.agent.exec(["uname", "-a"]).stdout.decode())

Names are imported when they are first used, so that importing this package costs next to nothing.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.messages import Keep, Limits, StagedFile
    from guest.netplan import Interface, Route
    from host_client import aio, errors
    from host_client.agent import Agent, connect
    from host_client.machines.boot import boot
    from host_client.machines.machine import Machine
    from host_client.machines.mounts import Mount
    from host_client.process import Process
    from host_client.result import Result

__all__ = [
    "Agent",
    "Interface",
    "Keep",
    "Limits",
    "Machine",
    "Mount",
    "Process",
    "Result",
    "Route",
    "StagedFile",
    "aio",
    "boot",
    "connect",
    "errors",
]

_HOME = {
    "Agent": "host_client.agent",
    "Interface": "guest.netplan",
    "Keep": "guest.messages",
    "Limits": "guest.messages",
    "Machine": "host_client.machines.machine",
    "Mount": "host_client.machines.mounts",
    "Process": "host_client.process",
    "Result": "host_client.result",
    "Route": "guest.netplan",
    "StagedFile": "guest.messages",
    "boot": "host_client.machines.boot",
    "connect": "host_client.agent",
}


def __getattr__(name: str) -> object:
    import importlib

    if name in ("aio", "errors"):
        return importlib.import_module(f"host_client.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
