"""The frozen ELF as it is delivered: static, needs nothing, is what it says, and repeats."""

import hashlib
import os
import platform
import shutil
import struct
import subprocess
import sys

import pytest
from patience import PATIENCE

from microguest.guest.bundle.manifest import MANIFEST, PROGRAM, Manifest

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUILD = os.path.join(PROJECT, "build")
BUNDLE = os.path.join(PROJECT, "dist", "guest", platform.machine())
ELF = os.path.join(BUNDLE, PROGRAM)

pytestmark = pytest.mark.skipif(not os.path.exists(ELF), reason=f"no {ELF}: run `make guest`")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="chroot needs root")

PT_DYNAMIC, PT_INTERP, PT_GNU_STACK = 2, 3, 0x6474E551


def program_headers(path):
    """(type, memory size) of each program header of a 64-bit little-endian ELF."""
    with open(path, "rb") as file:
        image = file.read()
    assert image[:6] == b"\x7fELF\x02\x01"
    (offset,) = struct.unpack_from("<Q", image, 32)
    size, count = struct.unpack_from("<HH", image, 54)
    headers = []
    for index in range(count):
        kind, _flags, *_rest, memory, _align = struct.unpack_from(
            "<IIQQQQQQ", image, offset + index * size
        )
        headers.append((kind, memory))
    return headers


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run(*argv, **options):
    return subprocess.run(
        argv, capture_output=True, text=True, timeout=PATIENCE, check=False, **options
    )


def test_elf_is_static():
    kinds = [kind for kind, _ in program_headers(ELF)]
    assert PT_INTERP not in kinds
    assert PT_DYNAMIC not in kinds  # and so there is no DT_NEEDED either


def test_elf_asks_for_thread_stacks_that_python_can_use():
    assert dict(program_headers(ELF))[PT_GNU_STACK] == 0x800000


def test_elf_holds_no_path_of_the_build_machine():
    with open(ELF, "rb") as file:
        image = file.read()
    for path in (PROJECT, os.path.expanduser("~/.cache"), "/tmp/microguest"):
        assert path.encode() not in image


def test_version_names_what_is_inside():
    done = run(ELF, "--version", env={})
    assert done.returncode == 0, done.stderr
    with open(os.path.join(BUNDLE, MANIFEST), "rb") as file:
        versions = Manifest.from_json(file.read()).versions
    assert set(versions) == {"microguest", "cpython", "trio", "msgpack", "pyroute2", "musl", "zig"}
    for name, version in versions.items():
        assert name in done.stdout.lower()
        assert version in done.stdout


def test_self_check_uses_the_c_packer():
    done = run(ELF, "--self-check", env={})
    assert done.returncode == 0, done.stderr
    assert "packer msgpack._cmsgpack" in done.stdout


def busybox_root(root):
    """As in alpine: musl-like, /bin/sh from busybox, hardly any file."""
    os.makedirs(root / "bin")
    busybox = shutil.which("busybox")
    assert busybox, "install busybox-static"
    shutil.copy(busybox, root / "bin" / "busybox")
    os.symlink("busybox", root / "bin" / "sh")
    return ["/bin/sh", "-c", "exec /microguest --self-check"]


def distroless_root(root):
    """As in distroless: users and groups, no program."""
    os.makedirs(root / "etc")
    (root / "etc" / "passwd").write_text("root:x:0:0:root:/root:/sbin/nologin\n")
    (root / "etc" / "group").write_text("root:x:0:\n")
    return ["/microguest", "--self-check"]


def empty_root(_root):
    return ["/microguest", "--self-check"]


@as_root
@pytest.mark.parametrize("make_root", [empty_root, busybox_root, distroless_root])
def test_elf_runs_in_any_root(tmp_path, make_root):
    command = make_root(tmp_path)
    shutil.copy(ELF, tmp_path / "microguest")
    done = run("/usr/sbin/chroot", str(tmp_path), *command, env={})
    assert (done.returncode, done.stderr) == (0, "")
    assert "modules" in done.stdout


@as_root
def test_elf_starts_with_standard_streams_closed_and_no_dev_null(tmp_path):
    shutil.copy(ELF, tmp_path / "microguest")
    script = f"exec chroot {tmp_path} /microguest --self-check <&- >&- 2>&-"
    done = run("/bin/sh", "-c", script)
    # 120: all went well but for the last line, which has no reader (Py_FinalizeEx).
    assert done.returncode == 120


def test_environment_and_working_folder_do_not_matter(tmp_path):
    (tmp_path / "socket.py").write_text("raise SystemExit('imported from the working folder')")
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit('site ran')")
    environment = {
        "PYTHONPATH": str(tmp_path),
        "PYTHONHOME": "/nonexistent",
        "PYTHONSTARTUP": str(tmp_path / "sitecustomize.py"),
        "PYTHONVERBOSE": "1",
        "PYTHONINSPECT": "1",
    }
    done = run(ELF, "--self-check", cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


RELINK = """
import dataclasses, os, sys
sys.path[:0] = [{build!r}, {source!r}]
from link import gather_parts, link_program
from pins import load_pins
from stages import open_cache
output = sys.argv[1]
with open_cache() as cache:
    parts = gather_parts(cache, load_pins(), {arch!r})
    # A compiler cache of its own: the linker must do its work, not repeat an earlier answer.
    environment = {{**parts.toolchain.environment, "ZIG_LOCAL_CACHE_DIR": output + ".zig"}}
    toolchain = dataclasses.replace(parts.toolchain, environment=environment)
    link_program(dataclasses.replace(parts, toolchain=toolchain), output)
"""


def test_linking_again_elsewhere_gives_the_same_bytes(tmp_path):
    script = RELINK.format(
        build=BUILD, source=os.path.join(PROJECT, "src"), arch=platform.machine()
    )
    images = []
    for name in ("first", "a-longer-name-for-the-second"):
        folder = tmp_path / name
        folder.mkdir()
        output = str(folder / "microguest")
        subprocess.run([sys.executable, "-c", script, output], check=True, timeout=110)
        images.append((folder / "microguest").read_bytes())
    assert images[0] == images[1]
    assert os.listdir(str(folder) + "/microguest.zig")


def test_manifest_describes_the_files():
    with open(os.path.join(BUNDLE, MANIFEST), "rb") as file:
        manifest = Manifest.from_json(file.read())
    for name, record in manifest.files.items():
        assert os.path.getsize(os.path.join(BUNDLE, name)) == record.size
        assert sha256_of(os.path.join(BUNDLE, name)) == record.sha256
