"""Which of several images is meant, and images in the forms that other tools write."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagefactory as factory
import pytest
from imagefactory import directory, for_platform, layer, member, tagged

from microguest.errors import ImageError
from microguest.host_client import images
from microguest.host_client.images import manifest

SMALL = layer([directory("etc"), member("etc/name", b"guest\n")])


@pytest.fixture
def cache(tmp_path: Path) -> images.Cache:
    return images.Cache(str(tmp_path / "cache"))


def named(descriptor: dict[str, Any], name: str, tag: str | None = None) -> dict[str, Any]:
    """As docker and containerd list it: the full name, and its tag."""
    notes = {"io.containerd.image.name": name}
    if tag:
        notes["org.opencontainers.image.ref.name"] = tag
    return {**descriptor, "annotations": notes}


def two(path: Path) -> tuple[factory.Layout, dict[str, Any], dict[str, Any]]:
    layout = factory.Layout(path)
    one, other = (layout.image([SMALL], config={"Cmd": [name]}) for name in ("one", "other"))
    return layout, one, other


def command_of(text: str) -> tuple[str, ...]:
    return images.open_image(text).config.cmd


def content_of(reference: str, tmp_path: Path, cache: images.Cache) -> bytes:
    with images.open_image(reference) as image:
        root = images.as_directory(image, tmp_path, cache=cache)
        return (root / "etc" / "name").read_bytes()


# -- names -----------------------------------------------------------------------------------


def test_two_images_of_one_tag(tmp_path: Path) -> None:
    """What `docker save a b` writes: both are tagged `latest`."""
    layout, one, other = two(tmp_path / "i")
    layout.index(
        named(one, "docker.io/library/a:latest", "latest"),
        named(other, "docker.io/library/b:latest", "latest"),
    )
    for ambiguous in ("", ":latest"):
        with pytest.raises(ImageError, match=r"several images: name one of: a:latest, b:latest$"):
            images.open_image(f"oci:{layout.path}{ambiguous}")
    for name in ("b", "b:latest", "library/b", "docker.io/library/b", "docker.io/library/b:latest"):
        assert command_of(f"oci:{layout.path}:{name}") == ("other",)
    with pytest.raises(ImageError, match=r"no tag 'c'; it has: a:latest, b:latest, latest"):
        images.open_image(f"oci:{layout.path}:c")


def test_two_images_of_one_name(tmp_path: Path) -> None:
    layout, one, other = two(tmp_path / "i")
    layout.index(tagged(one, "v1"), tagged(other, "v1"))
    digests = [descriptor["digest"][:19] for descriptor in (one, other)]
    known = ", ".join(f"@{digest}" for digest in sorted(digests))
    for ambiguous in ("", ":v1"):
        with pytest.raises(ImageError, match=f"name one of: {known}"):
            images.open_image(f"oci:{layout.path}{ambiguous}")
    assert command_of(f"oci:{layout.path}@{digests[0]}") == ("one",)
    assert command_of(f"oci:{layout.path}:v1@{other['digest']}") == ("other",)


def test_two_images_without_names(tmp_path: Path) -> None:
    layout, one, other = two(tmp_path / "i")
    layout.index(one, other)
    with pytest.raises(ImageError, match=r"name one of: @sha256:[0-9a-f]{12}, @sha256:"):
        images.open_image(f"oci:{layout.path}")


def test_image_beside_one_without_a_name(tmp_path: Path) -> None:
    layout, one, other = two(tmp_path / "i")
    layout.index(tagged(one, "v1"), other)
    with pytest.raises(ImageError, match=r"name one of: @sha256:[0-9a-f]{12}, v1"):
        images.open_image(f"oci:{layout.path}")
    assert command_of(f"oci:{layout.path}:v1") == ("one",)


def test_two_names_of_one_image(tmp_path: Path) -> None:
    layout, one, _ = two(tmp_path / "i")
    layout.index(tagged(one, "v1"), tagged(one, "stable"))
    assert command_of(f"oci:{layout.path}") == ("one",)


def test_tag_of_a_full_name(tmp_path: Path) -> None:
    layout, one, other = two(tmp_path / "i")
    layout.index(named(one, "ghcr.io/x/app:1.0"), named(other, "ghcr.io/x/app:1.1"))
    assert command_of(f"oci:{layout.path}:1.1") == ("other",)
    with pytest.raises(ImageError, match=r"one of: ghcr.io/x/app:1.0, ghcr.io/x/app:1.1"):
        images.open_image(f"oci:{layout.path}")


def test_latest_of_one_repository_and_of_two(tmp_path: Path) -> None:
    layout, one, other = two(tmp_path / "i")
    layout.index(named(one, "docker.io/library/a:1"), named(other, "docker.io/library/a:latest"))
    assert command_of(f"oci:{layout.path}") == ("other",)
    layout.index(named(one, "docker.io/library/b:1"), named(other, "docker.io/library/a:latest"))
    with pytest.raises(ImageError, match="one of: a:latest, b:1"):
        images.open_image(f"oci:{layout.path}")


def test_one_name_for_two_platforms_is_one_image(tmp_path: Path) -> None:
    layout, one, other = two(tmp_path / "i")
    layout.index(
        tagged(for_platform(one, "linux/amd64"), "v1"),
        tagged(for_platform(other, "linux/arm64"), "v1"),
    )
    assert command_of(f"oci:{layout.path}") == ("one",)


def test_digest_inside_a_nested_index(tmp_path: Path) -> None:
    layout, one, other = two(tmp_path / "i")
    inner = layout.json(
        factory.INDEX_TYPE,
        {"manifests": [for_platform(image, "linux/amd64") for image in (one, other)]},
    )
    layout.index(tagged(inner, "v1"))
    assert command_of(f"oci:{layout.path}") == ("one",)
    assert command_of(f"oci:{layout.path}@{other['digest'][:16]}") == ("other",)
    with pytest.raises(ImageError, match=r"no image sha256:0000; it has: @sha256:"):
        images.open_image(f"oci:{layout.path}@sha256:0000")


def test_nested_images_that_say_no_platform(tmp_path: Path) -> None:
    layout, one, other = two(tmp_path / "i")
    layout.index(layout.json(factory.INDEX_TYPE, {"manifests": [one, other]}))
    with pytest.raises(ImageError, match=r"name one of: @sha256:[0-9a-f]{12}, @sha256:"):
        images.open_image(f"oci:{layout.path}")


def test_half_of_a_surrogate_pair_in_a_config(tmp_path: Path) -> None:
    reference = factory.make_layout(tmp_path / "i", [SMALL], config={"Env": ["A=\ud800"]})
    with pytest.raises(ImageError, match="the Env of the image's config"):
        images.open_image(reference)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("oci:d@sha256:abcd", ("oci", "d", None, "sha256:abcd")),
        ("oci:d:v1@sha256:abcd", ("oci", "d", "v1", "sha256:abcd")),
        ("docker-archive:f.tar:my__app:1", ("docker-archive", "f.tar", "my__app:1", None)),
        (
            "docker-archive:f.tar@sha256:" + "0" * 64,
            ("docker-archive", "f.tar", None, "sha256:" + "0" * 64),
        ),
    ],
)
def test_reference_with_a_digest(text: str, expected: tuple[str, str, str, str]) -> None:
    found = images.parse_reference(text)
    assert (found.transport, found.path, found.tag, found.digest) == expected
    assert str(found) == text


# -- docker's archives -----------------------------------------------------------------------


def skopeo(*words: str) -> None:
    factory.require("skopeo")
    subprocess.run(["skopeo", "--insecure-policy", "copy", "-q", *words], check=True, timeout=60)


@pytest.mark.parametrize("transport", ["docker-archive", "oci-archive"])
def test_docker_archive_by_skopeo(tmp_path: Path, cache: images.Cache, transport: str) -> None:
    reference = factory.make_layout(tmp_path / "i", [SMALL, layer([member("more", b"1")])])
    archive = tmp_path / "a.tar"
    skopeo("--additional-tag", "docker.io/x/app:2", reference, f"docker-archive:{archive}:app:1")
    for name in ("", ":app:1", ":docker.io/library/app:1", ":x/app:2", ":2"):
        assert content_of(f"{transport}:{archive}{name}", tmp_path, cache) == b"guest\n"
    with pytest.raises(ImageError, match="no tag 'app:3'; it has: app:1, x/app:2"):
        images.open_image(f"{transport}:{archive}:app:3")


def docker_save(path: Path, items: list[dict[str, Any]], files: dict[str, bytes]) -> None:
    """As docker saved before it wrote OCI layouts: layers as links to those of other images."""
    with tarfile.open(path, "w") as tar:
        files = {**files, "manifest.json": json.dumps(items).encode()}
        for name, data in files.items():
            info, content = member(name, data)
            tar.addfile(info, io.BytesIO(content))


def docker_config(command: str) -> bytes:
    diff_id = f"sha256:{hashlib.sha256(SMALL).hexdigest()}"
    return json.dumps(
        {
            "os": "linux",
            "architecture": "amd64",
            "config": {"Cmd": [command]},
            "rootfs": {"type": "layers", "diff_ids": [diff_id]},
        }
    ).encode()


def test_docker_archive_of_several_images(tmp_path: Path) -> None:
    archive = tmp_path / "a.tar"
    items = [
        {"Config": "one.json", "RepoTags": ["a:latest"], "Layers": ["x/layer.tar"]},
        {"Config": "other.json", "RepoTags": None, "Layers": ["x/layer.tar"]},
    ]
    files = {"one.json": docker_config("one"), "other.json": docker_config("other")}
    docker_save(archive, items, {**files, "x/layer.tar": SMALL})
    ident = hashlib.sha256(files["other.json"]).hexdigest()
    with pytest.raises(ImageError, match=f"name one of: @sha256:{ident[:12]}, a:latest"):
        images.open_image(f"docker-archive:{archive}")
    assert command_of(f"docker-archive:{archive}:a") == ("one",)
    assert command_of(f"docker-archive:{archive}@sha256:{ident[:8]}") == ("other",)


def test_docker_archive_that_somebody_writes_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else another's layers would be kept in the cache as those of the image that was named."""
    archive = tmp_path / "a.tar"
    items = [{"Config": "one.json", "RepoTags": ["a:1"], "Layers": ["x/layer.tar"]}]
    docker_save(archive, items, {"one.json": docker_config("good"), "x/layer.tar": SMALL})
    digest = f"sha256:{hashlib.sha256(docker_config('good')).hexdigest()}"
    choose = manifest.choose

    def choose_and_write(*arguments: Any) -> Any:
        chosen = choose(*arguments)
        archive.write_bytes(archive.read_bytes().replace(b'"good"', b'"evil"'))
        return chosen

    monkeypatch.setattr(manifest, "choose", choose_and_write)
    with pytest.raises(ImageError, match="somebody writes to it"):
        images.open_image(f"docker-archive:{archive}@{digest}")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_docker_archive_with_linked_layers(
    tmp_path: Path, cache: images.Cache, kind: bytes
) -> None:
    archive = tmp_path / "a.tar"
    items = [{"Config": "one.json", "RepoTags": ["a:1"], "Layers": ["y/layer.tar"]}]
    docker_save(archive, items, {"one.json": docker_config("one"), "x/layer.tar": SMALL})
    with tarfile.open(archive, "a") as tar:
        target = "../x/layer.tar" if kind == tarfile.SYMTYPE else "x/layer.tar"
        tar.addfile(member("y/layer.tar", kind=kind, target=target)[0])
    assert content_of(f"docker-archive:{archive}", tmp_path, cache) == b"guest\n"


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "lists no image"),
        ([1], "no image"),
        ({}, "no list"),
        ([{}], "Config that names no file"),
        ([{"Config": "../../etc/passwd", "Layers": []}], "is missing"),
        ([{"Config": "one.json", "Layers": ["/etc/passwd"]}], "is missing"),
        ([{"Config": "one.json", "Layers": []}], "0 layers but config 1"),
        ([{"Config": "one.json", "Layers": [""]}], "Layers that names no file"),
        ([{"Config": "one.json", "Layers": ["one.json"]}], "diff_id"),
    ],
)
def test_broken_docker_archive(
    tmp_path: Path, cache: images.Cache, items: Any, message: str
) -> None:
    archive = tmp_path / "a.tar"
    docker_save(archive, items, {"one.json": docker_config("one")})
    with pytest.raises(ImageError, match=message):
        content_of(f"docker-archive:{archive}", tmp_path, cache)


