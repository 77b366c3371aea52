"""The agent's end of the supervision pair: messages from PID 1 with descriptors, messages to it.

Messages are `guest.supervision`'s. What PID 1's are acted upon with is `agent.orders`.
"""

import os
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence

import trio

from microguest.agent.registry import Process
from microguest.guest import bounds
from microguest.guest.supervision import AGENT_FD, MESSAGES, Deposit, ExecStarted, Message, Withdraw

__all__ = ["Link", "Packet"]

Packet = tuple[Message, Sequence[int]]  # with the descriptors that go with it
Parting = list[tuple[Process, int]]  # descriptors to close, each with whose stream it is


class Link:
    """The pair, packet by packet."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._turn = trio.Lock()
        self._exec_told = False
        self._parting: deque[Parting] = deque()  # for each deposit and withdrawal under way

    @classmethod
    def inherited(cls) -> "Link":
        """The end that PID 1 left at AGENT_FD. Raises OSError where there is none."""
        os.set_inheritable(AGENT_FD, False)
        return cls(socket.socket(fileno=AGENT_FD))

    def receive_first(self) -> tuple[Message | None, list[int]]:
        """Wait for a message as long as it takes; None when the pair was closed."""
        self.sock.setblocking(True)
        received = self._receive()
        self.sock.setblocking(False)
        return received

    async def receive(self) -> tuple[Message | None, list[int]]:
        """The next message and its descriptors, close-on-exec; None when the pair was closed."""
        await trio.lowlevel.wait_readable(self.sock)
        return self._receive()

    def _receive(self) -> tuple[Message | None, list[int]]:
        try:
            data, descriptors, flags, _ = socket.recv_fds(
                self.sock,
                bounds.SUPERVISION_MESSAGE,
                bounds.SUPERVISION_DESCRIPTORS,
                socket.MSG_CMSG_CLOEXEC,
            )
        except ConnectionResetError:  # closed with something of ours unread
            return None, []
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise OSError("message from PID 1 is larger than agreed")
        if not data:
            return None, []
        message = MESSAGES.decode(data)
        assert isinstance(message, Message)
        return message, descriptors

    def send(self, message: Message) -> None:
        """Tell PID 1 one of the few short things that the queue of the pair always has room for."""
        self.sock.send(MESSAGES.encode(message))

    def exec_started(self) -> None:
        """A process was started for a host. PID 1 is told of the first."""
        if self._exec_told:
            return
        try:
            self.send(ExecStarted(boot_ms=time.clock_gettime(time.CLOCK_BOOTTIME) * 1000))
        except OSError:
            return  # there is no room, and later there may be; a PID 1 that is gone, `follow` sees
        self._exec_told = True

    async def deliver(
        self, build: Callable[[], Packet | None], parting: Callable[[], Parting] = list
    ) -> None:
        """Tell PID 1, in the order of the calls, as soon as it has room.

        `build` is called at that moment, so that its descriptors are open then; None is not sent.
        `parting` is called then for what to close once PID 1 has done what the message says.
        Raises OSError, but not where PID 1 is gone: `follow` sees that.
        """
        async with self._turn:
            while True:
                packet = build()
                if packet is None:
                    return
                message, descriptors = packet
                try:
                    socket.send_fds(self.sock, [MESSAGES.encode(message)], descriptors)
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self.sock)
                except (BrokenPipeError, ConnectionResetError):
                    return
                else:
                    if isinstance(message, Deposit | Withdraw):
                        self._parting.append(parting())
                    return

    def taken(self) -> None:
        """PID 1 has done what the oldest of these messages says."""
        for process, fd in self._parting.popleft():
            process.close(fd)
