"""What a machine's workload wrote to its console, without what PID 1 and the kernel say there."""

import os
import re
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import chain
from typing import Final

from guest.report import CONSOLE_MARK
from host_client.errors import MachineError
from host_client.machines.console import LogReader
from host_client.machines.folder import check_name, is_alive, machines_root, read_state

__all__ = ["console_lines", "console_looks"]

FOLLOW_EVERY: Final = 0.1  # seconds between looks at a console that is followed
# What PID 1 says, and the kernel's last words, which `quiet` does not silence.
NOT_THE_WORKLOADS: Final = re.compile(
    rb"microguest: |" + re.escape(CONSOLE_MARK.encode()) + rb"|\[ *[0-9]+\.[0-9]+\] reboot: "
)


def console_lines(name: str, *, follow: bool = False, tail: int | None = None) -> Iterator[bytes]:
    """Lines with their newlines, the last of them perhaps without one.

    tail: only so many of what is there already. follow: those that come, until the machine ends.
    MachineError where there is no such machine, running or kept.
    """
    return chain.from_iterable(console_looks(name, follow=follow, tail=tail))


def console_looks(
    name: str, *, follow: bool = False, tail: int | None = None
) -> Generator[list[bytes], None, None]:
    """The same as what each look has found, which may be nothing; none of them waits for long."""
    path = os.path.join(machines_root(), check_name(name))
    if not is_alive(name) and not os.path.isdir(path):  # the first refuses a folder of others
        raise MachineError(f"no machine named {name}: see microguest ls -a")
    return _looks(name, os.path.join(path, "console.log"), follow, tail)


def _looks(
    name: str, path: str, follow: bool, tail: int | None
) -> Generator[list[bytes], None, None]:
    # Of a virtual machine the console is a terminal, which writes \r\n for \n (ONLCR); what the
    # program wrote is what is left without that. In namespaces it is a pipe.
    state = read_state(name)
    end = b"\r\n" if state is None or state.machine != "namespaces" else b"\n"
    rest = b""
    with closing(LogReader(path)) as log:
        while True:
            alive = follow and is_alive(name)  # before the last look, so that it misses nothing
            *whole, rest = (rest + log.read()).split(b"\n")
            lines = [line + b"\n" for line in whole]
            if not alive and rest:
                lines.append(rest)
            lines = [
                line.replace(end, b"\n") for line in lines if not NOT_THE_WORKLOADS.match(line)
            ]
            yield lines if tail is None else list(deque(lines, maxlen=tail))
            if not alive:
                return
            tail = None
            time.sleep(FOLLOW_EVERY)
