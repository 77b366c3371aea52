"""What an image says its stored bytes are: a kilobyte can claim an exabyte of holes.

Each file that is made here is sparse. What is read of it runs in a child whose files may not grow
large: a fault here must not fill the disk of whoever runs the tests.
"""

import hashlib
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagefactory as factory
import pytest
from imagefactory import layer, member

from microguest.errors import ImageError
from microguest.host_client import images
from microguest.host_client.images.progress import Progress

HUGE = 10**17
MIB = 1 << 20
LARGEST = 64 * MIB  # of a file that the child writes
MAGIC = {
    "plain": b"etc/name",
    "gzip": b"\x1f\x8b\x08",
    "zstd": b"\x28\xb5\x2f\xfd",
    "xz": b"\xfd7zXZ\x00",
    "bzip2": b"BZh91AY&SY",
}
CONFIG = {
    "architecture": "amd64",
    "os": "linux",
    "config": {"Cmd": ["sh"]},
    "rootfs": {"type": "layers", "diff_ids": ["sha256:" + "a" * 64]},
}
LISTED = [{"Config": "c.json", "RepoTags": ["a:latest"], "Layers": ["layer.tar"]}]

PREPARE = r"""
import resource, sys
from microguest.host_client import images
from microguest.errors import ImageError
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    with images.open_image(sys.argv[1]) as image:
        images.as_disk(image, sys.argv[2], cache=images.Cache(sys.argv[2]))
except ImageError as error:
    print(error)
"""


def prepared(reference: str, tmp_path: Path) -> str:
    """The error for an image that a child process tries to make a disk of."""
    command = [sys.executable, "-c", PREPARE, reference, str(tmp_path / "cache"), str(LARGEST)]
    done = subprocess.run(
        command, cwd=factory.PROJECT, check=True, capture_output=True, text=True, timeout=120
    )
    return done.stdout.strip()


def sparse(name: str, data: bytes, size: int) -> list[tuple[tarfile.TarInfo, bytes]]:
    """A member of `size` bytes that begins with `data` and has no other, in pax form 0.1."""
    info, data = member(name, data)
    info.pax_headers = {"GNU.sparse.size": str(size), "GNU.sparse.map": f"0,{len(data)}"}
    return [(info, data)]


def docker_archive(path: Path, **sizes: tuple[bytes, int]) -> str:
    """An archive of docker's whose members manifest, config, layer may be sparse: start, size."""
    plain = {
        "manifest": ("manifest.json", json.dumps(LISTED).encode()),
        "config": ("c.json", json.dumps(CONFIG).encode()),
        "layer": ("layer.tar", b"x"),
    }
    members = []
    for what, (name, data) in plain.items():
        members += sparse(name, *sizes[what]) if what in sizes else [member(name, data)]
    path.write_bytes(layer(members))
    return f"docker-archive:{path}"


def grow(path: Path, start: bytes, size: int) -> None:
    path.write_bytes(start)
    os.truncate(path, size)


def layout_with_sparse_layer(path: Path, start: bytes, size: int, digest: str = "b" * 64) -> str:
    """An OCI layout whose manifest tells the layer's size as the sparse blob has it."""
    layout = factory.Layout(path)

    def change(manifest: dict[str, Any], _config: dict[str, Any]) -> None:
        manifest["layers"][0] |= {"digest": f"sha256:{digest}", "size": size}

    layout.index(factory.tagged(layout.image([layer([])], change=change), "t"))
    grow(path / "blobs" / "sha256" / digest, start, size)
    return f"oci:{path}:t"


# -- layers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("magic", MAGIC)
def test_layer_of_an_archive_that_is_one_hole(tmp_path: Path, magic: str) -> None:
    """It is refused for what it says, before anything of it is written, whatever it begins with."""
    start = MAGIC[magic].ljust(512, b"\1")
    reference = docker_archive(tmp_path / "i.tar", layer=(start, HUGE))
    assert (tmp_path / "i.tar").stat().st_size < 64 << 10
    said = prepared(reference, tmp_path)
    assert (
        f"more than the image's limit of {32 << 10} MiB as they are stored, holes included" in said
    )
    assert "layer sha256:aaa" in said


def test_layer_of_a_directory_that_is_one_hole(tmp_path: Path) -> None:
    reference = layout_with_sparse_layer(tmp_path / "i", MAGIC["zstd"], 1 << 40)
    assert "as they are stored, holes included" in prepared(reference, tmp_path)


def test_layer_of_an_archive_file_with_holes(tmp_path: Path) -> None:
    """The member is whole; it is the archive's file that has no bytes for it."""
    path = tmp_path / "i.tar"
    docker_archive(path)
    info = tarfile.TarInfo("layer.tar")
    info.size = 1 << 40
    with tarfile.open(path) as archive:
        end = archive.getmember("layer.tar").offset
    with path.open("r+b") as file:
        file.truncate(end)
        file.seek(end)
        file.write(info.tobuf(tarfile.GNU_FORMAT) + MAGIC["zstd"])
    os.truncate(path, end + 512 + info.size + 1024)
    assert "as they are stored" in prepared(f"docker-archive:{path}", tmp_path)


