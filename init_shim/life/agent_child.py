"""The agent as PID 1 sees it: a child that is started, told what it needs, and started again.

It runs the same program under another name, with nothing but a socket pair to PID 1. What it has to
know is told anew after each start, so that an agent that died costs its connections and no more.
"""

import _socket
import errno
import fcntl
import os
import time

from microguest.guest import bounds, supervision
from microguest.guest.boot.config import BootConfig
from microguest.guest.record import RecordError
from microguest.guest.report import AgentExited
from microguest.guest.status import exit_fields
from microguest.guest.supervision import (
    AGENT_FD,
    AgentReady,
    AreYouThere,
    Configure,
    Deposit,
    Here,
    KeptExited,
    MainExited,
    MainStarted,
    RootReady,
    Taken,
    Withdraw,
)
from microguest.init_shim.ending import Ending
from microguest.init_shim.failure import Failure, call
from microguest.init_shim.life import deposits
from microguest.init_shim.life.deposits import Deposits
from microguest.init_shim.life.last_words import LastWords
from microguest.init_shim.life.watchdog import Watchdog
from microguest.init_shim.life.workload import RunningWorkload
from microguest.init_shim.reporter import say
from microguest.init_shim.signals import KILL, fork

TYPE_CHECKING = False  # typing itself is too heavy for PID 1
if TYPE_CHECKING:
    from resource import struct_rusage

    from microguest.guest.record import Record

__all__ = ["AgentProcess"]

NAME = "agent"  # argv[0]: how the program knows what it is to be
FD_SIZE = 4  # bytes of a descriptor's number beside a message
UNSAID = 2 * bounds.KEPT_PROCESSES  # messages that wait for the agent to read
NICEST = 19  # the lowest priority that is not idle: setpriority(2)
HIGH_FD = 10  # the program's descriptor must not be where the child's socket goes


