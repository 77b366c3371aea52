"""The agent's end of the supervision pair: messages from PID 1 with descriptors, messages to it.

Messages are `guest.supervision`'s. When PID 1 closes the pair, or says something that cannot be
understood, the agent ends: there is nobody left who would reap for it or power off.
"""

import os
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence

import trio

from agent.guard import Guard
from agent.kept import MAIN_ID, KeptProcess
from agent.main_process import ConsoleMain, take_main
from agent.restoring import restore_all
from agent.state import Agent, Process
from guest import limits
from guest.supervision import (
    AGENT_FD,
    MESSAGES,
    AreYouThere,
    Deposit,
    ExecStarted,
    Here,
    KeptExited,
    MainExited,
    MainStarted,
    Message,
    Restored,
    RootReady,
    Taken,
    Withdraw,
)

__all__ = ["Link", "follow"]

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
                limits.SUPERVISION_MESSAGE,
                limits.SUPERVISION_DESCRIPTORS,
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


async def follow(agent: Agent) -> None:
    """Act on PID 1's messages. When it is gone, end the whole agent."""
    deposits: list[tuple[Restored, list[int]]] = []
    while True:
        message, descriptors = await agent.link.receive()
        match message:
            case Restored():
                deposits.append((message, descriptors))
            case RootReady():
                enter_root(descriptors[0])
                Guard(agent).start()  # now, as a machine may have no /proc before
                await restore_all(agent, deposits)
                agent.root_ready.set()
            case MainStarted():
                await take_main(agent, message, descriptors)
            case MainExited() | KeptExited():
                process_id = message.id if isinstance(message, KeptExited) else MAIN_ID
                process = agent.processes.get(process_id)
                if isinstance(process, KeptProcess):
                    process.reaped(message)
                elif isinstance(process, ConsoleMain) and isinstance(message, MainExited):
                    process.ended(message)
            case Taken():
                agent.link.taken()
            case AreYouThere():
                answer(agent, message)
            case _:
                agent.kill_everything()
                os._exit(0)


def answer(agent: Agent, question: AreYouThere) -> None:
    """Say that the event loop turns; not in `follow` itself, which goes on hearing meanwhile."""
    assert agent.nursery is not None  # since before PID 1's messages are followed
    agent.nursery.start_soon(agent.link.deliver, lambda: (Here(number=question.number), ()))


def enter_root(directory: int) -> None:
    """Make the image's root the agent's own, from its O_PATH descriptor."""
    os.fchdir(directory)
    os.chroot(".")
    os.chdir("/")
    os.close(directory)
