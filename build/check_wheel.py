"""The wheel as a stranger gets it: built, installed where nothing else is, used in an empty folder.

    .venv/bin/python build/check_wheel.py

Modules of a user's own with the names of our folders lie there, and raise when they are imported.
It boots a machine in namespaces with the bundle and the image that `make check` has made before.
"""

import os
import platform
import subprocess
import sys
import tempfile

from stages import BuildError, run, say

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUNDLE = os.path.join(PROJECT, "dist", "guest", platform.machine())
IMAGE = os.path.join(PROJECT, "dist", "demo")
FOLDERS = ("guest", "agent", "init_shim", "host_client")
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")

LOOK = """
import importlib.util, sys
import microguest, microguest.errors, microguest.seccomp
assert microguest.__file__.startswith(sys.prefix), microguest.__file__
missing = [name for name in microguest.__all__ if name != "aio" and not hasattr(microguest, name)]
assert not missing, missing
inside = [name for name in ("agent", "init_shim") if importlib.util.find_spec(f"microguest.{name}")]
assert not inside, inside
"""
BOOT = """
import sys
import microguest
with microguest.boot(sys.argv[1], machine="namespaces") as machine:
    assert machine.agent.exec(["echo", "here"], check=True).stdout == b"here\\n"
"""


def main() -> int:
    """Build, install, use. Exit status 1 and one message where something is missing."""
    try:
        with tempfile.TemporaryDirectory(prefix="microguest-wheel-") as work:
            check(work)
    except (BuildError, OSError, subprocess.SubprocessError) as error:
        say(f"the wheel: {error}")
        return 1
    return 0


def check(work: str) -> None:
    """All of it, in a scratch folder. Raises BuildError where a step fails."""
    python = installed(work)
    empty = os.path.join(work, "empty")
    os.mkdir(empty)
    for name in FOLDERS:
        with open(os.path.join(empty, f"{name}.py"), "w", encoding="utf-8") as file:
            file.write(f"raise SystemExit('{name}.py of the user was imported')\n")
    environment = {**os.environ, "MICROGUEST_BUNDLE": BUNDLE}
    environment.pop("PYTHONPATH", None)
    environment["XDG_STATE_HOME"] = environment["XDG_CACHE_HOME"] = os.path.join(work, "own")
    run([python, "-c", LOOK], cwd=empty, env=environment)
    run([python, "-m", "microguest", "--help"], cwd=empty, env=environment)
    run([python, "-c", BOOT, f"oci:{IMAGE}:busybox"], cwd=empty, env=environment)


def installed(work: str) -> str:
    """The Python of an environment that has the wheel, and msgpack from this one."""
    import msgpack

    wheels = os.path.join(work, "wheels")
    build = ("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", wheels)
    run([*PIP, *build, PROJECT], cwd=work)
    (wheel,) = os.listdir(wheels)
    environment = os.path.join(work, "environment")
    run([sys.executable, "-m", "venv", "--without-pip", environment])
    python = os.path.join(environment, "bin", "python")
    packages = run([python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))"])
    target = packages.strip()
    run([*PIP, "install", "--no-deps", "--no-index", "--target", target, f"{wheels}/{wheel}"])
    source = os.path.dirname(os.path.abspath(msgpack.__file__))
    os.symlink(source, os.path.join(target, "msgpack"))
    return python


if __name__ == "__main__":
    sys.exit(main())