class AgentProcess:
    """`pid` is 0 while none runs. `ready` says whether the running one serves.

    Whoever reaps it sets `reaped` at once, and calls `ended` after its last messages were received.
    `ending` has begun where that is to be expected.

    `root` and `workload` are what a later start has to be told about too.
    """

    def __init__(self, config: BootConfig, listener: _socket.socket) -> None:
        self.pid = 0
        self.reaped = False  # its pid is nobody's, or another's
        self.ready = False
        self.starts = 0
        self.crashes = 0  # in a row, without AGENT_HEALTHY seconds of service between them
        self.restart_at: float | None = None  # time.monotonic()
        self.words: LastWords | None = None
        self.watchdog = Watchdog(config.agent.watchdog, self._ask)
        self.ending = Ending(0, NAME)
        self.root_fd = -1
        self.deposits = Deposits()
        self.workload: RunningWorkload | None = None
        self._workload_restarts = False  # the one that has ended
        self._config = config
        self._listener = listener
        self._pair: _socket.socket | None = None
        self._served_since: float | None = None  # time.monotonic()
        self._hung = False
        self._measures = 0  # against who keeps the running one from its end
        self._measure_at = 0.0  # time.monotonic(), when the next one is due
        self._stands_back = False
        # What the pair had no room for: a message with its descriptors, or the id of a deposit.
        self._unsaid: list[tuple[Record, list[int]] | str] = []
        with call("open", "/proc/self/exe"):
            program = os.open("/proc/self/exe", os.O_RDONLY | os.O_CLOEXEC)
            self._program = out_of_the_way(program)

    # ── its life ─────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Fork, exec, and tell it what is known so far. Raises Failure."""
        with call("socketpair", NAME):
            kind = _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC
            ours, theirs = _socket.socketpair(_socket.AF_UNIX, kind)
        ours.setblocking(False)
        with call("pipe2", NAME):
            words = LastWords()
        # On one processor its imports would hold up the root, and with it the workload. In
        # namespaces there are more, and an ordinary user could not take it back.
        self._stands_back = self._config.machine == "vm" and self.root_fd < 0
        try:
            with call("fork", NAME):
                pid = fork()
        except Failure:
            words.close_writer()
            words.close()
            raise
        if pid == 0:
            become_agent(self._program, theirs.fileno(), words.writer, self._stands_back)
        theirs.close()
        words.close_writer()
        self.pid, self._pair, self.words = pid, ours, words
        self.ending = Ending(pid, f"agent {pid}")
        self.reaped = False
        self.ready = self._hung = False
        self._measures = 0
        self._served_since = None
        self.restart_at = None
        self.starts += 1
        self.watchdog.start(pid)
        self._introduce()

    def start_again(self) -> None:
        """The same for a later one. Where even a fork fails now, it is tried again later."""
        try:
            self.start()
        except Failure as failure:
            say(f"the agent cannot be started: {failure}")
            self.restart_at = time.monotonic() + bounds.AGENT_RESTART_DELAYS[-1]

    def ended(self, status: int) -> AgentExited:
        """With this wait status.

        `restart_at` is set unless it has crashed AGENT_CRASH_LIMIT times in a row. Then it stays
        down, and who dials is refused instead of waiting for nobody.
        """
        now = time.monotonic()
        self.pid, self.ready = 0, False
        self._close()
        self.watchdog.stop()
        if self._served_since is not None and now - self._served_since >= bounds.AGENT_HEALTHY:
            self.crashes = 0
        self.crashes += 1
        delay = None
        if self.crashes < bounds.AGENT_CRASH_LIMIT:
            delays = bounds.AGENT_RESTART_DELAYS
            delay = delays[min(self.crashes, len(delays)) - 1]
            self.restart_at = now + delay
        else:
            self._listener.close()
        return AgentExited.from_map(
            {
                **exit_fields(status),
                "crashes": self.crashes,
                "restart_in": delay,
                "hung": self._hung,
                "last_words": self._take_words(),
            }
        )

    def _take_words(self) -> str:
        if self.words is None:
            return ""
        words, self.words = self.words, None
        words.read()
        words.close()
        return words.text()

    def watch(self) -> bool:
        """Look after it when its watchdog's time has come. Whether it is to be helped to its end.

        What it has said is to be heard before that: from now on it says nothing more.
        """
        if self.watchdog.look() and not self.reaped:
            say(f"agent {self.pid} hangs; it is replaced")
            self._hung = True
            self._kill()
        return self.watchdog.ends and not self.reaped

    def let_end(self) -> None:
        """Kill what can keep it from its end: at first not what it has deposited."""
        from microguest.init_shim.life.dying import kill_who_keeps

        self.ending.begin()
        self.watchdog.look_within(bounds.LOCK_KILL_WAIT)
        if self._measures and time.monotonic() < self._measure_at:
            return
        mine = self.deposits.agents_meta(), self.deposits.pids()
        killed = kill_who_keeps(self.pid, *mine, self._measures)
        say(f"agent {self.pid} cannot end; {killed} are killed first")
        self._measures += 1
        self._measure_at = time.monotonic() + bounds.LOCK_KILL_WAIT

    def _kill(self) -> None:
        os.kill(self.pid, KILL)
        self.ending.begin()

    def _ask(self, number: int) -> None:
        self._send(AreYouThere(number=number))

    # ── what it is told ──────────────────────────────────────────────────────────────────────────

    def root_ready(self, root_fd: int) -> None:
        """The image's root is in place; `root_fd` is kept for later starts."""
        if self._stands_back:
            set_nice(self.pid, 0)  # before it can start anything, which would inherit it
            self._stands_back = False
        self.root_fd = root_fd
        self._send(self._root_ready(), [root_fd])

    def _root_ready(self) -> RootReady:
        supervises = self._config.mode == "supervise"
        return RootReady(workload=supervises and self._config.workload is not None)

    def main_started(self, workload: RunningWorkload) -> None:
        """The workload runs, also again. Pipes or a terminal of it are handed over."""
        self.workload = workload
        self._tell_workload()

    def main_exited(self, *, restarts: bool) -> None:
        """The workload that it was told about ended. `restarts`: another life follows."""
        self._workload_restarts = restarts
        self._tell_workload_exit()

    def _tell_workload_exit(self) -> None:
        if self.workload is not None and self.workload.exit is not None:
            about = {
                "duration": self.workload.duration,
                "oom_killed": self.workload.oom_killed(),
                "restarts": self._workload_restarts,
            }
            self._send(MainExited.from_map({**self.workload.exit, **about}))

    def _introduce(self) -> None:
        listen = self._config.agent.listen
        configure = Configure(
            transport=listen.transport,
            token=self._config.agent.token,
            image=self._config.image,
            starts=self.starts,
            versions=versions(),
        )
        self._send(configure, [self._listener.fileno()])
        self._unsaid += self.deposits.ids()
        self.say_more()
        if self.root_fd >= 0:
            self._send(self._root_ready(), [self.root_fd])
        if self.workload is not None:
            self._tell_workload()
            self._tell_workload_exit()

    def kept_reaped(self, pid: int, status: int, usage: "struct_rusage") -> None:
        """PID 1 has reaped this child; tell the agent where it is a deposited one."""
        message = self.deposits.reaped(pid, status, usage)
        if message is not None:
            self._send(message)

    def _tell_workload(self) -> None:
        assert self.workload is not None
        assert self._config.workload is not None
        started = MainStarted(
            pid=self.workload.pid,
            argv=self.workload.argv,
            output_wait=self._config.workload.output_wait,
        )
        if self.workload.terminal >= 0:
            terminal = [self.workload.terminal]
            self._send(started.replace(terminal=True), terminal)
            return
        if self.workload.stdout < 0:
            self._send(started.replace(console=True))
            return
        stdin = self.workload.stdin
        if stdin < 0:  # it is with the agent's deposit, or at its end
            stdin = self.workload.stdout
        fds = [stdin, self.workload.stdout, self.workload.stderr]
        self._send(started, fds)

    def _send(self, message: "Record", fds: list[int] | None = None) -> None:
        """Behind what is not said yet. An agent that reads nothing is as good as dead."""
        if len(self._unsaid) > UNSAID:
            self._give_up("reads nothing")
        if self._pair is not None:
            self._unsaid.append((message, fds or []))
            self.say_more()

    @property
    def has_more_to_say(self) -> bool:
        """Whether to call `say_more` once the agent takes something."""
        return bool(self._unsaid)

    def say_more(self) -> None:
        """As much as the pair has room for."""
        while self._unsaid and self._pair is not None:
            first = self._unsaid[0]
            packet = self.deposits.restored(first) if isinstance(first, str) else first
            if packet is not None and not self._say(self._pair, *packet):
                return
            self._unsaid = self._unsaid[1:]

    def _say(self, pair: _socket.socket, message: "Record", fds: list[int]) -> bool:
        """One packet; False where there is no room for it."""
        data = supervision.MESSAGES.encode(message)
        if len(data) > bounds.SUPERVISION_MESSAGE:
            raise Failure(
                f"{type(message).__name__} for the agent has {len(data)} bytes, at most"
                f" {bounds.SUPERVISION_MESSAGE} fit; make the image's environment smaller"
            )
        packed = b"".join(fd.to_bytes(4, "little") for fd in fds)
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, packed)] if packed else []
        try:
            pair.sendmsg([data], rights, _socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        except OSError as error:
            self._give_up(f"takes no {type(message).__name__}: {error}")
        return True

    # ── what it says ─────────────────────────────────────────────────────────────────────────────

    def fileno(self) -> int:
        """What to wait on; -1 while it has nothing to say."""
        return -1 if self._pair is None else self._pair.fileno()

    def receive(self) -> "Record | None":
        """Its next message, or None. One that breaks the rules is killed, and so started again."""
        if self._pair is None:
            return None
        try:
            data, fds = receive_packet(self._pair)
        except BlockingIOError:
            return None
        except ConnectionResetError:  # once, where it died with messages unread; its own are there
            return self.receive()
        except OSError as error:
            self._give_up(f"cannot be heard: {error}")
            return None
        if not data:
            deposits.close_all(fds)
            self._close()  # its exit follows, or it goes on without us until it exits
            self.ending.begin()
            return None
        try:
            message = supervision.MESSAGES.decode(data)
        except RecordError as error:
            deposits.close_all(fds)
            self._give_up(f"sent nonsense: {error}")
            return None
        if isinstance(message, Deposit):
            taken = self.deposits.take(message, fds)
            if taken and self.workload is not None and message.pid == self.workload.pid:
                self.workload.close_stdin()
            self._send(Taken())
            return message
        deposits.close_all(fds)
        self._note(message)
        return message

    def _note(self, message: "Record") -> None:
        if isinstance(message, AgentReady):
            self.ready = True
            self._served_since = time.monotonic()
        elif isinstance(message, Here):
            self.watchdog.answer(message.number)
        elif isinstance(message, Withdraw):
            self.deposits.withdraw(message.id)
            self._send(Taken())
        elif isinstance(message, KeptExited):
            self.deposits.note_exit(message)

    def _give_up(self, why: str) -> None:
        say(f"agent {self.pid} {why}")
        self._close()
        if self.pid and not self.reaped:
            self._kill()

    def _close(self) -> None:
        if self._pair is not None:
            self._pair.close()
            self._pair = None
            self._unsaid = []


def out_of_the_way(fd: int) -> int:
    """The same file at HIGH_FD or above, instead. Raises OSError."""
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, HIGH_FD)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise OSError(errno.EMFILE, "") from error  # the limit is below HIGH_FD: fcntl(2)
    finally:
        os.close(fd)