def test_stored_bytes_of_all_layers_count(tmp_path: Path) -> None:
    """Each of them would do, and holes take no room in the archive."""
    config = CONFIG | {"rootfs": {"diff_ids": [""] * 3}}
    data = layer([member("a", b"a")])
    gap = 4 * MIB
    body = data.ljust(gap, b"\0")
    config["rootfs"] = {"diff_ids": [f"sha256:{hashlib.sha256(body).hexdigest()}"] * 3}
    files = [
        member("manifest.json", json.dumps([LISTED[0] | {"Layers": ["l"] * 3}]).encode()),
        member("c.json", json.dumps(config).encode()),
        *sparse("l", data, gap),
    ]
    (tmp_path / "i.tar").write_bytes(layer(files))
    with images.open_image(f"docker-archive:{tmp_path / 'i.tar'}") as image:
        kept = images.Cache(str(tmp_path / "cache"))
        with pytest.raises(ImageError, match="limit of 11 MiB as they are stored"):
            images.as_disk(image, tmp_path, cache=kept, limits=images.Limits(bytes=3 * gap - 1))
        images.as_disk(image, tmp_path, cache=kept, limits=images.Limits(bytes=3 * gap))


def test_what_zstd_is_given_is_never_written_down(tmp_path: Path) -> None:
    """A frame to be skipped, of more bytes than the child may write to a file, and then rubbish."""
    factory.require("zstd")
    frame = 0x184D2A50.to_bytes(4, "little") + (4 * LARGEST).to_bytes(4, "little")
    reference = docker_archive(tmp_path / "i.tar", layer=(frame, 4 * LARGEST + 4096))
    said = prepared(reference, tmp_path)
    assert "zstd -d" in said
    assert "File too large" not in said


def test_zstd_layer_of_more_than_a_pipe_holds(tmp_path: Path) -> None:
    """Both of its pipes are full at times, and neither waits for the other."""
    content = os.urandom(3 * MIB) + bytes(40 * MIB) + os.urandom(3 * MIB)
    data = layer([member("a", content)])
    reference = factory.make_layout(tmp_path / "i", [data], compression="zstd")
    with images.open_image(reference) as image:
        kept = images.Cache(str(tmp_path / "cache"))
        root = images.as_directory(image, tmp_path, cache=kept)
        assert (root / "a").read_bytes() == content


@pytest.mark.parametrize("magic", ["gzip", "zstd", "xz", "bzip2"])
def test_wrong_digest_explains_more_than_a_damaged_stream(tmp_path: Path, magic: str) -> None:
    reference = layout_with_sparse_layer(tmp_path / "i", MAGIC[magic], 4 * MIB)
    assert "its digest ends in" in prepared(reference, tmp_path)


@pytest.mark.parametrize("magic", ["gzip", "zstd", "xz", "bzip2"])
def test_damaged_stream_without_a_digest_is_not_read_on(tmp_path: Path, magic: str) -> None:
    """There is nothing that the rest of it could explain."""
    start = MAGIC[magic].ljust(512, b"\1")
    reference = docker_archive(tmp_path / "i.tar", layer=(start, 1 << 30))
    read: list[Progress] = []
    with images.open_image(reference) as image:
        kept = images.Cache(str(tmp_path / "cache"))
        with pytest.raises(ImageError, match=r"damaged|zstd -d"):
            images.as_disk(image, tmp_path, cache=kept, progress=read.append)
    assert max(one.done for one in read) <= 16 * MIB


@pytest.mark.parametrize("magic", ["gzip", "xz", "bzip2", "zstd"])
def test_deadline_holds_while_a_damaged_stream_is_read_on(tmp_path: Path, magic: str) -> None:
    """For its digest, of which twenty gibibytes take a processor many seconds."""
    reference = layout_with_sparse_layer(tmp_path / "i", MAGIC[magic], 20 << 30)
    with images.open_image(reference) as image:
        kept = images.Cache(str(tmp_path / "cache"))
        with pytest.raises(ImageError, match=r"not ready after 0\.5 s"):
            images.as_disk(image, tmp_path, cache=kept, limits=images.Limits(seconds=0.5))


# -- the documents before them ---------------------------------------------------------------


@pytest.mark.parametrize("what", ["manifest", "config"])
def test_document_of_an_archive_that_is_one_hole(tmp_path: Path, what: str) -> None:
    reference = docker_archive(tmp_path / "i.tar", **{what: (b"[", HUGE)})
    assert f"has {HUGE} bytes, more than the" in prepared(reference, tmp_path)


def _index(root: Path) -> Path:
    return root / "index.json"


def _version(root: Path) -> Path:
    return root / "oci-layout"


def _manifest(root: Path) -> Path:
    digest = json.loads((root / "index.json").read_text())["manifests"][0]["digest"]
    return root / "blobs" / digest.replace(":", "/")


def _config(root: Path) -> Path:
    digest = json.loads(_manifest(root).read_text())["config"]["digest"]
    return root / "blobs" / digest.replace(":", "/")


@pytest.mark.parametrize("find", [_index, _version, _manifest, _config])
@pytest.mark.parametrize("transport", ["oci", "oci-archive"])
def test_document_of_oci_that_is_one_hole(
    tmp_path: Path, find: Callable[[Path], Path], transport: str
) -> None:
    root = tmp_path / "i"
    factory.make_layout(root, [layer([])])
    found = find(root)
    if transport == "oci":
        grow(found, b"{", 1 << 40)
        reference = f"oci:{root}"
    else:
        files = []
        for path in filter(Path.is_file, root.rglob("*")):
            name, data = str(path.relative_to(root)), path.read_bytes()
            files += sparse(name, b"{", 1 << 40) if path == found else [member(name, data)]
        (tmp_path / "i.tar").write_bytes(layer(files))
        reference = f"oci-archive:{tmp_path / 'i.tar'}"
    assert f"has {1 << 40} bytes, more than the" in prepared(reference, tmp_path)
