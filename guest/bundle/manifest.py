"""What a bundle consists of: the contents of its `manifest.json`.

The build writes it beside the kernel and the initramfs; the host checks files against it before it
boots them. Pure data, no I/O.

In the initramfs, `/microguest/modules/` holds the kernel modules under the names of
`Manifest.modules`, and `/microguest/modules/order` lists these names in load order, one per line:
PID 1 reads that file and nothing else of this module.
"""

import json

from microguest.guest.errors import ManifestError
from microguest.guest.record import Record, RecordError

__all__ = [
    "BOOT_CONFIG_PATH",
    "INITRAMFS",
    "KERNEL",
    "MANIFEST",
    "MODULES_FOLDER",
    "MODULES_ORDER",
    "PROGRAM",
    "SCHEMA",
    "FileRecord",
    "KernelModule",
    "Manifest",
]

# Goes up by one when a reader of the old form would misread the new one.
SCHEMA = 1

# Names in a bundle's folder.
KERNEL = "vmlinuz"
INITRAMFS = "initramfs.cpio"
PROGRAM = "microguest"
MANIFEST = "manifest.json"

# Paths inside the initramfs, as PID 1 sees them.
MODULES_FOLDER = "/microguest/modules"
MODULES_ORDER = "/microguest/modules/order"
BOOT_CONFIG_PATH = "/microguest/boot.json"


class FileRecord(Record):
    """One file of the bundle: `size` in bytes and SHA-256 in hexadecimal."""

    size: int
    sha256: str

    def check(self) -> None:
        """Sizes are not negative, digests are 64 lower-case hexadecimal digits."""
        if self.size < 0:
            raise RecordError(f"size: {self.size} is negative")
        if len(self.sha256) != 64 or set(self.sha256) - set("0123456789abcdef"):
            raise RecordError(f"sha256: {self.sha256!r:.80} is not a SHA-256")


class KernelModule(Record):
    """A kernel module: `name` as modprobe has it, `file` in MODULES_FOLDER, `size` in bytes."""

    name: str
    file: str
    size: int


class Manifest(Record):
    """A bundle. `modules` are in load order, each after what it depends on.

    schema         SCHEMA
    arch           "x86_64" or "aarch64"
    kernel_release what `uname -r` says in the guest
    kernel_source  where the kernel came from, for people
    versions       component to version: microguest, cpython, trio, msgpack, pyroute2, musl, zig
    files          KERNEL, INITRAMFS and PROGRAM
    modules        empty where the kernel has everything built in
    """

    schema: int
    arch: str
    kernel_release: str
    kernel_source: str
    versions: dict[str, str]
    files: dict[str, FileRecord]
    modules: tuple[KernelModule, ...]

    def check(self) -> None:
        """This schema, all files present, no file name that leaves its folder."""
        if self.schema != SCHEMA:
            raise RecordError(f"schema: {self.schema} is not {SCHEMA}; rebuild with `make guest`")
        for name in (KERNEL, INITRAMFS, PROGRAM):
            if name not in self.files:
                raise RecordError(f"missing field files[{name}]")
        for where, name in [(f"files[{name:.100}]", name) for name in self.files] + [
            (f"modules[{index}].file", module.file) for index, module in enumerate(self.modules)
        ]:
            if name in {"", ".", ".."} or "/" in name or "\0" in name:
                raise RecordError(f"{where}: {name!r:.100} is not a plain file name")

    def to_json(self) -> str:
        """Text of a manifest.json: sorted and indented, so that two builds can be compared."""
        return json.dumps(self.to_map(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, *, ignore_unknown: bool = False) -> "Manifest":
        """Read a manifest.json. Raises ManifestError, which names the bad field."""
        try:
            return super().from_json(text, ignore_unknown=ignore_unknown)
        except RecordError as error:
            raise ManifestError(f"{MANIFEST}: {error}") from error