def become_agent(program: int, pair: int, words: int, stands_back: bool) -> None:
    """In the child: a session of its own, the pair as AGENT_FD, no environment. Never returns."""
    try:
        os.setsid()
        if stands_back:
            set_nice(os.getpid(), NICEST)
        for stream in (1, 2):
            os.dup2(words, stream)
        os.dup2(pair, AGENT_FD)
        os.set_inheritable(AGENT_FD, True)
        os.execve(program, [NAME], {})  # noqa: S606
    except BaseException as error:  # noqa: BLE001  nothing may run on as a second PID 1
        say(f"cannot start the agent: {error}")
    finally:
        os._exit(127)


def set_nice(pid: int, nice: int) -> None:
    """Of a process that leads a session, which the scheduler may weigh as one: sched(7)."""
    try:
        os.setpriority(os.PRIO_PROCESS, pid, nice)
        with open(f"/proc/{pid}/autogroup", "w", encoding="ascii") as file:
            file.write(str(nice))
    except OSError:
        pass  # it has ended, or the kernel has no autogroups


def receive_packet(pair: _socket.socket) -> tuple[bytes, list[int]]:
    """One packet and its descriptors, close-on-exec; those without room are not there. OSError."""
    size = bounds.SUPERVISION_DESCRIPTORS * FD_SIZE
    data, rights, _, _ = pair.recvmsg(
        bounds.SUPERVISION_MESSAGE + 1, _socket.CMSG_SPACE(size), _socket.MSG_CMSG_CLOEXEC
    )
    fds: list[int] = []
    for level, kind, packed in rights:
        if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS):
            for at in range(0, len(packed) - FD_SIZE + 1, FD_SIZE):
                fds.append(int.from_bytes(packed[at : at + FD_SIZE], "little"))
    return data, fds


def versions() -> dict[str, str]:
    """What this program is made of."""
    from _guest_build import VERSIONS

    return VERSIONS
