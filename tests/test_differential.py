"""The same process under crun and under PID 1: what it sees of itself is the same, or listed here.

A shell tells what the kernel says of it. Every difference is in DIFFERENCES with its reason; one
that is not there is a failure, and so is one that has gone.
"""

import base64
import ctypes
import fnmatch
import json
import os
import platform
import pty
import resource
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from init_machine import TOKEN, Machine, boot_config, make_root, require_program
from patience import PATIENCE

from microguest import seccomp
from microguest.host_client.connecting import connect

Facts = dict[str, str]

PROBE = """
section() { echo "## $1"; }
section status; cat /proc/$$/status
section limits; cat /proc/$$/limits
section environ; tr '\\000' '\\n' < /proc/$$/environ
section descriptors; ls -l /proc/$$/fd
section stat; cat /proc/$$/stat
section mounts; cat /proc/$$/mountinfo
section devices; ls -l /dev
section values
echo cwd $(readlink /proc/$$/cwd)
echo root $(readlink /proc/$$/root)
echo directory $(ls -ldn . | tr -s ' ' | cut -d' ' -f1,3,4)
echo hostname $(hostname)
for name in oom_score_adj coredump_filter personality; do
    echo $name $(cat /proc/$$/$name 2>/dev/null)
done
echo tty $(tty)
echo size $(stty size 2>/dev/null)
echo keyring $(grep -o "$KEYRING:" /proc/keys 2>/dev/null || echo another)
section hidden
for path in /proc/kcore /proc/timer_list /sys/firmware; do
    if [ -d $path ]; then echo $path $(ls -A $path | wc -l) entries
    elif [ -e $path ]; then echo $path $(head -c 10 $path 2>/dev/null | wc -c) bytes; fi
done
[ -f /proc/keys ] && echo /proc/keys shown || echo /proc/keys covered
for path in /proc/sys/kernel/domainname /proc/irq/default_smp_affinity /proc/sysrq-trigger; do
    (echo x > $path) 2>/dev/null && echo $path writable || echo $path refused
done
(mkdir /tmp/made && echo mkdir allowed) 2>/dev/null || echo mkdir refused
"""

# Signals 32 and 33, which a C library keeps for itself: make ignores them for all that it starts,
# and crun passes that on.
LIBC_SIGNALS = 0b11 << 31

# Of /proc/PID/status, what says how much and where, and not what it is.
UNSTEADY = (
    *("Name", "State", "Tgid", "Ngid", "Pid", "PPid", "FDSize", "NS*", "Vm*", "Rss*", "Hugetlb*"),
    *("SigQ", "*voluntary_ctxt_switches", "HugetlbPages", "Threads", "TracerPid"),
)

DOCKERS = ("chown", "dac_override", "fsetid", "fowner", "mknod", "net_raw", "setgid", "setuid")
MASKED = ("/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware", "/proc/not-there")
READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
PROFILE = {
    "defaultAction": "SCMP_ACT_ALLOW",
    "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}],
}


NONE: tuple[str, ...] = ()
THREE = dict.fromkeys(("bounding", "permitted", "effective"), DOCKERS)

# Of the test: what is started without one of its own is in it. Whatever other keys the host has do
# not matter.
KEYRING = f"microguest-test-{os.getpid()}"
BASE: dict[str, Any] = {"env": {"COLOUR": "red", "KEYRING": KEYRING}, "capabilities": THREE}

# As Workload fields, over BASE. The runtime's config is made from them.
VARIANTS: dict[str, dict[str, Any]] = {
    "root": {},
    "user": {
        "user": "1000:1000",
        "groups": ["2000", "3000"],
        "cwd": "/srv/made/for/it",
        "umask": 0o027,
    },
    "no-capabilities": {"capabilities": {}, "no_new_privs": True},
    "ambient": {
        "user": "1000:1000",
        "capabilities": {
            "bounding": DOCKERS,
            "permitted": ("chown", "net_raw"),
            "effective": ("net_raw",),
            "inheritable": ("chown", "net_raw"),
            "ambient": ("chown",),
        },
    },
    "limits": {"rlimits": {"nofile": (100, 200), "core": (0, 0), "stack": (1 << 20, -1)}},
    "hidden": {"masked": MASKED, "read_only_paths": READ_ONLY},
    "filter": {"seccomp": PROFILE, "user": "1000:1000"},
    "filter-no-new-privs": {"seccomp": PROFILE, "no_new_privs": True},
    "terminal": {"stdio": "terminal", "rows": 33, "columns": 99, "user": "1000:1000"},
}

