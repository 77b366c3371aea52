"""The process that the machine is for: started as OCI says, watched, and its end kept.

With stdio "attached" PID 1 keeps its own copies of the pipes' reading ends, with "terminal" one of
the terminal's other end, so that an agent that dies does not take the workload with it.

`start_workload` can be called again after an end: nothing of a life is left but files.
"""

import os
import time

import _guestsys

from microguest.guest import bounds, launch, users
from microguest.guest.boot.workload import ImageDefaults, Workload
from microguest.guest.errors import OperationError
from microguest.guest.status import exit_fields
from microguest.init_shim.confined import RootFolder
from microguest.init_shim.ending import Ending
from microguest.init_shim.failure import SHORT, call, reason
from microguest.init_shim.life.workload_cgroup import (
    LimitsUnavailable,
    Most,
    WorkloadCgroup,
    open_cgroup,
)

TYPE_CHECKING = False  # typing itself is too heavy for PID 1
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["RunningWorkload", "WorkloadNotStarted", "start_workload"]


class WorkloadNotStarted(Exception):
    """It was never started; the fields are those of a start error on the wire."""

    def __init__(self, code: str, message: str, *, step: str = "", errno: int = 0) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.step = step
        self.errno = errno


def start_workload(
    workload: Workload, image: ImageDefaults, most: Most, clear: "Callable[[], None]"
) -> "RunningWorkload":
    """Start it in the root that PID 1 is in. Raises WorkloadNotStarted, or Failure.

    Then nothing of it is left. The image's files are read anew each time. `most`: what it may use,
    whatever its own limits are. `clear` is called when no process of an earlier life runs any more.
    """
    plan = make_plan(workload, image)
    privileges = Privileges(workload)
    cgroup = own_cgroup(workload, most)
    try:
        clear()
        streams = Streams(workload, plan.identity.uid)
        try:
            pid, pidfd = spawn_in_place(plan, workload, privileges, streams, cgroup)
        except BaseException:
            streams.close()
            raise
        finally:
            streams.close_lent()
    except BaseException:
        if cgroup is not None:
            cgroup.close()
        raise
    argv = launch.listed_argv(tuple(map(os.fsdecode, plan.argv)))
    return RunningWorkload(pid, pidfd, argv, streams, cgroup)


class RunningWorkload:
    """A workload that was started. `exit` is None while it runs, then the fields of its end.

    -1 stands for what it does not have: with pipes `terminal`, with a terminal the pipes, with the
    console all of them.
    """

    def __init__(
        self,
        pid: int,
        pidfd: int,
        argv: tuple[str, ...],
        streams: "Streams",
        cgroup: WorkloadCgroup | None,
    ) -> None:
        self.pid = pid
        self.argv = argv  # as a list shows it
        self.pidfd = pidfd  # readable once it has ended, also while a debugger hides that
        self.ending = Ending(pid, "the workload")
        self.stdin = streams.stdin  # the writing end, until the agent has made its deposit
        self.stdout = streams.stdout  # reading ends
        self.stderr = streams.stderr
        self.terminal = streams.terminal  # the master
        self.exit: dict[str, int | bool] | None = None
        self.duration = 0.0  # seconds
        self._cgroup = cgroup
        self._oom_killed = False
        self._started = time.monotonic()

    def close_stdin(self) -> None:
        """Give up the writing end: somebody else answers for it, or for its end."""
        if self.stdin >= 0:
            os.close(self.stdin)
            self.stdin = -1

    def ended(self, status: int) -> dict[str, int | bool]:
        """With this wait status. Returns the fields of its ExitStatus."""
        self.exit = exit_fields(status)
        os.close(self.pidfd)
        self.duration = time.monotonic() - self._started
        if self._cgroup is not None:
            self._oom_killed = self._cgroup.oom_killed()
            self._cgroup.close()
            self._cgroup = None
        return self.exit

    def oom_killed(self) -> bool:
        """Whether the kernel has killed of it, or of what descends from it, for want of memory."""
        return self._oom_killed if self._cgroup is None else self._cgroup.oom_killed()


# ── what it is to be, worked out before anything is made ─────────────────────────────────────────


def make_plan(workload: Workload, image: ImageDefaults) -> launch.Plan:
    """Who it runs as, where, with which environment: the image's rules and files."""
    try:
        identity = users.resolve(
            workload.user,
            account_file(users.USERS_FILE),
            account_file(users.GROUPS_FILE),
            more_groups=workload.groups,
        )
        return launch.plan(
            workload.argv,
            identity,
            env=workload.env,
            cwd=workload.cwd,
            image=image,
            tty=workload.stdio == "terminal",
        )
    except OperationError as error:
        raise WorkloadNotStarted(error.code, error.message) from None


def account_file(path: str) -> bytes | None:
    """A file of the image; b"" where there is none, None where it cannot be read."""
    try:
        with RootFolder("/") as root:
            return root.read(path, bounds.ACCOUNT_FILE)
    except (FileNotFoundError, NotADirectoryError):
        return b""
    except OSError:
        return None


class Privileges:
    """What it may do and use, as numbers. Raises WorkloadNotStarted for names that are none.

    Modules that only some workloads need are imported here, to keep PID 1 small.
    """

    def __init__(self, workload: Workload) -> None:
        self.resources: tuple[tuple[int, int, int], ...] = ()
        self.sets: tuple[int, int, int, int, int] | None = None
        self.filter = b""
        try:
            if workload.rlimits:
                from microguest.guest.privileges import resource_limits

                self.resources = resource_limits(workload.rlimits)
            if workload.capabilities is not None:
                from microguest.guest.privileges import capability_sets

                self.sets = capability_sets(workload.capabilities)
            if workload.seccomp:
                from microguest.guest.privileges import seccomp_program

                self.filter = seccomp_program(workload.seccomp)
        except OperationError as error:
            raise WorkloadNotStarted(error.code, error.message) from None


