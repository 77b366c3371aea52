"""Make the demo image: an OCI layout with the tag `busybox`.

    python build/demo_image.py OUTDIR

The program in it is Debian's busybox-static, unpacked from the package and never installed; umoci
makes the layout. A finished layout is kept as it is, a new one appears by rename.
"""

import fcntl
import glob
import os
import shutil
import subprocess
import sys
import tempfile

PACKAGE = "busybox-static"
TAG = "busybox"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_SECONDS = 120
_LOCK = ".lock-of-demo"
_WORK = ".demo-"
_STAMP = ".demo-recipe"
_RECIPE = "3"  # raise it when what this script makes changes

_USERS = """\
root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
nobody:x:65534:65534:nobody:/nonexistent:/bin/false
user:x:1000:1000:user:/home/user:/bin/sh
"""
_GROUPS = """\
root:x:0:
daemon:x:1:
tty:x:5:
users:x:100:user
nogroup:x:65534:
user:x:1000:
"""


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        print("usage: python build/demo_image.py OUTDIR", file=sys.stderr)
        return 2
    try:
        made = make_demo_image(os.path.abspath(argv[1]))
    except subprocess.CalledProcessError as error:
        print(f"failed: {' '.join(error.cmd)}\n{error.stderr}", file=sys.stderr)
        return 1
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    print(f"oci:{argv[1]}:{TAG} {'made' if made else 'is there already'}")
    return 0


def make_demo_image(layout: str) -> bool:
    """Make the layout unless it is there; return whether it was made."""
    parent = os.path.dirname(layout)
    os.makedirs(parent, exist_ok=True)
    with open(os.path.join(parent, _LOCK), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another one waits here, and finds it made
        for name in os.listdir(parent):
            if name.startswith(_WORK):  # of one that was killed
                shutil.rmtree(os.path.join(parent, name))
        if _is_current(layout):
            os.utime(os.path.join(layout, "index.json"))  # newer than this script again, for make
            return False
        _replace(layout, parent)
    return True


def _replace(layout: str, parent: str) -> None:
    with tempfile.TemporaryDirectory(prefix=_WORK, dir=parent) as work:
        root = os.path.join(work, "root")
        os.mkdir(root, 0o755)
        _fill_root(root, _unpack_package(work))
        fresh = os.path.join(work, "layout")
        _make_layout(fresh, root)
        if os.path.lexists(layout):
            os.rename(layout, os.path.join(work, "old"))
        os.rename(fresh, layout)


def _is_current(layout: str) -> bool:
    if not os.path.exists(os.path.join(layout, "index.json")):
        return False
    listed = _run("umoci", "list", "--layout", layout).split()
    stamp = os.path.join(layout, _STAMP)
    return TAG in listed and os.path.exists(stamp) and _read(stamp) == _RECIPE


def _unpack_package(work: str) -> str:
    """Fetch the package with apt, and return the directory that it was unpacked to."""
    unpacked = os.path.join(work, "package")
    _run("apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", PACKAGE, cwd=work)
    (archive,) = glob.glob(os.path.join(work, f"{PACKAGE}_*.deb"))
    _run("dpkg-deb", "-x", archive, unpacked)
    return unpacked


def _fill_root(root: str, package: str) -> None:
    for name, mode in (
        *(("bin", 0o755), ("sbin", 0o755), ("usr", 0o755), ("usr/bin", 0o755), ("usr/sbin", 0o755)),
        *(("etc", 0o755), ("root", 0o700), ("home", 0o755), ("home/user", 0o755), ("tmp", 0o1777)),
        *(("proc", 0o555), ("sys", 0o555), ("dev", 0o755), ("run", 0o755), ("var", 0o755)),
    ):
        os.mkdir(os.path.join(root, name))
        os.chmod(os.path.join(root, name), mode)
    os.chown(os.path.join(root, "home/user"), 1000, 1000)
    busybox = os.path.join(root, "bin/busybox")
    (source,) = (
        path
        for place in ("bin", "usr/bin")
        if os.path.isfile(path := os.path.join(package, place, "busybox"))
    )
    shutil.copy(source, busybox)
    for applet in _run(busybox, "--list-full").split():
        link = os.path.join(root, applet)
        os.makedirs(os.path.dirname(link), exist_ok=True)
        if not os.path.lexists(link):
            # Relative: from an unpacked copy, an absolute link leads to the host's own busybox.
            os.symlink(os.path.relpath(busybox, os.path.dirname(link)), link)
    _write(os.path.join(root, "etc/passwd"), _USERS)
    _write(os.path.join(root, "etc/group"), _GROUPS)


def _make_layout(layout: str, root: str) -> None:
    image = f"{layout}:{TAG}"
    _run("umoci", "init", "--layout", layout)
    _run("umoci", "new", "--image", image)
    _run("umoci", "insert", "--image", image, root, "/")
    _run(
        *("umoci", "config", "--image", image, "--config.env", f"PATH={PATH}"),
        *("--config.cmd", "sh"),
    )
    _run("umoci", "gc", "--layout", layout)
    _write(os.path.join(layout, _STAMP), _RECIPE)
    _let_all_read(layout)


def _let_all_read(layout: str) -> None:
    """Also users other than the one who made it: umoci's index is 0600, as temporary files are."""
    for folder, _, files in os.walk(layout):
        os.chmod(folder, 0o755)  # noqa: S103 - whatever the umask is
        for name in files:
            os.chmod(os.path.join(folder, name), 0o644)


def _run(*argv: str, cwd: str | None = None) -> str:
    result = subprocess.run(
        argv, cwd=cwd, check=True, timeout=_SECONDS, capture_output=True, text=True
    )
    return result.stdout


def _read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(path, 0o644)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
