"""A machine of this program: its agent, its state, its end."""

import math
import threading
from types import TracebackType
from typing import Self

from microguest.guest import bounds
from microguest.guest.report import Step
from microguest.host_client.client.address import parse
from microguest.host_client.client.agent import Agent
from microguest.host_client.client.clock import STEP_BEYOND, GuestClock
from microguest.host_client.forking import Rooted, tell_children
from microguest.host_client.machines import control
from microguest.host_client.machines.monitor_link import Link
from microguest.host_client.machines.plan import Detach, End, MachineState
from microguest.host_client.values import check_seconds, check_timeout

__all__ = ["Machine"]


class Machine(Rooted):
    """Made by `boot`. As a context manager it is stopped at the end, and nothing of it stays.

    A forked child can use its agent and look at its state, and cannot end it (MachineError): it is
    the parent's, and goes with that.
    """

    def __init__(self, link: Link, token: str) -> None:
        self._link = link
        self._closing = threading.Lock()
        tell_children(self)
        self.agent = Agent(parse(link.state.url), token, obituary=link.obituary)

    def forked(self) -> None:
        """See `Owner.forked`: the agent can be used; to end the machine is for the parent."""
        self._closing = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.held:
            return  # a forked child leaves its copy of the block; or it is detached
        if kind is not None and not issubclass(kind, Exception):
            self.kill()  # Ctrl-C: no time for a clean end
        else:
            self.stop()

    def __repr__(self) -> str:
        return f"Machine({self.name!r}, {self.state.phase})"

    @property
    def held(self) -> bool:
        """Whether it ends with its `with` block: not where detached, nor in a forked child."""
        return self._link.held

    @property
    def name(self) -> str:
        """Its name; also what `connect` and the command line take."""
        return self._link.name

    @property
    def url(self) -> str:
        """Where its agent is."""
        return self._link.state.url

    @property
    def state(self) -> MachineState:
        """All that is known of it now."""
        return self._link.listen(0.0)

    def await_change(self, seconds: float) -> MachineState:
        """The state after its next change, or after `seconds`."""
        check_seconds(seconds, "seconds")
        return self._link.listen(seconds)

    def timeline(self) -> list[Step]:
        """When what happened, in milliseconds since the launch: VMM, kernel, each step of PID 1,
        its process's start, ready, the agent's first start of a command, and that one's result."""
        steps = list(self.state.timeline)
        if self.agent.first_exec_at is not None:
            at = round((self.agent.first_exec_at - self.state.launched) * 1000, 3)
            steps.append(Step(name="first-result", start_ms=at, end_ms=at))
        return steps

    def console(self) -> str:
        """What the machine has written to its console; the last few MiB of it.

        Of a machine that ended while nobody listened, only the last lines.
        """
        self._link.listen(0.0)
        return self._link.console()

    def pause(self) -> None:
        """Let it stand still: no instruction of it is executed. Only for "qemu"; else MachineError.

        What waits for an answer of its agent meanwhile ends with an error, and so do processes that
        are not kept. A machine that is paused already is fine.
        """
        control.set_paused(self._link, True)

    def resume(self) -> GuestClock:
        """Let it go on, and set its clock by ours: `stepped` is by how much. Raises as `pause`."""
        control.set_paused(self._link, False)
        return self.agent.step_clock(STEP_BEYOND)

    def stop(self, grace: float = bounds.STOP_GRACE) -> MachineState:
        """End it: TERM to all processes, `grace` seconds, KILL, power off; then remove all of it.

        A machine that does not manage is killed POWER_OFF_WAIT seconds later. Returns the last
        state. May be called again.
        """
        check_seconds(grace, "grace", bounds.STOP_GRACE_MAX)
        self._link.check_owner()
        if not self._link.over and not self.state.ended:
            control.end_well(self._link, lambda: self.agent.shutdown(grace=grace), grace)
        return self.kill()

    def kill(self) -> MachineState:
        """End it at once, without a word to what runs in it. Returns the last state."""
        self._link.check_owner()
        with self._closing:
            self.agent.driver.close()  # what runs is told how the machine has ended
            if not self._link.over:
                self._link.send(End())
                if not self._link.await_over(control.KILL_WAIT):
                    self._link.kill()
            self._link.close()
            return self._link.state

    def wait(self, timeout: float | None = None) -> MachineState:
        """Until it has ended by itself. DeadlineExceeded after `timeout` seconds."""
        check_timeout(timeout)
        self._link.check_owner()
        if not self._link.wait(math.inf if timeout is None else timeout):
            raise control.still_runs(self.name, timeout)
        return self.kill()

    def detach(self) -> None:
        """Let it outlive this program and its `with` block. `find` and `connect` take its name.

        This object only looks on from here: what would change the machine raises MachineError.
        """
        self._link.check_owner()
        self.agent.driver.close()
        self._link.send(Detach())
        self._link.abandon()