EVERYWHERE = tuple(VARIANTS)
NOT_ROOT = ("user", "ambient", "terminal", "filter")  # root sees the keys of all of root's
HIDDEN = ("hidden",)
TERMINAL = ("terminal",)

# Facts, in which variants, and why.
DIFFERENCES: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("process id", EVERYWHERE, "PID 1 of a machine is its init, not its workload"),
    ("process parent", EVERYWHERE, "the same"),
    ("status Groups", EVERYWHERE, "the primary group is among the others, as docker has it"),
    ("mount /dev/[fnrtuz]*", EVERYWHERE, "the launcher makes no devices: it binds the host's"),
    ("mount /sys/fs/cgroup", EVERYWHERE, "the bundle does not ask for it; a machine has it"),
    ("device core", EVERYWHERE, "/proc/kcore by another name, which a guest should not offer"),
    ("value keyring", NOT_ROOT, "crun gives it one, as it shares the kernel with others"),
    ("mount /proc/[bfis]*", HIDDEN, "nosuid, nodev and noexec stay when it becomes read-only"),
    ("mount /sys/firmware", HIDDEN, "what covers it is nosuid, nodev and noexec too"),
    ("mount /proc/[kt]*", HIDDEN, "/dev/null covers it; that it is read-only changes nothing"),
    ("env TERM", TERMINAL, "docker sets it; a runtime's bundle has to"),
    ("device console", TERMINAL, "the machine's console is not the workload's terminal"),
    ("mount /dev/console", TERMINAL, "the same"),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_program()
    if shutil.which("crun") is None:
        pytest.skip("needs crun: apt install crun")
    join_session_keyring(KEYRING)
    return make_root(tmp_path_factory.mktemp("image"))


def join_session_keyring(name: str) -> None:
    """keyctl_join_session_keyring(3). It ends with the last process that is in it."""
    number = {"x86_64": 250, "aarch64": 219}[platform.machine()]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(number, 1, name.encode()) < 0:
        pytest.skip(f"keyctl: {os.strerror(ctypes.get_errno())}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_process_is_the_same_or_its_difference_is_known(
    variant: str, root: Path, tmp_path: Path
) -> None:
    wanted = {**BASE, **VARIANTS[variant]}
    ours, theirs = facts(under_pid_1(root, wanted)), facts(under_crun(root, wanted, tmp_path))
    differing = {name for name in ours | theirs if ours.get(name) != theirs.get(name)}
    known = [pattern for pattern, where, _ in DIFFERENCES if variant in where]
    unknown = {
        name: (ours.get(name), theirs.get(name))
        for name in sorted(differing)
        if not any(fnmatch.fnmatch(name, pattern) for pattern in known)
    }
    assert unknown == {}, "ours, theirs"
    gone = [pattern for pattern in known if not fnmatch.filter(differing, pattern)]
    assert gone == [], "these differences have gone"
    assert len(ours) > 80


# ── run by PID 1 ─────────────────────────────────────────────────────────────────────────────────


def under_pid_1(root: Path, wanted: dict[str, Any]) -> str:
    """What the probe writes as the workload."""
    fields = {"stdio": "attached", **wanted}
    if "seccomp" in fields:
        program = seccomp.profile(fields["seccomp"], arch=platform.machine())
        fields["seccomp"] = base64.b64encode(program).decode()
    config = boot_config(["/bin/sh", "-c", PROBE], **fields)
    config["hostname"] = "probe"
    with Machine(root, config) as machine:
        machine.report("ready")
        with (
            connect(f"unix://{machine.host}/agent.sock", token=TOKEN) as agent,
            agent.attach("main") as main,
        ):
            result = main.communicate()
        assert result.returncode == 0, result.stderr
        assert machine.wait() == 0
    return result.stdout.decode().replace("\r", "")


# ── run by crun ──────────────────────────────────────────────────────────────────────────────────


