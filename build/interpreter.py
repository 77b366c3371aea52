"""CPython twice: native (to freeze with) and as a static library for the guest.

Cross-compiling CPython needs a native Python of the same micro version, and marshalled code is only
valid for the version that wrote it, so both come from one source tree.
"""

import os
import platform
import shutil
import tempfile
from dataclasses import dataclass

from pins import Pins, digest_of
from stages import BuildError, Cache, read_bytes, run
from toolchain import COMPILE_FLAGS, STABLE_ENVIRONMENT, Toolchain

HERE = os.path.dirname(os.path.abspath(__file__))
SETUP_LOCAL = os.path.join(HERE, "native", "Setup.local")

# PyInstaller refuses a Python without a shared library, though its Analysis needs none.
NATIVE_OPTIONS = ("--enable-shared", "--without-ensurepip", "--disable-test-modules")
# The library is found from the binary: the folder is renamed when complete. Quoted for make and sh.
NATIVE_LINK = r"LDFLAGS=-Wl,-rpath,\$$ORIGIN/../lib"
# What configure would find out by running a program, which a cross build cannot.
CROSS_ANSWERS = (
    "ac_cv_file__dev_ptmx=yes",
    "ac_cv_file__dev_ptc=no",
    "ac_cv_buggy_getaddrinfo=no",
    "ac_cv_func_dlopen=no",
    "ac_cv_aligned_required=no",
    "ac_cv_broken_sem_getvalue=no",
    "ac_cv_working_tzset=yes",
    "ac_cv_pthread_system_supported=yes",
)
CROSS_OPTIONS = (
    "--prefix=/nonexistent",
    "--disable-shared",
    "--disable-test-modules",
    "--enable-ipv6",
    "--with-computed-gotos",
    "--with-pkg-config=no",
    "--with-static-libpython",
    "--without-doc-strings",
    "--without-ensurepip",
)


@dataclass(frozen=True, kw_only=True)
class Interpreter:
    """The guest's interpreter as it is linked: headers and archives in `folder`."""

    folder: str
    native_python: str
    key: str

    @property
    def include(self) -> str:
        """The folder of Python.h and pyconfig.h."""
        return os.path.join(self.folder, "include")

    @property
    def archives(self) -> tuple[str, ...]:
        """The static archives, in link order."""
        return tuple(
            os.path.join(self.folder, name) for name in ("libpython.a", "libHacl_Hash_SHA2.a")
        )

    @property
    def builtin_modules(self) -> frozenset[str]:
        """The names in the static library's table of built-in modules."""
        return frozenset(read_bytes(os.path.join(self.folder, "inittab")).decode().split())


def make_interpreter(cache: Cache, pins: Pins, toolchain: Toolchain, source: str) -> Interpreter:
    """Build both interpreters, or find them in the cache. About two minutes on two cores."""
    this_recipe = read_bytes(os.path.abspath(__file__))
    native_key = digest_of(pins.cpython.sha256, this_recipe, platform.machine())
    native = cache.stage("native-python", native_key, lambda to: _build_native(source, to))
    python = os.path.join(native, "bin", "python3")
    recipe = (this_recipe, read_bytes(SETUP_LOCAL), toolchain.key, toolchain.arch)
    key = digest_of(pins.cpython.sha256, recipe)
    folder = cache.stage(
        f"libpython-{toolchain.arch}", key, lambda to: _build_cross(source, toolchain, python, to)
    )
    return Interpreter(folder=folder, native_python=python, key=key)


def _build_native(source: str, folder: str) -> None:
    with tempfile.TemporaryDirectory(prefix="microguest-native-") as work:
        environment = {**STABLE_ENVIRONMENT, "CFLAGS": "-O1 -g0", "HOME": work}
        configure = os.path.join(source, "configure")
        log = os.path.join(work, "log")
        run(
            [configure, "--prefix=/nonexistent", *NATIVE_OPTIONS],
            cwd=work,
            env=environment,
            log=log,
        )
        run(["make", _jobs(), NATIVE_LINK], cwd=work, env=environment, log=log)
        # Python finds its modules from where its binary is, so any prefix will do here.
        install = ["make", NATIVE_LINK, f"prefix={folder}", "install"]
        run(install, cwd=work, env=environment, log=log)
    check = "import ctypes, zlib, sys; print(sys.version)"
    run([os.path.join(folder, "bin", "python3"), "-I", "-c", check])


def _build_cross(source: str, toolchain: Toolchain, python: str, folder: str) -> None:
    with tempfile.TemporaryDirectory(prefix="microguest-cross-") as work:
        # Paths reach the archive through __FILE__ and VPATH: give configure a relative one.
        os.symlink(source, os.path.join(work, "cpython"))
        tree = os.path.join(work, "tree")
        os.mkdir(tree)
        environment = {
            **toolchain.environment,
            "CC": toolchain.tool("cc"),
            "AR": toolchain.tool("ar"),
            "RANLIB": toolchain.tool("ranlib"),
            "READELF": "readelf",
            "CFLAGS": " ".join((*COMPILE_FLAGS, f"-ffile-prefix-map={work}=.")),
            "LDFLAGS": "-static",
            "LINKFORSHARED": " ",
            "MODULE_BUILDTYPE": "static",
        }
        machine = f"{platform.machine()}-pc-linux-gnu"
        command = ["../cpython/configure", f"--host={toolchain.target}"]
        command += [f"--build={machine}", f"--with-build-python={python}"]
        log = os.path.join(work, "log")
        run([*command, *CROSS_OPTIONS, *CROSS_ANSWERS], cwd=tree, env=environment, log=log)
        shutil.copy(SETUP_LOCAL, os.path.join(tree, "Modules", "Setup.local"))
        run(["make", _jobs(), "libpython3.13.a"], cwd=tree, env=environment, log=log)
        _keep_cross(source, tree, folder)


def _keep_cross(source: str, tree: str, folder: str) -> None:
    """Copy what linking needs out of the build tree."""
    include = os.path.join(folder, "include")
    shutil.copytree(os.path.join(source, "Include"), include)
    shutil.copy(os.path.join(tree, "pyconfig.h"), include)
    shutil.copy(os.path.join(tree, "libpython3.13.a"), os.path.join(folder, "libpython.a"))
    shutil.copy(os.path.join(tree, "Modules", "_hacl", "libHacl_Hash_SHA2.a"), folder)
    with open(os.path.join(folder, "inittab"), "w", encoding="utf-8") as file:
        file.writelines(f"{name}\n" for name in _inittab(os.path.join(tree, "Modules/config.c")))


def _inittab(config_c: str) -> list[str]:
    """Module names in the table that CPython's build generates."""
    lines = read_bytes(config_c).decode().splitlines()
    names = [line.split('"')[1] for line in lines if line.lstrip().startswith('{"')]
    if "posix" not in names:
        raise BuildError(f"no table of built-in modules in {config_c}")
    return sorted(names)


def _jobs() -> str:
    return f"-j{os.cpu_count() or 1}"
