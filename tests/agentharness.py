"""A running agent without PID 1, and a plain blocking host for it.

`AgentProcess` plays PID 1: it starts the frozen program under the name "agent" with one end of a
supervision pair as descriptor 3. `Host` speaks the protocol over a blocking socket and nothing
else, so that tests can also say what a proper client never would.
"""

import hashlib
import os
import pathlib
import select
import shlex
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from typing import Any, Self

import pytest
from patience import PATIENCE

from microguest.guest.boot.workload import ImageDefaults
from microguest.guest.record import Record
from microguest.guest.supervision import (
    AGENT_FD,
    MESSAGES,
    AgentReady,
    Configure,
    Deposit,
    ExecStarted,
    RootReady,
    Taken,
    Withdraw,
)
from microguest.guest.wire.connection import Connection, Data, End, Event, Request, Response, Role
from microguest.guest.wire.messages import (
    Attach,
    Exited,
    Failure,
    Hello,
    Info,
    InfoResult,
    Ping,
    PingResult,
    Resize,
    Signal,
    Start,
    Started,
    Welcome,
)

ROOT = pathlib.Path(__file__).parent.parent
TOKEN = "correct horse battery staple"
AGENT = os.environ.get("MICROGUEST_AGENT")  # a command instead of the frozen program
# Seconds that no single answer may take, but by an agent that somebody may be debugging.
WAIT = 24 * 3600.0 if AGENT else PATIENCE


def program() -> list[str]:
    """The command of the agent: the frozen program, or what MICROGUEST_AGENT says."""
    override = os.environ.get("MICROGUEST_AGENT")
    if override:
        return shlex.split(override)
    path = ROOT / "dist" / "guest" / os.uname().machine / "microguest"
    if not path.is_file():
        pytest.fail(f"{path} does not exist: build it with `make guest`")
    return [str(path)]


class AgentProcess:
    """One agent. `pid1`: PID 1's end of its pair. `ready_seconds`: from exec to ready.

    `root` None: the root is not announced. `prepare` runs in the child before exec.
    """

    def __init__(
        self,
        *,
        root: str | None = "/",
        image: ImageDefaults | None = None,
        prepare: Any = None,
    ) -> None:
        command = program()
        self.folder = tempfile.TemporaryDirectory(prefix="agent-")
        self.path = f"{self.folder.name}/agent.sock"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.path)
        listener.listen(1024)
        self.pid1, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid1.settimeout(WAIT)
        configure = Configure(
            transport="unix",
            token=TOKEN,
            image=image or ImageDefaults(),
            starts=1,
            versions={"microguest": "test"},
        )
        with theirs, listener:
            self.send(configure, [listener.fileno()])
            started = time.monotonic()
            self.popen = start_with_pair(command, theirs, prepare)
        try:
            assert isinstance(self.receive(), AgentReady)
            self.ready_seconds = time.monotonic() - started
            if root is not None:
                self.send_root(root)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self.popen.pid

    def send(self, message: Any, descriptors: Sequence[int] = ()) -> None:
        socket.send_fds(self.pid1, [MESSAGES.encode(message)], list(descriptors))

    def receive(self) -> Record:
        """The agent's next message, its deposit of itself and its first exec passed over."""
        message = self.receive_any()
        if isinstance(message, ExecStarted) or (
            isinstance(message, Deposit) and message.id == "agent"
        ):
            return self.receive()
        return message

    def receive_any(self) -> Record:
        """The agent's next message. A deposit's descriptors are closed, and it is told so."""
        message = MESSAGES.decode(self.pid1.recv(65536))
        if isinstance(message, Deposit | Withdraw):
            AgentProcess.send(self, Taken())
        return message

    def answer(self) -> None:
        """As PID 1 does at once: take what the agent has said, and tell it so."""
        while select.select([self.pid1], [], [], 0)[0]:
            self.receive_any()

    def send_root(self, root: str) -> None:
        fd = os.open(root, os.O_PATH | os.O_DIRECTORY)
        self.send(RootReady(), [fd])
        os.close(fd)

    def open_descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def children(self) -> list[int]:
        text = pathlib.Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return [int(word) for word in text.split()]

    def resident_kib(self) -> int:
        with open(f"/proc/{self.pid}/statm") as file:
            return int(file.read().split()[1]) * 4

    def close(self) -> None:
        """Be PID 1 that goes away; the agent has to end by itself."""
        self.pid1.close()
        try:
            self.popen.wait(WAIT)
        finally:
            self.popen.kill()
            self.popen.wait()
            self.folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def start_with_pair(
    command: list[str], theirs: socket.socket, prepare: Any
) -> subprocess.Popen[bytes]:
    """Exec the agent with its end of the pair as AGENT_FD.

    It inherits the end under its old number as well: one descriptor that no child may see. The
    frozen program is the agent under that name. A plain Python finds its virtual environment by its
    own, and may have a debugger in it that asks for commands.
    """
    fd = theirs.fileno()
    plain = len(command) > 1

    def before_exec() -> None:
        if prepare is not None:
            prepare()
        os.dup2(fd, AGENT_FD)
        os.set_inheritable(AGENT_FD, True)

    return subprocess.Popen(
        command if plain else ["agent"],
        executable=command[0],
        stdin=None if plain else subprocess.DEVNULL,
        pass_fds=[AGENT_FD, fd] if fd != AGENT_FD else [fd],
        preexec_fn=before_exec,  # noqa: PLW1509  no threads run while agents are started
        start_new_session=True,
    )


class Result:
    """All that a process gave."""

    def __init__(self, stdout: bytes, stderr: bytes, exited: Exited) -> None:
        self.stdout = stdout
        self.stderr = stderr
        self.exited = exited


