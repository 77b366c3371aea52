"""What the root of a guest can leave on this host, in a directory that root has shared with it."""

import base64
import errno
import os
import shutil
import stat
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import machinekit
import pytest
from patience import PATIENCE

from microguest import Machine, Mount, boot
from microguest.host_client.machines.deputy import share_filter
from microguest.host_client.machines.virtiofsd import is_successor, virtiofsd
from microguest.host_client.monitor.vmm import dies_with

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give away root's files")
SET_IDS = stat.S_ISUID | stat.S_ISGID

ATTEMPTS = """
import ctypes, os, sys
os.chdir(sys.argv[1])
def attempt(act, *words):
    try:
        act(*words)
    except OSError as error:
        print(error.errno)
    else:
        print("made")
open("plain", "w").close()
attempt(os.chmod, "plain", 0o4755)
attempt(os.chmod, "plain", 0o2755)
fd = os.open("plain", os.O_RDWR)
attempt(os.fchmod, fd, 0o4755)
os.umask(0)
attempt(os.open, "made", os.O_CREAT | os.O_WRONLY, 0o4755)
attempt(os.mknod, "node", 0o104755)
libc = ctypes.CDLL(None, use_errno=True)
def raw(number, *words):
    if libc.syscall(number, *words) < 0:
        raise OSError(ctypes.get_errno(), "")
attempt(raw, 437, -100, b"opened", 0, 24)
attempt(raw, 452, -100, b"plain", 0o4755, 0)
attempt(raw, 425, 8, 0)
attempt(os.chmod, "plain", 0o1777)
attempt(os.open, "plain", os.O_RDONLY, 0o4755)
"""


@needs_root
def test_the_filter_holds_every_way_to_a_set_user_id_bit(tmp_path: Path) -> None:
    done = subprocess.run(
        ["python3", "-c", ATTEMPTS, str(tmp_path)],
        preexec_fn=dies_with(os.getpid(), share_filter(suid=False)),
        capture_output=True,
        text=True,
        check=True,
    )
    refused, hidden, fine = "1", "38", "made"
    assert done.stdout.split() == [
        *([refused] * 5), hidden, refused, hidden, fine, fine,
    ]  # fmt: skip
    assert not any(path.stat().st_mode & SET_IDS for path in tmp_path.iterdir())


@needs_root
def test_nothing_runs_without_the_filter_that_it_was_to_have(tmp_path: Path) -> None:
    nonsense = base64.b64encode(b"\xff" * 8).decode()
    done = subprocess.run(
        ["touch", str(tmp_path / "ran")],
        preexec_fn=dies_with(os.getpid(), nonsense),
        check=False,
    )
    assert done.returncode == 1
    assert not (tmp_path / "ran").exists()


LEAVE = """
cp /bin/busybox /mnt/shell; chmod 4755 /mnt/shell; chmod 6755 /mnt/shell
cp -p /bin/busybox /mnt/group; chmod g+s /mnt/group
cat /bin/busybox > /mnt/victim
mknod /mnt/disk b 8 0; mknod /mnt/memory c 1 1; mknod /mnt/fifo p
mknod /mnt/whiteout c 0 0
setfattr -n security.capability -v 0sAQAAAgAgAAAAAAAAAAAAAAAAAAA= /mnt/shell
mkdir /mnt/folder; chmod 1777 /mnt/folder; echo plain > /mnt/folder/file; chown 1000 /mnt/folder
"""


def leave(image: str, shared: Path, **options: bool) -> None:
    shared.mkdir()
    victim = shared / "victim"
    victim.write_bytes(b"#!/bin/sh\n")
    victim.chmod(0o4755)
    with boot(image, mounts=[Mount(source=str(shared), target="/mnt", **options)]) as machine:  # type: ignore[arg-type]
        said(machine, LEAVE)


def said(machine: Machine, script: str) -> None:
    machine.agent.exec(["sh", "-c", script], timeout=PATIENCE)


def modes(shared: Path, test: Callable[[int], object]) -> set[str]:
    return {path.name for path in shared.iterdir() if test(path.lstat().st_mode)}


def is_device(mode: int) -> bool:
    return stat.S_ISBLK(mode) or stat.S_ISCHR(mode)


def remove_whiteout(shared: Path) -> None:
    """The one that anybody may make, and that is no device."""
    assert (shared / "whiteout").stat().st_rdev == 0
    (shared / "whiteout").unlink()


