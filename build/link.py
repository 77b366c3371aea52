"""One static ELF from the interpreter, the frozen modules and the guest's C file."""

import json
import os
import re
import tempfile
from dataclasses import dataclass

from freeze import (
    APPLICATION,
    NATIVE,
    PACKAGE_INIT,
    PROJECT,
    Blob,
    Source,
    application_sources,
    freeze,
    freeze_runtime,
    imported_modules,
    imports_of,
)
from interpreter import Interpreter, make_interpreter
from pins import Pins, digest_of
from sources import cpython_source, sdist_source
from stages import BuildError, Cache, read_bytes, run, tree_sha256
from toolchain import Toolchain, make_toolchain

GUESTSYS = os.path.join(NATIVE, "guestsys.c")
# What of native/ ends up in the ELF or shapes it, beyond what earlier stages have consumed.
LINKED_FILES = ("_guest_check.py", "_guest_compile.py", "entry.py", "freezer.py", "guestsys.c")
# Asserts stay in the frozen code (native/freezer.py), so the interpreter says so too.
OPTIMIZATION = 0
# musl gives threads a stack of what PT_GNU_STACK asks for, else 128 KiB, where CPython's recursion
# limit of 10,000 C frames overflows. 8 MiB is what glibc gives; it is address space, not memory.
STACK_SIZE = 0x800000
LINK_FLAGS = (
    "-O2",
    "-s",
    "-Wl,--gc-sections",
    "-Wl,--build-id=none",
    f"-Wl,-z,stack-size={STACK_SIZE:#x}",
)


@dataclass(frozen=True, kw_only=True)
class Program:
    """The linked ELF and the versions of what is inside."""

    path: str
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """All that is linked: `key` is a digest of it."""

    toolchain: Toolchain
    interpreter: Interpreter
    packer: str
    runtime: Blob
    application: list[Source]
    checked_modules: tuple[str, ...]
    versions: dict[str, str]
    key: str


def make_program(cache: Cache, pins: Pins, arch: str) -> Program:
    """Build what is not in the cache, and check the result by running it."""
    parts = gather_parts(cache, pins, arch)

    def make(folder: str) -> None:
        program = os.path.join(folder, "microguest")
        link_program(parts, program)
        self_check(program)

    folder = cache.stage(f"elf-{arch}", parts.key, make)
    cache.keep_newest(f"elf-{arch}", 4)
    return Program(path=os.path.join(folder, "microguest"), versions=parts.versions)


def gather_parts(cache: Cache, pins: Pins, arch: str) -> Parts:
    """Compiler, interpreter and modules, each from the cache where its inputs have not changed."""
    toolchain = make_toolchain(cache, pins, arch)
    interpreter = make_interpreter(cache, pins, toolchain, cpython_source(cache, pins))
    backend = [pin for pin in pins.analysis if pin.name == "setuptools"]
    msgpack = sdist_source(cache, pins.sdist[0], backend)
    application = application_sources()
    roots = imports_of(application)
    runtime_folder, runtime = freeze_runtime(cache, pins, interpreter, msgpack, roots)
    versions = program_versions(pins)
    key = digest_of(
        [runtime_folder, interpreter.key, versions, read_bytes(os.path.abspath(__file__))],
        [tree_sha256(os.path.join(PROJECT, name), (".py",)) for name in APPLICATION],
        read_bytes(PACKAGE_INIT),
        [read_bytes(os.path.join(NATIVE, name)) for name in LINKED_FILES],
    )
    return Parts(
        toolchain=toolchain,
        interpreter=interpreter,
        packer=_packer_object(cache, toolchain, interpreter, msgpack),
        runtime=runtime,
        application=application,
        checked_modules=(*(item.name for item in application), *imported_modules(roots)),
        versions=versions,
        key=key,
    )


def link_program(parts: Parts, output: str) -> None:
    """Freeze the application, compile the C, link everything into the file `output`."""
    linker = Linker(toolchain=parts.toolchain, interpreter=parts.interpreter)
    with tempfile.TemporaryDirectory(prefix="microguest-link-") as work:
        inside_only = _inside_only(work, parts.versions, parts.checked_modules)
        code = freeze(parts.interpreter, [*parts.application, *inside_only], work, "application")
        linker.link(work, [parts.runtime, code], parts.packer, output)


