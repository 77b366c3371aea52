"""How a root becomes a disk or a directory: the external commands and their options.

Debian 12 has erofs-utils 1.5, which cannot read a tar, so a disk is erofs where mkfs.erofs can
(1.7) and squashfs where it cannot. Why these compressors: docs/design/images.md.
"""

import functools
import os
import subprocess
from collections.abc import Callable, Sequence
from typing import IO, Literal

from microguest.host_client.errors import ImageError
from microguest.host_client.images import export, limits, squashfs
from microguest.host_client.images.export import Merged
from microguest.host_client.images.tools import find_command, require_command, run_command
from microguest.host_client.probe import probe

VERSION = 2
"""Part of every cache key: raise it when a change here or in `tree` changes what is made."""

_PROBE_SECONDS = 10

Fstype = Literal["erofs", "squashfs"]


def disk_format() -> Fstype:
    """The file system that is made on this host unless another is asked for."""
    return "erofs" if "--tar" in _erofs_options() else "squashfs"


def make_disk(merged: Merged, path: str, fstype: Fstype) -> None:
    """Write the root as a read-only file system to the new file `path`."""
    if fstype == "erofs":
        _make_erofs(merged, path)
    else:
        _make_squashfs(merged, path)
    _sync(path)


def _make_erofs(merged: Merged, path: str) -> None:
    if "--tar" not in _erofs_options():
        raise ImageError("an erofs disk of an image needs erofs-utils 1.7 or newer on this host")

    def feed(pipe: IO[bytes]) -> None:
        export.write_tar(merged, export.EROFS, pipe)

    argv = [require_command("mkfs.erofs"), "--quiet"]
    argv += ["-zlz4", "-C16384"] if "lz4" in _erofs_options() else []
    _run([*argv, "--tar=f", path], feed, os.path.dirname(path), merged)


def _make_squashfs(merged: Merged, path: str) -> None:
    def feed(pipe: IO[bytes]) -> None:
        export.write_tar(merged, export.SQUASHFS, pipe)

    argv = [require_command("sqfstar"), "-quiet", "-no-progress", "-exit-on-error"]
    argv += [*("-comp", "lz4", "-noI"), *("-mem", "256M"), *("-mkfs-time", "0")]
    argv += ["-no-duplicates", path]  # each file is compared with all others of its size
    said = _run(argv, feed, os.path.dirname(path), merged)
    if said:  # it can lose a file, say so, and end with status 0
        raise ImageError(f"sqfstar did not take the whole image: {said.strip()}")
    root = merged.tree.root
    mtime = export.squashfs_seconds(root.mtime_ns)
    squashfs.set_root(path, mode=root.mode, uid=root.uid, gid=root.gid, mtime=mtime)


def make_directory(merged: Merged, path: str) -> None:
    """Unpack the root into the new directory `path`.

    As root: with owners, device nodes and all extended attributes. As a user: everything is the
    user's, device nodes and attributes outside "user." are left out.
    """
    os.mkdir(path, 0o700)
    privileged = os.geteuid() == 0
    argv = [require_command("tar"), "--extract", "--file=-", "--directory", path]
    argv += ["--preserve-permissions", "--absolute-names", "--delay-directory-restore"]
    argv += ["--numeric-owner", "--xattrs", "--xattrs-include=*", "--no-acls", "--no-selinux"]
    argv += ["--same-owner"] if privileged else ["--no-same-owner"]
    abilities = export.DIRECTORY if privileged else export.DIRECTORY_OF_A_USER

    def feed(pipe: IO[bytes]) -> None:
        export.write_tar(merged, abilities, pipe)

    _run(argv, feed, path, merged)
    # Else a power cut may leave the cache with an entry of empty files, which is never made again.
    run_command([require_command("sync"), "-f", path], told=merged.told)


def make_disk_of_directory(source: str, stem: str, told: Callable[[], None]) -> tuple[str, Fstype]:
    """Make STEM.erofs, or STEM.squashfs where erofs-utils is missing; return (path, fstype).

    Uncompressed: it is made for one machine and read once or twice. Replaces an earlier one.
    """
    fstype: Fstype = "erofs" if find_command("mkfs.erofs") else "squashfs"
    path = f"{stem}.{fstype}"
    temporary = f"{path}.tmp"
    if fstype == "erofs":
        argv = [require_command("mkfs.erofs"), "--quiet", "--preserve-mtime", temporary, source]
    else:
        argv = [require_command("mksquashfs"), source, temporary, "-quiet", "-no-progress"]
        argv += ["-noappend", "-noI", "-noD", "-noF", "-noX"]
    try:
        run_command(argv, told=told, writes_to=os.path.dirname(path))
        os.rename(temporary, path)
    finally:
        if os.path.lexists(temporary):
            os.unlink(temporary)
    return path, fstype


def _run(argv: Sequence[str], feed: Callable[[IO[bytes]], None], to: str, merged: Merged) -> str:
    """The command within what is left of the image's time."""
    seconds = min(limits.COMMAND_SECONDS, merged.budget.seconds_left())
    return run_command(argv, feed=feed, told=merged.told, writes_to=to, seconds=seconds)


@functools.cache
def _erofs_options() -> str:
    """What mkfs.erofs says of its options; "" when it is not installed."""
    command = find_command("mkfs.erofs")
    if command is None:
        return ""
    try:
        result = probe([command, "--help"], seconds=_PROBE_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (result.stdout + result.stderr).decode("utf-8", "replace")


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
