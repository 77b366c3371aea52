"""Images as a user names and opens them: references, tags, platforms, configs, and bad input."""

import gzip
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagefactory as factory
import pytest
from patience import PATIENCE

from microguest.errors import ImageError
from microguest.host_client import images

SMALL = factory.layer([factory.directory("etc"), factory.member("etc/name", b"guest\n")])


@pytest.fixture
def cache(tmp_path: Path) -> images.Cache:
    return images.Cache(str(tmp_path / "cache"))


def nothing_left(cache: images.Cache) -> bool:
    """No entry, work area or lock file in the cache."""
    places = [os.path.join(cache.directory, name) for name in ("entries", "tmp", "locks")]
    return not any(os.listdir(place) for place in places if os.path.exists(place))


def test_public_names_are_pinned() -> None:
    assert images.__all__ == [
        "Cache",
        "Descriptor",
        "Disk",
        "Image",
        "ImageConfig",
        "ImageReference",
        "Layer",
        "Limits",
        "OnProgress",
        "Progress",
        "as_directory",
        "as_disk",
        "open_image",
        "parse_reference",
        "process_for",
    ]


# -- references ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("oci:dist/demo", ("oci", "dist/demo", None)),
        ("oci:dist/demo:busybox", ("oci", "dist/demo", "busybox")),
        ("oci:/x:example.org/name:v1", ("oci", "/x", "example.org/name:v1")),
        ("oci-archive:a.tar:v1", ("oci-archive", "a.tar", "v1")),
        ("dir:/srv/a:b", ("dir", "/srv/a:b", None)),
    ],
)
def test_reference(text: str, expected: tuple[str, str, str | None]) -> None:
    reference = images.parse_reference(text)
    assert (reference.transport, reference.path, reference.tag) == expected
    assert str(reference) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "busybox",
        "docker:x",
        "oci:",
        "oci::t",
        "oci:d:",
        "oci:d:-x",
        "dir:",
        "oci:a\0b",
        "oci:d:a b",
    ],
)
def test_reference_that_is_none(text: str) -> None:
    with pytest.raises(ImageError, match="image reference"):
        images.parse_reference(text)


# -- what an image says ----------------------------------------------------------------------


def test_config_is_read(tmp_path: Path) -> None:
    config = {
        "Env": ["A=1", "B=ü"],
        "Entrypoint": ["/init", "--"],
        "Cmd": ["serve"],
        "WorkingDir": "/srv",
        "User": "1000:100",
        "ExposedPorts": {"80/tcp": {}},
        "Volumes": {"/data": {}},
        "StopSignal": "SIGINT",
        "Labels": {"b": "2", "a": "1"},
    }
    image = images.open_image(factory.make_layout(tmp_path / "i", [SMALL], config=config))
    assert image.config == images.ImageConfig(
        env=("A=1", "B=ü"),
        entrypoint=("/init", "--"),
        cmd=("serve",),
        working_dir="/srv",
        user="1000:100",
        exposed_ports=("80/tcp",),
        volumes=("/data",),
        stop_signal="SIGINT",
        labels=(("a", "1"), ("b", "2")),
    )
    assert image.digest is not None
    assert image.digest.startswith("sha256:")
    assert len(image.layers) == 1


@pytest.mark.parametrize(
    "value", [{"Env": "A=1"}, {"Cmd": [1]}, {"User": 3}, {"Labels": {"a": 1}}, [1]]
)
def test_config_of_wrong_types(tmp_path: Path, value: object) -> None:
    def change(_: dict[str, Any], config: dict[str, Any]) -> None:
        config["config"] = value

    reference = factory.make_layout(tmp_path / "i", [SMALL], change=change)
    with pytest.raises(ImageError, match="config"):
        images.open_image(reference)


@pytest.mark.parametrize(
    ("command", "entrypoint", "expected"),
    [
        (None, None, ("/entry", "cmd")),
        ([], None, ("/entry", "cmd")),
        (["x", "y"], None, ("/entry", "x", "y")),
        (None, ["/other"], ("/other",)),
        (["x"], ["/other", "-a"], ("/other", "-a", "x")),
        (["x"], [], ("x",)),
        (["x"], [""], ("x",)),
    ],
)
def test_process_follows_docker(
    command: list[str] | None, entrypoint: list[str] | None, expected: tuple[str, ...]
) -> None:
    config = images.ImageConfig(entrypoint=("/entry",), cmd=("cmd",))
    assert images.process_for(config, command, entrypoint) == expected


