"""The machines of this user, by their names, whichever program has started them.

What a program and the command line can do with them is written here once.
"""

import time
from collections.abc import Iterator
from itertools import chain
from types import TracebackType
from typing import Final, Self

from microguest.guest import bounds
from microguest.guest.record import Record
from microguest.host_client.client.agent import Agent
from microguest.host_client.client.clock import GuestClock
from microguest.host_client.errors import MachineError
from microguest.host_client.forking import Rooted
from microguest.host_client.machines.control import still_runs
from microguest.host_client.machines.find import FoundMachine, Watch
from microguest.host_client.machines.find import find as find_running
from microguest.host_client.machines.folder import (
    check_name,
    is_alive,
    names,
    read_state,
    sweep,
)
from microguest.host_client.machines.logs import console_looks
from microguest.host_client.machines.plan import MachineState
from microguest.host_client.machines.when import Moment
from microguest.host_client.values import check_flag, check_seconds, check_timeout, text

__all__ = ["MachineInfo", "NamedMachine", "find", "is_another", "list_machines"]

ENDED_SHOWN: Final = 40  # characters of how it ended, in a list
LOOK_EVERY: Final = 0.05  # seconds between looks at the state of a machine that is awaited


class MachineInfo(Record):
    """One machine in a list.

    name       the machine's
    machine    "qemu", "namespaces"; "" where its state cannot be read
    image      as it was named
    command    of its process, shortened
    phase      as MachineState.phase, or "unknown": its state cannot be read
    status     for people: "starting", "up", "up (paused)", "restarting (1)", "exited (0)", or how
               it ended
    running    something of it runs
    paused     its processors stand still
    created    seconds since the epoch
    exit_code  its command's, as a shell has it; None: it runs, or there is none
    agent      as MachineState.agent
    labels     as they were given
    """

    name: str
    machine: str = ""
    image: str = ""
    command: str = ""
    phase: str = "starting"
    status: str = "starting"
    running: bool = False
    paused: bool = False
    created: float = 0.0
    exit_code: int | None = None
    agent: str = ""
    labels: dict[str, str] = {}  # noqa: RUF012  frozen by convention


def list_machines(*, all: bool = False) -> list[MachineInfo]:  # noqa: A002  docker's word
    """The machines of this user that run, in the order of their names.

    all: those too that have ended and whose state is kept. What dead ones have left is removed.
    """
    check_flag(all, "all")
    sweep()
    found = [info(name) for name in names()]
    return [each for each in found if all or each.running]


def info(name: str) -> MachineInfo:
    """What is known of the machine, whether it runs or not."""
    running = is_alive(name)
    state = read_state(name) or MachineState(name=name, phase="unknown")
    exited = state.workload_exited
    ended = exited is not None and exited.restart_in is None
    return MachineInfo(
        name=name,
        machine=state.machine,
        image=state.image,
        command=state.command,
        phase=state.phase if running else "ended",
        status=status(state, running=running),
        running=running,
        paused=running and state.paused,
        created=state.created,
        exit_code=exited.shell_code if exited is not None and ended else None,
        agent=state.agent if running else "",
        labels=dict(state.labels),
    )


def status(state: MachineState, *, running: bool) -> str:
    """How it is, in a word or two."""
    exited = state.workload_exited
    if not running:
        if exited is not None:
            return f"exited ({exited.shell_code})"
        return shortened(" ".join((state.error or state.status or "gone").split()))
    if state.phase != "running":
        return state.phase
    if exited is not None and exited.restart_in is not None:
        return f"restarting ({exited.shell_code})"
    if state.paused:
        return "up (paused)"
    return "up" if state.agent == "serving" else f"up (agent {state.agent})"


def shortened(text: str) -> str:
    """At most ENDED_SHOWN characters, and whole words where it has any."""
    if len(text) <= ENDED_SHOWN:
        return text
    kept = text[: ENDED_SHOWN - 1]
    return f"{kept[: kept.rfind(' ')] if ' ' in kept else kept}…"


