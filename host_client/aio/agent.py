"""The agent of one machine, for asyncio and trio. The logic is `client.operations`'s."""

from collections.abc import Mapping, Sequence
from typing import Self, Unpack

from microguest.guest import bounds
from microguest.guest.boot.network import Interface
from microguest.guest.wire.messages import InfoResult, PingResult, ProcessInfo
from microguest.guest.wire.renewal import Renewed
from microguest.host_client.aio.process import Process
from microguest.host_client.aio.waiting import run
from microguest.host_client.client import clock as renewal
from microguest.host_client.client.address import Address
from microguest.host_client.client.agent import Agent as BlockingAgent
from microguest.host_client.client.clock import GuestClock
from microguest.host_client.client.operations import Driver
from microguest.host_client.client.process_connection import Exchange
from microguest.host_client.client.request import (
    Options,
    attach_record,
    check_reading,
    exec_record,
    start_record,
)
from microguest.host_client.client.result import Result
from microguest.host_client.client.streams import MAX_OUTPUT, MAX_UNREAD
from microguest.host_client.connecting import agent_at
from microguest.host_client.forking import Rooted
from microguest.host_client.values import Argument, Buffer, check_flag

__all__ = ["Agent", "connect"]


async def connect(
    url: str,
    *,
    token: str | None = None,
    timeout: float = 10.0,  # noqa: ASYNC109  of every later request as well
    step_clock: bool = True,
) -> "Agent":
    """As `microguest.connect`: the same URLs, names, waits and errors."""
    check_flag(step_clock, "step_clock")
    agent = Agent(agent_at(url, token=token, timeout=timeout).driver)
    agent.driver.keeps_clock = step_clock
    try:
        await agent.ping()
    except BaseException:
        agent.close()
        raise
    return agent


class Agent(Rooted):
    """As `microguest.Agent`, and for any number of tasks. An async context manager.

    Made by `connect`, or for a machine of this program by `Agent.of(machine.agent)`.
    """

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    @classmethod
    def of(cls, agent: BlockingAgent) -> Self:
        """The same agent; closing either of them closes the connections that they share."""
        return cls(agent.driver)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_how: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"aio.Agent({str(self.address)!r})"

    @property
    def address(self) -> Address:
        """Where it is."""
        return self.driver.address

    def close(self) -> None:
        """Close the kept connections, and end what runs in other tasks; see `Agent.close`."""
        self.driver.end()

    async def exec(
        self,
        argv: Sequence[Argument] = (),
        *,
        input: Buffer | None = None,  # noqa: A002
        check: bool = False,
        max_output: int = MAX_OUTPUT,
        **options: Unpack[Options],
    ) -> Result:
        """Run a command in the guest and collect what it writes; cancelled, it is killed."""
        check_flag(check, "check")
        start = exec_record(argv, options, input, max_output)
        result = await run(self.driver.exec(start, input, max_output))
        return result.check() if check else result

    async def start(
        self,
        argv: Sequence[Argument] = (),
        *,
        stdin: bool = False,
        tty: bool | tuple[int, int] | None = None,
        acknowledge: bool = True,
        max_unread: int = MAX_UNREAD,
        **options: Unpack[Options],
    ) -> Process:
        """Start a process and talk to it while it runs: `async with await agent.start(…)`."""
        start = start_record(argv, options, stdin=stdin, tty=tty)
        check_reading(acknowledge, max_unread)
        opened: list[Exchange] = []
        keeps = start.keep is not None
        try:
            await run(self.driver.open(start, Exchange, opened, acknowledge=keeps))
            process = Process(opened[0], acknowledge=acknowledge, max_unread=max_unread)
        except BaseException:  # interrupted: nobody would have its id
            for exchange in opened:
                exchange.abandon()
            raise
        return process

    async def attach(
        self,
        process: str = "main",
        *,
        offsets: Mapping[str, int] | None = None,
        write: bool = True,
        acknowledge: bool = True,
        max_unread: int = MAX_UNREAD,
    ) -> Process:
        """The streams of a kept process, or of the workload, whose id is "main"."""
        attach = attach_record(process, offsets, write=write)
        check_reading(acknowledge, max_unread)
        exchange = await run(self.driver.open(attach, Exchange, acknowledge=write))
        return Process(exchange, acknowledge=acknowledge, max_unread=max_unread)

    async def processes(self) -> list[ProcessInfo]:
        """What runs, and what is kept and not forgotten, in the order of the starts."""
        return await run(self.driver.processes())

    async def wait(self, process: str, timeout: float | None = None) -> Result:  # noqa: ASYNC109
        """Until a process has ended. DeadlineExceeded after `timeout` seconds."""
        return await run(self.driver.wait(process, timeout))

    async def signal(self, process: str, name: str | int, target: str = "group") -> bool:
        """Send "TERM", "SIGTERM" or 15; whether somebody was there to receive it."""
        return await run(self.driver.signal(process, name, target))

    async def forget(self, process: str) -> None:
        """Drop status and output of a kept process; one that still runs is killed first."""
        await run(self.driver.forget(process))

    async def ping(self) -> PingResult:
        """Ask whether the agent is alive; answered without waiting for anything in the guest."""
        return await run(self.driver.ping())

    async def info(self) -> InfoResult:
        """Versions, identity and state of the guest."""
        return await run(self.driver.info())

    async def clock(self) -> GuestClock:
        """What time it is in the guest, against ours: `offset` is known to `error` seconds."""
        return await run(self.driver.clock())

    async def step_clock(self, beyond: float = 0.0) -> GuestClock:
        """Set the guest's clock by ours where it is more than `beyond` seconds out.

        What was added is in `stepped`. Without being asked that is done for a clock that is more
        than 0.1 s out when a connection is made. OperationError: kernel_shared for machines without
        a kernel of their own, not_permitted.
        """
        return await run(self.driver.step_clock(beyond))

    async def renew(
        self,
        *,
        clock: bool = True,
        random: bool = True,
        hostname: str | None = None,
        machine_id: str | None = None,
        interfaces: Sequence[Interface] = (),
        check: bool = False,
    ) -> Renewed:
        """Make a restored guest one of its own: clock, random numbers, identity, addresses.

        clock: set by ours. random: fresh bytes of ours for its kernel's generator. hostname: a new
        one. machine_id: 32 hexadecimal digits, or "random". interfaces: each gets the addresses and
        routes given here and no others. What was not possible is in `failed`, by part; check: that
        raises OperationError("not_renewed").
        """
        check_flag(check, "check")
        renewed = await run(
            renewal.renew(
                self.driver,
                clock=clock,
                random=random,
                hostname=hostname,
                machine_id=machine_id,
                interfaces=interfaces,
            )
        )
        return renewal.checked(renewed) if check else renewed

    async def shutdown(self, *, grace: float = bounds.STOP_GRACE, reboot: bool = False) -> None:
        """Ask for the machine's end: TERM, `grace` seconds, KILL, power off. It is not awaited.

        `reboot`: restart instead. A machine of `boot` ends with that too, its status is "reboot".
        """
        await run(self.driver.shutdown(grace, reboot=reboot))
