"""The guest's kernel and the modules it needs, in load order.

A kernel comes from a `KernelSource`. The one here unpacks Debian's cloud kernel package, which
builds every virtio, vsock and file system driver as a module. It is never installed.
"""

import glob
import json
import lzma
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Protocol

from archive import private_apt
from pins import Pins, digest_of
from stages import BuildError, Cache, file_sha256, read_bytes, run

PACKAGE_OVERRIDE = "MICROGUEST_KERNEL_PACKAGE"
DEBIAN_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}

# What a guest may need, most urgent first: each is loaded after what it depends on, and those that
# a kernel has built in are skipped. Names as in the kernel's file names.
WANTED_MODULES = (
    "virtio_pci",  # the bus of q35
    "virtio_mmio",  # the bus of microvm and Firecracker
    "virtio_rng",  # before anything waits for entropy
    "vmw_vsock_virtio_transport",  # the way to the host
    "virtio_blk",
    # Check sums of erofs and ext4: asked for by name, so that no module says that it depends on it.
    "crc32c_generic",
    "erofs",
    "squashfs",
    "ext4",
    "overlay",
    "virtiofs",
    "9p",
    "9pnet_virtio",
    "virtio_net",
)
# Debian's cloud kernel has no 9p, and newer kernels than 6.1 have crc32c in their own library; a
# source that lacks any other of these cannot boot an image.
OPTIONAL_MODULES = frozenset({"9p", "9pnet_virtio", "crc32c_generic"})


@dataclass(frozen=True, kw_only=True)
class ModuleFile:
    """One module: its name, and its file below `modules/`, named NNN-name.ko by load order."""

    name: str
    file: str


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel ready to be bundled: `folder` holds the image and `modules/`."""

    folder: str
    release: str
    source: str
    modules: tuple[ModuleFile, ...]

    @property
    def image(self) -> str:
        """The bootable image."""
        return os.path.join(self.folder, "vmlinuz")

    def module_path(self, module: ModuleFile) -> str:
        """Where the module's file is now."""
        return os.path.join(self.folder, "modules", module.file)


class KernelSource(Protocol):
    """Where a kernel comes from. `--kernel` chooses one by its spec."""

    def forget(self, cache: Cache, arch: str) -> None:
        """Drop what was fetched, so that `make` looks for something newer."""

    def make(self, cache: Cache, arch: str) -> Kernel:
        """Build or fetch the kernel, or find it in the cache. Raises BuildError."""


def kernel_source(spec: str, pins: Pins) -> KernelSource:
    """The source for `--kernel SPEC`: "debian", or the path of a Debian kernel package."""
    if spec == "debian":
        override = os.environ.get(PACKAGE_OVERRIDE)
        return DebianKernel(pins=pins, package_file=override or None)
    if spec.endswith(".deb"):
        return DebianKernel(pins=pins, package_file=os.path.abspath(spec))
    raise BuildError(f"unknown kernel {spec!r}: give debian or the path of a linux-image .deb")


@dataclass(frozen=True, kw_only=True)
class DebianKernel:
    """Debian's cloud kernel: the newest of the pinned suite, or a package file at hand.

    A fetched package stays in the cache until it is removed from there or the pin changes, so that
    builds repeat; `make.py guest --refresh-kernel` forgets it first.
    """

    pins: Pins
    package_file: str | None

    def make(self, cache: Cache, arch: str) -> Kernel:
        """See KernelSource."""
        package = self.package_file or self._fetched(cache, arch)
        try:
            content = file_sha256(package)
        except OSError as error:
            raise BuildError(f"cannot read the kernel package: {error}") from error
        key = digest_of(content, WANTED_MODULES, read_bytes(os.path.abspath(__file__)))
        folder = cache.stage(f"kernel-{arch}", key, lambda to: _unpack_kernel(package, content, to))
        return _load_kernel(folder)

    def forget(self, cache: Cache, arch: str) -> None:
        """See KernelSource."""
        cache.forget(f"kernel-package-{arch}")

    def _fetched(self, cache: Cache, arch: str) -> str:
        def make(folder: str) -> None:
            with tempfile.TemporaryDirectory(prefix="microguest-kernel-") as work:
                architecture = DEBIAN_ARCHITECTURES[arch]
                suite = self.pins.kernel.suite
                apt = private_apt(
                    work, kind="deb", suite=suite, architecture=architecture, security=True
                )
                name = self.pins.kernel.package.replace("amd64", architecture)
                apt.get("download", apt.real_package(name))
                shutil.move(apt.only_file(".deb"), folder)

        folder = cache.stage(f"kernel-package-{arch}", digest_of(self.pins.kernel, arch), make)
        return glob.glob(os.path.join(folder, "*.deb"))[0]


