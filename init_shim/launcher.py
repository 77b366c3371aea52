"""`microguest namespaces`: the same PID 1 in Linux namespaces instead of a virtual machine.

For tests and a first look; it isolates nothing that matters. The launcher stays outside and waits:
its own end, however it comes, ends everything inside. What it mounts is in a mount namespace of its
own, so the host never sees a mount of it.

    --root DIR    a tree, read-only inside as /microguest/lower; more of them: lower.1, lower.2…
    --volume DIR  another one, as it is, inside as /microguest/volumes/0, /1…
    --run DIR     has boot.json, and host/, which the initial root sees as /microguest/host
    --parent PID  give up if this process is not the parent any more

Exit codes: 0 powered off, 1 failed (one line says why), 2 wrong usage, 3 restarted.
"""

import os
import select
import signal
import sys

import _guestsys

from microguest.guest.boot import config
from microguest.init_shim import mounts, tracers
from microguest.init_shim.failure import Failure, call
from microguest.init_shim.mounts import (
    BIND,
    NODEV,
    NOEXEC,
    NOSUID,
    READ_ONLY,
    RECURSIVE,
    REMOUNT,
    mount,
)

TYPE_CHECKING = False  # typing itself is too heavy for PID 1, which shares the program
if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn

__all__ = ["launch"]

# linux/sched.h
NEW_MOUNT = 0x00020000
NEW_CGROUP = 0x02000000
NEW_UTS = 0x04000000
NEW_IPC = 0x08000000
NEW_USER = 0x10000000
NEW_PID = 0x20000000
NEW_NET = 0x40000000

PR_SET_PDEATHSIG = 1  # linux/prctl.h

POWERED_OFF, FAILED, USAGE, RESTARTED = 0, 1, 2, 3
CHILD_FAILED = 125  # the child has said why already

FOLDERS = ("dev", "proc", "sys", "run", "newroot", "microguest/host", "microguest/volumes")
LOWER = "microguest/lower"
VOLUMES = "microguest/volumes"
DEVICES = ("full", "null", "random", "tty", "urandom", "zero")
FORWARDED = (signal.SIGTERM, signal.SIGINT)
# Flags that a bind mount keeps and that an ordinary user's namespace must state again.
KEPT_FLAGS = NOSUID | NODEV | NOEXEC


class Plan:
    """What was asked for, checked as far as it can be before there is a child."""

    def __init__(self, roots: list[str], volumes: list[str], run: str) -> None:
        self.run = run
        self.host = os.path.join(run, "host")
        self.config = read_config(os.path.join(run, "boot.json"))
        self.lowers = {LOWER + (f".{n}" if n else ""): roots[n] for n in range(len(roots))}
        self.volumes = {f"{VOLUMES}/{n}": volumes[n] for n in range(len(volumes))}
        for folder in (*roots, *volumes, self.host):
            os.close(open_path(folder, os.O_DIRECTORY))


def launch(arguments: list[str]) -> int:
    """Run a machine to its end. Returns an exit code."""
    try:
        roots, volumes, run, parent = parse(arguments)
    except ValueError as error:
        print(f"microguest namespaces: {error}", file=sys.stderr)
        return USAGE
    try:
        die_with(parent)
        plan = Plan(roots, volumes, run)
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
        enter_outer_namespaces()
        with call("pipe2"):
            alive, lifeline = os.pipe2(os.O_CLOEXEC)
        with call("fork"):
            pid = os.fork()
        if pid == 0:
            os.close(lifeline)
            become_init(plan, alive)
        return outlive(pid)
    except Failure as failure:
        print(f"microguest namespaces: {failure}", file=sys.stderr)
        return FAILED