# It takes cgroup v1 or v2, and no host that has both: it is shown v1 alone. Core dumps are off in a
# guest, whatever the host has.
PREPARED = 'umount /sys/fs/cgroup/unified 2>/dev/null; ulimit -Sc 0; exec "$@"'


def under_crun(root: Path, wanted: dict[str, Any], folder: Path) -> str:
    """What the probe writes as the process of an OCI bundle."""
    shutil.copytree(root, folder / "rootfs", symlinks=True)
    (folder / "config.json").write_text(json.dumps(oci_config(wanted)))
    name = f"microguest-test-{os.getpid()}-{time.monotonic_ns()}"
    command = ["unshare", "--mount", "sh", "-c", PREPARED, "sh", "crun"]
    command += ["--root", str(folder / "state"), "--cgroup-manager=disabled"]
    command += ["run", "--bundle", str(folder), name]
    if wanted.get("stdio") == "terminal":
        return on_a_terminal(command).replace("\r", "")
    done = subprocess.run(
        command,
        input=b"",
        capture_output=True,
        timeout=PATIENCE,
        check=False,
        env={"PATH": "/usr/bin"},
    )
    if done.returncode != 0:
        pytest.skip(f"crun cannot run here: {done.stderr.decode()[-300:]}")
    return done.stdout.decode()


def on_a_terminal(command: list[str]) -> str:
    """All that it writes to a terminal of its own."""
    master, slave = pty.openpty()
    output = b""
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave) as process:
        os.close(slave)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            ready, _, _ = select.select([master], [], [], 1.0)
            try:
                if ready:
                    output += os.read(master, 65536)
            except OSError:  # EIO: nobody has it open any more
                break
        process.kill()
    os.close(master)
    return output.decode()


def oci_config(wanted: dict[str, Any]) -> dict[str, Any]:
    """Runtime spec 1.0: config.md, config-linux.md."""
    uid, _, gid = wanted.get("user", "0:0").partition(":")
    terminal = wanted.get("stdio") == "terminal"
    env = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", **wanted["env"]}
    names = ("bounding", "permitted", "effective", "inheritable", "ambient")
    capabilities = wanted["capabilities"]
    groups = [int(group) for group in wanted.get("groups", [])]
    process: dict[str, Any] = {
        "terminal": terminal,
        "user": {"uid": int(uid), "gid": int(gid), "additionalGids": groups},
        "args": ["/bin/sh", "-c", PROBE],
        "env": [f"{name}={value}" for name, value in env.items()],
        "cwd": wanted.get("cwd", "/"),
        "noNewPrivileges": wanted.get("no_new_privs", False),
        "capabilities": {
            name: [f"CAP_{word.upper()}" for word in capabilities.get(name, NONE)] for name in names
        },
        "rlimits": [
            {"type": f"RLIMIT_{name.upper()}", "soft": soft % 2**64, "hard": hard % 2**64}
            for name, (soft, hard) in {**ENGINES, **wanted.get("rlimits", {})}.items()
        ],
    }
    if "umask" in wanted:
        process["user"]["umask"] = wanted["umask"]
    if terminal:
        process["consoleSize"] = {"height": wanted["rows"], "width": wanted["columns"]}
    linux: dict[str, Any] = {
        "namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")],
        "maskedPaths": list(wanted.get("masked", ())),
        "readonlyPaths": list(wanted.get("read_only_paths", ())),
    }
    if "seccomp" in wanted:
        linux["seccomp"] = wanted["seccomp"]
    return {
        "ociVersion": "1.0.2",
        "process": process,
        "root": {"path": "rootfs"},
        "hostname": "probe",
        "mounts": [mount(*words) for words in MOUNTS],
        "linux": linux,
    }


def mount(target: str, kind: str, options: str) -> dict[str, Any]:
    return {"destination": target, "type": kind, "source": kind, "options": options.split(",")}


def as_an_engine_gives(kind: int, wanted: int) -> tuple[int, int]:
    """Soft and hard, as far as the host goes: docker's daemon decides it, not the runtime."""
    soft, hard = resource.getrlimit(kind)
    return (max(soft, min(hard, wanted)) if hard != -1 else wanted), hard


ENGINES = {
    "nofile": as_an_engine_gives(resource.RLIMIT_NOFILE, 2**20),
    "nproc": (resource.getrlimit(resource.RLIMIT_NPROC)[1],) * 2,
}

