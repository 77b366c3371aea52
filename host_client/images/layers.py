"""Layers out of a layout: verified, decompressed once into a plain tar file, never into memory.

How a layer is compressed is read from its first bytes: what a media type says of it is often wrong,
and docker archives say nothing.
"""

import hashlib
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, BinaryIO, Protocol

from microguest.host_client.errors import ImageError
from microguest.host_client.images import limits
from microguest.host_client.images.budget import Budget
from microguest.host_client.images.layout import Extent, Layout
from microguest.host_client.images.manifest import Layer
from microguest.host_client.images.tools import filtered, require_command, run_command

Told = Callable[[int], None]
"""Is told of so many bytes more that were read of a layer as it is stored."""


def spool_layer(
    layout: Layout, layer: Layer, directory: str, budget: Budget, told: Told
) -> BinaryIO:
    """Write the layer's tar archive to an unnamed file in `directory` and return it open.

    Raises ImageError when the blob's size or digest, or the archive's diff_id, is not as the image
    says, when the compressed stream is damaged, or when it holds more than the budget has left.
    """
    spool = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - the caller closes it
    try:
        sink = _Sink(spool, layer, budget)
        with layout.open(layer.path) as extent:
            compression = _compression(extent)
            chunks = _verified_chunks(layout, layer, extent, budget, told)
            if compression == "zstd":
                _unzstd(layer, chunks, sink, budget)
            elif compression:
                _unpack(layer, _UNPACKERS[compression], chunks, sink, budget)
            else:
                for chunk in chunks:
                    sink.write(chunk)
        sink.check_diff_id()
        spool.flush()
    except BaseException:
        spool.close()
        raise
    return spool


_MAGIC = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "bzip2": re.compile(rb"BZh[1-9]1AY&SY"),
}
_MAGIC_BYTES = 10


def _compression(extent: Extent) -> str:
    """ "" for a plain tar, and for what is none: its digests say which."""
    start = next(extent.chunks(), b"")[:_MAGIC_BYTES]
    return next((name for name, magic in _MAGIC.items() if magic.match(start)), "")


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


def _new_hash(digest: str) -> tuple[_Hash, str]:
    algorithm, _, expected = digest.partition(":")
    return hashlib.new(algorithm), expected


class _Sink:
    """The spool file, with a bound on its size and the digest of what it holds."""

    def __init__(self, spool: IO[bytes], layer: Layer, budget: Budget) -> None:
        self._spool = spool
        self._layer = layer
        self._budget = budget
        self._hash, self._expected = _new_hash(layer.diff_id)

    def write(self, data: bytes) -> None:
        self._budget.unpack(len(data))
        self._hash.update(data)
        self._spool.write(data)

    def check_diff_id(self) -> None:
        actual = self._hash.hexdigest()
        if actual != self._expected:
            raise ImageError(
                "it is not what the image's config says "
                f"once unpacked: its diff_id ends in {actual[-12:]}, not {self._expected[-12:]}"
            )


def _verified_chunks(
    layout: Layout, layer: Layer, extent: Extent, budget: Budget, told: Told
) -> Iterator[bytes]:
    """The blob's bytes; the last step raises ImageError when their digest was wrong.

    Without a blob's digest, as in a docker archive, the diff_id alone says what a layer is.
    """
    if layer.blob and extent.length != layer.blob.size:
        raise ImageError(f"it has {extent.length} bytes, not {layer.blob.size}, in {layout.name}")
    budget.store(extent.length)  # of which a sparse file may hold next to nothing
    digest, expected = _new_hash(layer.blob.digest) if layer.blob else (None, "")
    for chunk in extent.chunks():
        budget.seconds_left()
        if digest:
            digest.update(chunk)
        told(len(chunk))
        yield chunk
    if digest and digest.hexdigest() != expected:
        raise ImageError(
            f"it is corrupt in {layout.name}: its digest ends in {digest.hexdigest()[-12:]}"
        )


# -- decompression ---------------------------------------------------------------------------


class _Unpacker(Protocol):
    """One compressed stream, as lzma and bz2 have it."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gzip:
    """zlib's object in the form of the others."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(wbits=31)
        self._full = False

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def needs_input(self) -> bool:
        return not self._stream.unconsumed_tail and not self._full

    @property
    def unused_data(self) -> bytes:
        return self._stream.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        out = self._stream.decompress(self._stream.unconsumed_tail or data, max_length)
        self._full = len(out) == max_length
        return out


def _xz() -> _Unpacker:
    import lzma  # a Python may have been built without it, and few layers need it

    return lzma.LZMADecompressor(memlimit=limits.UNPACKER_MEMORY)


def _bzip2() -> _Unpacker:
    import bz2

    return bz2.BZ2Decompressor()


_UNPACKERS: dict[str, Callable[[], _Unpacker]] = {"gzip": _Gzip, "xz": _xz, "bzip2": _bzip2}


def _unpack(
    layer: Layer,
    new: Callable[[], _Unpacker],
    chunks: Iterator[bytes],
    sink: _Sink,
    budget: Budget,
) -> None:
    """One or more streams (as in RFC 1952, members), as parallel compressors write them."""
    stream = new()
    fault = ""
    for chunk in chunks:
        for at in range(0, len(chunk), limits.SPOOL_SLICE_BYTES):
            if fault:
                break
            stream, fault = _unpack_slice(
                stream, new, chunk[at : at + limits.SPOOL_SLICE_BYTES], sink, budget
            )
        if fault:
            _read_on(layer, chunks)
            break
    if fault or not stream.eof:
        raise ImageError(f"it is damaged: {fault or 'its compressed stream is cut short'}")


def _read_on(layer: Layer, chunks: Iterator[bytes]) -> None:
    """Behind a fault: a wrong digest, found at the blob's end, explains more."""
    if layer.blob:
        for _ in chunks:
            pass


def _unpack_slice(
    stream: _Unpacker, new: Callable[[], _Unpacker], data: bytes, sink: _Sink, budget: Budget
) -> tuple[_Unpacker, str]:
    """Write what `data` unpacks to; return the stream to go on with, and what is wrong with it."""
    while True:
        budget.step()
        if stream.eof:
            data = data.lstrip(b"\0")  # padding
            if not data:
                return stream, ""
            stream = new()
            budget.step(_STEPS_A_STREAM)
        try:
            out = stream.decompress(data, limits.CHUNK_BYTES)
        except Exception as error:  # noqa: BLE001 - each module has its own, bz2 OSError
            return stream, f"{error}"
        sink.write(out)
        data = stream.unused_data if stream.eof else b""
        if not stream.eof and stream.needs_input:
            return stream, ""


_STEPS_A_STREAM = 20  # what setting up a decompressor takes


def _unzstd(layer: Layer, chunks: Iterator[bytes], sink: _Sink, budget: Budget) -> None:
    """By the zstd command: it is on every Linux, a module for it is not before Python 3.14."""

    seconds = min(limits.COMMAND_SECONDS, budget.seconds_left())

    def exchange(stdin: IO[bytes], stdout: IO[bytes]) -> None:
        try:
            for data in filtered(chunks, stdin, stdout, seconds):
                sink.write(data)
        except BrokenPipeError:
            _read_on(layer, chunks)
            raise

    run_command(
        [require_command("zstd"), "-d", "-c", "-q", "--no-progress"],
        exchange=exchange,
        seconds=seconds,
    )
