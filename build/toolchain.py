"""The C compiler of the guest: zig's clang with musl, as a package from the Python index.

It needs nothing of the build machine's toolchain, and compiles musl from source for the target. Its
quirks (sanitizers on by default, one program with subcommands) end in this module.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from pins import Pins, digest_of
from sources import install_packages
from stages import Cache, run

TARGETS = {"x86_64": "x86_64-linux-musl", "aarch64": "aarch64-linux-musl"}
# Two builds of the same inputs must not differ by their clock, hash seed, locale or paths.
STABLE_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C",
    "TZ": "UTC",
    "PYTHONHASHSEED": "0",
    "SOURCE_DATE_EPOCH": "1700000000",
}
# Unoptimised debug information would hold paths; zig turns on traps for undefined behaviour.
COMPILE_FLAGS = (
    "-O2",
    "-g0",
    "-fno-sanitize=all",
    "-ffunction-sections",
    "-fdata-sections",
    "-fno-semantic-interposition",
    "-Wno-date-time",
)


@dataclass(frozen=True, kw_only=True)
class Toolchain:
    """Compiler drivers for one target."""

    arch: str
    folder: str
    environment: dict[str, str]
    key: str

    @property
    def target(self) -> str:
        """The target triple, as configure's --host takes it."""
        return TARGETS[self.arch]

    def tool(self, name: str) -> str:
        """The path of "cc", "ar" or "ranlib"."""
        return os.path.join(self.folder, f"{self.target}-{name}")

    def compile(self, source: str, output: str, *flags: str, cwd: str) -> None:
        """Compile one C or assembler file. Raises BuildError."""
        command = [self.tool("cc"), *COMPILE_FLAGS, *flags, "-c", source, "-o", output]
        run(command, cwd=cwd, env=self.environment)

    def link(self, output: str, inputs: Sequence[str], *flags: str, cwd: str) -> None:
        """Link one static executable. Raises BuildError."""
        command = [self.tool("cc"), "-static", *flags, *inputs, "-o", output]
        run(command, cwd=cwd, env=self.environment)


def make_toolchain(cache: Cache, pins: Pins, arch: str) -> Toolchain:
    """The toolchain for `arch`, fetched on first use."""
    key = digest_of(pins.toolchain, TARGETS, COMPILE_FLAGS)

    def make(folder: str) -> None:
        install_packages(pins.toolchain, os.path.join(folder, "package"), "3.13")
        for name, target in ((n, t) for n in ("cc", "ar", "ranlib") for t in TARGETS.values()):
            driver = os.path.join(folder, f"{target}-{name}")
            options = f" -target {target}" if name == "cc" else ""
            with open(driver, "w", encoding="utf-8") as file:
                # Relative to the driver: the folder is renamed when it is complete.
                file.write(
                    f'#!/bin/sh\nexec "${{0%/*}}/package/ziglang/zig" {name}{options} "$@"\n'
                )
            os.chmod(driver, 0o755)  # noqa: S103 - a program

    folder = cache.stage("toolchain", key, make)
    zig_cache = cache.folder("zig-cache")
    environment = {
        **STABLE_ENVIRONMENT,
        "HOME": zig_cache,
        "ZIG_GLOBAL_CACHE_DIR": zig_cache,
        "ZIG_LOCAL_CACHE_DIR": zig_cache,
    }
    return Toolchain(arch=arch, folder=folder, environment=environment, key=key)
