"""What a stranger's image may cost: memory, steps, bytes and time, each with a small input.

Memory is measured in a child process, against what an honest image takes there. Work is counted in
steps of the budget and never in seconds, which depend on who else is at work.
"""

import dataclasses
import gzip
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import imagefactory as factory
import pytest
from imagefactory import directory, hard_link, layer, member, symlink

from microguest.errors import ImageError
from microguest.host_client import images
from microguest.host_client.images import export
from microguest.host_client.images import limits as image_limits

SMALL = layer([directory("etc"), member("etc/name", b"guest\n")])
ROOM = 64 << 10  # KiB above an honest image that are nobody's fault: allocators, chunks in flight

PREPARE = r"""
import re, sys
from microguest.host_client import images
from microguest.errors import ImageError
said = "done"
try:
    with images.open_image(sys.argv[1]) as image:
        cache = images.Cache(sys.argv[2])
        getattr(images, sys.argv[3])(image, sys.argv[2], cache=cache)
except ImageError as error:
    said = str(error)
# Not getrusage: its peak includes that of the parent, whose memory a child shares until it execs.
print(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1])
print(said)
"""


@pytest.fixture
def cache(tmp_path: Path) -> images.Cache:
    return images.Cache(str(tmp_path / "cache"))


def prepared(reference: str, tmp_path: Path, how: str = "as_disk") -> tuple[int, str]:
    """Peak of resident KiB of a process that prepares the image, and what came of it."""
    command = [sys.executable, "-c", PREPARE, reference, str(tmp_path / "cache"), how]
    done = subprocess.run(
        command, cwd=factory.PROJECT, check=True, capture_output=True, text=True, timeout=300
    )
    peak, _, said = done.stdout.partition("\n")
    return int(peak), said.strip()


@pytest.fixture
def honest(tmp_path: Path) -> int:
    """The peak for a small honest image."""
    peak, said = prepared(factory.make_layout(tmp_path / "honest", [SMALL]), tmp_path)
    assert said == "done"
    return peak


# -- what is retained ------------------------------------------------------------------------


def test_large_xattrs_of_one_entry(tmp_path: Path, honest: int) -> None:
    """Each header has less than the most that one may have, and the layer has 200."""
    value = {f"user.{number}": bytes(60_000) for number in range(17)}
    files = (member(f"f{number}", b"", xattrs=value) for number in range(200))
    reference = factory.make_layout(tmp_path / "i", [layer(list(files))])
    peak, said = prepared(reference, tmp_path)
    assert "bytes of extended attributes" in said
    assert "layer sha256:" in said
    assert "in the header at byte" in said
    assert peak < honest + ROOM


def test_xattrs_of_all_entries(tmp_path: Path, honest: int) -> None:
    """No entry has too many; all together would fill the memory."""
    files = [
        member(f"f{number}", b"", xattrs={"user.a": b"%06d" % number + bytes(60_000)})
        for number in range(2_600)
    ]
    reference = factory.make_layout(tmp_path / "i", [layer(files)])
    peak, said = prepared(reference, tmp_path)
    assert "of names, link targets, extended attributes" in said
    assert "entry 'f2" in said
    assert peak < honest + ROOM + (128 << 10)


def test_equal_xattrs_are_kept_once(tmp_path: Path, cache: images.Cache) -> None:
    """An SELinux label stands on each file of some images."""
    label = {"security.selinux": b"system_u:object_r:usr_t:s0\0"}
    files = [member(f"f{number}", b"", xattrs=label) for number in range(200)]
    reference = factory.make_layout(tmp_path / "i", [layer(files)])
    with images.open_image(reference) as image:
        images.as_disk(image, tmp_path, cache=cache, limits=images.Limits(text=2_000))


def test_long_targets_of_all_entries(tmp_path: Path, cache: images.Cache) -> None:
    links = [symlink(f"l{number}", "t" * 4000) for number in range(30)]
    image = images.open_image(factory.make_layout(tmp_path / "i", [layer(links)]))
    with pytest.raises(ImageError, match=r"layer sha256:.*entry 'l24'.*link targets"):
        images.as_disk(image, tmp_path, cache=cache, limits=images.Limits(text=100_000))