class Refused(Exception):
    """The agent answered with an error frame."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"{failure.code}: {failure.message}")
        self.failure = failure


class Closed(Exception):
    """The agent closed the connection."""


class Host:
    """One connection to an agent."""

    def __init__(self, agent: AgentProcess, *, hello: bool = True, token: str = TOKEN) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(WAIT)
        self.sock.connect(agent.path)
        self.connection = Connection(Role.HOST)
        self.read_size = 256 * 1024  # bytes at a time
        self._events: list[Event] = []
        if hello:
            self.send(Hello(token=token, client="test"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.sock.close()

    def send(self, *events: Event) -> None:
        self.sock.sendall(b"".join(self.connection.send(event) for event in events))

    def receive(self) -> Event:
        """The next event; a Welcome is checked and passed over."""
        while not self._events:
            try:
                data = self.sock.recv(self.read_size)
            except ConnectionResetError:
                raise Closed from None
            if not data:
                raise Closed
            self._events += self.connection.receive(data)
        event = self._events.pop(0)
        if isinstance(event, Welcome):
            return self.receive()
        if isinstance(event, Failure):
            raise Refused(event)
        return event

    def request(self, op: str, args: Record) -> Record:
        self.send(Request(op=op, args=args))
        response = self.receive()
        assert isinstance(response, Response)
        return response.result

    def ping(self) -> PingResult:
        result = self.request("ping", Ping())
        assert isinstance(result, PingResult)
        return result

    def info(self) -> InfoResult:
        result = self.request("info", Info())
        assert isinstance(result, InfoResult)
        return result

    def start(self, *argv: str, **options: Any) -> Started:
        result = self.request("start", Start(argv=argv, **options))
        assert isinstance(result, Started)
        return result

    def attach(self) -> Started:
        result = self.request("attach", Attach())
        assert isinstance(result, Started)
        return result

    def send_raw(self, data: bytes) -> None:
        """Whatever bytes, past the state machine."""
        self.sock.sendall(data)

    def read_until_closed(self) -> bytes:
        """What the agent still says before it closes."""
        data = b""
        try:
            while piece := self.sock.recv(65536):
                data += piece
        except ConnectionResetError:
            pass
        return data

    def refusal(self) -> Failure:
        """The error frame that must come next."""
        try:
            event = self.receive()
        except Refused as refused:
            return refused.failure
        raise AssertionError(f"expected an error frame, got {event!r}")

    def write(self, data: bytes, *, end: bool = False) -> None:
        """Both in one piece: what reads no further may have ended before a second one is sent."""
        events: list[Event] = [Data(stream=0, data=data)] if data else []
        if end:
            events.append(End(stream=0))
        self.send(*events)

    def signal(self, number: int, target: str = "group") -> None:
        self.send(Signal(signal=number, target=target))

    def resize(self, rows: int, columns: int) -> None:
        self.send(Resize(rows=rows, columns=columns))

    def read_until(self, wanted: bytes, outputs: tuple[int, ...] = (1,)) -> bytes:
        """The next output, as far as `wanted` is in it, with what came in the same piece."""
        seen = b""
        while wanted not in seen:
            try:
                event = self.receive()
            except TimeoutError:
                raise AssertionError(f"{wanted!r} did not come, but {seen!r}") from None
            if isinstance(event, Data) and event.stream in outputs:
                seen += event.data
            assert not isinstance(event, Exited), f"{event} after {seen!r}"
        return seen

    def collect(self) -> Result:
        """Everything until the process has ended and the agent has closed."""
        outputs = {1: bytearray(), 2: bytearray()}
        while True:
            event = self.receive()
            if isinstance(event, Data):
                outputs[event.stream] += event.data
            elif isinstance(event, Exited):
                return Result(bytes(outputs[1]), bytes(outputs[2]), event)
            else:
                assert isinstance(event, End)

    def exchange(self, chunks: Iterable[bytes]) -> tuple[str, int, Exited]:
        """Feed stdin and read stdout at once: SHA-256 and size of what came back."""
        digest, size = hashlib.sha256(), 0
        source = iter(chunks)
        unsent = memoryview(b"")
        feeding = True
        while True:
            while self._events:
                event = self.receive()
                if isinstance(event, Data):
                    digest.update(event.data)
                    size += len(event.data)
                elif isinstance(event, Exited):
                    return digest.hexdigest(), size, event
            wanted = [self.sock] if feeding else []
            readable, writable, _ = select.select([self.sock], wanted, [], WAIT)
            assert readable or writable, "neither side moves"
            if readable:
                data = self.sock.recv(256 * 1024)
                if not data:
                    raise Closed
                self._events += self.connection.receive(data)
            if writable:
                if not unsent:
                    chunk = next(source, None)
                    event = End(stream=0) if chunk is None else Data(stream=0, data=chunk)
                    feeding = chunk is not None
                    unsent = memoryview(self.connection.send(event))
                sent = self.sock.send(unsent, socket.MSG_DONTWAIT)
                unsent = unsent[sent:]
                feeding = feeding or bool(unsent)


def execute(agent: AgentProcess, *argv: str, **options: Any) -> Result:
    """Start, wait, collect."""
    with Host(agent) as host:
        host.start(*argv, **options)
        return host.collect()


TIMEOUTS = (0.3, 3.0, 30.0)  # seconds; the next one where a script was not ready by then


def run_into_timeout(agent: AgentProcess, script: str, **options: Any) -> tuple[Result, float]:
    """A shell's script that says "up" when its traps are set, and the timeout that ended it then.

    On a busy machine a short timeout is over before that.
    """
    for timeout in TIMEOUTS:
        result = execute(agent, "sh", "-c", script, timeout=timeout, **options)
        if result.stdout.startswith(b"up\n"):
            return result, timeout
    raise AssertionError(f"not ready within {timeout} s: {script}")
