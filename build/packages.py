"""What the machine must have, and its installation where that is possible.

    python3 build/packages.py GROUP

The Makefile runs it before each target, also before there is a virtual environment, so it stands on
the standard library alone.
"""

import os
import shutil
import subprocess
import sys
import time

from stages import BuildError, run, say

LOCK_WAIT = 600  # seconds that another apt-get may take

# Debian's and Ubuntu's names, by what needs them.
APT_PACKAGES = {
    "setup": {"python3-venv": "the virtual environment"},
    "compiler": {"gcc": "_guestsys for a plain Python", "libc6-dev": "the same"},
    "headers": {"python3-dev": "the same, for Debian's own Python"},
    "guest": {
        "binutils": "readelf, which CPython's configure asks for",
        "e2fsprogs": "mke2fs: the empty ext4 for blank disks",
        "gcc": "native Python of the guest's version, which freezes the modules",
        "libc6-dev": "the same",
        "libffi-dev": "its ctypes, which PyInstaller imports",
        "make": "CPython's makefiles",
        "xz-utils": "source tarballs",
        "zlib1g-dev": "native Python's zlib, which PyInstaller imports",
        "zstd": "the table of sizes, compressed kernel modules",
    },
    "image": {
        "busybox-static": "what the demo image holds",
        "skopeo": "making OCI layouts",
        "umoci": "making OCI layouts",
    },
    "run": {
        "erofs-utils": "mkfs.erofs: images become disks",
        "qemu-system-x86": "the virtual machine",
        "squashfs-tools": "the other disk format",
    },
    "bench": {
        "crun": "a peer: `crun exec`",
        "gcc": "the C floor",
        "libc6-dev": "the same, linked statically",
        "openssh-client": "a peer; its server is only unpacked, as installing it would start it",
        "qemu-guest-agent": "a peer; starts only where QEMU has given the machine its port",
        "runc": "a peer: `runc exec`",
        "strace": "when PID 1 made which system call",
        "util-linux": "unshare: peers in a mount namespace of their own",
    },
    "test": {
        "attr": "setfattr: layers with extended attributes",
        "busybox-static": "the smallest roots",
        "cpio": "reads what our cpio writer wrote",
        "crun": "what a process sees of itself, to compare with",
        "e2fsprogs": "mke2fs and e2fsck: disks that the guest writes to",
        "iproute2": "what the guest's netlink does, seen by another program",
        "mmdebstrap": "a Debian root to boot",
        "python3-seccomp": "another compiler of system call filters",
    },
}


def main(argv: list[str]) -> int:
    """Install one group. Exit status 1 and one message where that failed, 2 for a wrong call."""
    if len(argv) != 1 or argv[0] not in APT_PACKAGES:
        sys.stderr.write(f"usage: packages.py {'|'.join(APT_PACKAGES)}\n")
        return 2
    try:
        ensure_packages(argv[0])
    except BuildError as error:
        say(f"failed: {error}")
        return 1
    return 0


def ensure_packages(group: str) -> None:
    """Install what the group lacks with apt-get, as root on Debian or Ubuntu.

    Elsewhere it is left to the programs themselves to say what they miss. Raises BuildError where
    packages are missing and cannot be installed.
    """
    dpkg_query = shutil.which("dpkg-query")
    if dpkg_query is None:
        return
    wanted = set(APT_PACKAGES[group])
    missing = sorted(wanted - _installed(dpkg_query, wanted))
    if not missing:
        return
    # Somebody else may be installing something, another checkout's make for example.
    wait = f"DPkg::Lock::Timeout={LOCK_WAIT}"
    command = ["apt-get", "-o", wait, "install", "-y", "--no-install-recommends", *missing]
    if os.geteuid() != 0:
        raise BuildError(f"missing packages; run as root: {' '.join(command)}")
    say(f"installing {' '.join(missing)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        run(command, env=environment)
    except BuildError:  # the machine's package lists are old or were never fetched
        update_lists(environment)
        run(command, env=environment)


def update_lists(environment: dict[str, str]) -> None:
    """Fetch the package lists. apt-get itself does not wait for another that does the same."""
    deadline = time.monotonic() + LOCK_WAIT
    while True:
        try:
            run(["apt-get", "update"], env=environment)
        except BuildError as error:
            if "lock" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(1.0)
        else:
            return


def _installed(dpkg_query: str, names: set[str]) -> set[str]:
    """Those of `names` that are fully installed."""
    query = [dpkg_query, "-W", "-f=${binary:Package} ${Status}\\n", *sorted(names)]
    # Exit status 1 only says that a name is unknown, which is an answer here.
    done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
    lines = [line for line in done.stdout.splitlines() if line.endswith(" ok installed")]
    return {line.partition(" ")[0].partition(":")[0] for line in lines}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
