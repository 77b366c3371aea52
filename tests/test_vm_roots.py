"""Roots and volumes on real devices: disks by serial, shares, disks that the guest formats."""

import contextlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import vm_machine
from init_machine import Config, make_root, require_program
from patience import PATIENCE
from vm_machine import Ended, make_erofs, make_ext4, make_squashfs, run_vm, vm_config

from microguest.guest import bounds
from microguest.guest.bundle import cpio

pytestmark = pytest.mark.qemu

GIB = 2**30
UNFINISHED = b"microguest: this disk was being formatted\n"
VIRTIOFSD = ("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd")  # of QEMU 7, and the newer one
NINE_BUNDLE = Path(os.environ.get("MICROGUEST_9P_BUNDLE", "dist/9p/guest")) / platform.machine()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `root.erofs`, a small image, and the tree that it is made of."""
    require_program()
    folder = tmp_path_factory.mktemp("disks")
    make_erofs(make_root(folder / "root"), folder / "root.erofs")
    return folder


@pytest.fixture
def work(base: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mg-roots-") as path:
        yield Path(path)


@contextlib.contextmanager
def virtiofs(work: Path, tag: str, folder: Path) -> Iterator[list[str]]:
    """QEMU's options for a share, as long as its daemon runs."""
    program = next(filter(os.path.exists, VIRTIOFSD), None)
    if program is None:
        pytest.skip("needs virtiofsd: apt install qemu-system-common, or virtiofsd")
    socket = work / f"{tag}.sock"
    command = [program, f"--socket-path={socket}"]
    if "libexec" in program:
        command += [f"--shared-dir={folder}", "--sandbox=chroot"]
    else:
        command += ["-o", f"source={folder}", "-o", "sandbox=chroot"]
    with (work / f"{tag}.log").open("wb") as log:
        daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + PATIENCE
        while not socket.exists():
            assert daemon.poll() is None, (work / f"{tag}.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield ["-chardev", f"socket,id=fs-{tag},path={socket}",
               "-device", f"vhost-user-fs-pci,chardev=fs-{tag},tag={tag}"]  # fmt: skip
    finally:
        daemon.terminate()
        daemon.wait()


def tree(folder: Path, **files: str) -> Path:
    """A layer: `order` says whose it is, beside files whose names say where they are from."""
    folder.mkdir()
    for name, text in {"order": folder.name, f"of-{folder.name}": "", **files}.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return folder


def blank(path: Path, size: int) -> Path:
    path.touch()
    os.truncate(path, size)
    return path


