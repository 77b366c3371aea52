"""Each hardening profile in a virtual machine: what it sets is set, and what it prevents fails."""

import json
import lzma
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from init_machine import make_root, require_program
from test_init_hardening import profile
from vm_machine import BUNDLE, make_erofs, run_vm, vm_config

pytestmark = pytest.mark.qemu

ATTACKS = Path(__file__).parent / "data" / "attacks.c"
# Settings that a kernel may be too old for, with its first version that has them.
NEWER = {"dev/tty/legacy_tiocsti": (6, 2), "kernel/io_uring_disabled": (6, 6)}

# Prints "NAME VALUE" a line. Settings come first, as strict lets nobody see some files afterwards.
LOOK = """
uname -r | sed 's/^/release /'
echo "insmod $(insmod /vsock_loopback.ko 2>&1)"
for path in $PATHS; do
    for file in /proc/sys/$path; do
        test -e "$file" && echo "sysctl:${file#/proc/sys/} $(cat $file)"
    done
done
attacks
for who in root tester; do
    su -s /bin/sh $who -c "grep -m1 ' T ' /proc/kallsyms" | sed "s/ .*//; s/^/kallsyms:$who /"
done
echo "pids:tester $(su -s /bin/sh tester -c 'ls /proc | grep -c "^1$"')"
cp /bin/busybox /dev/shm/busybox; /dev/shm/busybox true 2>/dev/null; echo "shm $?"
cd /tmp; sh -c 'kill -SEGV $$'; sh -c 'ulimit -c unlimited; kill -SEGV $$'
echo "cores $(ls /tmp | grep -c ^core)"
test -s /proc/timer_list; echo "timer_list $?"
test -d /sys/firmware/acpi; echo "firmware $?"
mount -t securityfs none /sys/kernel/security 2>/dev/null
echo "lockdown $(grep -o '\\[.*\\]' /sys/kernel/security/lockdown)"
grep ' /sys ' /proc/mounts | tail -n1 | sed 's/.* \\(r[ow]\\),.*/sys \\1/'
"""

Look = Callable[..., dict[str, str]]


SERVER = """
grep -E 'Max (open files|processes)' /proc/self/limits
su -s /bin/sh tester -c 'ulimit -n; httpd -h /tmp -p 80 && echo serves'
cat /proc/sys/fs/file-max /proc/sys/fs/inotify/max_user_watches /proc/sys/vm/max_map_count
"""


def test_a_small_machine_has_a_servers_limits(image: Path) -> None:
    ended = run_vm(vm_config(["/bin/sh", "-c", SERVER]), disks={"root": image}, memory=160)
    assert [line.split()[-3:-1] for line in ended.lines[:2]] == [
        ["unlimited", "unlimited"],
        ["1048576", "1048576"],
    ]
    assert ended.lines[2:] == ["1048576", "serves", str(2**63 - 1), "65536", "262144"]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Busybox with /etc, and the attacks."""
    require_program()
    if shutil.which("gcc") is None:
        pytest.skip("needs a C compiler: apt install gcc")
    tree = make_root(tmp_path_factory.mktemp("image") / "root")
    (tree / "tmp").chmod(0o1777)
    attacks = tree / "bin" / "attacks"
    subprocess.run(["gcc", "-static", "-O1", "-o", str(attacks), str(ATTACKS)], check=True)
    copy_loopback_module(tree)
    return make_erofs(tree, tree.parent / "image.erofs")


def copy_loopback_module(tree: Path) -> None:
    """The kernel's vsock loopback, which is not in the bundle, from the package of its kernel."""
    source = json.loads((BUNDLE / "manifest.json").read_text())["kernel_source"]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    package = next(cache.glob(f"microguest/build/kernel-package-*/{source}"), None)
    if package is None:
        pytest.skip(f"needs {source} in the build's cache: make guest")
    folder = tree.parent / "kernel"
    subprocess.run(["dpkg-deb", "-x", str(package), str(folder)], check=True)
    (found,) = folder.rglob("vsock_loopback.ko*")
    content = found.read_bytes()
    compressed = found.suffix == ".xz"  # since Debian 13
    (tree / "vsock_loopback.ko").write_bytes(lzma.decompress(content) if compressed else content)


@pytest.fixture(scope="module")
def look(image: Path) -> Look:
    """What is seen from inside a machine with this hardening."""

    def boot(**hardening: Any) -> dict[str, str]:
        names = {path for name in ("default", "strict") for path in profile(name)}
        script = f"set -f; PATHS='{' '.join(sorted(names))}'; set +f{LOOK}"
        config = vm_config(["sh", "-c", script])
        config["hardening"] = hardening
        ended = run_vm(config, disks={"root": image})
        assert ended.code == 0, ended.console[-3000:]
        assert "hardening:" not in ended.console
        pairs = (line.partition(" ") for line in ended.lines)
        return {name: value for name, _, value in pairs}

    return boot


