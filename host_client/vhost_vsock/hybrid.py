"""The host side of vsock as Firecracker does it: Unix sockets that stand for guest ports.

A host program connects to one socket, writes `CONNECT <port>\\n`, and reads `OK <n>\\n` when the
guest has accepted, or end of file when not. The other direction is one Unix socket per port. This
module ends where the port is known; it knows nothing of packets.
"""

import errno
import socket
from collections.abc import Callable
from select import EPOLLET, EPOLLIN, EPOLLRDHUP
from typing import Final

from microguest.host_client.event_loop import EventLoop, Timer
from microguest.host_client.vhost_vsock.packet import PORT_MAX

MAX_LINE: Final = 64
"""Bytes a CONNECT line may have, newline included."""
MAX_HANDSHAKES: Final = 64
"""Host programs that have connected and not yet said a port; one more is closed."""
HANDSHAKE_TIMEOUT: Final = 10.0
"""Seconds for the CONNECT line."""
_ACCEPT_BATCH: Final = 16
_ACCEPT_PAUSE: Final = 0.1
"""Seconds without accepting when the process is out of descriptors."""


def unix_dialer(prefix: str) -> Callable[[int], socket.socket | None]:
    """A `connect_to_host` that takes the guest's port P to the Unix socket `<prefix>_P`.

    Refuses (None) when nobody listens there.
    """

    def dial(port: int) -> socket.socket | None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            sock.connect(f"{prefix}_{port}")
        except OSError:  # BlockingIOError too: a full backlog is a refusal
            sock.close()
            return None
        return sock

    return dial


class HybridListener:
    """Accepts host programs; `on_dial(socket, guest_port)` gets each once it said its port."""

    def __init__(
        self,
        loop: EventLoop,
        listener: socket.socket,
        on_dial: Callable[[socket.socket, int], None],
    ) -> None:
        """Takes over `listener`, a listening AF_UNIX socket."""
        self._loop = loop
        self._listener = listener
        self._on_dial = on_dial
        self._handshakes: dict[int, tuple[socket.socket, Timer]] = {}
        self._pause: Timer | None = None
        listener.setblocking(False)
        self._listen()

    def close(self) -> None:
        """Close the listener and every connection that has not yet said its port."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove(self._listener.fileno())
        self._listener.close()
        for fd in list(self._handshakes):
            self._end_handshake(fd).close()

    def _listen(self) -> None:
        self._pause = None
        self._loop.add(self._listener.fileno(), self._on_ready, EPOLLIN)

    def _on_ready(self, _events: int) -> None:
        for _ in range(_ACCEPT_BATCH):
            try:
                sock, _address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ECONNABORTED:
                    continue
                # EMFILE, ENOMEM: the event would come back at once, for ever
                self._loop.remove(self._listener.fileno())
                self._pause = self._loop.call_later(_ACCEPT_PAUSE, self._listen)
                return
            self._welcome(sock)

    def _welcome(self, sock: socket.socket) -> None:
        if len(self._handshakes) >= MAX_HANDSHAKES:
            sock.close()
            return
        sock.setblocking(False)
        fd = sock.fileno()
        timer = self._loop.call_later(HANDSHAKE_TIMEOUT, lambda: self._end_handshake(fd).close())
        self._handshakes[fd] = (sock, timer)
        # Edge-triggered: the line is peeked at until it is whole, which must not spin.
        self._loop.add(fd, lambda events: self._on_line(fd, events), EPOLLIN | EPOLLRDHUP | EPOLLET)

    def _on_line(self, fd: int, events: int) -> None:
        sock = self._handshakes[fd][0]
        try:
            line, newline, _rest = sock.recv(MAX_LINE, socket.MSG_PEEK).partition(b"\n")
        except BlockingIOError:
            return
        except OSError:
            line = newline = b""
        if not newline and 0 < len(line) < MAX_LINE and not events & EPOLLRDHUP:
            return
        self._end_handshake(fd)
        port = _parse_connect(line) if newline else None
        if port is None:
            sock.close()
            return
        sock.recv(len(line) + 1)
        self._on_dial(sock, port)

    def _end_handshake(self, fd: int) -> socket.socket:
        sock, timer = self._handshakes.pop(fd)
        timer.cancel()
        self._loop.remove(fd)
        return sock


def _parse_connect(line: bytes) -> int | None:
    words = line.split()
    if len(words) != 2 or words[0] != b"CONNECT" or not words[1].isdigit():
        return None
    port = int(words[1])
    return port if port <= PORT_MAX else None
