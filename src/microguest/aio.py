"""The same client for asyncio and trio, over anyio: `pip install microguest[aio]`.

    from microguest import aio

    async with await aio.connect("demo") as agent:
        result = await agent.exec(["uname", "-a"])

Cancelling a command closes its connection, and so kills the process, unless it is kept.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from microguest.host_client.aio.agent import Agent, connect
    from microguest.host_client.aio.machine import Machine, NamedMachine, boot, find, list_machines
    from microguest.host_client.aio.process import Process

__all__ = [
    "Agent",
    "Machine",
    "NamedMachine",
    "Process",
    "boot",
    "connect",
    "find",
    "list_machines",
]

_HOME = {
    "Agent": "microguest.host_client.aio.agent",
    "Machine": "microguest.host_client.aio.machine",
    "NamedMachine": "microguest.host_client.aio.machine",
    "Process": "microguest.host_client.aio.process",
    "boot": "microguest.host_client.aio.machine",
    "connect": "microguest.host_client.aio.agent",
    "find": "microguest.host_client.aio.machine",
    "list_machines": "microguest.host_client.aio.machine",
}


if not TYPE_CHECKING:  # as in microguest

    def __getattr__(name):
        import importlib

        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            home = importlib.import_module(_HOME[name])
        except ModuleNotFoundError as error:
            if error.name != "anyio":
                raise
            what = f"{__name__} needs anyio: pip install 'microguest[aio]'"
            raise ModuleNotFoundError(what, name="anyio") from None
        return getattr(home, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__} - {"TYPE_CHECKING"})