def load_order(wanted: tuple[str, ...], depends: Mapping[str, tuple[str, ...]]) -> list[str]:
    """`wanted` and all they depend on, dependencies first. `depends` has every module there is;
    names absent from it are built into the kernel or missing, and are left out."""
    ordered: list[str] = []

    def visit(name: str) -> None:
        if name in depends and name not in ordered:
            for other in depends[name]:
                visit(other)
            ordered.append(name)

    for name in wanted:
        visit(name)
    return ordered


def _unpack_kernel(package: str, content: str, folder: str) -> None:
    """`content`: the package's SHA-256, under which the result is kept."""
    with tempfile.TemporaryDirectory(prefix="microguest-kernel-") as work:
        run(["dpkg-deb", "-x", package, work])
        if file_sha256(package) != content:
            raise BuildError(f"{package} was written to while it was read: try once more")
        images = glob.glob(os.path.join(work, "boot", "vmlinu[xz]-*"))
        if len(images) != 1:
            raise BuildError(f"{package} holds no kernel image; is it a linux-image package?")
        release = os.path.basename(images[0]).partition("-")[2]
        shutil.copy(images[0], os.path.join(folder, "vmlinuz"))
        # Merged-/usr packages have their modules below usr/.
        trees = glob.glob(os.path.join(work, f"**/lib/modules/{release}"), recursive=True)
        if not trees or not os.path.exists(os.path.join(trees[0], "modules.builtin")):
            raise BuildError(
                f"{package} has no lib/modules/{release}/modules.builtin, which says what is built "
                "in; is it a whole linux-image package?"
            )
        modules = _copy_modules(trees[0], os.path.join(folder, "modules"))
    description = {
        "release": release,
        "source": os.path.basename(package),
        "modules": [asdict(module) for module in modules],
    }
    with open(os.path.join(folder, "kernel.json"), "w", encoding="utf-8") as file:
        json.dump(description, file)


def _copy_modules(tree: str, folder: str) -> list[ModuleFile]:
    """Copy what is wanted, uncompressed, numbered in load order."""
    files = {_module_name(path): path for path in glob.glob(f"{tree}/**/*.ko*", recursive=True)}
    builtin = {
        _module_name(line) for line in read_bytes(f"{tree}/modules.builtin").decode().splitlines()
    }
    lacking = set(WANTED_MODULES) - set(files) - builtin - OPTIONAL_MODULES
    if lacking:
        raise BuildError(f"the kernel has no {', '.join(sorted(lacking))}, built in or as a module")
    # Only what is reachable is read: a package has thousands of modules.
    contents: dict[str, bytes] = {}
    depends: dict[str, tuple[str, ...]] = {}
    pending = [name for name in WANTED_MODULES if name in files]
    while pending:
        name = pending.pop()
        if name not in depends:
            contents[name] = _module_content(files[name])
            depends[name] = _depends(contents[name])
            pending += depends[name]
    os.mkdir(folder)
    modules = []
    for number, name in enumerate(load_order(WANTED_MODULES, depends)):
        module = ModuleFile(name=name, file=f"{number:03}-{name}.ko")
        with open(os.path.join(folder, module.file), "wb") as file:
            file.write(contents[name])
        modules.append(module)
    return modules


def _module_name(path: str) -> str:
    """The kernel's name of a module file: file names use - and _ at will, names only _."""
    return os.path.basename(path).partition(".ko")[0].replace("-", "_")


def _module_content(path: str) -> bytes:
    content = read_bytes(path)
    if path.endswith(".xz"):
        return lzma.decompress(content)
    if path.endswith(".zst"):
        with tempfile.NamedTemporaryFile(suffix=".ko") as plain:
            run(["zstd", "--decompress", "--force", "--quiet", path, "-o", plain.name])
            return read_bytes(plain.name)
    return content


def _depends(content: bytes) -> tuple[str, ...]:
    """What modpost wrote into the module's .modinfo: the modules whose symbols it uses. The package
    has no modules.dep, which is made at installation from this same field."""
    found = re.search(rb"\0depends=([^\0]*)\0", content)
    if found is None:
        raise BuildError("a kernel module without .modinfo; is the package damaged?")
    names = found.group(1).decode().split(",")
    return tuple(name.replace("-", "_") for name in names if name)


def _load_kernel(folder: str) -> Kernel:
    description = json.loads(read_bytes(os.path.join(folder, "kernel.json")))
    return Kernel(
        folder=folder,
        release=description["release"],
        source=description["source"],
        modules=tuple(ModuleFile(**module) for module in description["modules"]),
    )