def test_what_is_no_archive_of_images(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(SMALL)
    with pytest.raises(ImageError, match=r"neither OCI's member oci-layout nor docker's"):
        images.open_image(f"docker-archive:{tmp_path}/a.tar")
    with pytest.raises(ImageError, match=r"is a file: name it as oci-archive:.* or docker-archive"):
        images.open_image(f"oci:{tmp_path}/a.tar")


# -- layers in other dress -------------------------------------------------------------------

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "none": bytes,
    "gzip": gzip.compress,
    "gzip with padding": lambda data: gzip.compress(data) + bytes(700),
    "zstd": lambda data: factory.compress(data, "zstd"),
    "xz": lzma.compress,
    "bzip2": bz2.compress,
}


@pytest.mark.parametrize("how", COMPRESS)
@pytest.mark.parametrize("said", ["tar.gzip", "tar.zstd", "tar"])
def test_compression_is_what_the_bytes_are(
    tmp_path: Path, cache: images.Cache, how: str, said: str
) -> None:
    layout = factory.Layout(tmp_path / "i")

    def change(manifest: dict[str, Any], _: dict[str, Any]) -> None:
        media_type = f"application/vnd.docker.image.rootfs.diff.{said}"
        manifest["layers"] = [layout.blob(media_type, COMPRESS[how](SMALL))]

    layout.index(layout.image([SMALL], change=change))
    assert content_of(f"oci:{layout.path}", tmp_path, cache) == b"guest\n"