@dataclass(frozen=True, kw_only=True)
class Linker:
    """Compiles and links against one interpreter."""

    toolchain: Toolchain
    interpreter: Interpreter

    def compile(self, source: str, output: str, *flags: str, cwd: str) -> None:
        """Compile with Python's headers. `__FILE__` keeps only the source's name."""
        prefix = f"-ffile-prefix-map={os.path.dirname(source)}=."
        include = f"-I{self.interpreter.include}"
        self.toolchain.compile(source, output, include, prefix, *flags, cwd=cwd)

    def link(self, work: str, blobs: list[Blob], packer: str, output: str) -> None:
        """Write the ELF to `output`; `work` is a scratch folder."""
        objects = [packer]
        for name, text in (("table.c", frozen_table(blobs)), ("blobs.S", blob_symbols(blobs))):
            source = os.path.join(work, name)
            with open(source, "w", encoding="utf-8") as file:
                file.write(text)
            objects.append(source + ".o")
            self.compile(source, objects[-1], cwd=work)
        objects.append(os.path.join(work, "guestsys.o"))
        define = f"-DGUEST_OPTIMIZATION={OPTIMIZATION}"
        self.compile(GUESTSYS, objects[-1], define, "-Wall", "-Wno-unused-parameter", cwd=work)
        inputs = [*objects, *self.interpreter.archives, "-lm"]
        self.toolchain.link(output, inputs, *LINK_FLAGS, cwd=work)


def frozen_table(blobs: list[Blob]) -> str:
    """C source of the table that CPython's importer searches (struct _frozen in Python.h)."""
    lines = ["#include <Python.h>"]
    lines += [f"extern const unsigned char guest_blob_{n}[];" for n in range(len(blobs))]
    lines.append("const struct _frozen guest_frozen[] = {")
    for number, blob in enumerate(blobs):
        lines += [
            f'    {{"{item.name}", guest_blob_{number} + {item.offset}, {item.size}, '
            f"{int(item.is_package)}}},"
            for item in blob.modules
        ]
    lines += ["    {0, 0, 0, 0},", "};", ""]
    return "\n".join(lines)


def blob_symbols(blobs: list[Blob]) -> str:
    """Assembler source that includes the blobs as read-only data."""
    lines = [".section .rodata"]
    for number, blob in enumerate(blobs):
        lines += [f".global guest_blob_{number}", ".balign 16", f"guest_blob_{number}:"]
        lines.append(f'.incbin "{blob.path}"')
    lines += ['.section .note.GNU-stack,"",%progbits', ""]
    return "\n".join(lines)


def program_versions(pins: Pins) -> dict[str, str]:
    """What `microguest --version` says, and the manifest."""
    text = read_bytes(os.path.join(PROJECT, "guest", "__init__.py")).decode()
    own = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if own is None:
        raise BuildError("guest/__init__.py has no __version__")
    return {
        "microguest": own.group(1),
        "cpython": pins.cpython.version,
        "trio": pins.version_of("trio"),
        "msgpack": pins.version_of("msgpack"),
        "pyroute2": pins.version_of("pyroute2"),
        "musl": pins.musl_version,
        "zig": pins.zig_version,
    }


def _inside_only(work: str, versions: dict[str, str], checked: tuple[str, ...]) -> list[Source]:
    """The modules that exist only in the binary, `__main__` among them."""
    generated = os.path.join(work, "_guest_build.py")
    with open(generated, "w", encoding="utf-8") as file:
        file.write(
            f"VERSIONS = {json.dumps(versions)}\nMODULES = {tuple(sorted(set(checked)))!r}\n"
        )
    files = {
        "__main__": os.path.join(NATIVE, "entry.py"),
        "_guest_build": generated,
        "_guest_check": os.path.join(NATIVE, "_guest_check.py"),
        "_guest_compile": os.path.join(NATIVE, "_guest_compile.py"),
    }
    return [Source(name=name, path=path, is_package=False) for name, path in files.items()]


def _packer_object(
    cache: Cache, toolchain: Toolchain, interpreter: Interpreter, msgpack: str
) -> str:
    """msgpack's C packer, compiled."""
    key = digest_of(interpreter.key, msgpack)

    def make(folder: str) -> None:
        source = os.path.join(msgpack, "msgpack", "_cmsgpack.c")
        output = os.path.join(folder, "_cmsgpack.o")
        linker = Linker(toolchain=toolchain, interpreter=interpreter)
        # Generated by Cython: its warnings are not ours to fix.
        linker.compile(source, output, "-w", f"-I{msgpack}", cwd=folder)

    return os.path.join(cache.stage("msgpack-object", key, make), "_cmsgpack.o")


def self_check(program: str) -> None:
    """Run the ELF's own check with no environment. Raises BuildError where it fails."""
    run([program, "--self-check"], cwd="/", env={})
