"""What `pins.toml` says, typed. Reads that one file and nothing else."""

import hashlib
import os
import tomllib
from dataclasses import dataclass

PINS_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "pins.toml")


@dataclass(frozen=True, kw_only=True)
class SourcePin:
    """A tarball that Debian's archive carries under a stable name, pinned by its content."""

    version: str
    source_package: str
    suite: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class KernelPin:
    """A binary package: its newest build in `suite`, vouched for by the archive's signature."""

    package: str
    suite: str


@dataclass(frozen=True, kw_only=True)
class PackagePin:
    """A Python package; `sha256` lists the accepted files, one per build machine's architecture."""

    name: str
    version: str
    sha256: tuple[str, ...]

    def requirement(self) -> str:
        """The line for `pip --require-hashes`."""
        hashes = " ".join(f"--hash=sha256:{digest}" for digest in self.sha256)
        return f"{self.name}=={self.version} {hashes}"


@dataclass(frozen=True, kw_only=True)
class Pins:
    """All pins of the file, in its order."""

    cpython: SourcePin
    kernel: KernelPin
    zig_version: str
    musl_version: str
    toolchain: tuple[PackagePin, ...]
    analysis: tuple[PackagePin, ...]
    guest: tuple[PackagePin, ...]
    sdist: tuple[PackagePin, ...]

    def version_of(self, name: str) -> str:
        """The pinned version of a Python package inside the ELF. Raises KeyError."""
        return {pin.name: pin.version for pin in self.guest + self.sdist}[name]


def load_pins(path: str = PINS_FILE) -> Pins:
    """Read the pins. Raises OSError, tomllib.TOMLDecodeError, KeyError or TypeError: a broken file
    is a mistake of whoever edited it, and the traceback names the place."""
    with open(path, "rb") as file:
        raw = tomllib.load(file)

    def packages(group: str) -> tuple[PackagePin, ...]:
        return tuple(
            PackagePin(name=name, version=pin["version"], sha256=tuple(pin["sha256"]))
            for name, pin in raw["packages"][group].items()
        )

    return Pins(
        cpython=SourcePin(**raw["cpython"]),
        kernel=KernelPin(**raw["kernel"]),
        zig_version=raw["zig"]["version"],
        musl_version=raw["zig"]["musl"],
        toolchain=packages("toolchain"),
        analysis=packages("analysis"),
        guest=packages("guest"),
        sdist=packages("sdist"),
    )


def digest_of(*parts: object) -> str:
    """One SHA-256 over the repr of `parts` (pins and strings have a stable one)."""
    return hashlib.sha256("\0".join(repr(part) for part in parts).encode()).hexdigest()
