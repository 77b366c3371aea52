"""Roots and volumes in namespaces: every kind that needs no block device, and hostile images."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from init_machine import Config, Machine, boot_config, make_root, require_program
from plainpython import needs_guestsys

from microguest.guest.boot.root import Volume
from microguest.init_shim.failure import Failure

LOWER = "/microguest/lower"  # the initial root's view of the image's folder
HOST = "/microguest/host"  # and of one that can be written to
NOBODY = 65534


@pytest.fixture(scope="module")
def image() -> Iterator[Path]:
    """A folder with busybox as `base`, to which tests add layers."""
    require_program()
    # Not in pytest's own folder: an ordinary user's machine has to get here.
    with tempfile.TemporaryDirectory(prefix="mg-image-") as path:
        folder = Path(path)
        folder.chmod(0o755)
        make_root(folder / "base")
        yield folder


class Layers:
    """Folders beside `base`, removed after the test; `paths` are the lowers, topmost first."""

    def __init__(self, image: Path) -> None:
        self.image = image
        self.names = ["base"]

    def add(self, name: str) -> Path:
        """A new layer above those that are there."""
        folder = self.image / name
        folder.mkdir()
        self.names.insert(0, name)
        return folder

    @property
    def lowers(self) -> list[dict[str, str]]:
        return [{"kind": "directory", "path": f"{LOWER}/{name}"} for name in self.names]

    def config(self, script: str, volumes: list[dict[str, Any]] | None = None) -> Config:
        config = boot_config(["/bin/sh", "-c", script])
        config["root"]["lower"] = self.lowers
        if volumes is not None:
            config["volumes"] = volumes
        return config

    def remove(self) -> None:
        for name in self.names[:-1]:
            shutil.rmtree(self.image / name)


@pytest.fixture
def layers(image: Path) -> Iterator[Layers]:
    made = Layers(image)
    yield made
    made.remove()


def lines(
    image: Path,
    config: Config,
    *,
    user: int | None = None,
    prepare: Callable[[Path], object] = lambda host: None,
    check: Callable[[Path], object] = lambda host: None,
) -> list[str]:
    """What a machine's workload wrote, which ended with 0.

    prepare, check: called with the host's folder before PID 1 can have seen it and afterwards.
    """
    with Machine(image, config, prepare=prepare, user=user) as machine:
        assert machine.wait() == 0, machine.console
        machine.report("ready")
        machine.report("workload_started")
        assert machine.report("workload_exited").get("code") == 0, machine.console
        check(machine.host)
        return machine.console.splitlines()


def refusal(
    image: Path, config: Config, *, prepare: Callable[[Path], object] = lambda host: None
) -> tuple[str, str]:
    """(step, message) of a boot that fails."""
    with Machine(image, config, prepare=prepare) as machine:
        assert machine.wait() == 0, machine.console
        failed = machine.report("boot_failed")
        return failed["step"], failed["message"]


# ── layers ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("user", [None, NOBODY])
def test_sixty_four_layers_the_first_is_on_top(
    image: Path, layers: Layers, user: int | None
) -> None:
    for number in range(1, 64):
        folder = layers.add(f"layer{number}")
        (folder / "order").write_text(f"{number}\n")
        (folder / f"only{number}").touch()
    script = "cat /order; ls / | grep -c only; ls -d /bin /only1 /only63"
    found = lines(image, layers.config(script), user=user)
    assert found == ["63", "63", "/bin", "/only1", "/only63"]


def test_layers_hide_what_is_below_and_the_kernel_does_what_the_root_needs(
    image: Path, layers: Layers
) -> None:
    below = layers.add("below")
    for name in ("gone", "dir/old", "moved/deep/file", "data"):
        (below / name).parent.mkdir(parents=True, exist_ok=True)
        (below / name).write_text("below")
    with (below / "big").open("wb") as file:
        file.truncate(200 << 20)
    above = layers.add("above")
    os.mknod(above / "gone", 0o020000, os.makedev(0, 0))  # overlayfs.rst: a whiteout
    (above / "dir").mkdir()
    (above / "dir" / "new").touch()
    os.setxattr(above / "dir", "trusted.overlay.opaque", b"y")
    above.chmod(0o751)
    os.chown(above, 12, 34)
    found = lines(
        image,
        layers.config(
            "ls -d /gone 2>&1; ls /dir; stat -c '%a %u %g' /;"
            # redirect_dir: rename(2) of a layer's directory; metacopy: no data is copied
            "mv -T /moved /other && cat /other/deep/file; echo;"
            "chmod 600 /big && stat -c %a /big;"
            "rm -r /dir && mkdir /dir && ls -A /dir;"
            # xino: one device number for all that is in the root
            "echo > /fresh; stat -c %d / /bin/busybox /data /fresh /dir | sort -u | wc -l;"
            "df -k / | awk 'END { print ($3 < 65536) }'"
        ),
    )
    assert found[0].startswith("ls: /gone: No such file")
    assert found[1:] == ["new", "751 12 34", "below", "600", "1", "1"]


def test_the_root_has_the_attributes_of_the_topmost_layer(image: Path, layers: Layers) -> None:
    top = layers.add("top")
    os.setxattr(top, "trusted.mark", b"here")
    os.setxattr(top, "trusted.overlay.opaque", b"y")
    with Machine(image, layers.config("exec sleep 100")) as machine:
        machine.report("ready")
        assert os.getxattr(f"/proc/{machine.init_pid()}/root", "trusted.mark") == b"here"
        machine.process.terminate()
        assert machine.wait() == 0, machine.console


def test_a_layer_that_is_missing_or_no_directory_fails_the_boot(
    image: Path, layers: Layers
) -> None:
    config = layers.config("true")
    config["root"]["lower"].append({"kind": "directory", "path": f"{LOWER}/missing"})
    step, message = refusal(image, config)
    assert step == "root-lower"
    assert "/missing: No such file or directory; a lower layer must be a directory" in message
    config["root"]["lower"][-1] = {"kind": "virtiofs", "tag": "nothing"}
    step, message = refusal(image, config)
    assert step == "root-lower"
    assert "virtiofs" in message


# ── one file system as it is, and read-only roots ────────────────────────────────────────────────


def test_a_plain_root_is_written_to_where_it_is(image: Path) -> None:
    config = boot_config(["/bin/sh", "-c", "echo kept > /kept; grep ' / ' /proc/mounts | wc -l"])
    config["root"] = {"lower": [{"kind": "directory", "path": f"{HOST}/tree"}], "upper": None}

    def check(host: Path) -> None:
        assert (host / "tree" / "kept").read_text() == "kept\n"

    def copy(host: Path) -> None:
        shutil.copytree(image / "base", host / "tree", symlinks=True)

    assert lines(image, config, prepare=copy, check=check) == ["1"]


def test_a_plain_root_that_cannot_be_written_to_stays_so(image: Path, layers: Layers) -> None:
    top = image / "plain"
    shutil.copytree(image / "base", top, symlinks=True)
    config = layers.config("! touch /x 2>/dev/null && echo read-only")
    config["root"] = {"lower": [{"kind": "directory", "path": f"{LOWER}/plain"}], "upper": None}
    try:
        step, message = refusal(image, config)
        assert step == "root-overlay"
        assert message.endswith("a root without an upper needs a directory at /proc")
        for name in ("proc", "sys", "dev", "run"):
            (top / name).mkdir()
        assert lines(image, config) == ["read-only"]
        config["root"] |= {"read_only": True, "writable": ["/tmp"]}
        step, message = refusal(image, config)
        assert step == "volumes"
        assert message == (
            "/tmp cannot be writable: its file system is read-only; give the root an upper"
        )
    finally:
        shutil.rmtree(top)


@pytest.mark.parametrize("user", [None, NOBODY])
def test_a_read_only_root_with_exceptions(image: Path, layers: Layers, user: int | None) -> None:
    top = layers.add("top")
    (top / "var/lib/app").mkdir(parents=True)
    (top / "var/lib/app/state").write_text("of the image\n")
    (top / "one").write_text("one\n")
    (top / "link").symlink_to("/var")
    for path in (top, *top.rglob("*")):
        os.chown(path, user or 0, user or 0, follow_symlinks=False)  # root inside, if not outside
    script = (
        "for path in /x /etc/x /bin/x /var/x /new/deep/x /one /link/y /var/lib/app/x /data/x; do"
        " { echo x >> $path; } 2>/dev/null && echo $path; done; cat /var/lib/app/state /one"
    )
    config = layers.config(script, [{"kind": "tmpfs", "target": "/data"}])
    config["root"] |= {"read_only": True, "writable": ["/var/lib", "/new/deep", "/var", "/one"]}
    assert lines(image, config, user=user) == [
        "/var/x", "/new/deep/x", "/one", "/link/y", "/var/lib/app/x", "/data/x",
        "of the image", "one", "x",
    ]  # fmt: skip


def test_a_writable_path_keeps_what_is_mounted_in_it(image: Path, layers: Layers) -> None:
    script = "awk '{ print $2 }' /proc/mounts | grep ^/dev/ | sort -u; touch /dev/shm/x && echo x"
    plain = lines(image, layers.config(script))
    assert {"/dev/pts", "/dev/shm"} < set(plain)
    config = layers.config(script)
    config["root"] |= {"read_only": True, "writable": ["/dev"]}
    assert lines(image, config) == plain


def test_a_read_only_root_is_read_only_for_the_workload(image: Path, layers: Layers) -> None:
    config = layers.config("! mkdir /x 2>/dev/null && grep ' / ' /proc/mounts | cut -c 1-22")
    config["root"]["read_only"] = True
    assert lines(image, config) == ["overlay / overlay ro,r"]


# ── volumes ──────────────────────────────────────────────────────────────────────────────────────


def share(host: Path) -> None:
    """What tests mount from the host: a folder with a program, a folder in it, and a file."""
    (host / "share" / "inner").mkdir(parents=True)
    (host / "share" / "file").write_text("from the host\n")
    (host / "share" / "run").write_text("#!/bin/sh\necho ran\n")
    (host / "share" / "run").chmod(0o755)
    os.chown(host / "share", NOBODY, NOBODY)


@pytest.mark.parametrize("user", [None, NOBODY])
def test_every_kind_of_volume(image: Path, layers: Layers, user: int | None) -> None:
    top = layers.add("top")
    (top / "srv" / "site").mkdir(parents=True)
    (top / "srv" / "site" / "page").write_text("page\n")
    volumes = [
        {"kind": "tmpfs", "target": "/var/cache/x/y", "size": "1m", "mode": 0o700, "exec": False},
        {"kind": "tmpfs", "target": "/loose", "suid": True, "dev": True},
        {"kind": "directory", "target": "/shared", "path": f"{HOST}/share"},
        {"kind": "directory", "target": "/fixed", "path": f"{HOST}/share", "read_only": True},
        {"kind": "directory", "target": "/still", "path": f"{HOST}/share", "exec": False},
        {"kind": "directory", "target": "/conf/app.conf", "path": f"{HOST}/share/file",
         "read_only": True},
        {"kind": "bind", "target": "/www", "path": "/srv/site", "read_only": True},
        {"kind": "bind", "target": "/run/secret", "path": "/etc/passwd"},
    ]  # fmt: skip
    script = (
        "flags() { awk -v at=$1 '$2 == at { print $4 }' /proc/mounts |"
        " tr , '\n' | grep -xE 'ro|nosuid|nodev|noexec' | tr '\n' ' '; echo; };"
        "for at in /var/cache/x/y /loose /shared /fixed /still /conf/app.conf /www /run/secret;"
        " do flags $at; done;"
        "stat -c %a /var/cache/x/y; cat /www/page /conf/app.conf; head -c 4 /run/secret; echo;"
        "/shared/run; /still/run 2>/dev/null || echo refused;"
        "echo written > /shared/new && cat /fixed/new;"
        "for path in /fixed/x /www/x /conf/app.conf; do echo x > $path || echo no; done 2>&-;"
        "dd if=/dev/zero of=/var/cache/x/y/big bs=64k count=32 2>/dev/null || echo full"
    )

    def check(host: Path) -> None:
        assert (host / "share" / "new").read_text() == "written\n"

    config = layers.config(script, volumes)
    found = lines(image, config, prepare=share, check=check, user=user)
    assert [line.strip() for line in found] == [
        "nosuid nodev noexec", "", "nosuid nodev", "ro nosuid nodev", "nosuid nodev noexec",
        "ro nosuid nodev", "ro nosuid nodev", "nosuid nodev",
        "700", "page", "from the host", "root", "ran", "refused", "written", "no", "no", "no",
        "full",
    ]  # fmt: skip


@pytest.fixture
def shared(image: Path, layers: Layers) -> Iterator[str]:
    """A folder of the host's in which another file system is mounted, as PID 1 sees it."""
    inner = layers.add("shared") / "inner"
    layers.names.remove("shared")
    inner.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=777", "tmpfs", str(inner)], check=True)
    try:
        (inner / "file").write_text("inside\n")
        (inner / "file").chmod(0o666)
        yield f"{LOWER}/shared"
    finally:
        subprocess.run(["umount", "-l", str(inner)], check=True)
        shutil.rmtree(inner.parent)