@pytest.mark.parametrize(
    "media_type",
    [
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
        "application/vnd.oci.image.layer.nondistributable.v1.tar",
    ],
)
def test_layer_that_is_not_distributed(
    tmp_path: Path, cache: images.Cache, media_type: str
) -> None:
    """Where its bytes are in the image it is a layer like others; else the error says that."""

    def change(manifest: dict[str, Any], _: dict[str, Any]) -> None:
        manifest["layers"][0]["mediaType"] = media_type
        blobs.append(manifest["layers"][0]["digest"].partition(":")[2])

    blobs: list[str] = []
    reference = factory.make_layout(tmp_path / "i", [SMALL], change=change)
    assert content_of(reference, tmp_path, cache) == b"guest\n"
    (tmp_path / "i" / "blobs" / "sha256" / blobs[0]).unlink()
    with pytest.raises(ImageError, match=f"layer sha256:{blobs[0]} is not in the image"):
        images.open_image(reference)


def test_encrypted_layer(tmp_path: Path) -> None:
    def change(manifest: dict[str, Any], _: dict[str, Any]) -> None:
        manifest["layers"][0]["mediaType"] += "+encrypted"

    with pytest.raises(ImageError, match="decrypt it first"):
        images.open_image(factory.make_layout(tmp_path / "i", [SMALL], change=change))


