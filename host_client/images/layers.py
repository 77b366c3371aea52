"""Layers out of a layout: verified, decompressed once into a plain tar file, never into memory."""

import hashlib
import os
import tempfile
import zlib
from collections.abc import Iterator
from typing import IO, BinaryIO, Protocol

from host_client.errors import ImageError
from host_client.images import limits
from host_client.images.command import require_command, run_command
from host_client.images.layout import Extent, Layout, blob_path
from host_client.images.manifest import Layer


def spool_layer(layout: Layout, layer: Layer, directory: str, room: int) -> BinaryIO:
    """Write the layer's tar archive to an unnamed file in `directory` and return it open.

    Raises ImageError when the blob's size or digest, or the archive's diff_id, is not as the image
    says, when the compressed stream is damaged, or when it holds more than `room` bytes.
    """
    spool = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - the caller closes it
    try:
        sink = _Sink(spool, layer, room)
        with layout.open(blob_path(layer.blob.digest)) as extent:
            chunks = _verified_chunks(layout, layer, extent)
            if layer.compression == "gzip":
                _gunzip(layer, chunks, sink)
            elif layer.compression == "zstd":
                _unzstd(chunks, sink, directory)
            else:
                for chunk in chunks:
                    sink.write(chunk)
        sink.check_diff_id()
        spool.flush()
    except BaseException:
        spool.close()
        raise
    return spool


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


def _new_hash(digest: str) -> tuple[_Hash, str]:
    algorithm, _, expected = digest.partition(":")
    return hashlib.new(algorithm), expected


class _Sink:
    """The spool file, with a bound on its size and the digest of what it holds."""

    def __init__(self, spool: IO[bytes], layer: Layer, room: int) -> None:
        self._spool = spool
        self._layer = layer
        self._room = room
        self._hash, self._expected = _new_hash(layer.diff_id)

    def write(self, data: bytes) -> None:
        self._room -= len(data)
        if self._room < 0:
            raise ImageError(
                f"layer {self._layer.blob.digest} unpacks to more than the image's limit allows"
            )
        self._hash.update(data)
        self._spool.write(data)

    def check_diff_id(self) -> None:
        actual = self._hash.hexdigest()
        if actual != self._expected:
            raise ImageError(
                f"layer {self._layer.blob.digest} is not what the image's config says "
                f"once unpacked: its diff_id ends in {actual[-12:]}, not {self._expected[-12:]}"
            )


def _verified_chunks(layout: Layout, layer: Layer, extent: Extent) -> Iterator[bytes]:
    """The blob's bytes; the last step raises ImageError when their digest was wrong."""
    if extent.length != layer.blob.size:
        raise ImageError(
            f"{layout.name}: layer {layer.blob.digest} has {extent.length} bytes, not "
            f"{layer.blob.size}"
        )
    digest, expected = _new_hash(layer.blob.digest)
    position, end = extent.start, extent.start + extent.length
    while position < end:
        chunk = os.pread(extent.fd, min(limits.CHUNK_BYTES, end - position), position)
        if not chunk:
            break
        digest.update(chunk)
        position += len(chunk)
        yield chunk
    if digest.hexdigest() != expected:
        raise ImageError(
            f"{layout.name}: layer {layer.blob.digest} is corrupt: its digest ends in "
            f"{digest.hexdigest()[-12:]}"
        )


def _gunzip(layer: Layer, chunks: Iterator[bytes], sink: _Sink) -> None:
    """One or more gzip members (RFC 1952), as parallel compressors write them."""
    stream = zlib.decompressobj(wbits=31)
    fault = ""
    for data in chunks:
        try:
            stream = _gunzip_chunk(stream, data, sink) if not fault else stream
        except zlib.error as error:
            fault = str(error)  # read on: a wrong digest, found at the blob's end, explains more
    if fault or not stream.eof:
        raise ImageError(
            f"layer {layer.blob.digest} is damaged: {fault or 'its gzip stream is cut short'}"
        )


def _gunzip_chunk(stream: "zlib._Decompress", data: bytes, sink: _Sink) -> "zlib._Decompress":
    """Write what `data` unpacks to, a chunk at a time; return the stream to go on with."""
    while True:
        if stream.eof and data:
            stream = zlib.decompressobj(wbits=31)
        out = stream.decompress(data, limits.CHUNK_BYTES)
        sink.write(out)
        data = stream.unused_data if stream.eof else stream.unconsumed_tail
        if not data and (stream.eof or len(out) < limits.CHUNK_BYTES):
            return stream


def _unzstd(chunks: Iterator[bytes], sink: _Sink, directory: str) -> None:
    """By the zstd command: it is on every Linux, a module for it is not before Python 3.14."""
    zstd = require_command("zstd")
    with tempfile.TemporaryFile(dir=directory) as verified:
        for chunk in chunks:
            verified.write(chunk)
        verified.seek(0)

        def drain(pipe: IO[bytes]) -> None:
            while data := pipe.read(limits.CHUNK_BYTES):
                sink.write(data)

        run_command([zstd, "-d", "-c", "-q", "--no-progress"], stdin=verified, drain=drain)
