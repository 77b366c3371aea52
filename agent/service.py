"""From the listener to a handler: who may connect, and who is told no.

A connection that has not said hello costs one task and at most one read of memory, and there are
never more than `bounds.UNAUTHENTICATED` of them. Everything that can go wrong with one connection
ends here, at most that connection with it.
"""

import hmac
import socket

import trio

from microguest.agent.channel import Channel, ConnectionLost
from microguest.agent.operations import Handler
from microguest.agent.state import Agent, log
from microguest.agent.system import clock
from microguest.guest import __version__, bounds
from microguest.guest.errors import OperationError, RemoteProtocolError, raised_at
from microguest.guest.wire.connection import Event, Request, Response, State
from microguest.guest.wire.messages import FEATURES, Failure, Hello, Welcome

__all__ = ["serve"]

WELCOME = Welcome(agent=__version__, features=FEATURES)
HOST_CID = 2  # VMADDR_CID_HOST of vsock(7)
ACCEPTED_AT_ONCE = 64  # connections, before those that were accepted earlier get their turn
ACCEPT_PAUSE = 0.5  # seconds to wait when the kernel has no descriptor or memory left

Table = dict[str, Handler]  # by the names of operations


async def serve(agent: Agent, table: Table, listener: socket.socket) -> None:
    """Accept connections for ever, each served by a task of its own."""
    async with trio.open_nursery() as nursery:
        await accept_and_serve(agent, table, listener, WaitingRoom(), nursery)


async def accept_and_serve(
    agent: Agent,
    table: Table,
    listener: socket.socket,
    waiting_room: "WaitingRoom",
    nursery: trio.Nursery,
) -> None:
    """Wait for a connection, leave the listener to another task, and serve it here.

    A task for each connection beside one that accepts would have every exec begin a turn of the
    event loop later.
    """
    first, *others = await accept_waiting(agent, listener)
    for sock in others:
        nursery.start_soon(serve_connection, agent, table, waiting_room, sock)
    nursery.start_soon(accept_and_serve, agent, table, listener, waiting_room, nursery)
    await serve_connection(agent, table, waiting_room, first)


async def accept_waiting(agent: Agent, listener: socket.socket) -> list[socket.socket]:
    """At least one; all who wait, as far as ACCEPTED_AT_ONCE, where others are served already."""
    accepted: list[socket.socket] = []
    while not accepted:
        await trio.lowlevel.wait_readable(listener)
        try:
            for _ in range(ACCEPTED_AT_ONCE if agent.connections else 1):
                sock = accept_host(agent, listener)
                if sock is not None:
                    accepted.append(sock)
        except BlockingIOError:
            pass  # nobody else waits
        except OSError as error:
            log(f"cannot accept a connection: {error}")
            if not accepted:
                await trio.sleep(ACCEPT_PAUSE)
    return accepted


def accept_host(agent: Agent, listener: socket.socket) -> socket.socket | None:
    """The next that waits; None where it is gone already or not from the host. Raises OSError."""
    try:
        sock, address = listener.accept()
    except ConnectionAbortedError:
        return None
    if agent.configure.transport == "vsock" and address[0] != HOST_CID:
        sock.close()
        return None
    sock.setblocking(False)
    return sock


class WaitingRoom:
    """Connections that have not said hello, oldest first. A full room loses its oldest."""

    def __init__(self) -> None:
        self._scopes: dict[int, trio.CancelScope] = {}

    async def wait_for_hello(self, channel: Channel) -> list[Event]:
        """The hello and what came with it; [] where this connection was the oldest of too many.

        Raises OperationError hello_timeout, ConnectionLost, RemoteProtocolError.
        """
        if len(self._scopes) >= bounds.UNAUTHENTICATED:
            self._scopes.pop(next(iter(self._scopes))).cancel()
        scope = trio.CancelScope(deadline=trio.current_time() + bounds.HELLO_TIMEOUT)
        self._scopes[id(scope)] = scope
        try:
            with scope:
                return await channel.receive()
        finally:
            self._scopes.pop(id(scope), None)
        if trio.current_time() < scope.deadline:
            return []
        raise OperationError("hello_timeout", f"no hello within {bounds.HELLO_TIMEOUT} s")


async def serve_connection(
    agent: Agent, table: Table, waiting_room: WaitingRoom, sock: socket.socket
) -> None:
    """One connection from hello to its end. Raises nothing."""
    channel = Channel(sock)
    try:
        early = channel.receive_now() or await waiting_room.wait_for_hello(channel)
        if not early:
            return
        admit(agent, channel, early.pop(0))
        agent.connections += 1
        try:
            await answer_requests(agent, table, channel, early)
        finally:
            agent.connections -= 1
    except ConnectionLost:
        pass
    except OperationError as error:
        refuse(channel, error.code, error.message)
    except RemoteProtocolError as error:
        refuse(channel, error.code, str(error))
    except Exception as error:  # noqa: BLE001  one connection's bug must not end the others
        log(f"connection failed: {raised_at(error)}".replace("\n", " "))
        refuse(channel, "internal", "the agent failed; its console has the reason")
    finally:
        sock.close()
        channel.drop()


def admit(agent: Agent, channel: Channel, hello: Event) -> None:
    """Check the token and queue the welcome. Raises OperationError."""
    assert isinstance(hello, Hello)  # the protocol allows nothing else first
    token = hello.token.encode("utf-8", "surrogatepass")
    if not hmac.compare_digest(token, agent.token):
        raise OperationError("unauthorized", "the token is not this machine's")
    if agent.connections >= bounds.CONNECTIONS:
        raise OperationError("too_busy", f"{bounds.CONNECTIONS} connections are open already")
    asks = hello.clock and clock.has_own_kernel(agent)
    channel.queue(WELCOME.replace(clock=clock.clocks()) if asks else WELCOME)


async def answer_requests(
    agent: Agent, table: Table, channel: Channel, events: list[Event]
) -> None:
    """One request after the other until the host closes or a process took the connection over."""
    while True:
        if not events:
            await channel.flush()
            events = await channel.receive()
        request = events.pop(0)
        assert isinstance(request, Request)  # the protocol allows nothing else here
        try:
            result = await table[request.op](agent, channel, request.args, events)
            if result is None:
                return
            channel.queue(Response(result=result))
        except OperationError as error:
            channel.queue(Failure(code=error.code, message=error.message, fields=error.fields))
            if channel.connection.state is State.DONE:
                await channel.flush()
                return
        events = []


def refuse(channel: Channel, code: str, message: str) -> None:
    """Say why before closing, as far as the protocol and the socket still take it."""
    if channel.connection.state is State.DONE:
        return
    try:
        channel.queue(Failure(code=code, message=message))
        channel.flush_now()
    except ConnectionLost:
        pass
