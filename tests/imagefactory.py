"""Images for tests: OCI layouts written by hand, a busybox image, a Debian root, and their content.

Layers are written with the standard library's tarfile, so that the product's own tar code is not
tested against itself.
"""

import dataclasses
import glob
import gzip
import hashlib
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parent.parent
BUSYBOX_TAG = "busybox"
DEBIAN_TAG = "debian"

_SUFFIX = {"": "", "gzip": "+gzip", "zstd": "+zstd"}
_LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"


def require(*commands: str, root: bool = False) -> None:
    """Skip the test, saying what is missing, unless the commands (and root) are there."""
    if root and os.geteuid() != 0:
        pytest.skip("needs root")
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    missing = [command for command in commands if shutil.which(command, path=path) is None]
    if missing:
        pytest.skip(f"needs the command {missing[0]}")


# -- layers ----------------------------------------------------------------------------------


def member(
    name: str,
    data: bytes | None = None,
    *,
    kind: bytes = tarfile.REGTYPE,
    target: str = "",
    mode: int | None = None,
    owner: tuple[int, int] = (0, 0),
    mtime: float = 1_600_000_000,
    device: tuple[int, int] = (0, 0),
    xattrs: dict[str, bytes] | None = None,
) -> tuple[tarfile.TarInfo, bytes]:
    """One tar member, for `layer`."""
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = target
    info.mode = (0o755 if kind == tarfile.DIRTYPE else 0o644) if mode is None else mode
    info.uid, info.gid = owner
    info.mtime = mtime
    info.devmajor, info.devminor = device
    info.size = len(data or b"")
    info.pax_headers = {
        f"SCHILY.xattr.{key}": value.decode("utf-8", "surrogateescape")
        for key, value in (xattrs or {}).items()
    }
    return info, data or b""


def directory(name: str, **how: Any) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, kind=tarfile.DIRTYPE, **how)


def symlink(name: str, target: str, **how: Any) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, kind=tarfile.SYMTYPE, target=target, **how)


def hard_link(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, kind=tarfile.LNKTYPE, target=target)


