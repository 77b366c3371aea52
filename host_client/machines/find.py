"""Machines that another program started: by name, through their folders."""

import os
import select
import signal
import time
from typing import Final, Self

from guest import limits
from guest.errors import MicroguestError
from host_client.address import parse
from host_client.agent import Agent
from host_client.errors import ConnectError, ConnectionLost, MachineError
from host_client.machines import pausing
from host_client.machines.folder import (
    bury,
    check_name,
    is_alive,
    machines_root,
    read_state,
)
from host_client.machines.holder import monitor_of
from host_client.machines.machine import KILL_WAIT, POWER_OFF_WAIT
from host_client.machines.plan import PAUSE_SIGNAL, POWER_SIGNAL, RESUME_SIGNAL, MachineState
from host_client.renewal import STEP_BEYOND, GuestClock

__all__ = ["FoundMachine", "agent_of", "find"]

TOKEN_MAX: Final = limits.TOKEN_MAX
TERM_WAIT: Final = KILL_WAIT
LOOK_EVERY: Final = 0.01  # seconds between looks at the state of a machine that is to change


def agent_of(name: str, *, timeout: float = 10.0) -> Agent:
    """The agent of a running machine of this user. MachineError where there is none."""
    machine = find(name)
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
            pausing.set_paused(True, lambda: watch.signal(PAUSE_SIGNAL), self._look)

    def resume(self) -> GuestClock:
        """As `Machine.resume`."""
        with Watch(self) as watch, self.agent() as agent:
            self._unpause(watch)
            return agent.step_clock(STEP_BEYOND)

    def _unpause(self, watch: "Watch") -> None:
        pausing.set_paused(False, lambda: watch.signal(RESUME_SIGNAL), self._look)

    def _look(self, seconds: float) -> MachineState:
        """The state, after at most that time; the monitor writes it whenever it changes."""
        time.sleep(min(seconds, LOOK_EVERY))
        return self.state

    def stop(self, grace: float = limits.STOP_GRACE) -> None:
        """End it as `Machine.stop` does, and wait until nothing of it runs."""
        with Watch(self) as watch:
            try:
                if self.state.paused:
                    self._unpause(watch)
                try:
                    with self.agent() as agent:
                        agent.shutdown(grace=grace)
                except (ConnectError, ConnectionLost, MachineError):
                    watch.signal(POWER_SIGNAL)
                ended = watch.wait(grace + POWER_OFF_WAIT)
            except MicroguestError:
                ended = False
            if not ended:
                self._kill(watch)

    def kill(self) -> None:
        """End it at once, without a word to what runs in it, and wait until nothing of it runs."""
        with Watch(self) as watch:
            self._kill(watch)

    def _kill(self, watch: "Watch") -> None:
        """Ask its monitor; where that is deaf, kill it, and by that the VMM."""
        watch.signal(signal.SIGTERM)
        if not watch.wait(TERM_WAIT):
            watch.signal(signal.SIGKILL)
            watch.wait(TERM_WAIT)
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

    def signal(self, number: int) -> None:
        """Send the monitor a signal, if it still is there."""
        if self._pidfd >= 0:
            try:
                signal.pidfd_send_signal(self._pidfd, number)
            except ProcessLookupError:
                pass

    def _close(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
