"""How steps wait in an event loop: readiness of a plain socket, for asyncio and trio alike."""

import select
import socket
from typing import TypeVar

import anyio
from anyio.lowlevel import checkpoint

from microguest.host_client.client.steps import Steps, Wait
from microguest.host_client.client.steps import wait_for as poll

__all__ = ["run", "wait_for"]

R = TypeVar("R")


async def run(steps: Steps[R]) -> R:
    """The result of the steps. Cancelled, they clean up after themselves.

    Lets others run and notices a cancellation before them also where there is nothing to wait for.
    Nothing is awaited after them, so that a result is never lost to a cancellation: no shield of
    anyio's holds against a `cancel` of asyncio's own.
    """
    await checkpoint()
    try:
        wait = next(steps)
        while True:
            wait = steps.send(await wait_for(wait))
    except StopIteration as stop:
        result: R = stop.value
    finally:
        steps.close()
    return result


async def wait_for(wait: Wait) -> int:
    """What happened of it: poll(2)'s bits, or 0."""
    if wait.sock is None:
        await anyio.sleep(wait.seconds)
        return 0
    if not wait.seconds:  # a scope that is over at once would not look
        await checkpoint()
        return poll(wait)
    with anyio.move_on_after(wait.seconds):
        return await _ready(wait.sock, wait.events)
    return 0


async def _ready(sock: socket.socket, events: int) -> int:
    if events == select.POLLIN:
        await anyio.wait_readable(sock)
        return select.POLLIN
    if events == select.POLLOUT:
        await anyio.wait_writable(sock)
        return select.POLLOUT
    ready = 0
    closed: anyio.ClosedResourceError | None = None  # raised here, not as a group of errors
    async with anyio.create_task_group() as either:

        async def until(wanted: int) -> None:
            nonlocal ready, closed
            try:
                await _ready(sock, wanted)
                ready |= wanted
            except anyio.ClosedResourceError as error:
                closed = error
            either.cancel_scope.cancel()

        either.start_soon(until, select.POLLIN)
        either.start_soon(until, select.POLLOUT)
    if closed is not None:
        raise closed
    return ready
