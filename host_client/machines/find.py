"""Machines that another program started: by name, through their folders."""

import contextlib
import os
import select
import signal
import time
from functools import partial
from typing import Final, Self

from microguest.guest import bounds
from microguest.guest.record import Record
from microguest.host_client.client.address import parse
from microguest.host_client.client.agent import Agent
from microguest.host_client.client.clock import STEP_BEYOND, GuestClock
from microguest.host_client.errors import MachineError
from microguest.host_client.machines import control
from microguest.host_client.machines.folder import (
    bury,
    check_name,
    is_alive,
    machines_root,
    read_state,
)
from microguest.host_client.machines.holder import monitor_of
from microguest.host_client.machines.kin import end_descendants, pid_of
from microguest.host_client.machines.plan import SIGNALLED, End, MachineState

__all__ = ["FoundMachine", "agent_of", "find"]

TOKEN_MAX: Final = bounds.TOKEN_MAX
LOOK_EVERY: Final = 0.01  # seconds between looks at the state of a machine that is to change


def agent_of(name: str, *, timeout: float = 10.0) -> Agent:
    """The agent of a running machine of this user. MachineError where none is, or it is paused."""
    machine = find(name)
    if machine.state.paused:
        raise MachineError(
            f"machine {name} is paused, and answers nothing: microguest unpause {name}"
        )
    agent = machine.agent(timeout=timeout)
    try:
        agent.ping()
    except BaseException:
        agent.close()
        raise
    return agent


def find(name: str) -> "FoundMachine":
    """A running machine. MachineError where none of that name runs.

    Whether its state can be read does not matter: it can be ended in any case.
    """
    check_name(name)
    state = read_state(name)
    if not is_alive(name):
        if state is not None and state.ended:
            raise MachineError(state.describe_end())
        raise MachineError(f"no machine named {name} runs: see microguest ls")
    return FoundMachine(name, state)


class FoundMachine:
    """A machine that runs, held by nothing but its name."""

    def __init__(self, name: str, state: MachineState | None) -> None:
        self.name = name
        self.started = state or MachineState(name=name)

    @property
    def state(self) -> MachineState:
        """The state on disk; after a machine that keeps none has ended, the one found first."""
        return read_state(self.name) or self.started

    def agent(self, *, timeout: float = 10.0) -> Agent:
        """Its agent, not dialled yet. MachineError where its state does not say where that is."""
        url = self.state.url
        if not url:
            raise MachineError(
                f"the state of machine {self.name} cannot be read: it is only being started (then "
                f"try again), or can be no more than ended: microguest stop {self.name}"
            )
        path = os.path.join(machines_root(), self.name, "token")
        try:
            with open(path, "rb") as file:
                token = file.read(TOKEN_MAX).decode("ascii")
        except (OSError, UnicodeDecodeError) as error:
            raise MachineError(f"cannot read the token of machine {self.name}: {error}") from error
        return Agent(parse(url), token, timeout=timeout, obituary=self._obituary)

    def pause(self) -> None:
        """As `Machine.pause`."""
        with Watch(self) as watch:
            control.set_paused(watch, True)

    def resume(self) -> GuestClock:
        """As `Machine.resume`."""
        with Watch(self) as watch, self.agent() as agent:
            control.set_paused(watch, False)
            return agent.step_clock(STEP_BEYOND)

    def stop(self, grace: float = bounds.STOP_GRACE) -> None:
        """End it as `Machine.stop` does, and wait until nothing of it runs."""
        with Watch(self) as watch:
            if not control.end_well(watch, partial(self._shut_down, grace), grace):
                self._kill(watch)

    def _shut_down(self, grace: float) -> None:
        with self.agent() as agent:
            agent.shutdown(grace=grace)

    def kill(self) -> None:
        """End it at once, without a word to what runs in it, and wait until nothing of it runs."""
        with Watch(self) as watch:
            self._kill(watch)

    def _kill(self, watch: "Watch") -> None:
        """Ask its monitor; where that is deaf, kill it, and by that the VMM."""
        watch.send(End())
        if not watch.wait(control.KILL_WAIT):
            watch.kill()
            if not watch.wait(control.KILL_WAIT):
                raise control.not_ended(self.name, watch.pid)
            bury(self.name)

    def _obituary(self, seconds: float) -> str:
        deadline = time.monotonic() + seconds
        while is_alive(self.name):
            state = read_state(self.name)
            if state is not None and state.ended:
                return state.describe_end()
            if time.monotonic() >= deadline:
                return ""
            time.sleep(0.05)
        return self.state.describe_end() or f"machine {self.name} has ended"


class Watch:
    """The monitor's process of a machine, so that its end can be awaited and not mistaken.

    MachineError where there is none yet.
    """

    def __init__(self, machine: FoundMachine) -> None:
        self._machine = machine
        self._pidfd = -1

    def __enter__(self) -> Self:
        self._pidfd = monitor_of(self._machine.name, self._machine.started.monitor)
        if self._pidfd < 0 and is_alive(self._machine.name):
            raise MachineError(f"machine {self._machine.name} is only being started: try again")
        return self

    def __exit__(self, *_how: object) -> None:
        self._close()

    def wait(self, seconds: float) -> bool:
        """Whether it has ended within that time."""
        if self._pidfd < 0:
            return True
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(int(seconds * 1000)))

    def listen(self, seconds: float) -> MachineState:
        """The state, after at most that time; the monitor writes it whenever it changes."""
        time.sleep(min(seconds, LOOK_EVERY))
        return self._machine.state

    def send(self, command: Record) -> None:
        """Give a command, as a signal."""
        self._signal(next(number for number, each in SIGNALLED.items() if each == command))

    def kill(self) -> None:
        """End a monitor that does not answer, behind its VMM, which could outlive it."""
        if self._pidfd >= 0:
            with contextlib.suppress(OSError):  # no descriptor is left for it
                end_descendants(self._pidfd, control.VMM_WAIT)
        self._signal(signal.SIGKILL)

    @property
    def pid(self) -> int:
        """Its number; -1 where it was reaped."""
        return pid_of(self._pidfd)

    def _signal(self, number: int) -> None:
        """If it still is there."""
        if self._pidfd >= 0:
            try:
                signal.pidfd_send_signal(self._pidfd, number)
            except ProcessLookupError:
                pass

    def _close(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
