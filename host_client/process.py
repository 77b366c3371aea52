"""A process connection: one process of the guest, its streams and its end.

Both `Agent.exec` and the command line drive this; it works under select(2) as well.
"""

from collections.abc import Iterator
from types import TracebackType
from typing import Final, Self

from guest import limits
from guest.connection import Data, End, Event, Request, Response
from guest.errors import RemoteProtocolError, operation_error
from guest.messages import STREAMS, Exited, Failure, Hello, Signal, Started, Welcome
from guest.record import Record
from host_client.channel import Channel
from host_client.deadline import Deadline
from host_client.errors import OutputTooLarge

__all__ = ["Output", "ProcessStream"]

STDIN: Final = 0


class ProcessStream:
    """Started or attached to. Iterate over it for Data, End and, last, Exited events."""

    def __init__(self, channel: Channel, hello: Hello, op: str, args: Record) -> None:
        self._channel = channel
        self._early: list[Event] = []  # what came together with the answer; one recv(2) at most
        self._welcomed = False
        self.started: Started | None = None
        self.exited: Exited | None = None
        channel.queue(hello, Request(op=op, args=args))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop the connection. A process that this connection started is killed by the agent."""
        self._channel.close()

    def fileno(self) -> int:
        """For select(2). Call `take` when it is readable."""
        return self._channel.fileno()

    @property
    def pending(self) -> int:
        """Bytes of stdin that are queued; write more when it is 0."""
        return self._channel.pending

    def wait_started(self, hello: Deadline, start: Deadline) -> Started:
        """Wait until the agent has greeted and then answered, each with a deadline of its own.

        StartError or OperationError where the answer is no.
        """
        while self.started is None:
            deadline = start if self._welcomed else hello
            self._early += self._checked(self._channel.step(deadline))
        return self.started

    def step(self, deadline: Deadline) -> list[Event]:
        """The next events; an empty list when only stdin moved. Empty for ever after Exited."""
        if self._early:
            early, self._early = self._early, []
            return early
        if self.exited is not None:
            return []
        return self._checked(self._channel.step(deadline))

    def take(self) -> list[Event]:
        """What is there, without waiting."""
        if self._early or self.exited is not None:
            return self.step(Deadline(0))
        return self._checked(self._channel.take())

    def check_alive(self) -> None:
        """ConnectionLost where the machine has died without a word on the connection."""
        self._channel.check_alive()

    def events(self, deadline: Deadline) -> Iterator[Event]:
        """All events until and including Exited."""
        while self.exited is None or self._early:
            yield from self.step(deadline)

    def __iter__(self) -> Iterator[Event]:
        return self.events(Deadline(None))

    def write(self, data: bytes | memoryview) -> None:
        """Queue bytes for stdin; call while `pending` is 0 to keep what is queued small.

        As with signals and the end of input, what comes after the process's end is dropped.
        """
        if self.exited is not None:
            return
        view = memoryview(data)
        for start in range(0, len(view), limits.DATA_PAYLOAD):
            self._channel.queue_data(STDIN, view[start : start + limits.DATA_PAYLOAD])

    def end_input(self) -> None:
        """No more stdin."""
        if self.exited is None:
            self._channel.queue(End(stream=STDIN))

    def signal(self, number: int, target: str = "group") -> None:
        """Send a signal to the "process" or its "group"."""
        if self.exited is None:
            self._channel.queue(Signal(signal=number, target=target))

    def _checked(self, events: list[Event]) -> list[Event]:
        """Events of the process; answers are noted and refusals raised."""
        passed: list[Event] = []
        for event in events:
            match event:
                case Welcome():
                    self._welcomed = True
                case Failure():
                    raise operation_error(event.code, event.message, event.fields)
                case Response(result=Started() as started):
                    self.started = started
                case Exited():
                    self.exited = event
                    passed.append(event)
                case Data() | End():
                    passed.append(event)
                case _:
                    raise RemoteProtocolError(f"{type(event).__name__} on a process connection")
        return passed


class Output:
    """Collects stdout and stderr in memory, each up to `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pieces: dict[int, list[bytes]] = {1: [], 2: []}
        self._sizes = {1: 0, 2: 0}

    def add(self, event: Data) -> None:
        """Keep the bytes. OutputTooLarge where that would be more than the limit."""
        self._sizes[event.stream] += len(event.data)
        if self._sizes[event.stream] > self._limit:
            name = STREAMS[event.stream]
            raise OutputTooLarge(
                f"the command wrote more than {self._limit} bytes to {name} and was killed: raise "
                "max_output, or send the output to a file",
                stream=name,
                limit=self._limit,
            )
        self._pieces[event.stream].append(event.data)

    @property
    def stdout(self) -> bytes:
        """All of stdout so far."""
        return b"".join(self._pieces[1])

    @property
    def stderr(self) -> bytes:
        """All of stderr so far."""
        return b"".join(self._pieces[2])