MOUNTS = (
    ("/proc", "proc", "nosuid,nodev,noexec"),
    ("/dev", "tmpfs", "nosuid,noexec,mode=755,size=64k"),
    ("/dev/pts", "devpts", "nosuid,noexec,newinstance,ptmxmode=0666,mode=0620"),
    ("/dev/shm", "tmpfs", "nosuid,nodev,noexec,mode=1777"),
    ("/dev/mqueue", "mqueue", "nosuid,nodev,noexec"),
    ("/run", "tmpfs", "nosuid,nodev,mode=0755"),
    ("/sys", "sysfs", "nosuid,nodev,noexec,ro"),
)


# ── what it told ─────────────────────────────────────────────────────────────────────────────────


def facts(text: str) -> Facts:
    """One for each thing that can differ, by a name like "status CapEff"."""
    found: Facts = {}
    for block in text.split("## ")[1:]:
        name, _, body = block.partition("\n")
        found |= READERS[name](body.splitlines())
    assert len([name for name in found if name.startswith("status ")]) > 15, text
    return found


def status(lines: list[str]) -> Facts:
    pairs = [line.split(":", 1) for line in lines]
    found = {
        f"status {name}": " ".join(value.split())
        for name, value in pairs
        if not any(fnmatch.fnmatch(name, pattern) for pattern in UNSTEADY)
    }
    ignored = int(found["status SigIgn"], 16) & ~LIBC_SIGNALS
    return found | {"status SigIgn": f"{ignored:016x}"}


def limits(lines: list[str]) -> Facts:
    return {f"limit {line[:25].strip()}": " ".join(line[25:].split()) for line in lines[1:]}


def environment(lines: list[str]) -> Facts:
    return {f"env {name}": value for name, _, value in (line.partition("=") for line in lines)}


def descriptors(lines: list[str]) -> Facts:
    """Where each leads, without the numbers of pipes; and who may do what with it."""
    found = {}
    for line in lines:
        left, arrow, target = line.partition(" -> ")
        if arrow:
            found[f"fd {left.split()[-1]}"] = f"{left[1:4]} {target.partition(':[')[0]}"
    return found


def process_numbers(lines: list[str]) -> Facts:
    """proc(5): its relations rather than the numbers."""
    before, _, after = lines[0].rpartition(")")
    pid = before.split()[0]
    _, parent, group, session, terminal, foreground, *rest = after.split()
    return {
        "process id": pid,
        "process parent": parent,
        "process group leader": str(group == pid),
        "process session leader": str(session == pid),
        "process has a terminal": str(terminal != "0"),
        "process in the foreground": str(foreground == pid),
        "process flags of fork": str(int(rest[0]) & 0x40),
        "process nice": rest[10],
        "process exit signal": rest[32],
        "process scheduling": " ".join(rest[34:36]),
    }


def mounts(lines: list[str]) -> Facts:
    """proc(5): type and the flags that forbid something. Which device it is differs anyway."""
    found = {}
    for line in lines:
        left, _, right = line.partition(" - ")
        target, flags = left.split()[4:6]
        held = [flag for flag in ("ro", "nosuid", "nodev", "noexec") if flag in flags.split(",")]
        kind = right.split()[0] if target != "/" else "whatever the image is on"
        found[f"mount {target}"] = " ".join([kind, *held])
    return found


def devices(lines: list[str]) -> Facts:
    """Mode and, of a device, its numbers, or where a link leads."""
    found = {}
    for line in lines[1:]:
        words = line.split()
        if words[0][0] in "cb":  # with two numbers, and a comma between them
            words[4:6] = ["".join(words[4:6])]
        else:
            words[4] = ""
        found[f"device {words[8]}"] = " ".join([words[0], words[4], *words[9:]]).strip()
    return found


def values(lines: list[str]) -> Facts:
    return {f"value {name}": rest for name, _, rest in (line.partition(" ") for line in lines)}


READERS = {
    "status": status,
    "limits": limits,
    "environ": environment,
    "descriptors": descriptors,
    "stat": process_numbers,
    "mounts": mounts,
    "devices": devices,
    "values": values,
    "hidden": values,
}