def check_clean(disk: Path) -> None:
    """e2fsck finds nothing to do, the journal included."""
    command = ["/usr/sbin/e2fsck", "-fn", str(disk)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "journal" not in done.stdout + done.stderr


def superblock(disk: Path, field: str) -> str:
    command = ["/usr/sbin/dumpe2fs", "-h", str(disk)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE)
    line = next(line for line in done.stdout.splitlines() if line.startswith(f"{field}:"))
    return line.partition(":")[2].strip()


def fields(ended: Ended) -> dict[str, str]:
    """The workload's lines of the form name=value."""
    assert ended.code == 0, ended.console[-4000:]
    return dict(line.split("=", 1) for line in ended.lines if "=" in line.split(" ")[0])


def initramfs_layer() -> bytes:
    """A directory that is a layer, beside much that is not and shall be gone."""
    return cpio.segment(
        [
            cpio.directory("layers"),
            cpio.directory("layers/inner"),
            cpio.directory("layers/inner/deep"),
            cpio.regular("layers/inner/of-initramfs", b"1\n"),
            cpio.regular("layers/inner/deep/file", b"2\n"),
            cpio.regular("layers/junk", os.urandom(1 << 20) * 40),
        ]
    )


MIXED = """
echo order=$(cat /order) below=$(ls / | grep of- | tr '\\n' ' ')
echo deep=$(cat /deep/file) bound=$(cat /bound/file)
echo boots=$(ls /kept | wc -l)
mkdir -p /kept && echo data > /kept/boot$(ls /kept | wc -l)
[ -d /moves ] && { mv /moves /moved 2>/dev/null; rm -r /hidden; ln -s order /link; }
chmod 701 /
echo moved=$(cat /moved/file) hidden=$(ls -d /hidden 2>/dev/null) mode=$(stat -c %a /)
echo root=$(df -k / | awk 'END { print $2 }') data=$(df -k /data | awk 'END { print $2 }')
echo dirty=$(cat /dirty/order) $(touch /dirty/x 2>&1 | grep -c Read-only)
echo share=$(cat /share/order) fixed=$(cat /fixed/order) $(touch /fixed/x 2>&1 | grep -c Read-only)
echo written > /share/written
echo written > /data/file
echo held=$(ls -l /proc/1/fd | grep -c ' /microguest/upper$')
echo shmem=$(awk '/Shmem:/ { print $2 }' /proc/meminfo)
echo types=$(awk '$2 ~ "^/(data|dirty|share|fixed)$" { print $3 }' /proc/mounts | tr '\\n' ' ')
echo options=$(awk '$2 == "/" { print $4 }' /proc/mounts)
"""


def mixed_config() -> Config:
    config = vm_config(["/bin/sh", "-c", MIXED])
    config["root"] = {
        "lower": [
            {"kind": "disk", "serial": "c-squash", "fstype": "squashfs"},
            {"kind": "virtiofs", "tag": "layer"},
            {"kind": "disk", "serial": "a-ext4", "fstype": "ext4"},
            {"kind": "directory", "path": "/layers/inner"},
            {"kind": "disk", "serial": "b-erofs", "fstype": "erofs"},
        ],
        "upper": {"kind": "disk", "serial": "upper", "format": "if-blank"},
    }
    config["volumes"] = [
        {"kind": "disk", "target": "/data", "serial": "data", "fstype": "ext4",
         "format": "if-blank"},
        {"kind": "disk", "target": "/dirty", "serial": "dirty", "fstype": "ext4",
         "read_only": True},
        {"kind": "directory", "target": "/bound", "path": "/layers/inner/deep"},
        {"kind": "virtiofs", "target": "/share", "tag": "share"},
        {"kind": "virtiofs", "target": "/fixed", "tag": "fixed", "read_only": True},
    ]  # fmt: skip
    return config


def test_mixed_layers_on_a_disk_that_is_kept(base: Path, work: Path) -> None:
    """Two boots: every kind of layer and volume, and what was written is there in the second."""
    squash = tree(work / "squash", hidden="")
    ext4 = tree(work / "ext4", moves__file="moves")
    dirty = make_ext4(work / "dirty.img", "16M", tree(work / "dirty"))
    debugfs = ["/usr/sbin/debugfs", "-w", "-R", "feature needs_recovery", str(dirty)]
    subprocess.run(debugfs, check=True, capture_output=True, timeout=PATIENCE)
    disks = {
        "upper": blank(work / "upper.img", 2 * GIB),
        "b-erofs": base / "root.erofs",
        "dirty": dirty,
        "data": blank(work / "data.img", 100 << 20),
        "c-squash": make_squashfs(squash, work / "squash.img"),
        "a-ext4": make_ext4(work / "ext4.img", "16M", ext4),
    }
    with disks["data"].open("r+b") as file:  # an earlier formatting was cut off
        file.write(UNFINISHED)
        file.write(os.urandom(8 << 20))
    folders = {name: tree(work / name) for name in ("layer", "share", "fixed")}

    def boot(config: Config) -> dict[str, str]:
        with contextlib.ExitStack() as stack:
            options: list[str] = []
            for tag, folder in folders.items():
                options += stack.enter_context(virtiofs(work, tag, folder))
            ended = run_vm(
                config, disks=disks, writable=["upper", "data"], options=options,
                segments=[initramfs_layer()], memory=320,
            )  # fmt: skip
        for disk in ("upper", "data"):
            check_clean(disks[disk])
        return fields(ended)

    first = boot(mixed_config())
    assert first["order"] == "squash below=of-ext4 of-initramfs of-layer of-squash"
    assert (first["deep"], first["boots"]) == ("2 bound=2", "0")
    assert first["moved"] == "moves hidden= mode=701"
    # 2 GiB less what ext4 itself needs; the other has 100 MiB.
    root, _, data = first["root"].partition(" data=")
    assert 0.97 * 2 * GIB < int(root) * 1024 < 2 * GIB
    assert 80 << 20 < int(data) * 1024 < 100 << 20
    assert first["dirty"] == "dirty 1"
    assert first["share"] == "share fixed=fixed 1"
    assert (folders["share"] / "written").read_text() == "written\n"
    assert first["held"] == "1"  # by PID 1, to leave it clean
    assert int(first["shmem"]) < 20 * 1024  # the junk had 40 MiB; the program stays
    assert first["types"] == "ext4 ext4 virtiofs virtiofs"
    assert "xino=on" in first["options"]
    assert "redirect_dir=on" not in first["options"]
    assert "metacopy=on" not in first["options"]
    for disk in ("upper", "data"):
        assert superblock(disks[disk], "Filesystem volume name") == "microguest"
        assert superblock(disks[disk], "Inode count") == str(8192 * (16 if disk == "upper" else 1))
    uuids = [superblock(disks[disk], "Filesystem UUID") for disk in ("upper", "data")]
    assert uuids[0] != uuids[1]

    os.truncate(disks["upper"], 3 * GIB)  # it grows with its disk
    config = mixed_config()
    config["root"]["lower"].pop(0)  # and the image may be another one meanwhile
    second = boot(config)
    assert second["order"] == "layer below=of-ext4 of-initramfs of-layer"
    assert second["boots"] == "1"
    assert second["moved"] == "moves hidden= mode=701"
    assert 0.97 * 3 * GIB < int(second["root"].partition(" ")[0]) * 1024 < 3 * GIB
    assert superblock(disks["upper"], "Filesystem UUID") == uuids[0]


FILL = """
echo names=$(cat /etc/hostname) $(hostname) $(tail -1 /etc/hosts) $(grep -c /etc/ /proc/mounts)
dd if=/dev/zero of=/full bs=64k 2>/dev/null; dd if=/dev/zero of=/full2 bs=1 2>/dev/null; sync
echo left=$(df -k / | awk 'END { print $4 }')
[ -e /room ] && rm /full /full2 && sync
exit 0
"""


def test_who_fills_a_kept_disk_can_still_start_the_machine(base: Path, work: Path) -> None:
    """With another name each time: all that PID 1 would write is new."""
    disks = {"root": base / "root.erofs", "upper": blank(work / "upper.img", 64 << 20)}
    config = vm_config(["/bin/sh", "-c", FILL])
    config["root"]["upper"] = {"kind": "disk", "serial": "upper", "format": "if-blank"}

    def boot(name: str, **more: object) -> Ended:
        more = {**config, "hostname": name, "machine_id": f"{len(name):032x}", **more}
        return run_vm(more, disks=disks, writable=["upper"])

    assert fields(boot("first"))["names"] == "first first 127.0.1.1 first 0"
    second = fields(boot("second-one"))
    assert second == {"names": "second-one second-one 127.0.1.1 second-one 3", "left": "0"}
    check_clean(disks["upper"])
    volume = {"kind": "tmpfs", "target": f"/new/{'x' * 200}/{'y' * 200}"}
    step = boot("third", volumes=[volume]).report()
    assert step[0] == "boot_failed"
    assert "the root is full: start the machine without what is mounted there" in step[1]["message"]
    os.truncate(disks["upper"], 128 << 20)  # more room is the other way out
    grown = fields(boot("third"))
    assert grown["names"] == "third third 127.0.1.1 third 0"
    check_clean(disks["upper"])


FILL_INODES = """
echo names=$(cat /etc/hostname) $(hostname) $(tail -1 /etc/hosts)
mkdir -p /i && cd /i && true >> /full
i=$(ls -f . | wc -l); while true 2>/dev/null > $i; do i=$((i + 1)); done
BLOCKS && cat /dev/zero 2>/dev/null >> /full
sync
echo inodes=$(df -i / | awk 'END { print $4 }') blocks=$(df -k / | awk 'END { print $4 }')
exit 0
"""


@pytest.mark.parametrize("blocks", [False, True], ids=["inodes", "inodes and blocks"])
def test_who_uses_all_inodes_of_a_kept_disk_can_still_start_the_machine(
    base: Path, work: Path, blocks: bool
) -> None:
    """An overlay makes files of its own at every mount: it has room kept for it."""
    disks = {"root": base / "root.erofs", "upper": blank(work / "upper.img", 64 << 20)}
    fill = FILL_INODES.replace("BLOCKS", "true" if blocks else "false")
    config = vm_config(["/bin/sh", "-c", fill])
    config["root"]["upper"] = {"kind": "disk", "serial": "upper", "format": "if-blank"}

    def boot(name: str) -> Ended:
        return run_vm({**config, "hostname": name}, disks=disks, writable=["upper"])

    first = fields(boot("first"))
    assert first["inodes"].startswith("0 blocks=")
    assert first["inodes"].endswith("=0") == blocks
    for name in ("second-one", "third"):  # what is used for a boot is there for the next
        assert fields(boot(name))["names"] == f"{name} {name} 127.0.1.1 {name}"
        check_clean(disks["upper"])


@pytest.mark.parametrize("left", [0, 1])
def test_a_disk_too_full_for_an_overlay_says_what_to_do(base: Path, work: Path, left: int) -> None:
    """One that another program filled has no room kept; a larger disk is the way in.

    With no inode at all overlayfs mounts read-only, with one it mounts nothing.
    """
    tree = work / "tree"
    for folder in ("upper", "work", *(f"upper/{name}" for name in ("proc", "sys", "dev", "run"))):
        (tree / folder).mkdir(parents=True)
    free = superblock(make_ext4(work / "upper.img", "64M", tree, "-N", "64"), "Free inodes")
    for index in range(int(free) - left):
        (tree / "upper" / f"{index}").touch()
    upper = make_ext4(work / "upper.img", "64M", tree, "-N", "64", "-L", "microguest")
    disks = {"root": base / "root.erofs", "upper": upper}
    config = vm_config(["/bin/sh", "-c", "true > /file && echo wrote=yes; true"])
    config["root"]["upper"] = {"kind": "disk", "serial": "upper", "format": "if-blank"}
    ended = run_vm(config, disks=disks, writable=["upper"])
    assert "the disk of the upper is full: give it more room (truncate" in ended.console
    if left:
        assert ended.report()[0] == "boot_failed"
        assert "No space left on device" in ended.report()[1]["message"]
    else:
        assert "wrote" not in fields(ended)
    os.truncate(upper, 320 << 20)
    assert fields(run_vm(config, disks=disks, writable=["upper"]))["wrote"] == "yes"


GREEDY = """
for at in /tmp /dev/shm /run/lock; do
    su -s /bin/sh tester -c "dd if=/dev/zero of=$at/full bs=64k" 2>/dev/null
    echo $at=$(stat -c %s $at/full)
done
echo total=$(awk '/MemTotal/ { print $2 }' /proc/meminfo)
echo left=$(awk '/MemAvailable/ { print $2 }' /proc/meminfo)
exit 0
"""


def test_no_user_fills_all_memory_with_files(work: Path) -> None:
    """All that a user may write to, in a machine where a half and 64 MiB are most of it."""
    tree = make_root(work / "tree")
    (tree / "run" / "lock").mkdir(parents=True)
    (tree / "run" / "lock").chmod(0o1777)
    disks = {"root": make_erofs(tree, work / "root.erofs")}
    ended = run_vm(vm_config(["/bin/sh", "-c", GREEDY]), disks=disks, memory=192)
    seen = fields(ended)
    assert all(int(seen[at]) > 1 << 20 for at in ("/tmp", "/dev/shm", "/run/lock"))
    assert int(seen["left"]) > 2 * bounds.MEMORY_RESERVE >> 10


def test_a_disk_that_cannot_grow_is_used_as_it_is(base: Path, work: Path) -> None:
    """The kernel grows no file system that has had an error; its owner has to get at the data."""
    disks = {"root": base / "root.erofs", "upper": blank(work / "upper.img", 64 << 20)}
    config = vm_config(["/bin/sh", "-c", "echo kept=$(cat /kept); echo data > /kept; sync"])
    config["root"]["upper"] = {"kind": "disk", "serial": "upper", "format": "if-blank"}
    assert fields(run_vm(config, disks=disks, writable=["upper"]))["kept"] == ""
    debugfs = ["/usr/sbin/debugfs", "-w", "-R", "set_super_value state 2", str(disks["upper"])]
    subprocess.run(debugfs, check=True, capture_output=True, timeout=60)
    os.truncate(disks["upper"], 128 << 20)
    ended = run_vm(config, disks=disks, writable=["upper"])
    assert fields(ended)["kept"] == "data"
    assert "disk 'upper' (/dev/vdb) does not grow: ioctl" in ended.console


def test_plain_roots(base: Path, work: Path) -> None:
    """An ext4 that is written to as it is, and an erofs that nobody can write to."""
    disk = make_ext4(work / "root.img", "64M", base / "root")
    script = "echo kept > /kept; sync; grep ' / ' /proc/mounts; ls -d /newroot /microguest"
    config = vm_config(["/bin/sh", "-c", script + "; true"])
    config["root"] = {
        "lower": [{"kind": "disk", "serial": "root", "fstype": "ext4"}],
        "upper": None,
    }
    ended = run_vm(config, disks={"root": disk}, writable=["root"])
    assert ended.code == 0
    assert any(line.startswith("/dev/vda / ext4 rw") for line in ended.lines), ended.console
    assert len([line for line in ended.lines if "No such file" in line]) == 2
    check_clean(disk)
    command = ["/usr/sbin/debugfs", "-R", "cat /kept", str(disk)]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"kept\n"

    full = work / "full"
    shutil.copytree(base / "root", full, symlinks=True)
    for name in ("proc", "sys", "dev", "run", "data"):
        (full / name).mkdir()
    config = vm_config(["/bin/sh", "-c", "touch /x || grep ' / ' /proc/mounts; touch /data/x"])
    config["root"]["upper"] = None
    config["volumes"] = [{"kind": "tmpfs", "target": "/data"}]
    ended = run_vm(config, disks={"root": make_erofs(full, work / "full.erofs")})
    assert ended.code == 0
    assert ended.lines[0].endswith("Read-only file system")
    assert ended.lines[1].startswith("/dev/vda / erofs ro")
    assert len(ended.lines) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "squashfs",
            "holds a squashfs, which is not formatted over; give an ext4 or an empty disk",
        ),
        ("end", "holds something that is no ext4, which is not formatted over; give an ext4 or an"),
        ("small", "has 33554432 bytes; an ext4 is made on 67108864 and more"),
        ("read-only", "is read-only, and /microguest/upper is to be written to; give the disk to"),
    ],
)
def test_a_disk_that_cannot_be_the_upper_is_left_alone(
    base: Path, work: Path, content: str, message: str
) -> None:
    disk = blank(work / "disk.img", (32 if content == "small" else 128) << 20)
    with disk.open("r+b") as file:
        if content == "squashfs":
            file.write(make_squashfs(tree(work / "old"), work / "old.img").read_bytes())
        elif content == "end":
            file.seek(-512, os.SEEK_END)
            file.write(b"backup of a partition table")
    before = disk.read_bytes()
    config = vm_config(["true"])
    config["root"]["upper"] = {"kind": "disk", "serial": "upper", "format": "if-blank"}
    writable = [] if content == "read-only" else ["upper"]
    ended = run_vm(config, disks={"root": base / "root.erofs", "upper": disk}, writable=writable)
    name, failed = ended.report()
    assert (name, failed["step"], ended.code) == ("boot_failed", "root-upper", 0)
    assert f"disk 'upper' (/dev/vdb) {message}" in failed["message"]
    assert disk.read_bytes() == before


