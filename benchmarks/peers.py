"""Other ways to run a command somewhere else, as far as this machine has them.

Each runs on a Unix socket or on loopback, in a folder of its own and, as root, in a mount namespace
of its own, so that nothing of this machine is configured or left changed. What cannot run is
reported with its reason.
"""

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path

from floor import Floor, FloorFailed

__all__ = ["Unavailable", "start_peers"]

START_WITHIN = 10.0  # seconds for a daemon to answer
UNPACKED = Path(__file__).parent.parent / "dist" / "bench" / "peers"
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
# Agents of others that would be compared with if there were a driver for what they speak.
UNDRIVEN = ("kata-agent", "envd", "vminitd")

Sample = Callable[[int], list[int]]  # so many execs, the nanoseconds of each


class Unavailable(Exception):
    """This machine cannot run the peer; the message says why."""


def start_peers(stack: ExitStack, floor: Floor) -> tuple[dict[str, Sample], dict[str, str]]:
    """Those that run, until `stack` is closed, and the reasons of the others."""
    candidates: dict[str, Callable[[Floor], AbstractContextManager[Sample]]] = {
        "qemu-ga, guest-exec": qemu_ga,
        "OpenSSH, master connection": openssh,
        "crun exec": partial(container, tool="crun"),
        "runc exec": partial(container, tool="runc"),
    }
    running: dict[str, Sample] = {}
    reasons = {name: reason for name in UNDRIVEN if (reason := undriven(name))}
    for name, candidate in candidates.items():
        try:
            sample = stack.enter_context(candidate(floor))
            sample(2)
            running[name] = sample
        except (Unavailable, FloorFailed, OSError, subprocess.SubprocessError) as error:
            reasons[name] = str(error)
    return running, reasons


def undriven(name: str) -> str:
    found = shutil.which(name)
    return f"{found} exists, but nothing here speaks its protocol" if found else "not on PATH"


# ── QEMU's guest agent ───────────────────────────────────────────────────────────────────────────


@contextmanager
def qemu_ga(floor: Floor) -> Iterator[Sample]:
    """guest-exec, then guest-exec-status without a pause until it has exited: its best case."""
    program = find("qemu-ga")
    folder = subfolder(floor, "qemu-ga")
    argv = [program, "--method=unix-listen", f"--path={folder}/qga.sock", f"--statedir={folder}"]
    with daemon([*argv, f"--pidfile={folder}/pid", f"--logfile={folder}/log"]):
        await_path(folder / "qga.sock")
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(START_WITHIN)
            sock.connect(f"{folder}/qga.sock")
            with sock.makefile("rb") as answers:
                yield lambda count: [guest_exec(sock, answers, floor.true) for _ in range(count)]


def guest_exec(sock: socket.socket, answers: Iterator[bytes], program: Path) -> int:
    start = time.monotonic_ns()
    execute = b'{"execute":"guest-exec","arguments":{"path":"%s","capture-output":true}}\n'
    sock.sendall(execute % os.fsencode(program))
    pid = json.loads(next(answers))["return"]["pid"]
    question = b'{"execute":"guest-exec-status","arguments":{"pid":%d}}\n' % pid
    while True:
        sock.sendall(question)
        status = json.loads(next(answers))["return"]
        if status["exited"]:
            break
    if status["exitcode"] != 0:
        raise Unavailable(f"guest-exec ended with {status}")
    return time.monotonic_ns() - start


# ── OpenSSH ──────────────────────────────────────────────────────────────────────────────────────

SSHD_CONFIG = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
PrintMotd no
PrintLastLog no
"""
SSH_CONFIG = """\
Host bench
  HostName 127.0.0.1
  Port {port}
  User root
  IdentityFile {folder}/user_key
  IdentitiesOnly yes
  UserKnownHostsFile /dev/null
  StrictHostKeyChecking no
  LogLevel ERROR
  ControlPath {folder}/control
