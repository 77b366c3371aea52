"""The finished bundle in `dist/guest/ARCH/`: kernel, initramfs, ELF and manifest."""

import hashlib
import os
import shutil
import subprocess

from initramfs import initramfs
from kernel import Kernel
from link import Program
from stages import read_bytes, remove_partial, write_atomically

from microguest.guest.bundle.manifest import (
    INITRAMFS,
    KERNEL,
    MANIFEST,
    PROGRAM,
    SCHEMA,
    FileRecord,
    KernelModule,
    Manifest,
)


def write_bundle(folder: str, arch: str, program: Program, kernel: Kernel) -> Manifest:
    """Write the four files to `folder`, the manifest last: who reads it finds the rest in place.

    Files that are already right are left untouched.
    """
    os.makedirs(folder, exist_ok=True)
    remove_partial(folder)
    contents = {
        KERNEL: read_bytes(kernel.image),
        PROGRAM: read_bytes(program.path),
        INITRAMFS: initramfs(program.path, kernel),
    }
    manifest = Manifest(
        schema=SCHEMA,
        arch=arch,
        kernel_release=kernel.release,
        kernel_source=kernel.source,
        versions=program.versions,
        files={name: _record(content) for name, content in contents.items()},
        modules=tuple(
            KernelModule(
                name=module.name,
                file=module.file,
                size=os.path.getsize(kernel.module_path(module)),
            )
            for module in kernel.modules
        ),
    )
    for name, content in contents.items():
        _update(os.path.join(folder, name), content, 0o755 if name == PROGRAM else 0o644)
    _update(os.path.join(folder, MANIFEST), manifest.to_json().encode(), 0o644)
    return manifest


def size_table(folder: str, manifest: Manifest) -> str:
    """The files with their sizes, and what `zstd -19` makes of them where zstd is on PATH."""
    lines = [f"{'file':<16}{'bytes':>12}{'zstd -19':>12}"]
    for name in (PROGRAM, INITRAMFS, KERNEL):
        packed = _zstd_size(os.path.join(folder, name))
        shown = "-" if packed is None else str(packed)
        lines.append(f"{name:<16}{manifest.files[name].size:>12}{shown:>12}")
    lines.append(f"modules: {len(manifest.modules)}, kernel: {manifest.kernel_release}")
    return "\n".join(lines)


def _record(content: bytes) -> FileRecord:
    return FileRecord(size=len(content), sha256=hashlib.sha256(content).hexdigest())


def _update(path: str, content: bytes, mode: int) -> None:
    if not (os.path.isfile(path) and read_bytes(path) == content):
        write_atomically(path, content, mode)


def _zstd_size(path: str) -> int | None:
    zstd = shutil.which("zstd")
    if zstd is None:
        return None
    done = subprocess.run(
        [zstd, "-19", "--stdout", "--quiet", path], capture_output=True, check=True, timeout=300
    )
    return len(done.stdout)
