"""`_guestsys` for a plain Python, which can then import, debug and test the agent and PID 1.

    .venv/bin/python build/host_module.py

Compiles the guest's C file as an extension module of the Python that runs this, and writes a
stand-in for `_guest_build`, both into its site-packages. Nothing but development needs them. So a
machine without a compiler is told what it does without, and that is no failure.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig

from packages import ensure_packages
from stages import BuildError, run, say

NATIVE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "native")
SITE_PACKAGES = sysconfig.get_path("platlib")
MODULE = os.path.join(SITE_PACKAGES, f"_guestsys{sysconfig.get_config_var('EXT_SUFFIX')}")
BUILD_MODULE = os.path.join(SITE_PACKAGES, "_guest_build.py")
INCLUDE = sysconfig.get_path("include")
# As the frozen program; with symbols, for who steps into it.
FLAGS = ("-shared", "-fPIC", "-O1", "-g", "-DGUESTSYS_ALONE")
WITHOUT = "tests that import the agent or PID 1 are skipped, and neither runs in a plain Python"


def main(argv: list[str]) -> int:
    """Make both modules, and touch the file `argv[0]` where that was possible. Always 0."""
    try:
        compile_module()
        write_build_module()
    except (BuildError, OSError, subprocess.SubprocessError) as error:
        reason = str(error).partition("\n")[0]
        say(f"no _guestsys for {sys.executable}: {reason}; {WITHOUT}")
        return 0
    for path in argv:
        with open(path, "w", encoding="utf-8"):
            pass
    return 0


def compile_module() -> None:
    """Put the module in its place once it can be imported. Raises BuildError, OSError."""
    compiler = find_compiler()
    find_headers()
    part = f"{MODULE}.{os.getpid()}"
    source = os.path.join(NATIVE, "guestsys.c")
    try:
        run([compiler, *FLAGS, f"-I{INCLUDE}", source, "-o", part])
        check = "from importlib.machinery import ExtensionFileLoader as Loader; import sys; "
        check += "from importlib.util import module_from_spec as made, spec_from_loader as spec; "
        check += "made(spec('_guestsys', Loader('_guestsys', sys.argv[1])))"
        run([sys.executable, "-c", check, part])
        os.replace(part, MODULE)
    finally:
        if os.path.exists(part):
            os.unlink(part)


def find_compiler() -> str:
    """Of the machine, installed where that is possible. Raises BuildError."""
    if not shutil.which("cc"):
        ensure_packages("compiler")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        raise BuildError("there is no C compiler (cc) in PATH")
    return compiler


def find_headers() -> None:
    """Python's own, which some distributions have in a package of their own. Raises BuildError."""
    header = os.path.join(INCLUDE, "Python.h")
    if not os.path.exists(header) and header.startswith("/usr/"):  # the distribution's own
        ensure_packages("headers")
    if not os.path.exists(header):
        raise BuildError(f"there is no {header}")


def write_build_module() -> None:
    """What `microguest --version` says, of what is installed here. Raises OSError."""
    versions = {"cpython": platform.python_version()}
    for name in ("microguest", "trio", "msgpack", "pyroute2"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # asked for where not all extras are installed
    part = f"{BUILD_MODULE}.{os.getpid()}"
    with open(part, "w", encoding="utf-8") as file:
        file.write(f"VERSIONS = {json.dumps(versions)}\nMODULES = ()\n")
    os.replace(part, BUILD_MODULE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
