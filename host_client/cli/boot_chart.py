"""`microguest boot-chart`: where the time of a machine's boot went."""

import argparse
import contextlib
import json
import os

from microguest.host_client.cli.output import write_all
from microguest.host_client.errors import MachineError
from microguest.host_client.machines.chart import boot_chart
from microguest.host_client.machines.folder import check_name, read_state
from microguest.host_client.machines.plan import MachineState
from microguest.host_client.shortage import explain

__all__ = ["main"]


def main(options: argparse.Namespace) -> int:
    """Write the picture, or with --json the steps, to a file or to stdout."""
    state = state_of(options.name)
    if options.json:
        steps = [step.to_map() for step in state.timeline]
        text = json.dumps({"machine": state.name, "kind": state.machine, "steps": steps}, indent=1)
        return put(options.output, text + "\n")
    last = max(step.end_ms for step in state.timeline)
    subtitle = f"{state.machine}, {state.image}: {last:.0f} ms after the launch"
    chart = boot_chart(state.timeline, title=f"Boot of {state.name}", subtitle=subtitle)
    return put(options.output, chart)


def state_of(name: str) -> MachineState:
    """Of a machine that runs or whose state was kept. MachineError where nothing is known."""
    state = read_state(check_name(name))
    if state is None:
        raise MachineError(f"no machine named {name}: see microguest ls -a")
    if not state.timeline:
        raise MachineError(f"machine {name} has no boot to show yet: it is {state.phase}")
    return state


def put(path: str | None, text: str) -> int:
    """Write it whole, or leave an earlier file as it is."""
    data = text.encode("ascii", "xmlcharrefreplace")
    if path is None:
        write_all(1, data)
        return 0
    try:
        replace(path, data)
    except OSError as error:
        raise MachineError(f"cannot write {explain(error, path)}") from error
    return 0


def replace(path: str, data: bytes) -> None:
    """A file's content at once; what is no file, as /dev/stdout, is written to. Raises OSError."""
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, "wb") as file:
            file.write(data)
        return
    path = os.path.realpath(path)
    # In /tmp others can make a link of a name that they guess, and we would write where it leads.
    temporary = f"{path}.{os.urandom(8).hex()}"
    try:
        file = open(temporary, "xb")  # noqa: SIM115
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error
    with file:
        try:
            file.write(data)
            file.flush()
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