@pytest.mark.parametrize("user", [None, NOBODY])
def test_a_bind_takes_along_what_is_mounted_inside_it(
    image: Path, layers: Layers, shared: str, user: int | None
) -> None:
    volumes: list[dict[str, Any]] = [
        {"kind": "directory", "target": "/as/is", "path": shared},
        {"kind": "directory", "target": "/fixed", "path": shared, "read_only": True},
        {"kind": "bind", "target": "/as/well/bound", "path": "/as/is", "exec": False},
    ]
    script = (
        "for at in /as/is /fixed /as/well/bound; do"
        " { echo $at >> $at/inner/file; } 2>/dev/null || echo read-only;"
        " awk -v at=$at/inner '$2 == at { print $4 }' /proc/mounts | cut -d, -f 1-4; done;"
        "cat /fixed/inner/file"
    )
    found = lines(image, layers.config(script, volumes), user=user)
    assert [line.removesuffix(",relatime").removesuffix(",inode64") for line in found] == [
        "rw,nosuid,nodev", "read-only", "ro,nosuid,nodev", "rw,nosuid,nodev,noexec",
        "inside", "/as/is", "/as/well/bound",
    ]  # fmt: skip


@needs_guestsys
def test_a_mount_that_turned_out_to_allow_more_is_refused(tmp_path: Path) -> None:
    """No kernel is known that does this, so the check is asked about a mount of this one."""
    from microguest.init_shim import confined
    from microguest.init_shim.root import volumes

    for flag in ("read_only", "exec"):
        volume = Volume(kind="tmpfs", target="/x", suid=True, dev=True)
        with confined.Opened(os.open(tmp_path, os.O_PATH)) as there:
            volumes.check_flags(volume, there)
            allowed = volume.replace(**{flag: flag == "read_only"})
            with pytest.raises(Failure, match=r"/x was mounted .* and turned out not to be"):
                volumes.check_flags(allowed, there)


