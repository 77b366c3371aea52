"""Work that has to wait, written once for every way of waiting.

A step function is a generator. Where it cannot go on it yields a `Wait`, and is sent what happened:
poll(2)'s bits, or 0 where nothing did in time. What it returns is its result. It never blocks.
`run` drives one with poll(2); `microguest.aio` does it with an event loop.
"""

import select
import socket
import time
from collections.abc import Generator
from typing import TypeVar

from microguest.host_client.client.deadline import Deadline

__all__ = ["Steps", "Wait", "run", "until", "wait_for"]

R = TypeVar("R")


class Wait:
    """Until `sock` is ready for one of `events`, at most `seconds`; with None just that time."""

    __slots__ = ("events", "seconds", "sock")

    def __init__(self, sock: socket.socket | None, events: int, seconds: float) -> None:
        self.sock = sock
        self.events = events
        self.seconds = seconds


Steps = Generator[Wait, int, R]


def run(steps: Steps[R]) -> R:
    """The result of the steps, waiting in this thread."""
    try:
        wait = next(steps)
        while True:
            wait = steps.send(wait_for(wait))
    except StopIteration as stop:
        result: R = stop.value
        return result  # with no call in between, at which an interrupt could take the result away
    except BaseException:
        steps.close()  # Ctrl-C while we wait: they clean up after themselves
        raise


def until(deadline: Deadline, steps: Steps[R]) -> Steps[R | None]:
    """The result of the steps, or None where the deadline comes first."""
    try:
        wait = next(steps)
        while not deadline.passed:
            ready = yield Wait(wait.sock, wait.events, deadline.within(wait.seconds))
            wait = steps.send(ready)
    except StopIteration as stop:
        result: R = stop.value
        return result
    finally:
        steps.close()
    return None


def wait_for(wait: Wait) -> int:
    """What happened of it: poll(2)'s bits, or 0."""
    if wait.sock is None:
        time.sleep(wait.seconds)
        return 0
    poll = select.poll()
    poll.register(wait.sock, wait.events)
    ready = poll.poll(int(1000 * wait.seconds) + 1 if wait.seconds else 0)
    return ready[0][1] if ready else 0