@pytest.mark.parametrize("link", ["hard link", "sparse"])
def test_archive_as_gnu_tar_writes_it(tmp_path: Path, cache: images.Cache, link: str) -> None:
    """Equal blobs as hard links, or with holes."""
    factory.require("tar")
    data = layer([directory("etc"), member("etc/name", b"guest\n"), member("z", bytes(1 << 20))])
    factory.make_layout(tmp_path / "i", [data], compression="")
    blobs = tmp_path / "i" / "blobs" / "sha256"
    if link == "hard link":
        (tmp_path / "i" / "a").mkdir()  # comes before the blobs, which become links to these
        for blob in list(blobs.iterdir()):
            os.link(blob, tmp_path / "i" / "a" / blob.name)
    else:
        for blob in blobs.iterdir():
            subprocess.run(["fallocate", "--dig-holes", blob], check=True, timeout=30)
    archive = tmp_path / "i.tar"
    command = ["tar", "-C", str(tmp_path / "i"), "--sort=name", "-Scf", str(archive), "."]
    subprocess.run(command, check=True, timeout=30)
    with tarfile.open(archive) as tar:
        kinds = {found.type for found in tar}
    assert (tarfile.LNKTYPE if link == "hard link" else tarfile.GNUTYPE_SPARSE) in kinds
    assert content_of(f"oci-archive:{archive}", tmp_path, cache) == b"guest\n"