@pytest.mark.parametrize(
    ("command", "entrypoint"), [(None, None), (None, [""]), ([""], None), (["a\0"], None)]
)
def test_process_that_cannot_be(command: list[str] | None, entrypoint: list[str] | None) -> None:
    with pytest.raises(ImageError):
        images.process_for(images.ImageConfig(), command, entrypoint)


# -- choosing --------------------------------------------------------------------------------


def test_tags(tmp_path: Path) -> None:
    layout = factory.Layout(tmp_path / "i")
    one = layout.image([SMALL], config={"Cmd": ["one"]})
    two = layout.image([SMALL], config={"Cmd": ["two"]})
    layout.index(factory.tagged(one, "one"), factory.tagged(two, "two"))
    assert images.open_image(f"oci:{layout.path}:two").config.cmd == ("two",)
    with pytest.raises(ImageError, match="one, two"):
        images.open_image(f"oci:{layout.path}")
    with pytest.raises(ImageError, match=r"no tag 'three'.*one, two"):
        images.open_image(f"oci:{layout.path}:three")
    layout.index(factory.tagged(one, "one"), factory.tagged(two, "latest"))
    assert images.open_image(f"oci:{layout.path}").config.cmd == ("two",)
    layout.index(one)
    assert images.open_image(f"oci:{layout.path}").config.cmd == ("one",)


def test_tags_with_terminal_codes_are_shown_without(tmp_path: Path) -> None:
    layout = factory.Layout(tmp_path / "i")
    one, two = (layout.image([SMALL], config={"Cmd": [name]}) for name in "ab")
    layout.index(factory.tagged(one, "a"), factory.tagged(two, "\x1b[2J"))
    with pytest.raises(ImageError) as caught:
        images.open_image(f"oci:{layout.path}")
    assert str(caught.value).isprintable()


def test_platform_is_chosen_through_nested_indexes(tmp_path: Path) -> None:
    layout = factory.Layout(tmp_path / "i")
    manifests = [
        factory.for_platform(
            layout.image([SMALL], architecture=platform.split("/")[1], config={"Cmd": [platform]}),
            platform,
        )
        for platform in ("linux/arm64/v8", "linux/amd64", "linux/arm/v6", "linux/arm/v7")
    ]
    inner = layout.json(factory.INDEX_TYPE, {"schemaVersion": 2, "manifests": manifests})
    outer = layout.json(factory.INDEX_TYPE, {"schemaVersion": 2, "manifests": [inner]})
    layout.index(factory.tagged(outer, "t"))

    def chosen(platform: str) -> tuple[str, ...]:
        return images.open_image(f"oci:{layout.path}:t", platform).config.cmd

    assert chosen("linux/amd64") == ("linux/amd64",)
    assert chosen("linux/arm64") == ("linux/arm64/v8",)
    assert chosen("linux/arm/v7") == ("linux/arm/v7",)
    with pytest.raises(ImageError, match=r"no image for linux/riscv64; it has: .*linux/amd64"):
        chosen("linux/riscv64")


def test_image_for_another_machine_is_refused(tmp_path: Path) -> None:
    reference = factory.make_layout(tmp_path / "i", [SMALL], architecture="arm64")
    with pytest.raises(ImageError, match="linux/arm64, not for linux/amd64"):
        images.open_image(reference)


def test_index_that_contains_itself_by_depth(tmp_path: Path) -> None:
    layout = factory.Layout(tmp_path / "i")
    descriptor = layout.image([SMALL])
    for _ in range(6):
        descriptor = layout.json(factory.INDEX_TYPE, {"manifests": [descriptor]})
    layout.index(descriptor)
    with pytest.raises(ImageError, match="nested"):
        images.open_image(f"oci:{layout.path}")


# -- forms -----------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["", "gzip", "zstd"])
def test_compressions_give_the_same_root(
    tmp_path: Path, cache: images.Cache, compression: str
) -> None:
    factory.require("tar")
    reference = factory.make_layout(tmp_path / "i", [SMALL], compression=compression)
    with images.open_image(reference) as image:
        root = images.as_directory(image, tmp_path, cache=cache)
        assert (root / "etc" / "name").read_bytes() == b"guest\n"