def assert_in_effect(seen: dict[str, str], name: str) -> None:
    """Every setting of the profile, on every interface, but for what this kernel is too old for."""
    found = re.match(r"(\d+)\.(\d+)", seen["release"])
    assert found is not None
    release = tuple(map(int, found.groups()))
    for path, value in profile(name).items():
        pattern = re.escape(path).replace(r"\*", "[^/]+")
        values = {
            key: shown
            for key, shown in seen.items()
            if key.startswith("sysctl:") and re.fullmatch(pattern, key.removeprefix("sysctl:"))
        }
        if path in NEWER and release < NEWER[path]:
            assert values == {}
            continue
        assert values, path
        assert len(values) > 2 or "*" not in path, values  # all, default, and lo
        assert set(values.values()) == {value}, values


def test_without_hardening_programs_may_what_the_kernel_lets_them(look: Look) -> None:
    """Shows that the attacks work, so that their failing elsewhere says something."""
    seen = look(profile="off")
    for attack in ("root:kexec_load", "root:iopl", "root:open:/dev/mem", "user:ptrace"):
        assert seen[attack] == "0", attack
    for attack in ("user:unshare", "user:open:/proc/1/cmdline", "root:open:/proc/sysrq-trigger"):
        assert seen[attack] == "0", attack
    assert seen["root:init_module"] == "ENOEXEC"
    assert (seen["tmp:fifo"], seen["tmp:regular"]) == ("0", "0")
    assert (seen["shm"], seen["cores"], seen["lockdown"], seen["sys"]) == ("0", "1", "[none]", "rw")
    assert seen["firmware"] == "0"
    assert int(seen["kallsyms:root"], 16) != 0


def test_default_profile(look: Look) -> None:
    seen = look()
    assert_in_effect(seen, "default")
    refused = {
        "root:kexec_load": "EPERM",
        "root:init_module": "EPERM",
        "user:syslog": "EPERM",
        "user:open:/dev/kmsg": "EPERM",
        "user:bpf": "EPERM",
        "user:perf_event_open": "EACCES",
        "user:userfaultfd": "EPERM",
        "user:ptrace": "EPERM",
        "user:link": "EPERM",
        "user:dial": "ENODEV",
        "tmp:symlink": "EACCES",
        "tmp:fifo": "EACCES",
        "tmp:regular": "EACCES",
        "shm": "126",
    }
    assert {name: seen[name] for name in refused} == refused
    assert int(seen["kallsyms:tester"], 16) == 0
    # What it leaves alone: images are known to need it.
    assert (seen["user:unshare"], seen["pids:tester"], seen["sys"]) == ("0", "1", "rw")
    assert seen["root:open:/proc/sys/kernel/hostname"] == "0"
    assert seen["cores"] == "1"  # of the one process that has asked for it


def test_strict_profile(look: Look) -> None:
    seen = look(profile="strict")
    assert_in_effect(seen, "strict")
    refused = {
        "root:kexec_load": "EPERM",
        "root:init_module": "EPERM",
        "root:open:/dev/mem": "EPERM",
        "root:iopl": "EPERM",
        "root:open:/proc/sysrq-trigger": "EROFS",
        "root:open:/proc/sys/kernel/hostname": "EROFS",
        "root:open:/sys/kernel/mm/transparent_hugepage/enabled": "EROFS",
        "user:unshare": "ENOSPC",
        "user:open:/proc/1/cmdline": "ENOENT",
        "user:ptrace": "EPERM",
        "pids:tester": "0",
        "cores": "0",
        "timer_list": "1",
        "firmware": "1",
        "lockdown": "[integrity]",
        "sys": "ro",
        "shm": "126",
    }
    assert {name: seen[name] for name in refused} == refused
    assert int(seen["kallsyms:root"], 16) == int(seen["kallsyms:tester"], 16) == 0


def test_own_sysctls_win_and_modules_may_be_loaded(look: Look) -> None:
    seen = look(
        modules=True,
        sysctls={"kernel/kptr_restrict": "0", "kernel.yama.ptrace_scope": "0"},
    )
    assert seen["sysctl:kernel/kptr_restrict"] == "0"
    assert (seen["sysctl:kernel/modules_disabled"], seen["root:init_module"]) == ("0", "ENOEXEC")
    assert (seen["user:ptrace"], seen["root:kexec_load"]) == ("0", "EPERM")
    # Even with a way from the guest to itself, the agent hangs up.
    assert (seen["insmod"], seen["user:dial"]) in {("", "0"), ("", "ECONNRESET")}