def layer(
    members: Sequence[tuple[tarfile.TarInfo, bytes]], tar_format: int = tarfile.PAX_FORMAT
) -> bytes:
    """A tar archive of the members, in their order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format, encoding="utf-8") as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


# -- layouts ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Layout:
    """An OCI layout under construction. `blob` writes one and gives its descriptor."""

    path: Path

    def __post_init__(self) -> None:
        (self.path / "blobs" / "sha256").mkdir(parents=True)
        (self.path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def blob(self, media_type: str, data: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (self.path / "blobs" / "sha256" / digest).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    def json(self, media_type: str, value: object) -> dict[str, Any]:
        return self.blob(media_type, json.dumps(value).encode())

    def index(self, *descriptors: dict[str, Any]) -> None:
        (self.path / "index.json").write_text(
            json.dumps({"schemaVersion": 2, "manifests": list(descriptors)})
        )

    def image(
        self,
        layers: Sequence[bytes],
        *,
        compression: str = "gzip",
        config: dict[str, Any] | None = None,
        architecture: str = "amd64",
        change: Callable[[dict[str, Any], dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """Write an image; `change(manifest, config)` may break it before it is written."""
        media_type = _LAYER_TYPE + _SUFFIX[compression]
        described = {
            "architecture": architecture,
            "os": "linux",
            "config": config or {"Cmd": ["sh"]},
            "rootfs": {
                "type": "layers",
                "diff_ids": [f"sha256:{hashlib.sha256(data).hexdigest()}" for data in layers],
            },
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "layers": [self.blob(media_type, compress(data, compression)) for data in layers],
        }
        if change:
            change(manifest, described)
        manifest["config"] = manifest.get("config") or self.json(CONFIG_TYPE, described)
        return self.json(MANIFEST_TYPE, manifest)


def tagged(descriptor: dict[str, Any], tag: str) -> dict[str, Any]:
    """The descriptor with a tag, as it stands in index.json."""
    return {**descriptor, "annotations": {"org.opencontainers.image.ref.name": tag}}


def for_platform(descriptor: dict[str, Any], text: str) -> dict[str, Any]:
    system, architecture, *variant = text.split("/")
    platform = {"os": system, "architecture": architecture}
    if variant:
        platform["variant"] = variant[0]
    return {**descriptor, "platform": platform}


def make_layout(path: Path, layers: Sequence[bytes], **how: Any) -> str:
    """A layout with one image tagged `t`; returns its `oci:` reference."""
    layout = Layout(path)
    layout.index(tagged(layout.image(layers, **how), "t"))
    return f"oci:{path}:t"


def compress(data: bytes, compression: str) -> bytes:
    if compression == "gzip":
        return gzip.compress(data, 1, mtime=0)
    if compression == "zstd":
        require("zstd")
        return subprocess.run(
            ["zstd", "-q", "-c"], input=data, capture_output=True, check=True
        ).stdout
    return data


# -- whole systems ---------------------------------------------------------------------------


def busybox_layout(path: Path) -> str:
    """The demo image at `path`, made if it is not there; returns its `oci:` reference."""
    require("umoci", "apt-get", "dpkg-deb", root=True)
    script = PROJECT / "build" / "demo_image.py"
    subprocess.run(
        [sys.executable, str(script), str(path)], check=True, timeout=120, capture_output=True
    )
    return f"oci:{path}:{BUSYBOX_TAG}"


def debian_layout(path: Path, packages: str = "python3-minimal", command: str = "bash") -> str:
    """A minimal Debian with `packages` (comma-separated) and a `command` as an image at `path`.

    Made if it is not there (about 40 s).
    """
    require("umoci", "mmdebstrap", root=True)
    reference = f"oci:{path}:{DEBIAN_TAG}"
    if path.exists():
        return reference
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".debian-", dir=path.parent) as work:
        root, fresh = Path(work, "root"), Path(work, "layout")
        debian_root(root, packages)
        image = f"{fresh}:{DEBIAN_TAG}"
        for argv in (
            ["umoci", "init", "--layout", str(fresh)],
            ["umoci", "new", "--image", image],
            ["umoci", "insert", "--image", image, str(root), "/"],
            ["umoci", "config", "--image", image, "--config.cmd", command],
            ["umoci", "gc", "--layout", str(fresh)],
        ):
            subprocess.run(argv, check=True, timeout=120, capture_output=True)
        fresh.rename(path)
    return reference


def debian_root(path: Path, packages: str = "python3-minimal") -> None:
    """A minimal Debian root of the host's release with `packages`, in the new directory `path`."""
    require("mmdebstrap", root=True)
    release = dict(
        line.split("=", 1)
        for line in Path("/etc/os-release").read_text().splitlines()
        if "=" in line
    )
    sources = [name for name in ("/etc/apt/sources.list",) if os.path.exists(name)]
    sources += sorted(glob.glob(f"/etc/apt/sources.list.d/{release['ID']}*.sources"))
    argv = [
        "mmdebstrap",
        "--quiet",
        "--mode=root",
        "--variant=minbase",
        f"--include={packages}",
    ]
    argv += ["--aptopt=APT::Sandbox::User root", release["VERSION_CODENAME"], str(path), *sources]
    subprocess.run(argv, check=True, timeout=600, capture_output=True)


# -- looking at a result ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Seen:
    """What one file of a tree is, as far as a layer can say it."""

    mode: int
    owner: tuple[int, int]
    mtime_ns: int
    content: bytes
    device: int
    xattrs: tuple[tuple[str, bytes], ...]
    names: tuple[bytes, ...]


def look(root: Path, *, xattrs: bool = True, fractions: bool = True) -> dict[bytes, Seen]:
    """Every file below `root` by its path; the root itself as b""."""
    found = {path: _status(root, path) for path in _paths(os.fsencode(root))}
    names: dict[int, list[bytes]] = {}
    for path, status in found.items():
        if not stat.S_ISDIR(status.st_mode):
            names.setdefault(status.st_ino, []).append(path)
    return {
        path: Seen(
            mode=status.st_mode,
            owner=(status.st_uid, status.st_gid),
            mtime_ns=status.st_mtime_ns if fractions else status.st_mtime_ns // 10**9 * 10**9,
            content=_content(os.path.join(os.fsencode(root), path), status),
            device=status.st_rdev,
            xattrs=_xattrs(os.path.join(os.fsencode(root), path)) if xattrs else (),
            names=tuple(sorted(names.get(status.st_ino, ()))),
        )
        for path, status in found.items()
    }


def _paths(root: bytes) -> Iterator[bytes]:
    yield b""
    for directory_path, directories, files in os.walk(root):
        for name in directories + files:
            yield os.path.relpath(os.path.join(directory_path, name), root)


def _status(root: Path, path: bytes) -> os.stat_result:
    return os.lstat(os.path.join(os.fsencode(root), path))


def _content(path: bytes, status: os.stat_result) -> bytes:
    if stat.S_ISLNK(status.st_mode):
        return os.readlink(path)
    if stat.S_ISREG(status.st_mode):
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).digest()
    return b""


def _xattrs(path: bytes) -> tuple[tuple[str, bytes], ...]:
    names = sorted(os.listxattr(path, follow_symlinks=False))
    return tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in names)
