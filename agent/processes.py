"""Processes that hosts start: from a request to the end of everything that was started.

The connection is the process's: while it is open the process runs, and when it is lost everything
that descends from the process is killed. Each child is waited for by nobody else.
"""

import contextlib
import os
import signal
import stat
import threading
import time
from collections.abc import Iterable

import _guestsys
import trio

from agent import terminals, tracers, tree
from agent.cgroups import REFUSALS, needed_controllers, unavailable
from agent.channel import Channel
from agent.exchange import Exchange
from agent.hunting import Hunters, Quarry
from agent.leaf import Leaf
from agent.registry import Process
from agent.staging import stage
from agent.state import Agent
from guest import limits
from guest.connection import Event, Response
from guest.errors import OperationError, operation_error
from guest.messages import Exited, Start, Started
from guest.privileges import capability_mask, resource_limits
from guest.process import Plan, plan, shell_argv, start_failure
from guest.record import Record

__all__ = ["REAPING", "ChildProcess", "begin", "start"]

NULL_DEVICE = os.makedev(1, 3)  # admin-guide/devices.txt

# Whoever has it may use the ids and cgroups of processes: the guard's thread to kill, and the event
# loop to give them back. So nobody is killed who has got them since.
REAPING = threading.Lock()

Resources = tuple[tuple[int, int, int], ...]
Channels = tuple[int, dict[int, int]]  # stdin, outputs: our ends


async def start(agent: Agent, channel: Channel, args: Record, early: list[Event]) -> None:
    """The operation: spawn, exchange bytes until it has ended, leave nothing. OperationError."""
    assert isinstance(args, Start)
    await agent.wait_root()
    process = await begin(agent, args)
    agent.processes[process.id] = process
    try:
        channel.queue(Response(result=Started(id=process.id, pid=process.pid)))
        process.attached = 1
        exchange = Exchange(
            channel,
            process,
            args.timeout,
            grace=args.grace,
            drain_idle=args.drain_idle,
            drain_cap=args.drain_cap,
        )
        await exchange.run(early)
    finally:
        await process.end()
        del agent.processes[process.id]


async def begin(agent: Agent, args: Start) -> "ChildProcess":
    """Start what was asked for, with its files in place. Raises OperationError.

    Then nothing was started, and nothing is left of it.
    """
    starting = Starting(agent, args)
    if not args.files:
        return starting.spawn()
    plan, capabilities = starting.plan, starting.capabilities
    staged = await stage(args.files, plan.cwd, plan.identity, capabilities)
    try:
        process = starting.spawn()
    except OperationError:
        await staged.take_back()
        raise
    staged.keep()
    return process