def test_parents_are_mounted_before_what_is_inside_them(image: Path, layers: Layers) -> None:
    volumes = [
        {"kind": "bind", "target": "/a/b/c/bound", "path": "/a/file-of-a"},
        {"kind": "tmpfs", "target": "/a/b/c"},
        {"kind": "directory", "target": "/a/b", "path": f"{HOST}/share"},
        {"kind": "tmpfs", "target": "/a"},
    ]
    script = "awk '$2 ~ \"^/a\" { print $2 }' /proc/mounts; ls /a /a/b"
    step, message = refusal(image, layers.config(script, volumes), prepare=share)
    assert (step, message.split(";")[0]) == (
        "volumes",
        "openat2 /a/file-of-a: No such file or directory",
    )
    found = lines(image, layers.config(script, volumes[1:]), prepare=share)
    assert found == ["/a", "/a/b", "/a/b/c", "/a:", "b", "", "/a/b:", "c", "file", "inner", "run"]


def test_volumes_below_run_and_dev_are_seen(image: Path, layers: Layers) -> None:
    (layers.add("top") / "var").mkdir()
    (image / "top" / "var" / "run").symlink_to("/run")
    volumes = [
        {"kind": "tmpfs", "target": "/var/run/app"},
        {"kind": "tmpfs", "target": "/dev/shm", "size": "2m"},
    ]
    script = "awk '$2 ~ \"/run/app|/dev/shm\" { print $2 }' /proc/mounts | sort -u; df -k /dev/shm"
    found = lines(image, layers.config(script, volumes))
    assert found[:2] == ["/dev/shm", "/run/app"]
    assert found[-1].split()[1] == "2048"