def test_directory_of_many_files_with_long_paths(tmp_path: Path, honest: int) -> None:
    """Their names are short, and each path has 4 KiB: never all of them at once."""
    deep = "/".join(["d" * 250] * 15)
    files = [member(f"l/f{number}", b"") for number in range(20_000)]
    reference = factory.make_layout(
        tmp_path / "i", [layer([member(f"{deep}/x", b""), symlink("l", deep), *files])]
    )
    peak, said = prepared(reference, tmp_path)
    assert said == "done"
    assert peak < honest + ROOM


@pytest.mark.parametrize(
    "document",
    ['{"manifests": [%s0]}' % ("[]," * 1_390_000), '{"a": [%s0]}' % ('{"":0},' * 590_000)],
)
def test_index_of_very_many_values(tmp_path: Path, honest: int, document: str) -> None:
    reference = factory.make_layout(tmp_path / "i", [SMALL])
    (tmp_path / "i" / "index.json").write_text(document)
    peak, said = prepared(reference, tmp_path)
    assert "values in it" in said
    assert peak < honest + ROOM


def test_archive_of_very_many_members(tmp_path: Path, honest: int) -> None:
    """Its list of members is bounded, and one that is longer is refused, not cut."""
    archive = tmp_path / "a.tar"
    name = "n" * 4000 + "%d"
    with tarfile.open(archive, "w", format=tarfile.GNU_FORMAT) as tar:
        for number in range(32_000):
            tar.addfile(tarfile.TarInfo(name % number))
    peak, said = prepared(f"oci-archive:{archive}", tmp_path)
    assert "more than" in said
    assert peak < honest + ROOM + (128 << 10)


# -- what is walked --------------------------------------------------------------------------


def refused(tmp_path: Path, data: bytes, **bounds: int) -> str:
    image = images.open_image(factory.make_layout(tmp_path / "i", [data]))
    with pytest.raises(ImageError) as caught:
        images.as_disk(
            image,
            tmp_path,
            cache=images.Cache(str(tmp_path / "cache")),
            limits=images.Limits(**bounds),
        )
    assert not os.listdir(tmp_path / "cache" / "tmp")
    return str(caught.value)


def test_path_through_links_of_many_names(tmp_path: Path) -> None:
    """39 links of 1,600 names each: 62,400 for one entry."""
    links = [symlink(f"l{number}", "x/../" * 800 + f"l{number + 1}") for number in range(39)]
    data = layer([directory("x"), *links, directory("l39"), member("l0/f", b"")])
    said = refused(tmp_path, data)
    assert "path 'l0' leads through too many symlinks, or more than 4096 names" in said


def test_links_of_many_names_in_each_entry(tmp_path: Path) -> None:
    """What one path may take, in entry after entry."""
    files = [member(f"l/f{number}", b"") for number in range(100)]
    data = layer([directory("x"), symlink("l", "x/../" * 790), *files])
    said = refused(tmp_path, data, steps=20_000)
    assert "entry 'l/f" in said
    assert "more than 20000 steps" in said


def test_names_of_slashes(tmp_path: Path) -> None:
    files = [member("/" * 4000 + f"f{number}", b"") for number in range(20)]
    assert "more than 20000 steps" in refused(tmp_path, layer(files), steps=20_000)


@pytest.mark.parametrize("whiteout", ["d/.wh..wh..opq", ".wh.d"])
def test_whiteouts_repeated_over_a_large_directory(
    tmp_path: Path, cache: images.Cache, whiteout: str
) -> None:
    """A thousand times a thousand files would be a million steps."""
    files = [directory("d"), *(member(f"d/f{number}", b"") for number in range(1000))]
    data = layer([*files, *(member(whiteout, b"") for _ in range(1000))])
    with images.open_image(factory.make_layout(tmp_path / "i", [data])) as image:
        images.as_disk(image, tmp_path, cache=cache, limits=images.Limits(steps=50_000))