class ChildProcess(Process):
    """A process of our own. Until it is reaped, its pid and process group cannot be another's.

    `leaf`: its cgroup, None where the guest has none; then `mark` is in its environment.
    """

    def __init__(
        self,
        process_id: str,
        pid: int,
        pidfd: int,
        streams: Channels,
        *,
        leaf: Leaf | None = None,
        mark: bytes = b"",
        argv: tuple[str, ...] = (),
        label: str = "",
    ) -> None:
        stdin, outputs = streams
        super().__init__(
            process_id, pid, exit_fd=pidfd, stdin=stdin, outputs=outputs, argv=argv, label=label
        )
        self.leaf = leaf
        self.mark = mark
        self._reaped = False
        self._hunts: list[Quarry] = []  # that are under way, and need the pid

    def signal(self, number: int, target: str) -> bool:
        """See `Process.signal`."""
        if self._reaped:
            return False
        if target == "tree":
            return self._signal_tree(number)
        try:
            if target == "process":
                os.kill(self.pid, number)
            else:
                os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):
            return False
        return True

    def _signal_tree(self, number: int) -> bool:
        if self.leaf is None:
            self._hunt(number)
            return True
        if number != signal.SIGKILL:
            return self.leaf.signal(number)
        delivered = self.leaf.populated()
        if not self.leaf.kill():
            self._hunt(number)
        return delivered

    async def deliver(self, number: int, target: str) -> bool:
        """See `Process.deliver`."""
        if target != "tree" or self.leaf is not None or self._reaped:
            return self.signal(number, target)
        hunt = self._hunt(number)
        await hunt.done.wait()
        return hunt.delivered

    def _hunt(self, number: int) -> Quarry:
        """One for each number that has not begun, as the kernel has one pending signal of each."""
        self._hunts = [hunt for hunt in self._hunts if not hunt.over]
        for hunt in self._hunts:
            if hunt.number == number and not hunt.begun:
                return hunt
        hunt = Hunters.send(self.pid, self.mark or tree.UNMARKED, number)
        self._hunts.append(hunt)
        return hunt

    async def settled(self) -> None:
        """See `Process.settled`."""
        while self._hunts:
            await self._hunts[0].done.wait()
            self._hunts = [hunt for hunt in self._hunts if not hunt.over]
        if not self._reaped and not tracers.has_ended(self.pid):
            await tracers.until_reapable(self.pid)

    def resize(self, rows: int, columns: int) -> None:
        """See `Process.resize`."""
        if self.tty and 1 in self.outputs:
            terminals.resize(self.outputs[1], rows, columns)

    def status(self) -> Exited:
        """Reap it, which must have ended and be `settled`; or later, where it is traced still."""
        with REAPING:
            reaped, status, usage = os.wait4(self.pid, os.WNOHANG)
            self._reaped = True
            oom_killed = self._leave()
        if not reaped:
            status = tracers.wait_status(self.pid)
            tracers.reap_later(self.pid)
        duration = time.monotonic() - self.started
        killed = os.WIFSIGNALED(status)
        return Exited(
            code=None if killed else os.WEXITSTATUS(status),
            signal=os.WTERMSIG(status) if killed else None,
            core_dumped=os.WCOREDUMP(status),
            oom_killed=oom_killed,
            duration=duration,
            user_seconds=usage.ru_utime,
            system_seconds=usage.ru_stime,
            max_rss_kib=usage.ru_maxrss,
        )

    def _leave(self) -> bool:
        """Give back its cgroup, with REAPING held. Whether the kernel killed it for memory."""
        if self.leaf is None:
            return False
        oom_killed = self.leaf.oom_killed()
        self.leaf.give_back()
        self.leaf = None
        return oom_killed

    def put_down(self) -> None:
        """See `Process.put_down`. The event loop may go on at any moment of this."""
        with REAPING:
            if self.leaf is not None and self.leaf.kill():
                return
            if self._is_reaped():
                return
            kill_now(self.pid)
        hunt = tree.Hunt(self.pid, self.mark or tree.UNMARKED)
        while not hunt.over:
            for seconds in tree.passes([hunt]):
                time.sleep(seconds)
                with REAPING:
                    if self._is_reaped():
                        return

    def _is_reaped(self) -> bool:
        """Also by PID 1, of which the event loop has not heard while it stands."""
        try:
            if not self._reaped:
                signal.pidfd_send_signal(self.exit_fd, 0)
        except ProcessLookupError:
            return True
        return self._reaped

    async def end(self) -> None:
        """Kill what still runs, reap it, close every descriptor: what is dead locks no pipe."""
        if not self._reaped:
            self.signal(signal.SIGKILL, "tree")
            with trio.CancelScope(shield=True):
                await self.dead()
                await self.settled()
            self.finish(self.status())
        self.close_streams()
        os.close(self.exit_fd)

    async def dead(self) -> None:
        """Until it has ended, or SIGKILL has ended it: what traces one of its threads is killed."""
        while True:
            with trio.move_on_after(limits.TRACER_WAIT):
                await trio.lowlevel.wait_readable(self.exit_fd)
                return
            await tracers.kill_tracers(self.pid)


