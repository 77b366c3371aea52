"""The kernel's settings: which ones a hardening profile has, and how one is written.

A name is as sysctl(8) has it, `kernel.yama.ptrace_scope` or with slashes, and never leads out of
/proc/sys. The tables say what; docs/design/security.md says what each prevents, and a test
compares.
"""

import os

from microguest.guest import bounds
from microguest.init_shim.failure import Failure, call

__all__ = [
    "DEFAULT",
    "LOCKED_MODULES",
    "PING_GROUPS",
    "SERVERS",
    "STRICT",
    "UNTRUSTING",
    "is_namespaced",
    "path_of",
    "write",
    "write_each",
]

ROOT = "/proc/sys"

# Nothing that images are known to do needs any of these otherwise. `*` stands for every network
# interface that there is, and for those to come.
DEFAULT = {
    "fs.protected_fifos": "1",
    "fs.protected_hardlinks": "1",
    "fs.protected_regular": "2",
    "fs.protected_symlinks": "1",
    "fs.suid_dumpable": "0",
    "dev.tty.ldisc_autoload": "0",
    "dev.tty.legacy_tiocsti": "0",
    "kernel.dmesg_restrict": "1",
    "kernel.kexec_load_disabled": "1",
    "kernel.kptr_restrict": "1",
    "kernel.perf_event_paranoid": "3",
    "kernel.randomize_va_space": "2",
    "kernel.unprivileged_bpf_disabled": "1",
    "kernel.yama.ptrace_scope": "1",
    "net.core.bpf_jit_harden": "1",
    "net.ipv4.conf.*.accept_redirects": "0",
    "net.ipv4.conf.all.accept_source_route": "0",
    "net.ipv4.conf.*.send_redirects": "0",
    "net.ipv4.icmp_echo_ignore_broadcasts": "1",
    "net.ipv4.tcp_syncookies": "1",
    "net.ipv6.conf.*.accept_redirects": "0",
    "net.ipv6.conf.all.accept_source_route": "0",
    "vm.mmap_min_addr": "65536",
    "vm.unprivileged_userfaultfd": "0",
}
PING_GROUPS = "net.ipv4.ping_group_range"
# What servers meet on a Debian host or in docker, and would miss in a small machine of its own. In
# every profile, `off` included; docs/design/security.md says where each comes from.
SERVERS = {
    "fs.file-max": "9223372036854775807",
    "fs.inotify.max_user_watches": "65536",
    # Terminals: beside the kernel's 4096, of which 1024 are the first mount namespace's alone, the
    # machine's own. So what users take in namespaces and at /dev/pts leaves HOSTS_TERMINALS.
    "kernel.pty.max": str(4096 + bounds.TERMINALS),
    "kernel.pty.reserve": str(bounds.HOSTS_TERMINALS + bounds.TERMINALS),
    "net.ipv4.ip_unprivileged_port_start": "0",
    PING_GROUPS: "0 2147483647",
    "vm.max_map_count": "262144",
}
# Of SERVERS, what gives users something: `strict` leaves the kernel's own.
UNTRUSTING = ("net.ipv4.ip_unprivileged_port_start", PING_GROUPS)
# Over DEFAULT. Some programs miss what these take away.
STRICT = {
    "fs.protected_fifos": "2",
    "kernel.core_pattern": "",
    "kernel.core_uses_pid": "0",  # with it, a core without a pattern is still written (core(5))
    "kernel.io_uring_disabled": "2",
    "kernel.kptr_restrict": "2",
    "kernel.panic_on_oops": "1",
    "kernel.sysrq": "0",  # 17 ms of an emulated boot, and it is only the host that has the keys
    "kernel.yama.ptrace_scope": "2",
    "net.core.bpf_jit_harden": "2",
    "net.ipv4.conf.*.rp_filter": "1",
    "user.max_user_namespaces": "0",
}
# Of both, after everything else, unless modules may be loaded.
LOCKED_MODULES = {
    "kernel.modprobe": "",  # which the kernel would run for whoever opens an unknown socket
    "kernel.modules_disabled": "1",
}

# What belongs to a network or IPC namespace; everything else is the whole kernel's. In net.core
# little is, and the kernel is not trusted to say which.
OWN_NETWORK = ("net/ipv4/", "net/ipv6/", "net/unix/")
OWN_IPC = frozenset(
    f"kernel/{name}"
    for name in ("msgmax", "msgmnb", "msgmni", "sem", "shm_rmid_forced", "shmall", "shmmax")
) | {"kernel/shmmni"}
OWN = OWN_IPC | {"net/core/somaxconn"}
OWN_MESSAGE_QUEUES = "fs/mqueue/"


def path_of(name: str) -> str:
    """Below ROOT. Raises Failure for a name that is none.

    Where a dot comes first, dots separate, and a slash stands for a dot (sysctl(8)).
    """
    first = next((character for character in name if character in "./"), "/")
    path = name if first == "/" else name.translate({ord("."): "/", ord("/"): "."})
    if not all(part.strip(".") and "\0" not in part for part in path.split("/")):
        raise Failure(f"sysctl {name!r:.100}: is not the name of a sysctl")
    return path


def is_namespaced(path: str) -> bool:
    """Whether it is a machine's own in namespaces, and not the host's."""
    return path in OWN or path.startswith((*OWN_NETWORK, OWN_MESSAGE_QUEUES))


def write(path: str, value: str) -> None:
    """One value. Raises Failure."""
    target = f"{ROOT}/{path}"
    with call("open", target, hint="has the kernel this sysctl?"):
        fd = os.open(target, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with call("write", target, hint=f"does it take {value!r:.100}?"):
            # An empty write would change nothing. What text may hold is the kernel's to judge.
            os.write(fd, f"{value}\n".encode("utf-8", "surrogatepass"))
    finally:
        os.close(fd)


def write_each(path: str, value: str) -> None:
    """As `write`, for each directory that a `*` in it stands for. Raises Failure."""
    folder, star, rest = path.partition("*")
    if not star:
        write(path, value)
        return
    with call("listdir", f"{ROOT}/{folder}"):
        names = os.listdir(f"{ROOT}/{folder}")
    for name in names:
        write(folder + name + rest, value)
