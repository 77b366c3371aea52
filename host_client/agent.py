"""The agent of one machine, as the host sees it. Blocking, without threads or an event loop.

Every command has a connection of its own; small requests share a few kept ones.
"""

import os
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Final, Self, TypeVar

from guest import limits
from guest.connection import Data, Request, Response
from guest.errors import RemoteProtocolError, operation_error
from guest.messages import (
    Attach,
    Exited,
    Failure,
    Hello,
    Info,
    InfoResult,
    Ping,
    PingResult,
    Shutdown,
    ShutdownResult,
    Start,
    Welcome,
)
from guest.record import Record
from host_client.address import Address, NotListening, parse
from host_client.channel import Channel, Obituary
from host_client.deadline import Deadline
from host_client.errors import CommandFailed, ConnectError, ConnectionLost, DeadlineExceeded
from host_client.process import Output, ProcessStream
from host_client.result import Result

__all__ = ["Agent", "connect"]

IDLE_CONNECTIONS: Final = 4  # kept for small requests
REUSED_WAIT: Final = 2.0  # seconds for an answer on a kept one, before a new one is tried
RETRY_EVERY: Final = 0.01  # seconds between dials of a guest whose listener is not up
KILL_ALLOWANCE: Final = 5.0  # seconds a timed-out command gets to be killed and reported
MAX_OUTPUT: Final = 256 * 1024 * 1024  # bytes of each stream that exec holds in memory
CLIENT: Final = "microguest-host"

Argument = str | bytes | os.PathLike[str] | os.PathLike[bytes]
R = TypeVar("R", bound=Record)


def connect(url: str, *, token: str | None = None, timeout: float = 10.0) -> "Agent":
    """Reach the agent at `url` and check that it takes the token.

    `url`: vsock://CID:PORT, hybrid:///PATH[?port=PORT], unix:///PATH, or the name of a machine of
    this user, which needs no token. `timeout`: seconds for this and for every later small request.
    A guest that is still booting is waited for; a socket that nobody serves is an error at once.
    Raises ConnectError; OperationError("unauthorized") for a wrong token.
    """
    if "://" not in url:
        from host_client.machines.find import agent_of

        return agent_of(url, timeout=timeout)
    if token is None:
        raise ConnectError(f"{url} needs a token; only a machine's name goes without", url=url)
    agent = Agent(parse(url), token, timeout=timeout)
    agent.ping()
    return agent


