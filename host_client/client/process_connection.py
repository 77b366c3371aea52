"""A process connection's events: what may be said to the process, and what it says.

Shared by every kind of client; it waits by steps. `host_client.client.streams` puts streams on top.
"""

from collections import deque
from signal import SIGKILL
from typing import Final

from microguest.guest.errors import LocalProtocolError, MicroguestError, RemoteProtocolError
from microguest.guest.wire.connection import Data, End, Event, Request, Response
from microguest.guest.wire.messages import (
    STREAMS,
    Acknowledge,
    Attach,
    Credit,
    Detach,
    Exited,
    Failure,
    Hello,
    Resize,
    Signal,
    Start,
    Started,
    Welcome,
)
from microguest.host_client.client.backlog import Backlog
from microguest.host_client.client.channel import Broken, Channel
from microguest.host_client.client.deadline import Deadline
from microguest.host_client.client.steps import Steps
from microguest.host_client.errors import ConnectionLost, OutputTooLarge, refusal

__all__ = ["Exchange", "Output", "too_large"]

STDIN: Final = 0


class Exchange:
    """One process that this connection started or is attached to. Not thread-safe."""

    def __init__(self, channel: Channel, hello: Hello, args: Start | Attach) -> None:
        self.channel = channel
        self.request = args
        self.welcome: Welcome | None = None
        self.started: Started | None = None
        self.exited: Exited | None = None
        self._early: list[Event] = []  # one recv(2) at most, and what came with the answer
        self._left = False  # detached
        self._input: deque[memoryview] = deque()  # stdin that waits for credit
        self._input_ends = False  # behind it
        op = "start" if isinstance(args, Start) else "attach"
        channel.queue(hello, Request(op=op, args=args))

    def close(self) -> None:
        """Drop the connection. A process that this started is killed, unless it is kept."""
        self.channel.close()

    def fileno(self) -> int:
        """For select(2). Call `take` when it is readable."""
        return self.channel.fileno()

    @property
    def pending(self) -> int:
        """Bytes that are not with the kernel yet; write more stdin when it is 0."""
        return self.channel.pending + sum(map(len, self._input))

    @property
    def unsent(self) -> int:
        """Those of them that only wait for room in the socket, and not for the agent's credit."""
        return self.channel.pending

    @property
    def over(self) -> bool:
        """Whether nothing can be said any more: the process has ended, or we have left."""
        return self.exited is not None or self._left

    def flush(self) -> None:
        """Give the kernel what it takes now of what was queued."""
        self.channel.flush()

    def own_queued(self) -> None:
        """Copy what is still queued, so that its owner may change it."""
        self._input = deque(memoryview(bytes(piece)) for piece in self._input)
        self.channel.own_queued()

    # ── what the process says ────────────────────────────────────────────────────────────────────

    def answer(self, hello: Deadline, start: Deadline) -> Steps[Started]:
        """Wait until the agent has greeted and then answered, each with a deadline of its own.

        StartError or OperationError where the answer is no.
        """
        while self.started is None:
            yield from self._more(hello if self.welcome is None else start)
        return self.started

    def gather(self, deadline: Deadline) -> Steps[None]:
        """Wait until there is something for `early`, or only stdin has moved, or it has ended."""
        if not self._early and self.exited is None:
            yield from self._more(deadline)

    def early(self) -> list[Event]:
        """Data, End and, last, Exited: what has arrived and nobody has taken yet."""
        early, self._early = self._early, []
        return early

    def _more(self, deadline: Deadline) -> Steps[None]:
        ready = yield from self.channel.until_ready(deadline)
        try:
            self.receive(ready)
        except Broken as error:
            raise (yield from self.channel.explained(error)) from error

    def receive(self, ready: int) -> None:
        """Do what poll(2) said can be done; what arrives is for `early`. Never waits.

        Interrupted in between (Ctrl-C, a signal's handler that raises), the connection is of no use
        any more: what was taken from the socket is not all here.
        """
        try:
            self._early += self.checked(self.channel.arrived(ready))
        except (Broken, MicroguestError):
            raise
        except BaseException:
            self.torn()
            raise

    def torn(self) -> ConnectionLost:
        """What whoever receives from now on is told; and its end, which may have come, is not."""
        self.exited = None
        return self.channel.torn()

    def checked(self, events: list[Event]) -> list[Event]:
        """Events of the process; answers are noted and refusals raised."""
        passed: list[Event] = []
        credited = False
        for event in events:
            match event:
                case Welcome():
                    self.welcome = event
                case Failure():
                    raise refusal(event.code, event.message, event.fields)
                case Response(result=Started() as started):
                    self.started = started
                case Exited():
                    self.exited = event
                    self._input.clear()
                    passed.append(event)
                case Data() | End():
                    passed.append(event)
                case Credit():
                    credited = True
                case _:
                    raise RemoteProtocolError(f"{type(event).__name__} on a process connection")
        if credited and not self.over:  # its end may have come right behind
            self._feed()
            self.channel.flush()
        return passed

    # ── what is said to it; after its end all of this does nothing ───────────────────────────────

    def write(self, data: bytes | memoryview) -> None:
        """Queue bytes for stdin; call while `pending` is 0 to keep what is queued small."""
        if not self.over and len(data):
            self._input.append(memoryview(data))
            self._feed()

    def end_input(self) -> None:
        """No more stdin."""
        if not self.over:
            self._input_ends = True
            self._feed()

    def _feed(self) -> None:
        """As much of the input as there is credit for; controls go past what waits for more."""
        while self._input and (room := self.channel.input_room):
            piece = self._input.popleft()
            self.channel.queue_data(STDIN, piece[:room])
            if len(piece) > room:
                self._input.appendleft(piece[room:])
        if self._input_ends and not self._input:
            self._input_ends = False
            self.channel.queue(End(stream=STDIN))

    def say(self, control: Signal | Resize | Acknowledge) -> None:
        """Queue a control."""
        if not self.over:
            self.channel.queue(control)

    def signal(self, number: int, target: str = "group") -> None:
        """Send a signal to the "process", its "group" or its whole "tree"."""
        self.say(Signal(signal=number, target=target))

    def resize(self, rows: int, columns: int) -> None:
        """Give the terminal a size; its foreground group gets SIGWINCH also for the same one."""
        self.say(Resize(rows=rows, columns=columns))

    def acknowledge(self, *, stdout: int = 0, stderr: int = 0) -> None:
        """Nothing before these offsets is needed again. Only for who may write."""
        self.say(Acknowledge(stdout=stdout, stderr=stderr))

    def abandon(self) -> None:
        """Drop the connection of a start that nobody will get: also a kept process is ended.

        Never waits. An agent that has not got all of the request by now starts nothing.
        """
        request = self.request
        try:
            if isinstance(request, Start) and request.keep is not None and not self.over:
                # Agents that do not know `forget` do as the signal says.
                self.channel.queue(Signal(signal=SIGKILL, target="tree"), Detach(forget=True))
                self.channel.flush()
        except LocalProtocolError:
            pass  # it was refused, so that nothing was started
        finally:
            self.close()

    def detach(self) -> None:
        """Leave a kept process to itself; the agent closes the connection.

        Input that still waits for credit is dropped.
        """
        if not self.over:
            self._input.clear()
            self.channel.queue(Detach())
            self._left = True


def too_large(stream: int, limit: int) -> OutputTooLarge:
    """What to raise where a stream has more than `limit` bytes."""
    name = STREAMS[stream]
    return OutputTooLarge(
        f"the command wrote more than {limit} bytes to {name}: raise max_output, or "
        "send the output to a file",
        stream=name,
        limit=limit,
    )


class Output:
    """Collects stdout and stderr in memory, each up to `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._backlogs = {1: Backlog(), 2: Backlog()}

    def add(self, stream: int, data: bytes) -> None:
        """Keep the bytes. OutputTooLarge where that would be more than the limit."""
        backlog = self._backlogs[stream]
        if backlog.size + len(data) > self._limit:
            raise too_large(stream, self._limit)
        backlog.add(data)

    @property
    def stdout(self) -> bytes:
        """All of stdout so far."""
        return self._backlogs[1].everything()

    @property
    def stderr(self) -> bytes:
        """All of stderr so far."""
        return self._backlogs[2].everything()