def test_what_is_not_there_is_said(base: Path, work: Path) -> None:
    config = vm_config(["true"])
    config["volumes"] = [{"kind": "9p", "target": "/nine", "tag": "nine"}]
    failed = run_vm(config, disks={"root": base / "root.erofs"}).report()[1]
    assert failed["step"] == "volumes"
    assert failed["message"].endswith("; the kernel has no 9p")
    config["volumes"] = [{"kind": "virtiofs", "target": "/share", "tag": "lost"}]
    failed = run_vm(config, disks={"root": base / "root.erofs"}).report()[1]
    assert failed["message"].endswith("; is there a virtiofs share with the tag 'lost'?")
    # A disk knows only the beginning of its serial.
    names = [f"a-volume-with-a-name-{number}" for number in (1, 2)]
    config["volumes"] = [
        {"kind": "disk", "target": "/data", "serial": names[1], "fstype": "erofs"},
    ]
    failed = run_vm(config, disks=dict.fromkeys(["root", *names], base / "root.erofs")).report()[1]
    assert failed["message"].startswith(
        "/dev/vdb and /dev/vdc have the same serial 'a-volume-with-a-name'; serials must differ"
    )


NINE = """
echo order=$(cat /order); echo share=$(cat /share/order) > /share/new; cat /share/new
echo ro=$(touch /fixed/x 2>&1 | grep -c Read-only)
awk '$3 == "9p" { print $2 "=" $4 }' /proc/mounts
"""