class Starting:
    """A request that was found to be in order. Raises OperationError where it is not."""

    def __init__(self, agent: Agent, args: Start) -> None:
        image = agent.configure.image
        self.agent = agent
        self.args = args
        self.argv = shell_argv(args.argv, args.shell)
        user = image.user if args.user is None else args.user
        self.plan = plan(
            self.argv,
            agent.accounts.identity(user, args.groups),
            env=args.env,
            clear_env=args.clear_env,
            cwd=args.cwd,
            image=image,
            tty=args.tty is not None,
        )
        self.capabilities = -1 if args.capabilities is None else capability_mask(args.capabilities)
        self.resources: Resources = agent.child_limits
        if args.limits is not None:
            self.resources += resource_limits(args.limits.rlimits)

    def spawn(self) -> ChildProcess:
        """Start it. Raises OperationError, and then nothing was started."""
        leaf = self.agent.take_cgroup(self.args.limits)
        mark = b"" if leaf else new_mark()
        try:
            pid, pidfd, streams = self._spawn(leaf, mark)
        except OperationError as error:
            if leaf is None:
                raise
            refused = error.fields.get("step") in ("clone", "cgroup") and (
                error.fields.get("errno") in REFUSALS
            )
            leaf.spent |= refused
            leaf.give_back()
            if not refused:
                raise
            if needed_controllers(self.args.limits):
                raise unavailable(f"nothing can start in a cgroup ({error.message})") from None
            leaf, mark = None, new_mark()
            pid, pidfd, streams = self._spawn(None, mark)
        process = ChildProcess(
            self.args.id or self.agent.processes.next_id(),
            pid,
            pidfd,
            streams,
            leaf=leaf,
            mark=mark,
            argv=self.argv,
            label=self.args.label,
        )
        process.tty = self.args.tty is not None
        self.agent.link.exec_started()
        return process

    def _spawn(self, leaf: Leaf | None, mark: bytes) -> tuple[int, int, Channels]:
        identity = self.plan.identity
        ours: list[int] = []
        theirs: list[int] = []
        step = "streams"
        try:
            self._open_streams(ours, theirs)
            step = "spawn"
            pid, pidfd = _guestsys.spawn(
                self.plan.argv,
                (*self.plan.env, mark) if mark else self.plan.env,
                candidates=self.plan.candidates,
                cwd=self.plan.cwd,
                fds=(theirs[0], theirs[1], theirs[2]),
                tty=theirs[0] if self.args.tty else -1,
                uid=identity.uid,
                gid=identity.gid,
                groups=identity.groups,
                umask=self.args.umask,
                cgroup_fd=-1 if leaf is None else leaf.fd,
                no_new_privs=self.args.no_new_privs,
                rlimits=self.resources,
                capabilities=self.capabilities,
                seccomp=self.args.seccomp,
            )
        except OSError as error:
            close_all(ours)
            if isinstance(error, _guestsys.SpawnError) and error.pid:
                tracers.reap_later(error.pid)
            raise not_started(self.plan, getattr(error, "step", step), error) from None
        finally:
            close_all(set(theirs))
        return pid, pidfd, (ours[0], dict(enumerate(ours[1:], start=1)))

    def _open_streams(self, ours: list[int], theirs: list[int]) -> None:
        """Fill in the two ends of stdin, stdout and stderr; a terminal is all three. OSError."""
        if self.args.tty is not None:
            master, slave = terminals.open_terminal(self.args.tty, self.plan.identity.uid)
            ours.append(master)
            theirs += (slave, slave, slave)
            ours.append(os.dup(master))  # each stream is closed by itself
            return
        uid = self.plan.identity.uid
        if self.args.stdin:
            reader, writer = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(writer, False)
            ours.append(writer)
            theirs.append(reader)
            give_to(uid, reader)
        else:
            ours.append(-1)
            theirs.append(null_input(uid))
        for _ in (1, 2):
            reader, writer = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(reader, False)  # the user may open the other end again
            ours.append(reader)
            theirs.append(writer)
            give_to(uid, writer)


def new_mark() -> bytes:
    """For the environment of a process without a cgroup, by which its tree is found."""
    return tree.MARKER + os.urandom(8).hex().encode()


def give_to(uid: int, pipe: int) -> None:
    """Let the user open it again, as /dev/stdout or in /proc/self/fd. As runc does."""
    if uid != os.geteuid():
        with contextlib.suppress(OSError):  # what cannot be this user is told so by its start
            os.fchown(pipe, uid, -1)


def null_input(uid: int) -> int:
    """An input that is at its end. Raises OSError.

    What stands at /dev/null is the image's affair: it may be missing, or a FIFO.
    """
    with contextlib.suppress(OSError):
        fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        status = os.fstat(fd)
        if stat.S_ISCHR(status.st_mode) and status.st_rdev == NULL_DEVICE:
            os.set_blocking(fd, True)
            return fd
        os.close(fd)
    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.close(writer)
    give_to(uid, reader)
    return reader


def not_started(planned: Plan, step: str, error: OSError) -> OperationError:
    """The error for the host, from the step that failed."""
    exists = any(os.path.exists(path) for path in planned.program_paths())
    code, message, fields = start_failure(
        step,
        error.errno or 0,
        os.fsdecode(planned.argv[0]),
        os.fsdecode(planned.cwd),
        program_exists=exists,
    )
    if isinstance(error, terminals.NoTerminal):
        message = f"no terminal: {error.filename}: {error.strerror}; {terminals.advice(error)}"
        fields["path"] = error.filename
    return operation_error(code, message, fields)


def kill_now(pid: int) -> None:
    """It and its group, which are looked for by nobody first."""
    for kill in (os.kill, os.killpg):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def close_all(descriptors: Iterable[int]) -> None:
    """Close those that are open."""
    for fd in descriptors:
        if fd >= 0:
            os.close(fd)