def find(name: str) -> "NamedMachine":
    """The machine of that name of this user, running or ended and kept. MachineError: none such."""
    check_name(text(name, "name"))
    if read_state(name) is None and not is_alive(name):
        raise MachineError(f"no machine named {name}: microguest ls -a lists all")
    return NamedMachine(name)


def is_another(state: MachineState, than: MachineState) -> bool:
    """Whether it is of a later machine of that name. One that is only being started has no time."""
    return than.created > 0 and state.created > than.created


class NamedMachine(Rooted):
    """A machine, held by nothing but its name: it goes on when this program ends.

    Made by `find`. Leaving its `with` block closes the connections to its agent, no more.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._agent: Agent | None = None
        self._last = read_state(name) or MachineState(name=name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"NamedMachine({self.name!r}, {self.info.status})"

    def close(self) -> None:
        """Close what is kept open to its agent. May be called again."""
        if self._agent is not None:
            self._agent.close()
            self._agent = None

    @property
    def agent(self) -> Agent:
        """Its agent, not dialled yet. MachineError where the machine does not run."""
        if self._agent is None:
            self._agent = self._running().agent()
        return self._agent

    @property
    def info(self) -> MachineInfo:
        """As in `list_machines`."""
        return info(self.name)

    @property
    def state(self) -> MachineState:
        """All that is known of it; of one that has ended and keeps nothing, what was known last."""
        found = read_state(self.name)
        if found is not None and found.created >= self._last.created:
            self._last = found
        return self._last

    def logs(
        self,
        *,
        follow: bool = False,
        tail: int | None = None,
        since: Moment | None = None,
        until: Moment | None = None,
        timestamps: bool = False,
    ) -> Iterator[bytes]:
        """Lines of what its command wrote to the console, without what PID 1 says there.

        tail: only the last ones of those that are there. follow: go on until the machine ends.
        since, until: only lines that began then; a datetime, seconds since the epoch, or a text:
        "10m" ago, "2026-01-31T12:00:00Z". timestamps: before each line its time and a space.
        Empty where its command writes to its caller and not to the console. MachineError where no
        times are kept, as an older version has started it.
        """
        looks = console_looks(
            self.name, follow=follow, tail=tail, since=since, until=until, timestamps=timestamps
        )
        return chain.from_iterable(looks)

    def pause(self) -> None:
        """As `Machine.pause`."""
        self._running().pause()

    def resume(self) -> GuestClock:
        """As `Machine.resume`."""
        return self._running().resume()

    def stop(self, grace: float = bounds.STOP_GRACE) -> MachineState:
        """End it as `Machine.stop` does; returns the last state. One that has ended is fine."""
        check_seconds(grace, "grace", bounds.STOP_GRACE_MAX)
        if is_alive(self.name):
            machine = self._running()
            self.close()
            machine.stop(grace=grace)
        return self.state

    def kill(self) -> MachineState:
        """End it at once, without a word to what runs in it; returns the last state."""
        if is_alive(self.name):
            machine = self._running()
            self.close()
            machine.kill()
        return self.state

    def wait(self, timeout: float | None = None) -> MachineState:
        """Until it has ended. DeadlineExceeded after `timeout` seconds.

        The state says how, and has the exit code in `workload_exited`. Of a machine that keeps
        nothing it is what was known last, and so it is where another one has got its name since.
        """
        check_timeout(timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        last = self.state

        def is_there() -> bool:
            nonlocal last
            found = self.state
            if is_another(found, last):
                return False
            last = found
            return is_alive(self.name)

        while is_there():
            try:
                with Watch(self._running()) as watch:
                    while is_there() and not watch.wait(LOOK_EVERY):
                        self._look(deadline, timeout)
            except MachineError:  # it is only being started, or has just ended
                time.sleep(LOOK_EVERY)
            self._look(deadline, timeout)
        found = self.state
        last = last if is_another(found, last) else found
        return last if last.ended else last.replace(phase="ended")

    def _look(self, deadline: float | None, timeout: float | None) -> None:
        """Remember its state while it is there. DeadlineExceeded."""
        if self.state.ended or deadline is None or time.monotonic() <= deadline:
            return
        if is_alive(self.name):
            raise still_runs(self.name, timeout)

    def _running(self) -> FoundMachine:
        return find_running(self.name)
