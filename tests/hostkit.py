"""Agents that do what a test says: the far end of the host's connections, as a script."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from patience import PATIENCE

from microguest.guest import bounds
from microguest.guest.wire.connection import Connection, End, Request, Response, Role, State
from microguest.guest.wire.messages import (
    FEATURES,
    Credit,
    Exited,
    Hello,
    PingResult,
    Started,
    Welcome,
)
from microguest.host_client.client.address import UnixAddress
from microguest.host_client.client.agent import Agent

E = TypeVar("E")
TOKEN = "a" * 64
Script = Callable[["Peer"], None]


class Peer:
    """The agent's end of one connection: a script says what it does."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.connection = Connection(Role.AGENT)
        self.events: list[object] = []
        self.takes_input = True  # gives credit for more as soon as some has come

    def next(self) -> object:
        while not self.events:
            data = self.sock.recv(65536)
            if not data:
                raise EOFError
            self.events += self.connection.receive(data)
            self._grant()
        return self.events.pop(0)

    def _grant(self) -> None:
        connection = self.connection
        credit, used = connection.input_credit, connection.input_bytes
        running = connection.state is State.PROCESS and credit is not None
        if self.takes_input and running and used + bounds.INPUT_WINDOW // 2 >= credit:
            self.send(Credit(stdin=used + bounds.INPUT_WINDOW))

    def send(self, *events: object) -> None:
        self.sock.sendall(b"".join(self.connection.send(event) for event in events))  # type: ignore[arg-type]

    def greet(self, features: tuple[str, ...] = FEATURES) -> Request:
        hello = self.next()
        assert isinstance(hello, Hello)
        assert hello.token == TOKEN
        self.send(Welcome(agent="test", features=features))
        request = self.next()
        assert isinstance(request, Request)
        return request

    def start(self, **fields: Any) -> Request:
        request = self.greet()
        self.send(Response(result=Started(**{"id": "1", "pid": 42, **fields})))
        return request

    def until(self, kind: type[E]) -> E:
        """The next event of that kind; others are dropped."""
        while not isinstance(event := self.next(), kind):
            pass
        return event

    def finish(self, **fields: object) -> None:
        self.send(End(stream=1), End(stream=2), Exited(**fields))


@contextmanager
def serving(path: Path, *scripts: Script) -> Iterator[str]:
    """Serve one connection with each script, in order; then nobody listens."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(16)
    failures: list[BaseException] = []

    def converse(sock: socket.socket, script: Script) -> None:
        with sock:
            try:
                script(Peer(sock))
            except (EOFError, ConnectionError):
                pass
            except BaseException as error:  # noqa: BLE001 the test's own thread reports it
                failures.append(error)

    def serve() -> None:
        threads = []
        for script in scripts:
            sock, _ = listener.accept()
            sock.settimeout(PATIENCE)
            threads.append(threading.Thread(target=converse, args=(sock, script)))
            threads[-1].start()
        listener.close()
        for each in threads:
            each.join(PATIENCE)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"unix://{path}"
    finally:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a script waits for a connection that never came"
        listener.close()
    assert not failures, failures


def agent_at(path: Path, **options: object) -> Agent:
    return Agent(UnixAddress(str(path)), TOKEN, **options)  # type: ignore[arg-type]


def answer_pings(peer: Peer) -> None:
    peer.greet()
    while True:
        peer.send(Response(result=PingResult(uptime=1.0, root_ready=True)))
        peer.next()
