"""Processes that hosts start: from a request to a child."""

import contextlib
import os
import signal
import stat
from collections.abc import Iterable

import _guestsys

from microguest.agent.files.staging import stage
from microguest.agent.process import terminals, tracers, tree
from microguest.agent.process.accounts import Accounts
from microguest.agent.process.cgroups import REFUSALS, needed_controllers, unavailable
from microguest.agent.process.child import ChildProcess, Ends
from microguest.agent.process.groups import Groups
from microguest.agent.process.hunting import Hunters
from microguest.agent.process.leaf import Leaf
from microguest.agent.state import Agent
from microguest.guest.errors import OperationError, operation_error
from microguest.guest.launch import Plan, plan, shell_argv, start_failure
from microguest.guest.privileges import capability_mask, resource_limits
from microguest.guest.wire.messages import Start

__all__ = ["Starter"]

NULL_DEVICE = os.makedev(1, 3)  # admin-guide/devices.txt

Resources = tuple[tuple[int, int, int], ...]


class Starter:
    """What all starts have in common; made once.

    `child_limits`: resource limits that every process gets back, (resource, soft, hard) each.
    """

    def __init__(self, agent: Agent, groups: Groups, child_limits: Resources) -> None:
        self.agent = agent
        self.groups = groups
        self.child_limits = child_limits
        self.accounts = Accounts()

    async def begin(self, args: Start) -> ChildProcess:
        """Start what was asked for, with its files in place. Raises OperationError.

        Then nothing was started, and nothing is left of it.
        """
        starting = Starting(self, args)
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

    def kill_everything(self) -> None:
        """SIGKILL to all that is not kept: the agent is about to end."""
        Hunters.ending = True
        for process in self.agent.processes.values():
            if not process.kept:
                process.signal(signal.SIGKILL, "tree")
        Hunters.finish()
        self.groups.close()


class Starting:
    """A request that was found to be in order. Raises OperationError where it is not."""

    def __init__(self, starter: Starter, args: Start) -> None:
        image = starter.agent.configure.image
        self.starter = starter
        self.args = args
        self.argv = shell_argv(args.argv, args.shell)
        user = image.user if args.user is None else args.user
        self.plan = plan(
            self.argv,
            starter.accounts.identity(user, args.groups),
            env=args.env,
            clear_env=args.clear_env,
            cwd=args.cwd,
            image=image,
            tty=args.tty is not None,
        )
        self.capabilities = -1 if args.capabilities is None else capability_mask(args.capabilities)
        self.resources: Resources = starter.child_limits
        if args.limits is not None:
            self.resources += resource_limits(args.limits.rlimits)

    def spawn(self) -> ChildProcess:
        """Start it. Raises OperationError, and then nothing was started."""
        leaf = self.starter.groups.take(self.args.limits)
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
        tracers.began(pid)
        process = ChildProcess(
            self.args.id or self.starter.agent.processes.next_id(),
            pid,
            pidfd,
            streams,
            leaf=leaf,
            mark=mark,
            argv=self.argv,
            label=self.args.label,
        )
        process.tty = self.args.tty is not None
        self.starter.agent.link.exec_started()
        return process

    def _spawn(self, leaf: Leaf | None, mark: bytes) -> tuple[int, int, Ends]:
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


def close_all(descriptors: Iterable[int]) -> None:
    """Close those that are open."""
    for fd in descriptors:
        if fd >= 0:
            os.close(fd)