"""
# The account with a plain shell and no start-up files, and the one that sshd drops its rights to.
PASSWD = "root:*:0:0::{folder}:/bin/sh\nsshd:*:65533:65533::/run/sshd:/bin/false\n"
# Nobody but this sshd sees them.
SSHD_MOUNTS = """\
set -e
mount --bind "$1/passwd" /etc/passwd
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/sshd
shift
exec "$@"
"""


@contextmanager
def openssh(floor: Floor) -> Iterator[Sample]:
    """`ssh` over a connection that a master holds: what a user of it types, client included."""
    require_root()
    ssh, keygen = find("ssh"), find("ssh-keygen")
    sshd, libraries = find_sshd()
    folder = subfolder(floor, "ssh")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name in ("host_key", "user_key"):
        quietly([keygen, "-q", "-t", "ed25519", "-N", "", "-f", f"{folder}/{name}"])
    texts = {"sshd_config": SSHD_CONFIG, "ssh_config": SSH_CONFIG, "passwd": PASSWD}
    for name, text in texts.items():
        (folder / name).write_text(text.format(port=port, folder=folder))
    serve = [sshd, "-D", "-e", "-f", f"{folder}/sshd_config"]
    client = [ssh, "-F", f"{folder}/ssh_config"]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries)} if libraries else None
    private = [*unshared("--pid", "--fork", "--kill-child"), "sh", "-c", SSHD_MOUNTS, "sh"]
    with daemon([*private, str(folder), *serve], environment):
        await_port(port)
        with daemon([*client, "-M", "-N", "bench"]):
            await_path(folder / "control")
            yield lambda count: floor.times("spawn", count, *client, "bench", floor.true)


def find_sshd() -> tuple[str, Path | None]:
    """sshd and, where it was only unpacked, its libraries.

    It is not installed for this: on Debian that would start a server for everybody on port 22.
    """
    installed = shutil.which("sshd", path=SBIN)
    if installed:
        return installed, None
    unpacked = UNPACKED / "usr" / "sbin" / "sshd"
    if not unpacked.exists():
        find("apt-get"), find("dpkg-deb")
        UNPACKED.mkdir(parents=True, exist_ok=True)
        quietly(["apt-get", "download", "openssh-server", "libwrap0"], cwd=UNPACKED)
        for package in UNPACKED.glob("*.deb"):
            quietly(["dpkg-deb", "-x", str(package), str(UNPACKED)])
    libraries = next(UNPACKED.glob("usr/lib/*-linux-gnu*"), UNPACKED)
    return str(unpacked), libraries


# ── OCI runtimes ─────────────────────────────────────────────────────────────────────────────────

# A runtime that takes cgroup v1 or v2 may refuse a host that has both: it is shown v1 alone.
ONE_HIERARCHY = 'umount /sys/fs/cgroup/unified 2>/dev/null; exec "$@"'


@contextmanager
def container(floor: Floor, tool: str) -> Iterator[Sample]:
    """`TOOL exec` in a running container that has the floor's programs as its root."""
    program = find(tool)
    require_root()
    folder = subfolder(floor, tool)
    rootfs = folder / "bundle" / "rootfs"
    rootfs.mkdir(parents=True)
    for source in (floor.program, floor.true):
        shutil.copy(source, rootfs)
    quietly([program, "spec"], cwd=rootfs.parent)
    config = json.loads((rootfs.parent / "config.json").read_text())
    config["process"].update(terminal=False, args=["/floor", "pause"])
    (rootfs.parent / "config.json").write_text(json.dumps(config))
    inside = (*unshared(), "sh", "-c", ONE_HIERARCHY, "sh")
    name = f"microguest-bench-{os.getpid()}"
    command = [program, "--root", f"{folder}/state"]
    try:
        quietly([*inside, *command, "run", "-d", name], cwd=rootfs.parent, keep_output=False)
        words = (*command, "exec", name, "/true")
        yield lambda count: floor.times("spawn", count, *words, before=inside)
    finally:
        gone = [*inside, *command, "delete", "-f", name]
        subprocess.run(gone, capture_output=True, check=False, timeout=START_WITHIN)


# ── processes ────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def daemon(argv: list[str], environment: dict[str, str] | None = None) -> Iterator[None]:
    """A program in the foreground of ours, ended with us. Unavailable where it ended itself."""
    with subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
    ) as process:
        try:
            yield
            if process.poll() is not None:
                raise Unavailable(f"{argv[0]} ended early with status {process.returncode}")
        finally:
            process.terminate()
            try:
                process.wait(START_WITHIN)
            except subprocess.TimeoutExpired:
                process.kill()


def quietly(argv: list[str], cwd: Path | None = None, *, keep_output: bool = True) -> None:
    """Run a step of the preparation; Unavailable with its words where it fails.

    keep_output False: for what leaves a process behind that would hold a pipe open.
    """
    output = subprocess.PIPE if keep_output else subprocess.DEVNULL
    done = subprocess.run(
        argv,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if keep_output else subprocess.DEVNULL,
        timeout=60,
        check=False,
    )
    if done.returncode != 0:
        words = (done.stdout or b"").decode(errors="replace").strip().splitlines()
        raise Unavailable(f"{argv[0]} failed ({done.returncode}): {' '.join(words[-2:])[:300]}")


def find(program: str) -> str:
    """Its path. Unavailable where it is not installed."""
    path = shutil.which(program, path=f"{os.environ.get('PATH', '')}:{SBIN}")
    if path is None:
        raise Unavailable(f"{program} is not installed")
    return path


def require_root() -> None:
    if os.geteuid() != 0:
        raise Unavailable("needs root here")


def unshared(*more: str) -> tuple[str, ...]:
    """The wrapper that gives a program a mount namespace of its own."""
    return (find("unshare"), "--mount", *more)


def subfolder(floor: Floor, name: str) -> Path:
    path = floor.folder / name
    path.mkdir(mode=0o700)
    return path


def await_path(path: Path) -> None:
    await_that(path.exists, f"{path.name} did not appear within {START_WITHIN:.0f} s")


def await_port(port: int) -> None:
    def accepts() -> bool:
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", port)) == 0

    await_that(accepts, f"nobody accepted on 127.0.0.1:{port} within {START_WITHIN:.0f} s")


def await_that(holds: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + START_WITHIN
    while not holds():
        if time.monotonic() > deadline:
            raise Unavailable(otherwise)
        time.sleep(0.01)