def hostile(top: Path) -> None:
    """Links that would lead out of an image, and things in the way."""
    for name, target in (
        ("root", "/"),
        ("up", "../../../../../.."),
        ("host", HOST),
        ("loop", "loop"),
        ("dangling", "/nowhere/at/all"),
        ("chain", "links/one"),
        ("magic", "/proc/self/root"),
        ("cwd", "/proc/1/cwd/inside"),
    ):
        (top / name).symlink_to(target)
    (top / "users").symlink_to("/etc")
    os.lchown(top / "users", 1000, 1000)
    (top / "links").mkdir()
    (top / "links" / "one").symlink_to("../links/two")
    (top / "links" / "two").symlink_to("/../../etc/../real")
    (top / "real").mkdir()
    (top / "file").touch()


@pytest.mark.parametrize(
    ("target", "where"),
    [
        ("/chain/new", "/real/new"),
        ("/up/real", "/real"),
        ("/root/root/up/new", "/new"),
        ("/links/one", "/real"),
        ("/new//deeper/", "/new/deeper"),
    ],
)
def test_links_on_the_way_stay_in_the_image(
    image: Path, layers: Layers, target: str, where: str
) -> None:
    hostile(layers.add("top"))
    script = "awk '$3 == \"tmpfs\" && $4 ~ /size=4k/ { print $2 }' /proc/mounts"
    config = layers.config(script, [{"kind": "tmpfs", "target": target, "size": "4k"}])
    assert lines(image, config) == [where]


