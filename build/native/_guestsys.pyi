"""System calls that the standard library lacks; implemented in guestsys.c.

It is part of the frozen ELF; build/host_module.py makes it for a plain Python.

Every function raises OSError with the errno of the call that failed.
"""

from collections.abc import Sequence

def mount(
    source: str | None, target: str, fstype: str | None, flags: int = 0, data: str | None = None
) -> None: ...
def mount_setattr(fd: int, attr_set: int) -> None: ...
def umount2(target: str, flags: int = 0) -> None: ...
def pivot_root(new_root: str, put_old: str) -> None: ...
def reboot(command: int) -> None: ...
def finit_module(fd: int, parameters: str = "", flags: int = 0) -> None: ...
def fork() -> int:
    """As os.fork(), which opens a file of /proc each time: that may hang in a guest.

    The caller has one thread.
    """

def ipc_objects(kind: int) -> list[tuple[int, int, tuple[int, int]]]:
    """System V's objects: id, how often it is attached, and who had to do with it, 0 for nobody.

    `kind` 0, shared memory: who made it and who attached or detached it last. 1, queues: who sent
    and who received last. 2, sets of semaphores: nobody is told.
    """

def ipc_remove(kind: int, identity: int) -> None: ...
def let_go(pid: int, signal: int) -> None:
    """Trace it no more, and let it have the signal that it stopped for: PTRACE_DETACH of ptrace(2).

    For who has become a tracer by another's PTRACE_TRACEME. SIGTRAP is dropped: without a tracer
    execve(2) sends none. Who was killed meanwhile, or is not traced by this thread, is no error.
    """

def unshare(flags: int) -> None: ...
def setns(fd: int, nstype: int = 0) -> None: ...
def reset_signals() -> None:
    """Every signal's default and none blocked, in the kernel only: for who goes on to execve(2).

    Python's own handlers are not told.
    """

def prctl(option: int, arg2: int = 0, arg3: int = 0, arg4: int = 0, arg5: int = 0) -> int: ...
def openat2(dir_fd: int, path: str, flags: int, mode: int = 0, resolve: int = 0) -> int: ...
def act_as(uid: int, gid: int, groups: Sequence[int], capabilities: int = -1) -> None:
    """Whose rights this thread has to files, from now on: setgroups(2), setfsgid(2), setfsuid(2).

    Without user 0 it loses the capabilities that are about files, and has them again with 0.
    `capabilities` has a bit for each that may stay effective; -1: all that are permitted. The
    caller is root, and comes back by a second call. After an error some of it may be done.
    """

class SpawnError(OSError):
    """The child failed between clone and exec. `step` is the call that failed, as in "chdir".

    Steps: clone, cgroup, setsid, setpgid, tty, fds, close_range, oom_score_adj, rlimit, setgroups,
    capabilities, setgid, setuid, dumpable, chdir, no_new_privs, signals, seccomp, exec.
    `filename` is set for exec: the candidate.

    `pid` is the child where it is the caller's to reap, later: it has not ended in 0.1 s, or a
    debugger is told of its end first (ptrace(2)). Else 0, and no child exists any more.
    """

    step: str
    pid: int

def spawn(
    argv: Sequence[bytes],
    env: Sequence[bytes],
    *,
    candidates: Sequence[bytes],
    cwd: bytes,
    fds: tuple[int, int, int],
    uid: int = 0,
    gid: int = 0,
    groups: Sequence[int] = (),
    session: bool = True,
    tty: int = -1,
    oom_score_adj: int = 0,
    umask: int = 0o022,
    cgroup_fd: int = -1,
    no_new_privs: bool = False,
    rlimits: Sequence[tuple[int, int, int]] = (),
    capabilities: int = -1,
    seccomp: bytes = b"",
    capability_sets: tuple[int, int, int, int, int] | None = None,
    enter_first: bool = False,
    filter_first: bool = False,
) -> tuple[int, int]:
    """Start a program and return (pid, pidfd) once it has exec'ed; both are the caller's to reap.

    `candidates` are paths tried in order as execvp(3) does (ENOENT, ENOTDIR and EACCES go on to the
    next; EACCES wins in the end). `fds` become 0, 1 and 2; every other descriptor is closed.
    Signals are unblocked and at their defaults. With `enter_first` a `cwd` that only the caller may
    enter is no obstacle. `oom_score_adj` is not lowered where that is not allowed.

    `capabilities` has a bit for each that may stay in the bounding, permitted and effective sets,
    and empties the inheritable and ambient ones; -1 leaves all sets alone. `capability_sets` says
    exactly instead: bounding, permitted, effective, inheritable, ambient, of which exec makes what
    capabilities(7) says.

    `seccomp` is an array of struct sock_filter, empty for none; it implies `no_new_privs` and has
    to allow execve. With `filter_first` it implies nothing, needs a caller with CAP_SYS_ADMIN, and
    has to allow what the steps from setgroups on take.

    The calling thread holds the GIL until the child has exec'ed. Raises SpawnError.
    """