def parse(arguments: list[str]) -> tuple[list[str], list[str], str, int]:
    """(roots, volumes, run, parent's pid). Raises ValueError."""
    values: dict[str, list[str]] = {"--root": [], "--volume": [], "--run": [], "--parent": []}
    for name, value in zip(arguments[::2], arguments[1::2], strict=False):
        if name not in values:
            raise ValueError(f"unknown option {name}")
        values[name].append(value)
    if len(arguments) % 2 or not (values["--root"] and len(values["--run"]) == 1):
        raise ValueError("needs --root DIR and --run DIR")
    parent = (values["--parent"] or [str(os.getppid())])[-1]
    if not parent.isdecimal():
        raise ValueError("--parent needs a process id")
    return values["--root"], values["--volume"], values["--run"][0], int(parent)


def die_with(parent: int) -> None:
    """Be killed when `parent` dies, and now if it is dead already."""
    with call("prctl", "PR_SET_PDEATHSIG"):
        _guestsys.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise Failure(f"process {parent}, which this belongs to, is gone")


def read_config(path: str) -> bytes:
    """The boot config as it is; PID 1 checks it."""
    with call("open", path), open(path, "rb", buffering=0) as file:
        return file.read(config.CONFIG_SIZE + 1) or b""


def open_path(path: str, flags: int = 0) -> int:
    """A descriptor that can be bound: of the mount namespace that the caller is in."""
    with call("open", path):
        return os.open(path, os.O_PATH | os.O_CLOEXEC | flags)


def enter_outer_namespaces() -> None:
    """A user namespace where we are not root, and the PID namespace for the child."""
    uid, gid = os.geteuid(), os.getegid()
    if uid != 0:
        with call("unshare", "user namespace", hint="the system may forbid it to users"):
            _guestsys.unshare(NEW_USER)
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"0 {uid} 1"),
            ("gid_map", f"0 {gid} 1"),
        ):
            path = f"/proc/self/{name}"
            with call("write", path), open(path, "w", encoding="ascii") as file:
                file.write(text)
    with call("unshare", "PID namespace"):
        _guestsys.unshare(NEW_PID)


# ── outside, while it runs ───────────────────────────────────────────────────────────────────────


def outlive(pid: int) -> int:
    """Pass signals on, wait, and translate how PID 1 ended (reboot(2), in a PID namespace)."""

    def forward(number: int, frame: "FrameType | None") -> None:
        os.kill(pid, number)

    for number in FORWARDED:
        signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    status = tracers.await_end(pid)
    for number in FORWARDED:
        signal.signal(number, signal.SIG_IGN)
    if status is None:
        status = tracers.wait_status(pid)
    if status is None:
        raise Failure("PID 1 has ended, and a debugger keeps how")
    if os.WIFSIGNALED(status):
        cause = os.WTERMSIG(status)
        if cause == signal.SIGINT:
            return POWERED_OFF
        if cause == signal.SIGHUP:
            return RESTARTED
        raise Failure(f"PID 1 was killed by signal {cause}")
    if os.WEXITSTATUS(status) != CHILD_FAILED:
        raise Failure(f"PID 1 exited with {os.WEXITSTATUS(status)} instead of powering off")
    return FAILED


# ── inside, until it is PID 1 ────────────────────────────────────────────────────────────────────