def test_gzip_of_several_members_and_large_expansion(tmp_path: Path, cache: images.Cache) -> None:
    data = factory.layer([factory.member("zeros", bytes(9 << 20)), factory.member("end", b"!")])
    layout = factory.Layout(tmp_path / "i")
    third = len(data) // 3
    parts = b"".join(gzip.compress(part) for part in (data[:third], data[third:]))

    def change(manifest: dict[str, Any], _: dict[str, Any]) -> None:
        manifest["layers"] = [layout.blob(manifest["layers"][0]["mediaType"], parts)]

    layout.index(layout.image([data], change=change))
    with images.open_image(f"oci:{layout.path}") as image:
        root = images.as_directory(image, tmp_path, cache=cache)
        assert (root / "zeros").read_bytes() == bytes(9 << 20)
        assert (root / "end").read_bytes() == b"!"


@pytest.mark.parametrize("prefix", ["", "./"])
def test_archive_is_read_without_unpacking(
    tmp_path: Path, cache: images.Cache, prefix: str
) -> None:
    factory.make_layout(tmp_path / "i", [SMALL])
    archive = tmp_path / "i.tar"
    with tarfile.open(archive, "w") as tar:
        for path in sorted((tmp_path / "i").rglob("*")):
            tar.add(path, prefix + str(path.relative_to(tmp_path / "i")), recursive=False)
    with images.open_image(f"oci-archive:{archive}:t") as image:
        root = images.as_directory(image, tmp_path, cache=cache)
        assert (root / "etc" / "name").read_bytes() == b"guest\n"


def test_archive_by_skopeo(tmp_path: Path, cache: images.Cache) -> None:
    factory.require("skopeo")
    reference = factory.make_layout(tmp_path / "i", [SMALL])
    archive = f"oci-archive:{tmp_path / 'i.tar'}:v1"
    subprocess.run(
        ["skopeo", "--insecure-policy", "copy", "-q", reference, archive],
        check=True,
        timeout=PATIENCE,
    )
    with images.open_image(archive) as image:
        root = images.as_directory(image, tmp_path, cache=cache)
        assert (root / "etc" / "name").read_bytes() == b"guest\n"


def test_directory_is_used_as_it_is(tmp_path: Path) -> None:
    image = images.open_image(f"dir:{tmp_path}")
    assert image.digest is None
    assert image.layers == ()
    assert image.config == images.ImageConfig()
    assert images.as_directory(image, tmp_path) == tmp_path


# -- bad input: one clear error, nothing left ------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("oci:{0}/none:t", "no image directory"),
        ("oci:{0}:t", "not an OCI layout"),
        ("oci-archive:{0}/none.tar", "is missing"),
        ("oci-archive:{0}", "not a regular file"),
        ("dir:{0}/none", "no directory"),
        ("dir:/", "host's own root"),
    ],
)
def test_what_is_not_there(tmp_path: Path, reference: str, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        images.open_image(reference.format(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "index.json has values nested too deep$"),
        (b'{"a":' * 100_000, "index.json has values nested too deep$"),
        (b"9" * 5000, "index.json is not valid JSON: a number of 5000 digits$"),
        (b'{"manifests": [NaN]}', "not valid JSON: NaN, which"),
        (b"[]", "not a JSON object"),
        (b"{}", "no list manifests"),
        (b'{"manifests": []}', "lists no image"),
        (b'{"manifests": [1]}', "lacks a descriptor"),
        (b'{"manifests": [{"mediaType": "x", "size": 1}]}', "lacks mediaType, digest or size"),
        (
            b'{"manifests": [{"mediaType": "x", "digest": "sha256:../../etc/passwd", "size": 1}]}',
            "sha256 or sha512 digest",
        ),
        (b" " * (5 << 20), "more than"),
    ],
)
def test_broken_index(tmp_path: Path, content: bytes, message: str) -> None:
    reference = factory.make_layout(tmp_path / "i", [SMALL])
    (tmp_path / "i" / "index.json").write_bytes(content)
    with pytest.raises(ImageError, match=message):
        images.open_image(reference)


def _drop_diff_id(_: dict[str, Any], config: dict[str, Any]) -> None:
    config["rootfs"]["diff_ids"] = []


def _unknown(manifest: dict[str, Any], _: dict[str, Any]) -> None:
    manifest["layers"][0]["mediaType"] = "application/x-squashfs"


def _artifact(manifest: dict[str, Any], _: dict[str, Any]) -> None:
    manifest["config"] = {**manifest["layers"][0], "mediaType": "application/vnd.oci.empty.v1+json"}