def test_9p_layers_and_volumes(base: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another kernel than the bundle's: docs/design/roots.md says how to make this one."""
    bundle = Path(__file__).parent.parent / NINE_BUNDLE
    if not (bundle / "vmlinuz").exists():
        pytest.skip(f"needs a bundle whose kernel has 9p in {bundle}: docs/design/roots.md, 9p")
    monkeypatch.setattr(vm_machine, "BUNDLE", bundle)
    shutil.copytree(base / "root", work / "root", symlinks=True)
    (work / "root" / "order").write_text("9p\n")
    tree(work / "share")
    config = vm_config(["/bin/sh", "-c", NINE])
    config["root"] = {
        "lower": [{"kind": "9p", "tag": "root"}],
        "upper": {"kind": "disk", "serial": "upper", "format": "if-blank"},
    }
    config["volumes"] = [
        {"kind": "9p", "target": "/share", "tag": "share"},
        {"kind": "9p", "target": "/fixed", "tag": "share2", "read_only": True},
    ]
    options: list[str] = []
    for tag, folder in (("root", "root"), ("share", "share"), ("share2", "share")):
        options += ["-fsdev", f"local,id=p9-{tag},path={work / folder},security_model=none",
                    "-device", f"virtio-9p-pci,fsdev=p9-{tag},mount_tag={tag}"]  # fmt: skip
    upper = blank(work / "upper.img", GIB)
    ended = run_vm(config, disks={"upper": upper}, writable=["upper"], options=options)
    found = fields(ended)
    assert (found["order"], found["share"], found["ro"]) == ("9p", "share", "1")
    assert (work / "share" / "new").read_text() == "share=share\n"
    assert "trans=virtio" in found["/share"]
    check_clean(upper)
