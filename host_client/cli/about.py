"""`microguest info` and `microguest version`: what is here, for people and for scripts."""

import argparse

from microguest.guest import __version__
from microguest.guest.errors import MicroguestError
from microguest.host_client.cli.tell import complain, say
from microguest.host_client.cli.template import Row, formatted
from microguest.host_client.machines.bundle import find_bundle
from microguest.host_client.machines.folder import is_alive, machines_root, names, read_state

__all__ = ["info", "version"]


def version(options: argparse.Namespace) -> int:
    """Of this program, and of the guest that machines will run."""
    return told(options, versions())


def info(options: argparse.Namespace) -> int:
    """The same with the machines there are; `doctor` says what works."""
    alive = [name for name in names() if is_alive(name)]
    states = [read_state(name) for name in alive]
    paused = sum(1 for state in states if state is not None and state.paused)
    counts = {
        "Machines": len(names()),
        "Running": len(alive) - paused,
        "Paused": paused,
        "Stopped": len(names()) - len(alive),
        "StateFolder": machines_root(),
    }
    return told(options, {**versions(), **counts})


def versions() -> dict[str, object]:
    """By field; "" where there is no guest bundle that can be used, and a line says why."""
    found: dict[str, object] = {"Version": __version__, "GuestVersion": "", "Kernel": ""}
    try:
        manifest = find_bundle().manifest
    except (MicroguestError, OSError) as error:
        complain(str(error))
        return found
    guest = manifest.versions.get("microguest", "")
    return {**found, "GuestVersion": guest, "Kernel": manifest.kernel_release}


def told(options: argparse.Namespace, row: Row) -> int:
    """A line for each, or what --format makes of it."""
    if options.format not in (None, "", "table"):
        formatted([row], options.format, tuple(row))
        return 0
    for name, value in row.items():
        say(f"{name + ':':<14}{value}".rstrip())
    return 0