def _negative(manifest: dict[str, Any], _: dict[str, Any]) -> None:
    manifest["layers"][0]["size"] = -1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop_diff_id, "1 layers but config 0 diff_ids"),
        (_unknown, "unsupported type"),
        (_artifact, "other artifact"),
        (_negative, "size -1"),
    ],
)
def test_broken_manifest(
    tmp_path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None], message: str
) -> None:
    with pytest.raises(ImageError, match=message):
        images.open_image(factory.make_layout(tmp_path / "i", [SMALL], change=change))


def _blobs(path: Path) -> list[Path]:
    return sorted((path / "blobs" / "sha256").iterdir())


def test_each_damaged_blob_is_noticed(tmp_path: Path, cache: images.Cache) -> None:
    reference = factory.make_layout(tmp_path / "good", [SMALL])
    for number, blob in enumerate(_blobs(tmp_path / "good")):
        for way in ("flip", "cut", "gone", "fifo"):
            copy = tmp_path / f"{number}-{way}"
            shutil.copytree(tmp_path / "good", copy)
            victim = copy / blob.relative_to(tmp_path / "good")
            data = victim.read_bytes()
            victim.unlink()
            if way == "flip":
                victim.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
            elif way == "cut":
                victim.write_bytes(data[:-1])
            elif way == "fifo":
                os.mkfifo(victim)
            with pytest.raises(ImageError, match="sha256"):
                images.as_directory(images.open_image(f"oci:{copy}:t"), tmp_path, cache=cache)
            assert nothing_left(cache)
    assert images.open_image(reference).config.cmd == ("sh",)


def test_wrong_diff_id(tmp_path: Path, cache: images.Cache) -> None:
    def change(_: dict[str, Any], config: dict[str, Any]) -> None:
        config["rootfs"]["diff_ids"] = ["sha256:" + "0" * 64]

    image = images.open_image(factory.make_layout(tmp_path / "i", [SMALL], change=change))
    with pytest.raises(ImageError, match="diff_id"):
        images.as_disk(image, tmp_path, cache=cache)


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_truncated_compression_with_a_right_digest(
    tmp_path: Path, cache: images.Cache, compression: str
) -> None:
    layout = factory.Layout(tmp_path / "i")

    def change(manifest: dict[str, Any], _: dict[str, Any]) -> None:
        cut = factory.compress(SMALL, compression)[:-5]
        manifest["layers"] = [layout.blob(manifest["layers"][0]["mediaType"], cut)]

    layout.index(layout.image([SMALL], compression=compression, change=change))
    with pytest.raises(ImageError, match=r"damaged|zstd"):
        images.as_directory(images.open_image(f"oci:{layout.path}"), tmp_path, cache=cache)


@pytest.mark.parametrize("compression", ["", "gzip", "zstd"])
def test_layer_that_unpacks_to_too_much(
    tmp_path: Path, cache: images.Cache, compression: str
) -> None:
    bomb = factory.layer([factory.member("bomb", bytes(64 << 20))])
    image = images.open_image(factory.make_layout(tmp_path / "i", [bomb], compression=compression))
    with pytest.raises(ImageError, match="more than the image's limit"):
        images.as_directory(image, tmp_path, cache=cache, limits=images.Limits(bytes=1 << 20))


def test_too_many_entries(tmp_path: Path, cache: images.Cache) -> None:
    many = factory.layer([factory.member(f"f{number}") for number in range(101)])
    image = images.open_image(factory.make_layout(tmp_path / "i", [many]))
    with pytest.raises(ImageError, match="more than 100 entries"):
        images.as_directory(image, tmp_path, cache=cache, limits=images.Limits(entries=100))


def test_index_json_of_a_symlink_loop(tmp_path: Path) -> None:
    reference = factory.make_layout(tmp_path / "i", [SMALL])
    (tmp_path / "i" / "index.json").unlink()
    (tmp_path / "i" / "index.json").symlink_to("index.json")
    with pytest.raises(ImageError, match="cannot be opened"):
        images.open_image(reference)


def test_layout_of_an_unknown_version(tmp_path: Path) -> None:
    reference = factory.make_layout(tmp_path / "i", [SMALL])
    (tmp_path / "i" / "oci-layout").write_text(json.dumps({"imageLayoutVersion": "2.0"}))
    with pytest.raises(ImageError, match="version"):
        images.open_image(reference)


def test_compressed_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(gzip.compress(SMALL))
    with pytest.raises(ImageError, match="compressed"):
        images.open_image(f"oci-archive:{tmp_path / 'a.tar'}")
