"""manifest.json: what is written is read back, and what does not fit is named."""

import json

import pytest

from microguest.guest.bundle.manifest import SCHEMA, FileRecord, KernelModule, Manifest
from microguest.guest.errors import ManifestError

DIGEST = "0123456789abcdef" * 4
FILE = {"size": 1, "sha256": DIGEST}
VALID = {
    "schema": SCHEMA,
    "arch": "x86_64",
    "kernel_release": "6.1.0",
    "kernel_source": "linux-image.deb",
    "versions": {"cpython": "3.13.5"},
    "files": {"vmlinuz": FILE, "initramfs.cpio": FILE, "microguest": FILE},
    "modules": [{"name": "vsock", "file": "000-vsock.ko", "size": 7}],
}


def test_round_trip():
    manifest = Manifest.from_json(json.dumps(VALID))
    assert manifest.modules == (KernelModule(name="vsock", file="000-vsock.ko", size=7),)
    assert manifest.files["vmlinuz"] == FileRecord(size=1, sha256=DIGEST)
    assert json.loads(manifest.to_json()) == VALID
    assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"schema": SCHEMA + 1}, "schema"),
        ({"arch": 3}, "arch"),
        ({"files": {}}, "vmlinuz"),
        ({"files": {**VALID["files"], "vmlinuz": {"size": -1, "sha256": DIGEST}}}, "size"),
        ({"files": {**VALID["files"], "vmlinuz": {"size": 1, "sha256": "AB" * 32}}}, "sha256"),
        ({"files": {**VALID["files"], "../x": FILE}}, "../x"),
        ({"modules": [{"name": "a", "file": "b/c.ko", "size": 1}]}, "modules[0].file"),
        ({"modules": [{"name": "a", "file": "a.ko"}]}, "modules[0].size"),
        ({"modules": {"a": 1}}, "modules"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_bad_fields_are_named(change, named):
    with pytest.raises(ManifestError) as caught:
        Manifest.from_json(json.dumps({**VALID, **change}))
    assert named in str(caught.value)
    assert "manifest.json" in str(caught.value)


@pytest.mark.parametrize("missing", sorted(VALID))
def test_missing_fields_are_named(missing):
    with pytest.raises(ManifestError, match=missing):
        Manifest.from_json(json.dumps({key: VALID[key] for key in VALID if key != missing}))


@pytest.mark.parametrize("text", ["", "null", "[]", "{", b"\xff", "[" * 100_000])
def test_what_is_no_manifest_is_refused(text):
    with pytest.raises(ManifestError, match=r"manifest\.json"):
        Manifest.from_json(text)