def test_whiteouts_in_very_many_layers(tmp_path: Path) -> None:
    """A layer may go over a directory once; 256 layers may not go over everything."""
    below = layer([directory("d"), *(member(f"d/f{number}", b"") for number in range(1000))])
    again = layer(
        [*(member(f"d/f{number}", b"") for number in range(1000)), member("d/.wh..wh..opq")]
    )
    layout = factory.Layout(tmp_path / "i")
    layout.index(layout.image([below, *[again] * 20]))
    cache = images.Cache(str(tmp_path / "cache"))
    with pytest.raises(ImageError, match="more than 100000 steps"):
        images.as_disk(
            images.open_image(f"oci:{layout.path}"),
            tmp_path,
            cache=cache,
            limits=images.Limits(steps=100_000),
        )


def test_very_many_pax_records(tmp_path: Path) -> None:
    info = tarfile.TarInfo("f")
    records = b"5 a=\n" * 20_000
    extended = tarfile.TarInfo("x")
    extended.type = tarfile.XHDTYPE
    extended.size = len(records)
    buffer = io.BytesIO()
    for _ in range(5):
        buffer.write(extended.tobuf(tarfile.USTAR_FORMAT))
        buffer.write(records + bytes(-len(records) % 512))
    buffer.write(info.tobuf(tarfile.USTAR_FORMAT) + bytes(1024))
    assert "more than 50000 steps" in refused(tmp_path, buffer.getvalue(), steps=50_000)


def test_layer_of_empty_compressed_streams(tmp_path: Path, cache: images.Cache) -> None:
    layout = factory.Layout(tmp_path / "i")

    def change(manifest: dict[str, list[dict[str, object]]], _: object) -> None:
        blob = gzip.compress(b"") * 5_000 + gzip.compress(SMALL)
        manifest["layers"] = [layout.blob(str(manifest["layers"][0]["mediaType"]), blob)]

    layout.index(layout.image([SMALL], change=change))
    image = images.open_image(f"oci:{layout.path}")
    with pytest.raises(ImageError, match="more than 50000 steps"):
        images.as_disk(image, tmp_path, cache=cache, limits=images.Limits(steps=50_000))
    with image:
        images.as_disk(image, tmp_path, cache=cache)


# -- what is written -------------------------------------------------------------------------


def test_deep_paths(tmp_path: Path) -> None:
    """A name of 4 KiB implies 2,000 directories, whose paths have 4 MiB."""
    assert "'f'" not in (said := refused(tmp_path, layer([member("a/" * 2000 + "f")])))
    assert "is more than 256 directories deep" in said


def test_implied_directories_are_entries(tmp_path: Path) -> None:
    files = [member(f"{number}/" * 90 + "f") for number in range(4)]
    said = refused(tmp_path, layer(files), entries=300)
    assert "entry '3/3/" in said
    assert "more than 300 entries" in said


def test_paths_that_add_up(tmp_path: Path) -> None:
    deep = "/".join(["d" * 250] * 15)
    files = [member(f"l/f{number}", b"") for number in range(100)]
    data = layer([member(f"{deep}/x", b""), symlink("l", deep), *files])
    said = refused(tmp_path, data, paths=100_000)
    assert "paths of the image have more than 97 KiB" in said
    assert "file 'dddd" in said