@pytest.mark.parametrize(
    ("volume", "expected"),
    [
        ({"target": "/root"}, "/root leads to the root itself"),
        ({"target": "/up"}, "/up leads to the root itself"),
        ({"target": "/loop/x"}, "openat2 /loop/x: Symbolic link loop"),
        ({"target": "/dangling"}, "/dangling is a symbolic link that leads nowhere; nothing is "),
        ({"target": "/dangling/x"}, "/dangling is a symbolic link that leads nowhere; nothing is "),
        ({"target": "/host/x"}, "/host is a symbolic link that leads nowhere; nothing is made"),
        ({"target": "/magic/x"}, "openat2 /magic/x: Symbolic link loop"),
        ({"target": "/cwd"}, "openat2 /cwd: Symbolic link loop"),
        (
            {"target": "/users"},
            "/users leads through /users, a symbolic link of user 1000; what is",
        ),
        (
            {"target": "/root/users/x"},
            "/root/users/x leads through /users, a symbolic link of user",
        ),
        ({"target": "/proc"}, "/proc leads into /proc, where nothing is mounted"),
        ({"target": "/proc/sys/kernel"}, "/proc/sys/kernel leads into /proc, where nothing is"),
        ({"target": "/dev"}, "/dev leads to /dev, whose devices the machine needs; mount inside"),
        ({"target": "/file"}, "/file is a file and a directory is to be mounted there"),
        ({"target": "/file/x"}, "openat2 /file/x: Not a directory"),
        (
            {"target": "/new/x", "create": False},
            "openat2 /new/x: No such file or directory; it is ",
        ),
        (
            {"target": "/real", "kind": "bind", "path": "/file"},
            "/real is a directory and a file is to be mounted there",
        ),
        (
            {"target": "/x", "kind": "bind", "path": "/host/share"},
            "openat2 /host/share: No such file or directory; /host/share is a path of the image",
        ),
        ({"target": "/x", "kind": "bind", "path": "/magic"}, "openat2 /magic: Symbolic link loop"),
        (
            {"target": "/x", "kind": "directory", "path": "/nothing"},
            "open /nothing: No such file or directory; it must be in the initial root",
        ),
    ],
)
def test_hostile_images_and_wrong_volumes_are_refused(
    image: Path, layers: Layers, volume: dict[str, Any], expected: str
) -> None:
    hostile(layers.add("top"))
    config = layers.config("true", [{"kind": "tmpfs", **volume}])
    step, message = refusal(image, config, prepare=share)
    assert step == "volumes"
    assert message.startswith(expected), message
    assert not (image / "top" / "nowhere").exists()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("/real/inside", "/links/one"),  # which is /real
        ("/real", "/chain"),
        ("/twice", "/twice"),
    ],
)
def test_a_volume_that_another_one_hides_is_told(
    image: Path, layers: Layers, first: str, second: str
) -> None:
    hostile(layers.add("top"))
    volumes = [{"kind": "tmpfs", "target": first}, {"kind": "tmpfs", "target": second}]
    assert refusal(image, layers.config("true", volumes)) == (
        "volumes",
        f"the volume at {first} is hidden by another one",
    )


def test_a_read_only_volume_has_no_room_for_targets(image: Path, layers: Layers) -> None:
    volumes = [
        {"kind": "directory", "target": "/fixed", "path": f"{HOST}/share", "read_only": True},
        {"kind": "tmpfs", "target": "/fixed/inner"},
    ]
    assert lines(image, layers.config("ls /fixed/inner", volumes), prepare=share) == []
    volumes[1]["target"] = "/fixed/new"
    step, message = refusal(image, layers.config("true", volumes), prepare=share)
    assert (step, message) == ("volumes", "mkdir /fixed/new: Read-only file system")