def become_init(plan: Plan, alive: int) -> "NoReturn":
    """In the child: the other namespaces, the initial root, and exec of its /init."""
    try:
        _guestsys.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if launcher_is_gone(alive):
            os._exit(CHILD_FAILED)
        with call("unshare", "namespaces"):
            _guestsys.unshare(NEW_MOUNT | NEW_UTS | NEW_IPC | NEW_NET | NEW_CGROUP)
        mount(None, "/", None, mounts.PRIVATE | RECURSIVE)
        make_initial_root(plan)
        enter(plan.run)
        close_descriptors()
        with call("execve", "/init"):
            os.execve("/init", ["init"], {})  # noqa: S606
    except BaseException as error:  # noqa: BLE001  nothing of the launcher may run on in the child
        print(f"microguest namespaces: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(CHILD_FAILED)


def launcher_is_gone(alive: int) -> bool:
    """Its end of the pipe is closed: it died before the death signal was set."""
    poll = select.poll()
    poll.register(alive, select.POLLIN)
    return bool(poll.poll(0))


def make_initial_root(plan: Plan) -> None:
    """What a virtual machine's initramfs would hold, as a tmpfs on the run folder."""
    run = plan.run
    # By name: the link itself leads into the host's mount namespace, which cannot be bound from.
    with call("readlink", "/proc/self/exe"):
        program_path = os.readlink("/proc/self/exe")
    program, host = map(open_path, (program_path, plan.host))
    lowers = {target: open_path(source) for target, source in plan.lowers.items()}
    volumes = {target: open_path(source) for target, source in plan.volumes.items()}
    mount("tmpfs", run, "tmpfs", NOSUID | NODEV, "mode=0755,size=16m")
    for folder in (*FOLDERS, *lowers, *volumes):
        with call("mkdir", f"{run}/{folder}"):
            os.makedirs(f"{run}/{folder}")
    write_new(f"{run}/init", b"", 0o755)
    bind(program, f"{run}/init")
    write_new(run + config.PATH, plan.config, 0o600)
    bind(host, f"{run}/microguest/host")
    for target, fd in lowers.items():
        bind(fd, f"{run}/{target}")
        make_read_only(f"{run}/{target}")
    for target, fd in volumes.items():
        bind(fd, f"{run}/{target}")
    make_devices(f"{run}/dev")
    mount("proc", f"{run}/proc", "proc", NOSUID | NODEV | NOEXEC)
    make_sys(f"{run}/sys")


def make_devices(dev: str) -> None:
    """The device nodes that programs need; none may be made here, so the host's are bound."""
    mount("tmpfs", dev, "tmpfs", NOSUID | NOEXEC, "mode=0755,size=64k")
    for name in DEVICES:
        write_new(f"{dev}/{name}", b"", 0o644)
        mount(f"/dev/{name}", f"{dev}/{name}", None, BIND)
    for name, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        os.symlink(f"/proc/self/fd{target}", f"{dev}/{name}")
    os.symlink("pts/ptmx", f"{dev}/ptmx")


def make_sys(sys_folder: str) -> None:
    """/sys, read-only, and the cgroup hierarchy in it where there is one of version 2."""
    mount("sysfs", sys_folder, "sysfs", NOSUID | NODEV | NOEXEC | READ_ONLY)
    try:
        flags = NOSUID | NODEV | NOEXEC | READ_ONLY
        mount("cgroup2", f"{sys_folder}/fs/cgroup", "cgroup2", flags)
    except Failure:
        pass


def bind(fd: int, target: str) -> None:
    mount(f"/proc/self/fd/{fd}", target, None, BIND | RECURSIVE)


def make_read_only(target: str) -> None:
    """A second call: mount(2) takes no notice of READ_ONLY together with a new BIND."""
    with call("statvfs", target):
        kept = os.statvfs(target).f_flag & KEPT_FLAGS
    mount(None, target, None, REMOUNT | BIND | READ_ONLY | kept)


def write_new(path: str, data: bytes, mode: int) -> None:
    with call("open", path):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with open(fd, "wb", buffering=0) as file:
            file.write(data)


def enter(root: str) -> None:
    """Make `root` the root and let go of the old one."""
    with call("chdir", root):
        os.chdir(root)
    with call("pivot_root", root):
        _guestsys.pivot_root(".", ".")
    with call("umount2", "/"):
        _guestsys.umount2(".", mounts.DETACH)
    with call("chdir", "/"):
        os.chdir("/")


def close_descriptors() -> None:
    """Only the console goes on, as stdout and stderr; stdin is empty."""
    with call("open", "/dev/null"):
        nothing = os.open("/dev/null", os.O_RDONLY)
    os.dup2(nothing, 0)
    with call("open", "/proc/self/fd"):
        names = os.listdir("/proc/self/fd")
    for name in names:
        if int(name) > 2:
            try:
                os.close(int(name))
            except OSError:
                pass
