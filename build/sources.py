"""Fetching what is compiled and frozen: CPython's source and the Python packages.

Everything is checked against `pins.toml` before it is unpacked, wherever it came from.
"""

import glob
import os
import shutil
import sys
import tempfile
import urllib.request
from collections.abc import Sequence

from archive import private_apt
from pins import PackagePin, Pins, digest_of
from stages import BuildError, Cache, file_sha256, run

CPYTHON_OVERRIDE = "MICROGUEST_CPYTHON_SOURCE"
DOWNLOAD_TIMEOUT = 60.0  # seconds without a byte


def cpython_source(cache: Cache, pins: Pins) -> str:
    """The folder of CPython's unpacked source tree."""

    def make(folder: str) -> None:
        with tempfile.TemporaryDirectory(prefix="microguest-source-") as work:
            tarball = _cpython_tarball(work, pins)
            _check(tarball, (pins.cpython.sha256,))
            unpack(tarball, folder)

    stage = cache.stage("cpython-source", digest_of(pins.cpython.sha256), make)
    return _only_folder(stage)


def _cpython_tarball(work: str, pins: Pins) -> str:
    override = os.environ.get(CPYTHON_OVERRIDE)
    if override and "://" not in override:
        return override
    if override:
        return _downloaded(override, os.path.join(work, "download"))
    apt = private_apt(work, kind="deb-src", suite=pins.cpython.suite, architecture="amd64")
    apt.get("source", "--download-only", "--tar-only", pins.cpython.source_package)
    return apt.only_file(".orig.tar.xz")


def _downloaded(url: str, target: str) -> str:
    try:
        with (
            urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT) as response,  # noqa: S310
            open(target, "wb") as file,
        ):
            shutil.copyfileobj(response, file)
    except OSError as error:
        raise BuildError(f"cannot fetch {url} ({CPYTHON_OVERRIDE}): {error}") from error
    return target


def install_packages(pins: Sequence[PackagePin], target: str, python_version: str) -> None:
    """Install hash-checked wheels for CPython `python_version` ("3.13") into `target`."""
    with tempfile.TemporaryDirectory(prefix="microguest-pip-") as work:
        _pip(
            "install",
            "--target",
            target,
            "--only-binary=:all:",
            f"--python-version={python_version}",
            "--implementation=cp",
            "--no-compile",
            "--requirement",
            _requirements(pins, work),
        )


def sdist_source(cache: Cache, pin: PackagePin, build_backend: Sequence[PackagePin]) -> str:
    """The unpacked source distribution of `pin`.

    pip asks a source distribution for its metadata even when it only downloads it, so the backend
    that answers is pinned too (`build_backend`) and no other is fetched.
    """

    def make(folder: str) -> None:
        with tempfile.TemporaryDirectory(prefix="microguest-sdist-") as work:
            backend = os.path.join(work, "backend")
            install_packages(build_backend, backend, "{}.{}".format(*sys.version_info))
            _pip(
                "download",
                "--dest",
                work,
                "--no-binary=:all:",
                "--no-build-isolation",
                "--requirement",
                _requirements([pin], work),
                python_path=backend,
            )
            tarballs = glob.glob(os.path.join(work, f"{pin.name}-*.tar.gz"))
            if len(tarballs) != 1:
                raise BuildError(f"pip downloaded no source distribution of {pin.name}")
            _check(tarballs[0], pin.sha256)
            unpack(tarballs[0], folder)

    return _only_folder(cache.stage(f"{pin.name}-source", digest_of(pin.sha256), make))


def unpack(tarball: str, folder: str) -> None:
    """Unpack a source tarball whose hash has been checked."""
    run(["tar", "--extract", "--no-same-owner", "--file", tarball, "--directory", folder])


def _requirements(pins: Sequence[PackagePin], work: str) -> str:
    path = os.path.join(work, "requirements.txt")
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(pin.requirement() + "\n" for pin in pins)
    return path


def _pip(command: str, *arguments: str, python_path: str | None = None) -> None:
    environment = {**os.environ, "TMPDIR": tempfile.gettempdir()}  # which the next build sweeps
    if python_path is not None:
        environment["PYTHONPATH"] = python_path
    prefix = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", command]
    run([*prefix, "--no-deps", "--require-hashes", *arguments], env=environment)


def _check(path: str, accepted: Sequence[str]) -> None:
    try:
        found = file_sha256(path)
    except OSError as error:
        raise BuildError(f"cannot read {path}: {error}") from error
    if found not in accepted:
        raise BuildError(
            f"{path} has SHA-256 {found}, build/pins.toml wants {' or '.join(accepted)}"
        )


def _only_folder(stage: str) -> str:
    entries = os.listdir(stage)
    if len(entries) != 1:
        raise BuildError(f"{stage} should hold one source tree, has {entries}; remove it")
    return os.path.join(stage, entries[0])
