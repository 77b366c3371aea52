"""One program, several names: decides which of them it was called by.

Each path imports only what it needs; PID 1 pays for every module before the machine can be reached.
"""

import os
import sys

TYPE_CHECKING = False  # typing itself is too heavy for PID 1
if TYPE_CHECKING:
    from typing import NoReturn

__all__ = ["main"]

USAGE = """\
usage: microguest namespaces --root DIR --run DIR [--parent PID]
       microguest --version
As PID 1, or called `init`, it boots a machine; called `agent`, it serves one; called
`dhcp`, it keeps an address for it."""


def main() -> "NoReturn":
    """Run as what the process is, and exit."""
    sys.exit(run())


def run() -> int:
    """PID 1, `agent`, or a command. Returns an exit code, or never."""
    arguments = sys.argv[1:]
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    if name == "agent" or arguments[:1] == ["agent"]:
        return run_agent()
    if name == "dhcp" and len(arguments) == 1:
        from microguest.init_shim.network.dhcp_client import run as keep_lease

        return keep_lease(arguments[0])
    if os.getpid() == 1 or name == "init":
        from microguest.init_shim.main import run as boot

        boot()
    if arguments[:1] == ["namespaces"]:
        from microguest.init_shim.launcher import launch

        return launch(arguments[1:])
    if arguments == ["--version"]:
        return print_versions()
    if arguments == ["self-check", "imports"]:
        return print_imports()
    print(USAGE, file=sys.stderr)
    return 2


def run_agent() -> int:
    """Serve, under a name that `ps` shows."""
    try:
        with open("/proc/self/comm", "w", encoding="ascii") as file:
            file.write("agent")
    except OSError:
        pass  # only for people
    from microguest.agent.main import run as serve

    serve()
    return 0


def print_versions() -> int:
    """One component a line."""
    from _guest_build import VERSIONS

    for component, version in VERSIONS.items():
        print(component, version)
    return 0


def print_imports() -> int:
    """Every module that PID 1 has loaded when its listener is open, one a line."""
    import microguest.guest.plainjson  # what guest.record loads when it reads the boot config
    import microguest.init_shim.main

    assert microguest.guest.plainjson and microguest.init_shim.main  # noqa: PT018  for their weight
    print("\n".join(sorted(sys.modules)))
    return 0