@pytest.mark.parametrize("how", ["as_disk", "as_directory"])
def test_hard_links_of_one_file(
    tmp_path: Path, cache: images.Cache, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as may be, in the merged root: the layer's own names that went again do not count."""
    monkeypatch.setattr(image_limits, "MAX_LINKS", 100)
    names = [hard_link(f"d{number % 7}/l{number}", "f") for number in range(100)]
    fits = [member("f", b"x"), *names, member("d0/l0", b"another")]
    with images.open_image(factory.make_layout(tmp_path / "i", [layer(fits)])) as image:
        getattr(images, how)(image, tmp_path, cache=cache)
    reference = factory.make_layout(tmp_path / "j", [layer([*fits, hard_link("last", "f")])])
    with (
        images.open_image(reference) as image,
        pytest.raises(ImageError, match=r"file 'last': it is hard link 101 to .* 100 names: make"),
    ):
        getattr(images, how)(image, tmp_path, cache=cache)


def test_names_of_one_directory(tmp_path: Path, cache: images.Cache) -> None:
    """The maker of a disk compares each with all others; a directory is made without that."""
    data = layer([member(f"d/f{number}", b"") for number in range(3000)])
    said = refused(tmp_path, data, steps=40_000)
    assert "directory 'd' has 3000 names" in said
    assert "spread them over more directories, or boot it with --machine namespaces" in said
    with images.open_image(f"oci:{tmp_path}/i") as image:
        images.as_directory(image, tmp_path, cache=cache, limits=images.Limits(steps=40_000))


@pytest.mark.parametrize(
    "entry",
    [
        lambda number: directory(f"d{number}"),
        lambda number: member(f"f{number}", b"x"),
        lambda number: symlink(f"l{number}", "x" * 100),
        lambda number: member(f"a{number}", b"", xattrs={"user.a": b"x" * 200}),
    ],
    ids=["directory", "file", "link", "attribute"],
)
def test_what_takes_a_block_is_charged_for_one(
    tmp_path: Path,
    cache: images.Cache,
    entry: Callable[[int], tuple[tarfile.TarInfo, bytes]],
) -> None:
    """Of a host's file system; a disk of ours packs what is small."""
    count, block = 1500, 4096
    reference = factory.make_layout(tmp_path / "i", [layer([entry(n) for n in range(count)])])
    with images.open_image(reference) as image:
        with pytest.raises(ImageError, match="more than the 5 MiB"):
            images.as_directory(image, tmp_path, cache=cache, limits=images.Limits(bytes=5 << 20))
        enough = images.Limits(bytes=count * 2 * block + (1 << 20))
        images.as_directory(image, tmp_path, cache=cache, limits=enough)


def test_links_to_a_file_of_a_large_directory(tmp_path: Path) -> None:
    """Each takes the maker of a disk through all names of the other directory again."""
    files = [member(f"d/f{number}", b"") for number in range(3000)]
    links = [hard_link(f"e{number}/l", "d/f0") for number in range(1000)]
    said = refused(tmp_path, layer([*files, *links]), steps=85_000)
    assert "a hard link to 'd/f0' in a large directory: image takes more than 85000 steps" in said


def test_directories_of_an_honest_size_cost_little(tmp_path: Path, cache: images.Cache) -> None:
    """Where 100,000 files are in 100 directories, comparing is a tenth of what reading takes."""
    files = [member(f"d{number % 10}/f{number}", b"") for number in range(5_000)]
    with images.open_image(factory.make_layout(tmp_path / "i", [layer(files)])) as image:
        images.as_disk(image, tmp_path, cache=cache, limits=images.Limits(steps=50_000))


def test_more_owners_than_a_squashfs_holds(
    tmp_path: Path, cache: images.Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    factory.require("sqfstar")
    monkeypatch.setattr(export, "SQUASHFS", dataclasses.replace(export.SQUASHFS, owners=20))
    files = [member(f"f{number:02}", b"", owner=(number, 1000 + number)) for number in range(11)]
    reference = factory.make_layout(tmp_path / "i", [layer(files)])
    with images.open_image(reference) as image:
        with pytest.raises(ImageError, match=r"file 'f10': .* more than 20 different users"):
            images.as_disk(image, tmp_path, cache=cache, fstype="squashfs")
        images.as_directory(image, tmp_path, cache=cache)


def test_as_many_owners_as_a_squashfs_holds(tmp_path: Path, cache: images.Cache) -> None:
    factory.require("sqfstar")
    owners = iter(range(image_limits.MAX_OWNERS))
    pairs = list(itertools.zip_longest(owners, owners, fillvalue=0))
    files = [
        member(f"d{number // 500}/f{number}", b"", owner=pair) for number, pair in enumerate(pairs)
    ]
    with images.open_image(factory.make_layout(tmp_path / "i", [layer(files)])) as image:
        images.as_disk(image, tmp_path, cache=cache, fstype="squashfs")


def test_files_of_one_size_are_not_compared(tmp_path: Path, cache: images.Cache) -> None:
    """sqfstar's search for duplicates takes time by the square of their number."""
    factory.require("sqfstar")
    same = os.urandom(200_000)
    sizes = []
    for name, contents in (("i", [same] * 8), ("j", [os.urandom(200_000) for _ in range(8)])):
        data = layer([member(f"f{number}", data) for number, data in enumerate(contents)])
        with images.open_image(factory.make_layout(tmp_path / name, [data])) as image:
            disk = images.as_disk(image, tmp_path, cache=cache, fstype="squashfs")
            sizes.append(disk.path.stat().st_size)
    assert sizes[0] > 0.5 * sizes[1]


def test_holes_are_written_and_count(tmp_path: Path) -> None:
    """A kilobyte of a layer can say that its file has an exbibyte."""
    header = bytearray(tarfile.TarInfo("hole").tobuf(tarfile.GNU_FORMAT)[:512])
    header[156:157] = b"S"
    header[483:495] = b"\x80" + (1 << 60).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    said = refused(tmp_path, bytes(header) + bytes(1024))
    assert "file 'hole'" in said
    assert "holes included" in said


def test_deadline_of_the_whole(tmp_path: Path) -> None:
    assert "not ready after 0 s" in refused(tmp_path, SMALL, seconds=0)


def test_deepest_tree_is_made_and_removed(tmp_path: Path, cache: images.Cache) -> None:
    """Also where its paths, below the cache's, are longer than a system call takes."""
    factory.require("tar")
    data = layer([member("/".join(["d" * 14] * 256) + "/f", b"")])
    with images.open_image(factory.make_layout(tmp_path / "i", [data])) as image:
        root = images.as_directory(image, tmp_path, cache=cache)
        assert sum(1 for _ in _walk(root)) == 257
    one = images.Cache(cache.directory, 0)
    with images.open_image(factory.make_layout(tmp_path / "j", [SMALL])) as image:
        images.as_directory(image, tmp_path, cache=one)
    assert not root.exists()


def _walk(root: Path) -> Iterator[str]:
    for _, directories, files, _ in os.fwalk(root):
        yield from directories
        yield from files


def test_docs_name_every_bound() -> None:
    from microguest.host_client.images import limits

    page = (factory.PROJECT / "docs" / "design" / "images.md").read_text()
    section = page[page.index("## Limits") : page.index("## What an image's config does")]
    bounds = [name for name in dir(limits) if name.isupper() and name != "DEFAULT_LIMITS"]
    fields = list(json.loads(json.dumps(images.Limits.__annotations__, default=str)))
    missing = [name for name in (*bounds, *fields) if f"`{name}`" not in section]
    assert missing == []


def test_index_of_very_many_images(tmp_path: Path) -> None:
    layout = factory.Layout(tmp_path / "i")
    image = layout.image([SMALL])
    layout.index(*[image] * 4097)
    with pytest.raises(ImageError, match="lists 4097 images, more than 4096"):
        images.open_image(f"oci:{layout.path}")


def test_error_for_very_many_names_compares_a_few(tmp_path: Path) -> None:
    """Each name of each image with those of all others would be millions of calls."""
    layout = factory.Layout(tmp_path / "i")
    one, other = (layout.image([SMALL], config={"Cmd": [name]}) for name in "ab")
    layout.index(*[factory.tagged(one, f"x/y{number}:1") for number in range(2000)], other)
    calls = 0

    def count(frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        with pytest.raises(ImageError, match="several images"):
            images.open_image(f"oci:{layout.path}")
    finally:
        sys.setprofile(None)
    assert calls < 2_000_000