SPARSE = ["--format=gnu", "--sparse-version=0.0", "--sparse-version=0.1", "--sparse-version=1.0"]


@pytest.mark.parametrize("form", SPARSE)
def test_sparse_file_in_a_layer(tmp_path: Path, cache: images.Cache, form: str) -> None:
    """With pieces of all kinds: more than a header has room for, at the start, none at the end."""
    factory.require("tar")
    root = tmp_path / "root"
    root.mkdir()
    with open(root / "f", "wb") as file:
        for number in range(60):
            file.seek(number * 65536)
            file.write(b"piece %d" % number)
        file.truncate((60 << 16) + 12345)
    with open(root / "hole", "wb") as file:
        file.truncate(1 << 20)
    with open(root / ("n" * 150), "wb") as file:
        file.truncate(1 << 16)
        file.seek(1 << 16)
        file.write(b"end")
    archive = tmp_path / "layer.tar"
    words = [form] if form.startswith("--format") else ["--format=posix", form]
    subprocess.run(
        ["tar", "-C", str(root), *words, "-Scf", str(archive), "."], check=True, timeout=30
    )
    data = archive.read_bytes()
    assert len(data) < 1 << 20
    with images.open_image(factory.make_layout(tmp_path / "i", [data])) as image:
        made = images.as_directory(image, tmp_path, cache=cache)
        for path in root.iterdir():
            assert (made / path.name).read_bytes() == path.read_bytes()


def _pax(records: dict[str, str], data: bytes = b"", size: int | None = None) -> bytes:
    info = tarfile.TarInfo("f")
    info.size = len(data) if size is None else size
    info.pax_headers = records
    return info.tobuf(tarfile.PAX_FORMAT) + data + bytes(1024 + -len(data) % 512)


@pytest.mark.parametrize(
    ("archive", "message"),
    [
        (_pax({"GNU.sparse.map": "0,3", "GNU.sparse.size": "9"}, b"four"), "a map for 3"),
        (_pax({"GNU.sparse.map": "5,5", "GNU.sparse.size": "9"}, b"fives"), "behind its end"),
        (_pax({"GNU.sparse.map": "4,2,3,2", "GNU.sparse.size": "9"}, b"four"), "overlap"),
        (_pax({"GNU.sparse.map": "0,4,5", "GNU.sparse.size": "9"}, b"four"), "odd count"),
        (_pax({"GNU.sparse.map": "0,-4", "GNU.sparse.size": "9"}, b"four"), "made of numbers"),
        (_pax({"GNU.sparse.map": "1" * 30, "GNU.sparse.size": "9"}, b"four"), "made of numbers"),
        (_pax({"GNU.sparse.map": "0,0," * 70_000 + "0,4", "GNU.sparse.size": "9"}, b"four"), "."),
        (_pax({"GNU.sparse.major": "1"}, b"99999999999\n".ljust(512, b"0")), "pieces"),
        (_pax({"GNU.sparse.major": "1"}, b"5\n".ljust(512, b"0")), "made of numbers"),
        (_pax({"GNU.sparse.major": "1"}, b"9\n" + b"0\n" * 15), "cut short"),
        (_pax({"GNU.sparse.major": "1"}), "cut short"),
    ],
)
def test_map_that_makes_no_sense(
    tmp_path: Path, cache: images.Cache, archive: bytes, message: str
) -> None:
    image = images.open_image(factory.make_layout(tmp_path / "i", [archive]))
    with pytest.raises(ImageError, match=rf"layer sha256:.*the header at byte \d+, .*{message}"):
        images.as_directory(image, tmp_path, cache=cache)
