"""What the build machine itself must have, and its installation where that is possible."""

import os
import shutil
import subprocess

from stages import BuildError, run, say

# Debian's and Ubuntu's names; each is needed to build or to unpack, none at run time of the guest.
APT_PACKAGES = {
    "gcc": "native Python of the guest's version, which freezes the modules",
    "libc6-dev": "the same",
    "libffi-dev": "its ctypes, which PyInstaller imports",
    "make": "CPython's makefiles",
    "binutils": "readelf, which CPython's configure asks for",
    "xz-utils": "source tarballs and compressed kernel modules",
    "zlib1g-dev": "its zlib, which PyInstaller imports",
    "zstd": "sizes in the final table, compressed kernel modules",
}


def ensure_packages() -> None:
    """Install what is missing with apt-get, as root on Debian or Ubuntu; elsewhere leave it to the
    commands themselves to say what they lack. Raises BuildError where apt-get fails."""
    dpkg_query = shutil.which("dpkg-query")
    if dpkg_query is None:
        return
    missing = sorted(set(APT_PACKAGES) - _installed(dpkg_query))
    if not missing:
        return
    command = ["apt-get", "install", "-y", "--no-install-recommends", *missing]
    if os.geteuid() != 0:
        raise BuildError(f"missing packages; run as root: {' '.join(command)}")
    say(f"installing {' '.join(missing)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        run(command, env=environment)
    except BuildError:  # the machine's package lists are old or were never fetched
        run(["apt-get", "update"], env=environment)
        run(command, env=environment)


def _installed(dpkg_query: str) -> set[str]:
    """Those of APT_PACKAGES that are fully installed."""
    query = [dpkg_query, "-W", "-f=${binary:Package} ${Status}\\n", *APT_PACKAGES]
    # Exit status 1 only says that a name is unknown, which is an answer here.
    done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
    lines = [line for line in done.stdout.splitlines() if line.endswith(" ok installed")]
    return {line.partition(" ")[0].partition(":")[0] for line in lines}
