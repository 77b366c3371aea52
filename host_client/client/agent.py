"""The agent of one machine, as the host sees it. Blocking, without threads or an event loop."""

from collections.abc import Mapping, Sequence
from typing import Self, Unpack

from microguest.guest import bounds
from microguest.guest.boot.network import Interface
from microguest.guest.wire.messages import Attach, InfoResult, PingResult, ProcessInfo, Start
from microguest.guest.wire.renewal import Renewed
from microguest.host_client.client import clock as renewal
from microguest.host_client.client.address import Address, parse
from microguest.host_client.client.channel import Obituary
from microguest.host_client.client.clock import GuestClock
from microguest.host_client.client.operations import Driver
from microguest.host_client.client.process import Process, ProcessStream
from microguest.host_client.client.process_connection import Exchange
from microguest.host_client.client.request import (
    Options,
    attach_record,
    check_reading,
    exec_record,
    start_record,
)
from microguest.host_client.client.result import Result
from microguest.host_client.client.steps import run
from microguest.host_client.client.streams import MAX_OUTPUT, MAX_UNREAD
from microguest.host_client.errors import ConnectError
from microguest.host_client.forking import Rooted
from microguest.host_client.values import Argument, Buffer, check_flag, text

__all__ = ["Agent"]


class Agent(Rooted):
    """Runs commands in a guest. Thread-safe; a context manager that closes what is kept open."""

    def __init__(
        self,
        address: Address,
        token: str,
        *,
        timeout: float = 10.0,
        obituary: Obituary | None = None,
    ) -> None:
        self.driver = Driver(address, token, timeout=timeout, obituary=obituary)

    @classmethod
    def at(cls, url: str, *, token: str | None = None, timeout: float = 10.0) -> "Agent":
        """By URL, without dialling yet; a machine's name is for `connect`. ConnectError."""
        address = parse(text(url, "url"))
        if token is None:
            raise ConnectError(f"{url} needs a token; only a machine's name goes without", url=url)
        return cls(address, token, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_how: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Agent({str(self.address)!r})"

    @property
    def address(self) -> Address:
        """Where it is."""
        return self.driver.address

    @property
    def timeout(self) -> float:
        """Seconds for a small request, and for the agent's greeting."""
        return self.driver.timeout

    @property
    def first_exec_at(self) -> float | None:
        """When the first result of a command was here, on the monotonic clock."""
        return self.driver.first_exec_at

    def close(self) -> None:
        """Close the kept connections, and end what runs in other threads: ConnectionLost there.

        A `Process` has a connection of its own, and goes on. So does this object: the next call
        connects anew.
        """
        self.driver.end()

    def exec(
        self,
        argv: Sequence[Argument] = (),
        *,
        input: Buffer | None = None,  # noqa: A002  the name that subprocess.run has for it
        check: bool = False,
        max_output: int = MAX_OUTPUT,
        **options: Unpack[Options],
    ) -> Result:
        """Run a command in the guest and collect what it writes.

        argv: program and arguments, a list. input: its stdin; None is /dev/null. check: a status
        other than 0 raises CommandFailed. max_output: bytes of stdout and of stderr, each; beyond
        it the command is killed. options: see `microguest.Options`.

        Raises StartError where the command could not be started (`code` says why), DeadlineExceeded
        with the output so far, OutputTooLarge, ConnectionLost, ConnectError.
        """
        check_flag(check, "check")
        start = exec_record(argv, options, input, max_output)
        result = run(self.driver.exec(start, input, max_output))
        return result.check() if check else result

    def start(
        self,
        argv: Sequence[Argument] = (),
        *,
        stdin: bool = False,
        tty: bool | tuple[int, int] | None = None,
        acknowledge: bool = True,
        max_unread: int = MAX_UNREAD,
        **options: Unpack[Options],
    ) -> Process:
        """Start a process and talk to it while it runs.

        stdin: it reads what is written; False is /dev/null. tty: a terminal of (rows, columns), or
        True for one as large as ours; its output is all stdout. acknowledge: what a kept process
        wrote may be forgotten by the agent once it was read here; False leaves it to
        `Process.acknowledge`. max_unread: bytes of each output that wait here for a reader. Raises
        as `exec` does where it cannot start.
        """
        start = start_record(argv, options, stdin=stdin, tty=tty)
        check_reading(acknowledge, max_unread)
        opened: list[Exchange] = []
        keeps = start.keep is not None
        try:
            run(self.driver.open(start, Exchange, opened, acknowledge=keeps))
            process = Process(opened[0], acknowledge=acknowledge, max_unread=max_unread)
        except BaseException:  # interrupted: nobody would have its id
            for exchange in opened:
                exchange.abandon()
            raise
        return process

    def attach(
        self,
        process: str = "main",
        *,
        offsets: Mapping[str, int] | None = None,
        write: bool = True,
        acknowledge: bool = True,
        max_unread: int = MAX_UNREAD,
    ) -> Process:
        """The streams of a kept process, or of the workload, whose id is "main".

        offsets: by output, the number of the first byte wanted, as `Process.offsets` had it; -1 is
        only what comes from now on; None is from the oldest that is retained. write: feed its
        stdin, which one connection can do at a time; False only watches.
        NoSuchProcess; StdinTaken where `write` is true and another host has it.
        """
        attach = attach_record(process, offsets, write=write)
        check_reading(acknowledge, max_unread)
        exchange = run(self.driver.open(attach, Exchange, acknowledge=write))
        return Process(exchange, acknowledge=acknowledge, max_unread=max_unread)

    def open_process(self, request: Start | Attach) -> ProcessStream:
        """A process as bare events, for select(2). Raises as `start` and `attach` do."""
        return run(self.driver.open(request, ProcessStream))

    def processes(self) -> list[ProcessInfo]:
        """What runs, and what is kept and not forgotten, in the order of the starts."""
        return run(self.driver.processes())

    def wait(self, process: str, timeout: float | None = None) -> Result:
        """Until a process has ended. DeadlineExceeded after `timeout` seconds.

        NoSuchProcess where it is not known any more.
        """
        return run(self.driver.wait(process, timeout))

    def signal(self, process: str, name: str | int, target: str = "group") -> bool:
        """Send "TERM", "SIGTERM" or 15; whether somebody was there to receive it.

        target: the "process", its "group" or its whole "tree". ValueError for unknown ones.
        """
        return run(self.driver.signal(process, name, target))

    def forget(self, process: str) -> None:
        """Drop status and output of a kept process; one that still runs is killed first."""
        run(self.driver.forget(process))

    def ping(self) -> PingResult:
        """Ask whether the agent is alive; answered without waiting for anything in the guest."""
        return run(self.driver.ping())

    def info(self) -> InfoResult:
        """Versions, identity and state of the guest."""
        return run(self.driver.info())

    def clock(self) -> GuestClock:
        """What time it is in the guest, against ours: `offset` is known to `error` seconds."""
        return run(self.driver.clock())

    def step_clock(self, beyond: float = 0.0) -> GuestClock:
        """Set the guest's clock by ours where it is more than `beyond` seconds out.

        What was added is in `stepped`. Without being asked that is done for a clock that is more
        than 0.1 s out when a connection is made. OperationError: kernel_shared for machines without
        a kernel of their own, not_permitted.
        """
        return run(self.driver.step_clock(beyond))

    def renew(
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
        renewed = run(
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

    def shutdown(self, *, grace: float = bounds.STOP_GRACE, reboot: bool = False) -> None:
        """Ask for the machine's end: TERM, `grace` seconds, KILL, power off. It is not awaited.

        `reboot`: restart instead. A machine of `boot` ends with that too, its status is "reboot".
        """
        run(self.driver.shutdown(grace, reboot=reboot))
