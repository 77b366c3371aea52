"""Builds the guest: `python build/make.py guest`. See docs/developing/building.md.

Run as a script, so that its neighbours are importable by name; `build` itself is no package.
"""

import argparse
import os
import subprocess
import sys

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(1, os.path.join(PROJECT, "src"))  # for the contract that the result follows

from bundle import size_table, write_bundle  # noqa: E402
from kernel import kernel_source  # noqa: E402
from link import make_program  # noqa: E402
from packages import ensure_packages  # noqa: E402
from pins import load_pins  # noqa: E402
from stages import BuildError, open_cache, say  # noqa: E402
from toolchain import TARGETS  # noqa: E402

from microguest.host_client.shortage import explain  # noqa: E402


def main(argv: list[str]) -> int:
    """Parse, build, report. Exit status 1 and one message where the build failed."""
    options = _parser().parse_args(argv)
    try:
        build_guest(
            options.arch,
            options.kernel,
            options.dist,
            refresh_kernel=options.refresh_kernel,
            sizes=options.print_sizes,
        )
    except OSError as error:
        say(f"failed: {explain(error, move='MICROGUEST_CACHE')}")
        return 1
    except (BuildError, subprocess.SubprocessError) as error:
        say(f"failed: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; what was finished is in the cache, and the next build goes on from there")
        return 130
    return 0


def build_guest(
    arch: str, kernel_spec: str, dist: str, *, refresh_kernel: bool, sizes: bool
) -> None:
    """Make `dist`/guest/`arch`/. Everything that is in the cache already is not built again."""
    ensure_packages("guest")
    pins = load_pins()
    source = kernel_source(kernel_spec, pins)
    with open_cache() as cache:
        program = make_program(cache, pins, arch)
        if refresh_kernel:
            source.forget(cache, arch)
        kernel = source.make(cache, arch)
        folder = os.path.join(dist, "guest", arch)
        manifest = write_bundle(folder, arch, program, kernel)
    say(f"{folder} is ready")
    if sizes:
        sys.stdout.write(size_table(folder, manifest) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="build/make.py", description=__doc__)
    commands = parser.add_subparsers(required=True)
    guest = commands.add_parser("guest", help="kernel, initramfs and ELF in dist/guest/ARCH")
    guest.add_argument("--arch", choices=sorted(TARGETS), default="x86_64")
    guest.add_argument("--kernel", metavar="SPEC", default="debian")
    guest.add_argument("--refresh-kernel", action="store_true", help="ask for a newer one")
    guest.add_argument("--dist", default=os.path.join(PROJECT, "dist"))
    guest.add_argument("--print-sizes", action="store_true", help="also what zstd makes of them")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
