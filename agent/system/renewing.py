"""The operation `renew`: what a paused or restored machine needs, part by part.

Clock, random numbers, identity, network, in this order: a new machine-id is to come out of new
random numbers. A part that fails is named in the answer, and the others are done all the same.
"""

from collections.abc import Callable
from typing import Any

from microguest.agent.channel import Channel
from microguest.agent.state import Agent
from microguest.agent.system import entropy, identity
from microguest.agent.system.clock import has_own_kernel, step
from microguest.agent.threads import in_thread
from microguest.guest.errors import OperationError
from microguest.guest.record import Record
from microguest.guest.wire.connection import Event
from microguest.guest.wire.renewal import Renew, Renewed

__all__ = ["renew"]


async def renew(agent: Agent, _channel: Channel, args: Record, _early: list[Event]) -> Record:
    """Do what is asked. Raises OperationError not_ready where the root is not in place."""
    assert isinstance(args, Renew)
    await agent.wait_root()
    renewal = Renewal(agent, args)
    renewal.set_clock()
    if renewal.for_thread:
        try:
            await in_thread(renewal.in_thread, abandon_on_cancel=True)
        except OperationError as error:
            renewal.failed |= dict.fromkeys(renewal.for_thread, error.message)
    await renewal.readdress()
    return Renewed(**renewal.done, failed=renewal.failed)


class Renewal:
    """One request. `done`: fields of `Renewed`; `failed`: why others are missing, by part.

    `for_thread`: the parts that `in_thread` is for.
    """

    def __init__(self, agent: Agent, asked: Renew) -> None:
        self.agent = agent
        self.asked = asked
        given = {
            "random": bool(asked.seed),
            "hostname": asked.hostname is not None,
            "machine_id": asked.machine_id is not None,
        }
        self.for_thread = [part for part, is_asked in given.items() if is_asked]
        self.done: dict[str, Any] = {}
        self.failed: dict[str, str] = {}

    def set_clock(self) -> None:
        """First, so that nothing that follows is stamped with the old time."""
        realtime, boottime = self.asked.realtime, self.asked.boottime
        if realtime is not None and boottime is not None:
            self._attempt("clock", "stepped", lambda: step(self.agent, realtime, boottime))

    def in_thread(self) -> None:
        """Random numbers and identity."""
        if self.asked.seed:
            self._attempt("random", "seeded", self._seed)
            self._attempt("random", "reseeded", self._reseed)
        hostname, machine_id = self.asked.hostname, self.asked.machine_id
        if hostname is not None:
            self._attempt("hostname", "hostname", lambda: identity.set_hostname(hostname))
        if machine_id is not None:
            self._attempt("machine_id", "machine_id", lambda: identity.set_machine_id(machine_id))

    async def readdress(self) -> None:
        """Interface by interface, as the request names them."""
        if not self.asked.interfaces:
            return
        # Only here, for what it imports.
        from microguest.agent.network.readdressing import readdress

        renewed: list[str] = []
        for interface in self.asked.interfaces:
            try:
                await readdress(interface)
            except (OSError, ValueError) as error:
                self.failed.setdefault("network", f"{interface.name}: {error}")
            else:
                renewed.append(interface.name)
        self.done["interfaces"] = tuple(renewed)

    def _attempt(self, part: str, field: str, work: Callable[[], object]) -> None:
        try:
            self.done[field] = work()
        except OperationError as error:
            self.failed.setdefault(part, error.message)
        except OSError as error:
            self.failed.setdefault(part, str(error))

    def _seed(self) -> bool:
        self._own_kernel()
        entropy.seed(self.asked.seed)
        return True

    def _reseed(self) -> bool:
        self._own_kernel()
        entropy.reseed()
        return True

    def _own_kernel(self) -> None:
        if not has_own_kernel(self.agent):
            raise OperationError(
                "kernel_shared", "this guest has its host's kernel, whose random numbers it shares"
            )
