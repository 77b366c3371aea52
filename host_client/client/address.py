"""Where an agent is: the URLs that name it, and how each kind is dialled.

Every dial gives a connected, non-blocking stream socket or raises ConnectError within its deadline.
"""

import errno
import os
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from microguest.guest.boot.config import AGENT_PORT
from microguest.host_client.client.deadline import Deadline
from microguest.host_client.client.steps import Steps, Wait
from microguest.host_client.errors import ConnectError
from microguest.host_client.forking import close_in_children
from microguest.host_client.shortage import explain

__all__ = ["Address", "HybridAddress", "NotListening", "UnixAddress", "VsockAddress", "parse"]

FOLDER: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
SUN_PATH_MAX: Final = 107  # bytes of a Unix socket's path without its NUL, unix(7)
LINE_MAX: Final = 64  # bytes of a hybrid device's answer to CONNECT
PORT_MAX: Final = 2**32 - 1
BACKLOG_EVERY: Final = 0.002  # seconds between tries while a Unix socket's backlog is full
LOOK_EVERY: Final = 1.0  # seconds that one wait may take
REFUSED: Final = {errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE}


class NotListening(ConnectError):
    """The way to the guest exists but nobody accepts there now: it may be worth trying again."""


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A Unix stream socket that the agent listens on.

    path  of the socket
    """

    path: str

    def __str__(self) -> str:
        return f"unix://{_quoted(self.path)}"

    def dial(self, deadline: Deadline) -> Steps[socket.socket]:
        """Connect. ConnectError where nobody listens."""
        return connect_unix(self.path, deadline, self.__str__)


@dataclass(frozen=True, slots=True)
class VsockAddress:
    """A vsock address, reached through the host's kernel.

    cid   the machine's context id
    port  the agent's
    """

    cid: int
    port: int

    def __str__(self) -> str:
        return f"vsock://{self.cid}:{self.port}"

    def dial(self, deadline: Deadline) -> Steps[socket.socket]:
        """Connect. NotListening where the guest or its listener is not up."""
        if not hasattr(socket, "AF_VSOCK"):
            raise ConnectError(f"cannot dial {self}: this Python has no vsock", url=str(self))
        try:
            sock = close_in_children(socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM))
        except OSError as error:
            raise _connect_error(str(self), error) from error
        try:
            sock.setblocking(False)
            failed = yield from _connected(sock, (self.cid, self.port), deadline)
        except BaseException:
            sock.close()
            raise
        if failed:
            sock.close()
            reason = OSError(failed, os.strerror(failed))
            raise _connect_error(str(self), reason, again=failed in REFUSED)
        return sock


@dataclass(frozen=True, slots=True)
class HybridAddress:
    """A guest's vsock port behind a Unix socket that speaks Firecracker's CONNECT line.

    path  of the Unix socket
    port  the agent's vsock port
    """

    path: str
    port: int = AGENT_PORT

    def __str__(self) -> str:
        return f"hybrid://{_quoted(self.path)}?port={self.port}"

    def dial(self, deadline: Deadline) -> Steps[socket.socket]:
        """Connect and ask for the port. NotListening where the guest does not accept."""
        sock = yield from connect_unix(self.path, deadline, self.__str__)
        try:
            sock.send(b"CONNECT %d\n" % self.port)
            line = yield from _read_line(sock, deadline, str(self))
        except OSError as error:
            sock.close()
            raise _connect_error(str(self), error, again=True) from error
        except BaseException:
            sock.close()
            raise
        if not line.startswith(b"OK "):
            sock.close()
            raise ConnectError(f"{self} answered CONNECT with {line!r}, not OK", url=str(self))
        return sock


Address = UnixAddress | VsockAddress | HybridAddress


def parse(url: str) -> Address:
    """The address in a URL. ConnectError says which forms there are."""
    scheme, separator, rest = url.partition("://")
    if separator and scheme == "vsock":
        return _parse_vsock(url, rest)
    if separator and scheme == "unix" and rest.startswith("/"):
        return UnixAddress(_unquoted(rest))
    if separator and scheme == "hybrid" and rest.startswith("/"):
        path, _, query = rest.partition("?")
        name, _, port = query.partition("=")
        if query and name != "port":
            raise ConnectError(f"{url}: only port=N may follow the ?", url=url)
        return HybridAddress(_unquoted(path), _number(port, url) if query else AGENT_PORT)
    raise ConnectError(
        f"{url!r} is none of vsock://CID:PORT, hybrid:///PATH[?port=PORT], unix:///PATH", url=url
    )


def connect_unix(path: str, deadline: Deadline, url: Callable[[], str]) -> Steps[socket.socket]:
    """A non-blocking socket connected to `path`, however long that path is."""
    try:
        sock = close_in_children(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    except OSError as error:
        raise _connect_error(url(), error) from error
    folders: list[int] = []
    try:
        sock.setblocking(False)
        target = path
        if len(path) > SUN_PATH_MAX or len(os.fsencode(path)) > SUN_PATH_MAX:
            # Opened and noted in one moment, between whose halves no interrupt can come.
            folders.extend(map(os.open, (os.path.dirname(path),), (FOLDER,)))
            target = f"/proc/self/fd/{folders[0]}/{os.path.basename(path)}"
        # A full backlog is EAGAIN on a Unix socket, and poll(2) does not tell when it has room.
        while (failed := sock.connect_ex(target)) == errno.EAGAIN and not deadline.passed:
            yield Wait(None, 0, deadline.within(BACKLOG_EVERY))
    except (OSError, ValueError) as error:
        sock.close()
        raise _connect_error(url(), error) from error
    except BaseException:
        sock.close()
        raise
    finally:
        for folder in folders:
            os.close(folder)
    if failed:
        sock.close()
        if failed == errno.EAGAIN:
            raise ConnectError(f"{url()} did not accept in {deadline.seconds} s", url=url())
        raise _connect_error(url(), OSError(failed, os.strerror(failed)))
    return sock


def _connected(sock: socket.socket, target: tuple[int, int], deadline: Deadline) -> Steps[int]:
    """0, or the errno with which connecting failed."""
    failed = sock.connect_ex(target)
    while failed in (errno.EINPROGRESS, errno.EALREADY):
        if deadline.passed:
            return errno.ETIMEDOUT
        if (yield Wait(sock, select.POLLOUT, deadline.within(LOOK_EVERY))):
            failed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return failed


def _parse_vsock(url: str, rest: str) -> VsockAddress:
    cid, colon, port = rest.partition(":")
    if not colon:
        raise ConnectError(f"{url}: write vsock://CID:PORT", url=url)
    return VsockAddress(_number(cid, url), _number(port, url))


def _number(text: str, url: str) -> int:
    if text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= PORT_MAX:
        return int(text)
    raise ConnectError(f"{url}: {text!r:.40} is not a number from 0 to {PORT_MAX}", url=url)


def _read_line(sock: socket.socket, deadline: Deadline, url: str) -> Steps[bytes]:
    """The device's answer, and not a byte of what the guest says after it."""
    line = b""
    while len(line) < LINE_MAX:
        ready = yield Wait(sock, select.POLLIN, deadline.within(LOOK_EVERY))
        if not ready or deadline.overdue:
            if deadline.passed:
                raise ConnectError(f"{url} did not answer in {deadline.seconds} s", url=url)
            continue
        peeked = sock.recv(LINE_MAX - len(line), socket.MSG_PEEK)
        if not peeked:
            raise NotListening(f"{url}: the guest does not accept there (yet)", url=url)
        head, newline, _ = peeked.partition(b"\n")
        line += sock.recv(len(head) + len(newline))
        if newline:
            return line[:-1]
    raise ConnectError(f"{url} answered CONNECT with an endless line", url=url)


def _connect_error(url: str, error: Exception, *, again: bool = False) -> ConnectError:
    kind = NotListening if again else ConnectError
    reason = explain(error) if isinstance(error, OSError) else error
    return kind(f"cannot reach {url}: {reason}", url=url)


def _quoted(path: str) -> str:
    from urllib.parse import quote

    return quote(path, errors="surrogateescape")


def _unquoted(path: str) -> str:
    from urllib.parse import unquote

    return unquote(path, errors="surrogateescape")
