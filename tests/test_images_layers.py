"""Layers: what a stack of them merges to, compared with what umoci unpacks; and hostile layers."""

import contextlib
import hashlib
import io
import os
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import imagefactory as factory
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from imagefactory import directory, hard_link, layer, member, symlink
from patience import PATIENCE

from microguest.errors import ImageError
from microguest.host_client import images
from microguest.host_client.images import recipes, tarformat
from microguest.host_client.images.budget import Budget

CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)  # cap_net_bind_service=ep
ROOT = directory("./", mode=0o751, mtime=1_500_000_000)


@pytest.fixture
def cache(tmp_path: Path) -> images.Cache:
    return images.Cache(str(tmp_path / "cache"))


# Stacks of layers, each by what it shows. Every parent is listed, because what an unlisted one gets
# is nobody's rule.
STACKS: dict[str, list[bytes]] = {
    "whiteout": [
        layer(
            [
                ROOT,
                directory("a"),
                member("a/keep", b"1"),
                member("a/drop", b"2"),
                directory("a/tree"),
                member("a/tree/x"),
                symlink("gone", "a"),
            ]
        ),
        layer(
            [member("a/.wh.drop"), member("a/.wh.tree"), member(".wh.gone"), member(".wh.never")]
        ),
    ],
    "whiteout then added again": [
        layer([directory("a"), member("a/f", b"old"), directory("d"), member("d/old")]),
        layer(
            [member("a/.wh.f"), member("a/f", b"new"), member(".wh.d"), directory("d", mode=0o700)]
        ),
    ],
    "opaque directory": [
        layer([directory("a"), member("a/old"), directory("a/sub"), member("a/sub/old")]),
        layer([directory("a", mode=0o711), member("a/.wh..wh..opq"), member("a/new", b"n")]),
    ],
    "opaque after its new children": [
        layer([directory("a"), member("a/old"), member("a/both", b"1")]),
        layer([directory("a"), member("a/both", b"2"), member("a/.wh..wh..opq")]),
    ],
    "file becomes directory and back": [
        layer([member("f", b"x"), directory("d"), member("d/x"), symlink("s", "d")]),
        layer([directory("f", mode=0o700), member("f/y", b"y"), member("d", b"z"), directory("s")]),
    ],
    "directory keeps its children": [
        layer([directory("a", mode=0o700), member("a/x", b"x")]),
        layer([directory("a", mode=0o1777, owner=(5, 6), mtime=1_234_567_890)]),
    ],
    "hard links in and across layers": [
        layer([directory("a"), member("a/one", b"data", mode=0o640), hard_link("two", "a/one")]),
        layer([hard_link("three", "two"), hard_link("a/four", "./a/one"), symlink("l", "x")]),
        layer([hard_link("l2", "l"), member(".wh.two"), member("a/one", b"replaced")]),
    ],
    "symlinked parents": [
        layer([directory("usr"), directory("usr/bin"), symlink("bin", "usr/bin")]),
        layer(
            [member("bin/tool", b"t", mode=0o755), symlink("abs", "/usr/bin"), symlink("u", "bin")]
        ),
        layer(
            [
                member("abs/tool2"),
                member("u/tool3"),
                member("bin/.wh.tool"),
                hard_link("bin/tool4", "abs/tool2"),
            ]
        ),
    ],
    "symlinks that point outside": [
        layer([directory("etc"), symlink("up", "../../../../etc"), symlink("top", "/..")]),
        layer([member("up/one", b"1"), member("top/two", b"2")]),
    ],
    "modes and owners": [
        layer(
            [
                member("setuid", b"", mode=0o4755, owner=(0, 42)),
                member("setgid", b"", mode=0o2750, owner=(7, 8)),
                directory("sticky", mode=0o1777),
                directory("shared", mode=0o2775, owner=(1000, 1000)),
                member("none", b"", mode=0),
                member("big", b"", owner=(3_000_000, 4_000_000_000)),
                symlink("link", "none", owner=(1000, 1001)),
            ]
        )
    ],
    "extended attributes": [
        layer(
            [
                member("cap", b"", xattrs={"security.capability": CAPABILITY}),
                member("user", b"", xattrs={"user.a": b"1", "user.bin": b"\0\xff=\n"}),
                directory("dir", xattrs={"user.dir": b"d", "trusted.t": b"t"}),
                member("lost", b"", xattrs={"user.old": b"1"}),
            ]
        ),
        layer([directory("dir", xattrs={"user.other": b"o"}), member("lost", b"")]),
    ],
    "devices": [
        layer(
            [
                member("null", kind=tarfile.CHRTYPE, mode=0o666, device=(1, 3)),
                member("wide", kind=tarfile.CHRTYPE, device=(300, 70_000)),
                member("disk", kind=tarfile.BLKTYPE, mode=0o660, owner=(0, 6), device=(8, 17)),
                member("fifo", kind=tarfile.FIFOTYPE, mode=0o600),
                hard_link("null2", "null"),
            ]
        )
    ],
    "names": [
        layer(
            [
                directory("d" * 200),
                member("d" * 200 + "/" + "f" * 250, b"long"),
                member("ünï", b"utf-8"),
                member("bad\udcff\udcfe", b"not utf-8"),
                member(" space\nnewline\\ ", b"odd"),
                member("-dash", b""),
                symlink("to", "t" * 300),
                hard_link("h" * 150, "d" * 200 + "/" + "f" * 250),
            ]
        )
    ],
    "names in GNU headers": [
        layer(
            [
                directory("d" * 200),
                member("d" * 200 + "/" + "f" * 250, b"long"),
                symlink("to", "t" * 300),
                hard_link("h" * 150, "d" * 200 + "/" + "f" * 250),
            ],
            tarfile.GNU_FORMAT,
        )
    ],
    "times": [
        layer(
            [
                directory("d", mtime=1_000_000_000.5),
                member("d/f", b"", mtime=1_600_000_000.25),
                member("epoch", b"", mtime=0),
                symlink("l", "f", mtime=1_111_111_111),
            ]
        )
    ],
    "twice in one layer": [
        layer([member("f", b"1"), member("f", b"2", mode=0o600), directory("d"), member("d", b"")])
    ],
    "contents of all sizes": [
        layer(
            [
                member(f"f{size}", bytes(range(256)) * (size // 256 + 1))
                for size in (1, 600, 3 << 20)
            ]
        )
    ],
}


def unpack_by_umoci(reference: str, tmp_path: Path) -> Path:
    bundle = tmp_path / "bundle"
    subprocess.run(
        ["umoci", "unpack", "--image", reference.removeprefix("oci:"), str(bundle)],
        check=True,
        timeout=PATIENCE,
        capture_output=True,
    )
    return bundle / "rootfs"


@contextlib.contextmanager
def mounted(disk: images.Disk, where: Path) -> Iterator[Path]:
    where.mkdir()
    options = ["-t", disk.fstype, "-o", "loop,ro"]
    subprocess.run(["mount", *options, str(disk.path), str(where)], check=True, timeout=PATIENCE)
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True, timeout=PATIENCE)


def without_root(tree: dict[bytes, factory.Seen]) -> dict[bytes, factory.Seen]:
    """The tree less its root: where no layer lists that, its attributes are nobody's rule."""
    return {path: seen for path, seen in tree.items() if path}


@pytest.mark.parametrize("name", STACKS)
def test_directory_is_what_umoci_unpacks(tmp_path: Path, cache: images.Cache, name: str) -> None:
    factory.require("umoci", "tar", root=True)
    reference = factory.make_layout(tmp_path / "i", STACKS[name])
    expected = factory.look(unpack_by_umoci(reference, tmp_path))
    with images.open_image(reference) as image:
        actual = factory.look(images.as_directory(image, tmp_path, cache=cache))
    assert without_root(actual) == without_root(expected)


@pytest.mark.parametrize("fstype", ["squashfs", "erofs"])
@pytest.mark.parametrize("name", STACKS)
def test_disk_is_what_umoci_unpacks(
    tmp_path: Path, cache: images.Cache, name: str, fstype: recipes.Fstype
) -> None:
    factory.require("umoci", "mount", root=True)
    require_format(fstype)
    reference = factory.make_layout(tmp_path / "i", STACKS[name])
    unpacked = unpack_by_umoci(reference, tmp_path)
    with images.open_image(reference) as image:
        disk = images.as_disk(image, tmp_path, fstype=fstype, cache=cache)
    assert disk.fstype == fstype
    in_full = fstype == "erofs"  # the host's squashfs may lack xattrs; no squashfs has fractions
    with mounted(disk, tmp_path / "mnt") as mount:
        actual = factory.look(mount, xattrs=in_full, fractions=in_full)
    expected = factory.look(unpacked, xattrs=in_full, fractions=in_full)
    assert without_root(actual) == without_root(expected)
    if fstype == "squashfs":
        actual = factory.look(unsquash(disk, tmp_path / "unsquashed"), fractions=False)
        expected = factory.look(unpacked, fractions=False)
        assert without_root(actual) == without_root(expected)


def unsquash(disk: images.Disk, where: Path) -> Path:
    command = ["unsquashfs", "-q", "-n", "-d", str(where), str(disk.path)]
    subprocess.run(command, check=True, timeout=PATIENCE, capture_output=True)
    return where


def require_format(fstype: recipes.Fstype) -> None:
    if fstype == "squashfs":
        factory.require("sqfstar", "unsquashfs")
    elif recipes.disk_format() != "erofs":
        pytest.skip("needs mkfs.erofs 1.7, which can read a tar")


@pytest.mark.parametrize("fstype", ["squashfs", "erofs"])
def test_root_directory_has_what_the_layer_says(
    tmp_path: Path, cache: images.Cache, fstype: recipes.Fstype
) -> None:
    factory.require("mount", root=True)
    require_format(fstype)
    root = directory("./", mode=0o1751, owner=(7, 8), mtime=1_500_000_000)
    layers = [layer([root, member("f", b"", owner=(8, 7))])]
    with images.open_image(factory.make_layout(tmp_path / "i", layers)) as image:
        disk = images.as_disk(image, tmp_path, fstype=fstype, cache=cache)
        with mounted(disk, tmp_path / "mnt") as mount:
            on_disk = mount.stat()
        in_directory = images.as_directory(image, tmp_path, cache=cache).stat()
    for status in (on_disk, in_directory):
        assert stat.S_IMODE(status.st_mode) == 0o1751
        assert (status.st_uid, status.st_gid) == (7, 8)
        assert status.st_mtime == 1_500_000_000


def test_squashfs_root_whose_owner_cannot_be_said(tmp_path: Path, cache: images.Cache) -> None:
    factory.require("sqfstar")
    layers = [layer([directory("./", owner=(7, 8)), member("f", b"")])]
    image = images.open_image(factory.make_layout(tmp_path / "i", layers))
    with pytest.raises(ImageError, match=r"belongs to 7.*erofs-utils 1\.7"):
        images.as_disk(image, tmp_path, fstype="squashfs", cache=cache)


def test_squashfs_root_inode_across_metadata_blocks(tmp_path: Path, cache: images.Cache) -> None:
    """The root's inode comes last, behind a varying number of others: some straddle two blocks."""
    factory.require("sqfstar", "unsquashfs", "mount", root=True)
    for count in range(250, 262):
        files = [member(f"f{number}", kind=tarfile.FIFOTYPE) for number in range(count)]
        links = [symlink(f"l{number}", "x" * number) for number in range(1, count % 12 + 2)]
        layers = [layer([directory("./", mode=0o711, mtime=1_500_000_000), *files, *links])]
        with images.open_image(factory.make_layout(tmp_path / f"i{count}", layers)) as image:
            disk = images.as_disk(image, tmp_path, fstype="squashfs", cache=cache)
            with mounted(disk, tmp_path / f"mnt{count}") as mount:
                assert mount.stat().st_mode == 0o40711
                assert mount.stat().st_mtime == 1_500_000_000
                assert len(os.listdir(mount)) == len(files) + len(links)


def test_unlisted_parents_are_plain_directories_of_root(
    tmp_path: Path, cache: images.Cache
) -> None:
    factory.require("tar", root=True)
    reference = factory.make_layout(tmp_path / "i", [layer([member("a/b/c", b"")])])
    with images.open_image(reference) as image:
        tree = factory.look(images.as_directory(image, tmp_path, cache=cache))
    assert {tree[path].mode for path in (b"", b"a", b"a/b")} == {0o40755}
    assert {tree[path].owner for path in (b"", b"a", b"a/b")} == {(0, 0)}


def test_whiteout_does_not_touch_its_own_layer(tmp_path: Path, cache: images.Cache) -> None:
    """The image spec says so; umoci, which removes what is there, is stricter than it should be."""
    layers = [
        layer([directory("d"), member("d/old"), member("f", b"old")]),
        layer([member("f", b"new"), member(".wh.f"), member("d/new"), member(".wh.d")]),
    ]
    with images.open_image(factory.make_layout(tmp_path / "i", layers)) as image:
        tree = factory.look(images.as_directory(image, tmp_path, cache=cache))
    assert sorted(tree) == [b"", b"d", b"d/new", b"f"]
    assert tree[b"f"].content == hashlib.sha256(b"new").digest()


def test_notes_of_overlayfs_are_left_out(tmp_path: Path, cache: images.Cache) -> None:
    factory.require("tar", root=True)
    notes = {"trusted.overlay.redirect": b"/etc", "user.overlay.opaque": b"y", "user.mine": b"1"}
    layers = [layer([directory("d", xattrs=notes)])]
    with images.open_image(factory.make_layout(tmp_path / "i", layers)) as image:
        tree = factory.look(images.as_directory(image, tmp_path, cache=cache))
    assert tree[b"d"].xattrs == (("user.mine", b"1"),)


def test_directory_as_a_disk(tmp_path: Path) -> None:
    factory.require("mkfs.erofs", "mount", root=True)
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc" / "name").write_text("guest\n")
    os.link(root / "etc" / "name", root / "link")
    os.symlink("etc", root / "s")
    os.mknod(root / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    os.setxattr(root / "link", "user.a", b"1")
    os.setxattr(root / "link", "security.capability", CAPABILITY)
    os.chown(root / "etc", 1000, 1001)
    (root / "etc").chmod(0o2750)
    for name in ("etc/name", "etc", "."):
        os.utime(root / name, (1_400_000_000, 1_400_000_000))
    work = tmp_path / "work"
    work.mkdir()
    image = images.open_image(f"dir:{root}")
    for _ in range(2):
        disk = images.as_disk(image, work)
        assert sorted(os.listdir(work)) == ["root.erofs"]
    with mounted(disk, tmp_path / "mnt") as mount:
        assert factory.look(mount) == factory.look(root)


AS_A_USER = """\
import os, sys
from microguest.host_client import images
os.setgroups([])
os.setgid(1234)
os.setuid(1234)
with images.open_image(sys.argv[1]) as image:
    cache = images.Cache(sys.argv[2] + "/cache", int(sys.argv[3]))
    print(images.as_directory(image, sys.argv[2], cache=cache))
    print(images.as_disk(image, sys.argv[2], fstype="squashfs", cache=cache).path)
"""


@pytest.fixture
def home_of_a_user() -> Iterator[Path]:
    """A directory that user 1234 owns and can reach, unlike pytest's own."""
    home = Path(tempfile.mkdtemp())
    os.chown(home, 1234, 1234)
    yield home
    shutil.rmtree(home)


def test_disk_of_a_directory_is_not_made_inside_it(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="where its disk is to be made"):
        images.as_disk(images.open_image(f"dir:{tmp_path.parent}"), tmp_path)


def test_a_user_can_prepare_images_too(home_of_a_user: Path) -> None:
    """A user's directory is the user's own; a user's disk has the image's owners all the same."""
    factory.require("tar", "sqfstar", "mount", root=True)
    layers = [
        layer(
            [
                member("f", b"x", owner=(5, 5), mode=0o4750, xattrs={"user.a": b"1"}),
                member("cap", b"", xattrs={"security.capability": CAPABILITY}),
                member("null", kind=tarfile.CHRTYPE, device=(1, 3)),
                directory("locked", mode=0o500),
                member("locked/in", b""),
            ]
        )
    ]
    reference = factory.make_layout(home_of_a_user / "i", layers)
    root, disk = prepare_as_a_user(reference, home_of_a_user, 1 << 30)
    tree = factory.look(Path(root))
    assert sorted(tree) == [b"", b"cap", b"f", b"locked", b"locked/in"]
    assert {seen.owner for seen in tree.values()} == {(1234, 1234)}
    assert tree[b"f"].xattrs == (("user.a", b"1"),)
    with mounted(images.Disk(Path(disk), "squashfs"), home_of_a_user / "mnt") as mount:
        tree = factory.look(mount, xattrs=False)
        assert sorted(tree) == [b"", b"cap", b"f", b"locked", b"locked/in", b"null"]
        assert {path: seen.owner for path, seen in tree.items() if seen.owner != (0, 0)} == {
            b"f": (5, 5)
        }
    other = factory.make_layout(home_of_a_user / "j", [layer([member("g", b"")])])
    prepare_as_a_user(other, home_of_a_user, 0)  # evicts all others, the locked directory too
    assert not Path(root).exists()
    assert not Path(disk).exists()


def prepare_as_a_user(reference: str, home: Path, max_bytes: int) -> list[str]:
    command = [sys.executable, "-c", AS_A_USER, reference, str(home), str(max_bytes)]
    done = subprocess.run(
        command, cwd=factory.PROJECT, check=True, timeout=PATIENCE, capture_output=True, text=True
    )
    return done.stdout.split()


def test_demo_image_runs(tmp_path: Path, cache: images.Cache) -> None:
    factory.require("tar", root=True)
    reference = factory.busybox_layout(factory.PROJECT / "dist" / "demo")
    with images.open_image(reference) as image:
        assert images.process_for(image.config) == ("sh",)
        assert image.config.env[0].startswith("PATH=/usr/local/sbin:")
        root = images.as_directory(image, tmp_path, cache=cache)
        command = ["chroot", str(root), "sh", "-c", "id -un && stat -c %a /tmp | tr 1 x"]
        done = subprocess.run(command, check=True, timeout=PATIENCE, capture_output=True, text=True)
    assert done.stdout == "root\nx777\n"


def test_links_of_the_demo_image_stay_inside(tmp_path: Path) -> None:
    """Who unpacks it and writes through an absolute link writes to the host's own busybox."""
    reference = factory.busybox_layout(factory.PROJECT / "dist" / "demo")
    cache = images.Cache(str(tmp_path / "cache"))
    with images.open_image(reference) as image:
        root = images.as_directory(image, tmp_path, cache=cache)
        links = [path for path in root.rglob("*") if path.is_symlink()]
        assert len(links) > 200
        assert {path.resolve() for path in links} == {root.resolve() / "bin" / "busybox"}


def test_what_a_killed_making_of_the_demo_image_left_is_removed(tmp_path: Path) -> None:
    factory.busybox_layout(factory.PROJECT / "dist" / "demo")
    shutil.copytree(factory.PROJECT / "dist" / "demo", tmp_path / "demo")
    (tmp_path / ".demo-killed" / "root").mkdir(parents=True)
    factory.busybox_layout(tmp_path / "demo")
    assert not (tmp_path / ".demo-killed").exists()


def test_demo_image_is_for_every_user() -> None:
    """umoci writes its index as 0600; who is not the one that made the demo could not open it."""
    factory.busybox_layout(factory.PROJECT / "dist" / "demo")
    for folder, _, files in os.walk(factory.PROJECT / "dist" / "demo"):
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o755
        modes = {name: os.stat(os.path.join(folder, name)).st_mode & 0o777 for name in files}
        assert set(modes.values()) <= {0o644}, modes


@pytest.mark.slow
def test_debian_is_what_umoci_unpacks(tmp_path: Path, cache: images.Cache) -> None:
    factory.require("umoci", "sqfstar", "tar", "mount", root=True)
    reference = factory.debian_layout(factory.PROJECT / "dist" / "test-images" / "debian")
    unpacked = unpack_by_umoci(reference, tmp_path)
    with images.open_image(reference) as image:
        root = images.as_directory(image, tmp_path, cache=cache)
        assert factory.look(root) == factory.look(unpacked)
        disk = images.as_disk(image, tmp_path, fstype="squashfs", cache=cache)
        with mounted(disk, tmp_path / "mnt") as mount:
            actual = factory.look(mount, xattrs=False, fractions=False)
            assert actual == factory.look(unpacked, xattrs=False, fractions=False)


# -- hostile layers --------------------------------------------------------------------------


def raw(name: bytes, **changes: bytes) -> bytes:
    """A ustar header, fields replaced as given, its checksum right."""
    info = tarfile.TarInfo("x")
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT)[:512])
    header[0 : len(name)] = name
    places = {"size": 124, "flag": 156, "target": 157, "mode": 100, "mtime": 136, "prefix": 345}
    for field, value in changes.items():
        header[places[field] : places[field] + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


LONG = "n" * 250 + "/"

HOSTILE: dict[str, tuple[list[bytes], str]] = {
    "name that climbs out": ([layer([member("../escape", b"")])], "outside the root"),
    "name that climbs out later": ([layer([member("a/../../escape", b"")])], "outside the root"),
    "hard link to outside": ([layer([hard_link("x", "../../etc/passwd")])], "outside the root"),
    "hard link to the host": ([layer([hard_link("x", "/etc/passwd")])], "no such file"),
    "hard link through a symlink": (
        [layer([symlink("s", "/etc"), hard_link("x", "s/passwd")])],
        "no such file",
    ),
    "hard link to a directory": ([layer([directory("d"), hard_link("x", "d")])], "the directory"),
    "symlink loop": ([layer([symlink("a", "b"), symlink("b", "a"), member("a/x")])], "symlinks"),
    "file as a parent": ([layer([member("f", b""), member("f/x")])], "parent is not a directory"),
    "root replaced": ([layer([symlink("./", "/etc")])], "replaces the root"),
    "whiteout of nothing": ([layer([member(".wh.")])], "impossible whiteout"),
    "whiteout of the parent": ([layer([member("a/.wh...")])], "impossible whiteout"),
    "name too long": ([layer([member("n" * 256)])], "file name of 256 bytes"),
    "path too long": ([layer([member("n/" * 2100 + "x")])], "bytes, more than 4096"),
    "depth by symlinks": (
        [
            layer(
                [
                    member(LONG * 10 + "f"),
                    symlink("l", LONG * 10),
                    member("l/" + LONG * 10 + "f"),
                ]
            )
        ],
        "real path is too long",
    ),
    "symlink without a target": ([raw(b"s", flag=b"2") + bytes(1024)], "no target"),
    "not a tar": ([b"this is not a tar archive" * 100], "checksum"),
    "cut in a header": ([layer([member("f", b"x")])[:100]], "cut short"),
    "cut in the data": ([layer([member("f", bytes(2000))])[:1024]], "more than the archive has"),
    "huge size": ([raw(b"f", size=b"77777777777\0") + bytes(1024)], "more than the archive has"),
    "largest size": (
        [raw(b"f", size=b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7)],
        "more than the archive has",
    ),
    "negative size": ([raw(b"f", size=b"\xff" * 12)], "size below zero"),
    "size that is no number": ([raw(b"f", size=b"12x45678901\0")], "not a number"),
    "huge extended header": (
        [raw(b"x", flag=b"x", size=b"00077777777\0") + bytes(1 << 20)],
        "extended header of",
    ),
    "extended header cut": ([raw(b"x", flag=b"x", size=b"00000001000\0")], "cut short"),
    "extended header and nothing": (
        [raw(b"x", flag=b"L", size=b"00000000004\0") + b"abc\0".ljust(512, b"\0")],
        "cut short",
    ),
    "pax record without length": (
        [raw(b"x", flag=b"x", size=b"00000000010\0") + b"path=abc".ljust(512, b"\0")],
        "pax record",
    ),
    "pax record that overruns": (
        [raw(b"x", flag=b"x", size=b"00000000010\0") + b"9 path=abc\n".ljust(512, b"\0")],
        "pax record",
    ),
    "pax record of length 0": (
        [raw(b"x", flag=b"x", size=b"00000000004\0") + b"0 =\n".ljust(512, b"\0")],
        "pax record",
    ),
    "unknown type": ([raw(b"f", flag=b"V") + bytes(1024)], "unknown type"),
    "damage in the middle": (
        [layer([member("f", b"")])[:512] + b"\1" * 512 + layer([member("g", b"")])],
        "checksum",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_layer_is_refused(tmp_path: Path, cache: images.Cache, name: str) -> None:
    layers, message = HOSTILE[name]
    image = images.open_image(factory.make_layout(tmp_path / "i", layers))
    with pytest.raises(ImageError, match=message):
        images.as_directory(image, tmp_path, cache=cache)
    with pytest.raises(ImageError, match=message):
        images.as_disk(image, tmp_path, cache=cache)
    for place in ("entries", "tmp", "locks"):
        assert os.listdir(os.path.join(cache.directory, place)) == []
    assert sorted(os.listdir(tmp_path)) == ["cache", "i"]


def test_absolute_names_stay_inside(tmp_path: Path, cache: images.Cache) -> None:
    layers = [layer([member("/etc/x", b""), symlink("out", "/"), member("out/y", b"")])]
    with images.open_image(factory.make_layout(tmp_path / "i", layers)) as image:
        tree = factory.look(images.as_directory(image, tmp_path, cache=cache))
    assert sorted(tree) == [b"", b"etc", b"etc/x", b"out", b"y"]


def test_chain_of_extended_headers_costs_no_stack(tmp_path: Path, cache: images.Cache) -> None:
    chain = (
        raw(b"x", flag=b"x", size=b"00000000015\0") + b"13 path=abcd\n".ljust(512, b"\0")
    ) * 5000
    layers = [chain + raw(b"f") + bytes(1024)]
    with images.open_image(factory.make_layout(tmp_path / "i", layers)) as image:
        tree = factory.look(images.as_directory(image, tmp_path, cache=cache))
    assert sorted(tree) == [b"", b"abcd"]


@given(data=st.binary(max_size=2048), at=st.integers(0, 2047))
@settings(max_examples=300, deadline=None)
def test_damaged_archive_gives_entries_or_image_error(data: bytes, at: int) -> None:
    good = layer([member("f", b"x" * 700, xattrs={"user.a": b"1"}), directory("d")])
    damaged = good[:at] + data + good[at + len(data) :]
    with io.BytesIO(damaged), os.fdopen(os.memfd_create("layer"), "wb") as file:
        file.write(damaged)
        file.flush()
        with contextlib.suppress(ImageError):
            list(tarformat.read_entries(file.fileno(), 0, len(damaged), Budget()))


# -- random stacks ---------------------------------------------------------------------------

_NAMES = st.sampled_from(["a", "b", "a/x", "a/y", "a/b", "b/x", "b/a/x", "c", "c/x"])
_TARGETS = st.sampled_from(["a", "/b", "../a", "missing", "b/a"])


@st.composite
def stacks(draw: st.DrawFn) -> list[bytes]:
    """Up to three layers of a few entries over a few names; whiteouts come first in their layer."""
    result = []
    for _ in range(draw(st.integers(1, 3))):
        dropped = draw(st.lists(_NAMES, max_size=2, unique=True))
        members = [
            member("/".join([*name.split("/")[:-1], ".wh." + name.split("/")[-1]]))
            for name in dropped
        ]
        for name in draw(st.lists(_NAMES, max_size=5, unique=True)):
            kind = draw(st.sampled_from(["file", "directory", "symlink"]))
            mode = draw(st.sampled_from([0o755, 0o4711, 0o640]))
            if kind == "file":
                members.append(member(name, name.encode(), mode=mode))
            elif kind == "directory":
                members.append(directory(name, mode=mode))
            else:
                members.append(symlink(name, draw(_TARGETS)))
        result.append(layer(members))
    return result


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(layers=stacks())
def test_random_stack_is_what_umoci_unpacks(tmp_path: Path, layers: Sequence[bytes]) -> None:
    factory.require("umoci", "tar", root=True)
    work = tmp_path / "example"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    reference = factory.make_layout(work / "i", layers)
    cache = images.Cache(str(work / "cache"))
    with images.open_image(reference) as image:
        try:
            actual = factory.look(images.as_directory(image, work, cache=cache))
        except ImageError:
            with pytest.raises(subprocess.CalledProcessError):
                unpack_by_umoci(reference, work)
            return
    expected = factory.look(unpack_by_umoci(reference, work))
    assert {path: (seen.mode, seen.content) for path, seen in actual.items() if path} == {
        path: (seen.mode, seen.content) for path, seen in expected.items() if path
    }