def own_cgroup(workload: Workload, most: Most) -> WorkloadCgroup | None:
    """Where there can be one. Raises WorkloadNotStarted where its limits need it."""
    try:
        return open_cgroup(workload, most)
    except LimitsUnavailable as error:
        raise WorkloadNotStarted("cgroup_unavailable", str(error), step="cgroup") from None


# ── making it ────────────────────────────────────────────────────────────────────────────────────


class Streams:
    """What the workload gets as 0, 1 and 2 (`theirs`), and the ends that stay here.

    Raises Failure, and then nothing is open.
    """

    def __init__(self, workload: Workload, uid: int) -> None:
        self.stdin = self.stdout = self.stderr = self.terminal = -1
        self.theirs = (-1, -1, -1)
        self.lent: tuple[int, ...] = ()  # `theirs`, until it has them
        if workload.stdio == "terminal":
            from microguest.init_shim.life.terminal import open_terminal

            self.terminal, slave = open_terminal(workload.rows, workload.columns, uid)
            self.theirs, self.lent = (slave, slave, slave), (slave,)
        elif workload.stdio == "attached":
            self._open_pipes(uid)
        else:
            from microguest.init_shim.life.console import open_console

            self.theirs = self.lent = open_console()

    def _open_pipes(self, uid: int) -> None:
        opened: list[int] = []
        try:
            with call("pipe2"):
                for _ in range(3):
                    opened += os.pipe2(os.O_CLOEXEC)
        except BaseException:
            for fd in opened:
                os.close(fd)
            raise
        in_read, self.stdin, self.stdout, out_write, self.stderr, err_write = opened
        self.theirs = self.lent = (in_read, out_write, err_write)
        for fd in self.theirs:  # so that its user can open them again, as /dev/stdout: as runc does
            try:
                os.fchown(fd, uid, -1)
            except OSError:
                pass  # what cannot be this user is told so by its start

    def close_lent(self) -> None:
        """It has them, or will never have."""
        for fd in self.lent:
            os.close(fd)
        self.lent = ()

    def close(self) -> None:
        """The ends that stay here, for want of somebody at the others."""
        for fd in (self.stdin, self.stdout, self.stderr, self.terminal):
            if fd >= 0:
                os.close(fd)


def spawn_in_place(
    plan: launch.Plan,
    workload: Workload,
    privileges: Privileges,
    streams: Streams,
    cgroup: WorkloadCgroup | None,
) -> tuple[int, int]:
    """As `spawn`, where the working directory may have to be made. Raises WorkloadNotStarted.

    The child looks for it first, and is killed where it hangs: by now it may be a share whose
    server is gone, and PID 1 would wait for that without an end.
    """
    try:
        return spawn(plan, workload, privileges, streams, cgroup)
    except WorkloadNotStarted as refused:
        if refused.step != "chdir" or not make_directory(plan):
            raise
    return spawn(plan, workload, privileges, streams, cgroup)


def make_directory(plan: launch.Plan) -> bool:
    """A working directory that is missing, owned by root, as docker does. WorkloadNotStarted.

    False where something is there, which is no directory.
    """
    try:
        if os.path.lexists(plan.cwd):
            return False
        with RootFolder("/") as root:
            root.open_trusted(os.fsdecode(plan.cwd), make="directory").close()
    except OSError as error:
        raise not_started(plan, "mkdir", error.errno or 0) from None
    return True


def spawn(
    plan: launch.Plan,
    workload: Workload,
    privileges: Privileges,
    streams: Streams,
    cgroup: WorkloadCgroup | None,
) -> tuple[int, int]:
    """Its pid, which cannot be reused before PID 1 reaps it, and a pidfd."""
    identity = plan.identity
    try:
        pid, pidfd = _guestsys.spawn(
            plan.argv,
            plan.env,
            candidates=plan.candidates,
            cwd=plan.cwd,
            fds=streams.theirs,
            tty=streams.theirs[0] if streams.terminal >= 0 else -1,
            uid=identity.uid,
            gid=identity.gid,
            groups=identity.groups,
            umask=workload.umask,
            cgroup_fd=-1 if cgroup is None else cgroup.fd,
            no_new_privs=workload.no_new_privs,
            rlimits=privileges.resources,
            capability_sets=privileges.sets,
            seccomp=privileges.filter,
            enter_first=True,
            filter_first=not workload.no_new_privs,  # as runc: a filter alone takes nothing away
        )
    except _guestsys.SpawnError as error:
        raise not_started(plan, error.step, error.errno or 0) from None
    return pid, pidfd


def not_started(plan: launch.Plan, step: str, errno: int) -> WorkloadNotStarted:
    """For a step of its start that failed."""
    code, message, _ = launch.start_failure(
        step,
        errno,
        os.fsdecode(plan.argv[0]),
        os.fsdecode(plan.cwd),
        # At another step nobody has looked for it yet: it could hang.
        program_exists=step == "exec" and any(map(os.path.exists, plan.program_paths())),
    )
    if errno in SHORT:  # PID 1's limit, which is the machine's
        message = f"{os.fsdecode(plan.argv[0])!r:.200}: {step}: {reason(errno)}"
    return WorkloadNotStarted(code, message, step=step, errno=errno)
