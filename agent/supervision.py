"""The agent's end of the supervision pair: messages from PID 1 with descriptors, messages to it.

Messages are `guest.supervision`'s. When PID 1 closes the pair, or says something that cannot be
understood, the agent ends: there is nobody left who would reap for it or power off.
"""

import os
import socket

import trio

from agent.main_process import MainProcess
from agent.state import Agent
from guest import limits
from guest.supervision import (
    AGENT_FD,
    MESSAGES,
    MainExited,
    MainStarted,
    Message,
    RootReady,
)

__all__ = ["Link", "follow"]

MAXIMUM_DESCRIPTORS = 3  # beside one message


class Link:
    """The pair, packet by packet."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

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
        data, descriptors, flags, _ = socket.recv_fds(
            self.sock, limits.SUPERVISION_MESSAGE, MAXIMUM_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
        )
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise OSError("message from PID 1 is larger than agreed")
        if not data:
            return None, []
        message = MESSAGES.decode(data)
        assert isinstance(message, Message)
        return message, descriptors

    def send(self, message: Message) -> None:
        """Tell PID 1. The queue of the pair holds more than the agent ever has to say."""
        self.sock.send(MESSAGES.encode(message))


async def follow(agent: Agent) -> None:
    """Act on PID 1's messages. When it is gone, end the whole agent."""
    while True:
        message, descriptors = await agent.link.receive()
        match message:
            case RootReady():
                enter_root(descriptors[0])
                agent.root_ready.set()
            case MainStarted():
                agent.main = MainProcess(message.pid, descriptors)
                agent.main_started.set()
            case MainExited():
                if isinstance(agent.main, MainProcess):
                    agent.main.ended(message)
            case _:
                agent.kill_everything()
                os._exit(0)


def enter_root(directory: int) -> None:
    """Make the image's root the agent's own, from its O_PATH descriptor."""
    os.fchdir(directory)
    os.chroot(".")
    os.chdir("/")
    os.close(directory)