class Agent:
    """Runs commands in a guest. Thread-safe; a context manager that closes what is kept open."""

    def __init__(
        self,
        address: Address,
        token: str,
        *,
        timeout: float = 10.0,
        obituary: Obituary = lambda _seconds: "",
    ) -> None:
        self.address = address
        self.timeout = timeout
        self.first_exec_at: float | None = None  # monotonic clock, when the first result was here
        self._token = token
        self._obituary = obituary
        self._lock = threading.Lock()
        self._idle: list[Channel] = []
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Agent({str(self.address)!r})"

    def close(self) -> None:
        """Close the kept connections. Commands that run in other threads end by themselves."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for channel in idle:
            channel.close()

    def exec(
        self,
        argv: Sequence[Argument],
        *,
        input: bytes | None = None,  # noqa: A002  the name that subprocess.run has for it
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        timeout: float | None = None,
        check: bool = False,
        max_output: int = MAX_OUTPUT,
    ) -> Result:
        """Run a command in the guest and collect what it writes.

        argv: program and arguments; a list, there is no shell. input: its stdin; None is /dev/null.
        env: merged over the image's. cwd, user: None takes the image's; user as `docker exec -u`.
        timeout: seconds after which it is killed, with its process group. check: a status other
        than 0 raises CommandFailed. max_output: bytes of stdout and of stderr, each.

        Raises StartError where the command could not be started (`code` says why), DeadlineExceeded
        with the output so far, OutputTooLarge, ConnectionLost, ConnectError.
        """
        start = Start(
            argv=words(argv),
            env=dict(env or {}),
            cwd=cwd,
            user=user,
            stdin=input is not None,
            timeout=timeout,
        )
        deadline = Deadline(None if timeout is None else timeout + self.timeout + KILL_ALLOWANCE)
        with self.open_process(start) as process:
            result = _collect(process, start, input, deadline, max_output)
        if self.first_exec_at is None:
            self.first_exec_at = time.monotonic()
        if check and result.returncode != 0:
            raise CommandFailed(f"{start.argv[0]} {result.describe()}", result=result)
        return result

    def open_process(self, start: Start) -> ProcessStream:
        """Start a process and keep its connection. Raises as `exec` does where it cannot start."""
        return self._open("start", start)

    def attach(self, process: str = "main") -> ProcessStream:
        """Take over the streams of the workload, whose id is "main"."""
        return self._open("attach", Attach(id=process))

    def ping(self) -> PingResult:
        """Ask whether the agent is alive; answered without waiting for anything in the guest."""
        return self._request("ping", Ping(), PingResult)

    def info(self) -> InfoResult:
        """Versions, identity and state of the guest."""
        return self._request("info", Info(), InfoResult)

    def shutdown(self, *, grace: float = limits.STOP_GRACE) -> None:
        """Ask for the machine's end: TERM, `grace` seconds, KILL, power off. It is not awaited."""
        self._request("shutdown", Shutdown(grace=grace), ShutdownResult)

    # ── connections ──────────────────────────────────────────────────────────────────────────────

    def _open(self, op: str, args: Record) -> ProcessStream:
        channel = self._dial(Deadline(self.timeout))
        try:
            process = ProcessStream(channel, self._hello(), op, args)
            process.wait_started(Deadline(self.timeout), Deadline(self.timeout + limits.ROOT_WAIT))
        except BaseException:
            channel.close()
            raise
        return process

    def _request(self, op: str, args: Record, kind: type[R]) -> R:
        request = Request(op=op, args=args)
        channel = self._take_idle()
        if channel is not None:
            try:
                return self._ask(channel, request, kind, Deadline(min(REUSED_WAIT, self.timeout)))
            except (ConnectionLost, DeadlineExceeded):
                pass  # stale, as after a guest's reboot or restore; every request can be repeated
        deadline = Deadline(self.timeout)
        channel = self._dial(deadline)
        channel.queue(self._hello())
        return self._ask(channel, request, kind, deadline)

    def _ask(self, channel: Channel, request: Request, kind: type[R], deadline: Deadline) -> R:
        """Send one request and wait for its answer; keep the connection where it stays usable."""
        try:
            channel.queue(request)
            while True:
                for event in channel.step(deadline):
                    match event:
                        case Welcome():
                            pass
                        case Failure():
                            raise operation_error(event.code, event.message, event.fields)
                        case Response(result=result) if isinstance(result, kind):
                            return result
                        case _:
                            name = type(event).__name__
                            raise RemoteProtocolError(f"{name} in answer to {request.op}")
        finally:
            if not (channel.ready and self._keep_idle(channel)):
                channel.close()

    def _hello(self) -> Hello:
        return Hello(token=self._token, client=CLIENT)

    def _dial(self, deadline: Deadline) -> Channel:
        """A new connection. A guest whose listener is not up yet is dialled again until then."""
        while True:
            try:
                sock = self.address.dial(deadline)
            except ConnectError as error:
                if how := self._obituary(0.0 if isinstance(error, NotListening) else 1.0):
                    raise ConnectionLost(how) from error
                if not isinstance(error, NotListening) or deadline.passed:
                    raise
                time.sleep(RETRY_EVERY)
            else:
                return Channel(sock, str(self.address), self._obituary)

    def _take_idle(self) -> Channel | None:
        while True:
            with self._lock:
                if not self._idle:
                    return None
                channel = self._idle.pop()
            if channel.usable:
                return channel
            channel.close()

    def _keep_idle(self, channel: Channel) -> bool:
        with self._lock:
            if self._closed or len(self._idle) >= IDLE_CONNECTIONS:
                return False
            self._idle.append(channel)
            return True


def words(argv: Sequence[Argument]) -> tuple[str, ...]:
    """`argv` as the wire has it. TypeError for one string, ValueError for what cannot be run."""
    if isinstance(argv, str | bytes | os.PathLike):
        raise TypeError(
            f'argv must be a list of words, not one string: write ["sh", "-c", {argv!r}] for a '
            "shell, or split it"
        )
    decoded = tuple(_word(word) for word in argv)
    if not decoded or not decoded[0]:
        raise ValueError("argv must begin with the name of a program")
    return decoded


def _word(word: Argument) -> str:
    raw = os.fspath(word)
    text = raw.decode("utf-8", "surrogateescape") if isinstance(raw, bytes) else raw
    if "\0" in text:
        raise ValueError(f"argv holds a NUL byte: {text!r:.100}")
    return text


def _collect(
    process: ProcessStream,
    start: Start,
    stdin: bytes | None,
    deadline: Deadline,
    max_output: int,
) -> Result:
    output = Output(max_output)
    if stdin is not None:
        process.write(memoryview(stdin).cast("B"))
        process.end_input()
    try:
        for event in process.events(deadline):
            if isinstance(event, Data):
                output.add(event)
    except DeadlineExceeded:
        raise _timed_out(start, output, "and the agent did not report its end") from None
    exited = process.exited
    assert isinstance(exited, Exited)
    if exited.timed_out:
        raise _timed_out(start, output, "and was killed")
    return Result.of(start.argv, exited, output.stdout, output.stderr)


def _timed_out(start: Start, output: Output, how: str) -> DeadlineExceeded:
    seconds = start.timeout or 0.0
    return DeadlineExceeded(
        f"{start.argv[0]} ran longer than {seconds:g} s {how}",
        seconds=seconds,
        stdout=output.stdout,
        stderr=output.stderr,
    )
