"""The process that the machine is for: started as the image says, watched, and its end kept.

With stdio "attached" PID 1 keeps its own copies of the pipes' reading ends, so that an agent that
dies does not take the workload with it by SIGPIPE.
"""

import os
import time

import _guestsys

from guest import limits, process, users
from guest.errors import OperationError
from guest.status import exit_fields
from guest.workload import ImageDefaults, Workload
from init_shim import deposits
from init_shim.failure import call

__all__ = ["RunningWorkload", "WorkloadNotStarted", "start_workload"]


class WorkloadNotStarted(Exception):
    """It was never started; the fields are those of a start error on the wire."""

    def __init__(self, code: str, message: str, *, step: str = "", errno: int = 0) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.step = step
        self.errno = errno


class RunningWorkload:
    """A workload that was started. `exit` is None while it runs, then the fields of its end."""

    def __init__(self, pid: int, stdin: int, stdout: int, stderr: int) -> None:
        self.pid = pid
        self.stdin = stdin  # the writing end, until the agent has made its deposit
        self.stdout = stdout  # reading ends; -1 where it has the console
        self.stderr = stderr
        self.exit: dict[str, int | bool] | None = None
        self.duration = 0.0  # seconds
        self._started = time.monotonic()

    def close_stdin(self) -> None:
        """Give up the writing end: somebody else answers for it, or for its end."""
        if self.stdin >= 0:
            os.close(self.stdin)
            self.stdin = -1

    def ended(self, status: int) -> dict[str, int | bool]:
        """It was reaped with this wait status. Returns the fields of its ExitStatus."""
        self.exit = exit_fields(status)
        self.duration = time.monotonic() - self._started
        return self.exit


def start_workload(workload: Workload, image: ImageDefaults) -> RunningWorkload:
    """Start it in the root that PID 1 is in. Raises WorkloadNotStarted, or Failure."""
    plan = make_plan(workload, image)
    if workload.stdio == "attached":
        return spawn_attached(plan)
    with call("open", "/dev/null"):
        nothing = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return RunningWorkload(spawn(plan, (nothing, 1, 2)), -1, -1, -1)
    finally:
        os.close(nothing)


def make_plan(workload: Workload, image: ImageDefaults) -> process.Plan:
    """Who it runs as, where, with which environment: the image's rules and files."""
    try:
        identity = users.resolve(
            workload.user, account_file(users.USERS_FILE), account_file(users.GROUPS_FILE)
        )
        return process.plan(
            workload.argv, identity, env=workload.env, cwd=workload.cwd, image=image
        )
    except OperationError as error:
        raise WorkloadNotStarted(error.code, error.message) from None


def account_file(path: str) -> bytes:
    """A file of the image, b"" where it cannot be read; at most one byte above ACCOUNT_FILE."""
    try:
        # A FIFO or device of that name must not hold up the boot.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return b""
    try:
        with open(fd, "rb", buffering=0) as file:
            return file.read(limits.ACCOUNT_FILE + 1) or b""
    except OSError:
        return b""


def spawn_attached(plan: process.Plan) -> RunningWorkload:
    """With a pipe for each standard stream."""
    opened: list[int] = []
    try:
        with call("pipe2"):
            for _ in range(3):
                opened += os.pipe2(os.O_CLOEXEC)
        in_read, in_write, out_read, out_write, err_read, err_write = opened
        pid = spawn(plan, (in_read, out_write, err_write))
    except BaseException:
        for fd in opened:
            os.close(fd)
        raise
    for fd in (in_read, out_write, err_write):
        os.close(fd)
    return RunningWorkload(pid, in_write, out_read, err_read)


def spawn(plan: process.Plan, fds: tuple[int, int, int]) -> int:
    """Its pid. The pidfd is not needed: only PID 1 reaps it, so the pid cannot be reused before."""
    identity = plan.identity
    try:
        pid, pidfd = _guestsys.spawn(
            plan.argv,
            plan.env,
            candidates=plan.candidates,
            cwd=plan.cwd,
            fds=fds,
            uid=identity.uid,
            gid=identity.gid,
            groups=identity.groups,
            rlimits=(deposits.given_descriptor_limit(),),
        )
    except _guestsys.SpawnError as error:
        code, message, _ = process.start_failure(
            error.step,
            error.errno or 0,
            os.fsdecode(plan.argv[0]),
            os.fsdecode(plan.cwd),
            program_exists=any(os.path.exists(path) for path in plan.program_paths()),
        )
        raise WorkloadNotStarted(code, message, step=error.step, errno=error.errno or 0) from None
    os.close(pidfd)
    return pid