@needs_root
@pytest.mark.qemu
def test_a_guest_leaves_no_set_user_id_file_and_no_device(elf: Path, tmp_path: Path) -> None:
    machinekit.require_shares()
    shared = tmp_path / "shared"
    leave(machinekit.demo_image(), shared)
    remove_whiteout(shared)
    assert modes(shared, is_device) == set()
    assert modes(shared, lambda mode: mode & SET_IDS) == set()  # what it overwrote has lost it, too
    for path in shared.iterdir():
        assert "security.capability" not in os.listxattr(path, follow_symlinks=False)
    assert (shared / "folder" / "file").read_text() == "plain\n"
    assert (shared / "folder").stat().st_uid == 1000
    assert (shared / "shell").stat().st_size > 1000
    assert stat.S_ISFIFO((shared / "fifo").lstat().st_mode)


@needs_root
@pytest.mark.qemu
def test_who_needs_them_says_so(elf: Path, tmp_path: Path) -> None:
    machinekit.require_shares()
    shared = tmp_path / "shared"
    leave(machinekit.demo_image(), shared, suid=True, dev=True)
    remove_whiteout(shared)
    assert modes(shared, is_device) == {"disk", "memory"}
    assert "shell" in modes(shared, lambda mode: mode & SET_IDS)


SET_ATTRIBUTE = r"""
#include <errno.h>
#include <stdio.h>
#include <sys/xattr.h>
int main(int argc, char **argv) {  /* PATH NAME HEX */
    static char value[256];
    size_t size = 0;
    unsigned byte;
    for (char *hex = argv[3]; sscanf(hex, "%2x", &byte) == 1; hex += 2)
        value[size++] = byte;
    printf("%d\n", setxattr(argv[1], argv[2], value, size, 0) ? errno : 0);
    return 0;
}
"""


def everybody(permissions: int) -> bytes:
    """A POSIX ACL that gives them to the owner, the group and all others."""
    entries = [struct.pack("<HHI", tag, permissions, 0xFFFFFFFF) for tag in (1, 4, 0x20)]
    return struct.pack("<I", 2) + b"".join(entries)


ATTRIBUTES = [
    ("program", "system.posix_acl_access", everybody(7)),
    ("folder", "system.posix_acl_default", everybody(7)),
    ("program", "security.selinux", b"system_u:object_r:bin_t:s0\0"),
    ("program", "security.capability", struct.pack("<5I", 0x02000001, 1 << 12, 0, 0, 0)),
    ("plain", "user.note", b"mine"),
]


def set_attributes(shared: Path, **options: bool) -> list[int]:
    """What each of ATTRIBUTES ends with, where the root of a guest sets it on a file of root's."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    (shared / "folder").mkdir(parents=True)
    (shared / "plain").touch()
    (shared / "program").touch()
    (shared / "program").chmod(0o4755)
    command = ["gcc", "-static", "-x", "c", "-o", str(shared / "set"), "-"]
    subprocess.run(command, input=SET_ATTRIBUTE, text=True, check=True)
    script = "".join(
        f"/mnt/set /mnt/{file} {name} {value.hex()}\n" for file, name, value in ATTRIBUTES
    )
    mount = Mount(source=str(shared), target="/mnt", **options)  # type: ignore[arg-type]
    with boot(machinekit.demo_image(), mounts=[mount]) as machine:
        done = machine.agent.exec(["sh", "-c", script], timeout=PATIENCE)
    return [int(line) for line in done.stdout.split()]


@needs_root
@pytest.mark.qemu
def test_a_guest_sets_no_attribute_that_gives_rights(elf: Path, tmp_path: Path) -> None:
    machinekit.require_shares()
    shared = tmp_path / "shared"
    ended = set_attributes(shared)
    refused = errno.EOPNOTSUPP
    if not is_successor(virtiofsd()):  # which serves no attribute at all
        assert ended == [refused, refused, refused, errno.EPERM, 0]
        assert os.getxattr(shared / "plain", "user.note") == b"mine"
    assert 0 not in ended[:4]
    assert stat.S_IMODE((shared / "program").stat().st_mode) == 0o4755
    assert os.listxattr(shared / "program") == os.listxattr(shared / "folder") == []


@needs_root
@pytest.mark.qemu
def test_who_needs_attributes_that_give_rights_says_so(elf: Path, tmp_path: Path) -> None:
    machinekit.require_shares()
    if is_successor(virtiofsd()):
        pytest.skip("the virtiofsd in Rust serves no attributes")
    shared = tmp_path / "shared"
    ended = set_attributes(shared, suid=True)
    assert (ended[0], ended[1], ended[3]) == (0, 0, 0)
    assert stat.S_IMODE((shared / "program").stat().st_mode) == 0o4777
