"""The guest's memory as QEMU shares it: regions of a memfd, addressed in two ways.

Descriptors carry guest-physical addresses (the guest writes them: hostile), ring addresses are
QEMU's own virtual ones (computed from what the guest wrote: hostile too). Both become views of the
mapping only after a bounds check here. Imports the standard library only.
"""

import mmap
import os
import struct
from typing import Final

MAX_REGIONS: Final = 8
"""VHOST_USER_MAX_RAM_SLOTS without the configurable-slots protocol feature."""

_TABLE: Final = struct.Struct("<II")
_REGION: Final = struct.Struct("<QQQQ")


class GuestMemoryError(Exception):
    """An address or length lies outside what QEMU shares. The message names both."""


class GuestMemory:
    """Maps the regions of one SET_MEM_TABLE message. Never resized: a new table is a new object."""

    __slots__ = ("_by_guest", "_by_qemu")

    def __init__(self, table: bytes, fds: list[int]) -> None:
        """Map the regions of `table` (payload of VHOST_USER_SET_MEM_TABLE) from `fds`.

        The fds stay the caller's. GuestMemoryError when the table is malformed, names more than
        MAX_REGIONS, or claims more than its files hold (touching that would be SIGBUS).
        """
        regions = []
        for guest_start, size, qemu_start, offset, fd in _parse(table, fds):
            held = os.fstat(fd).st_size
            if size == 0 or offset + size > held:
                raise GuestMemoryError(
                    f"memory region at {guest_start:#x}: {size:#x} bytes at offset {offset:#x} "
                    f"of a file of {held:#x}"
                )
            try:
                mapped = mmap.mmap(fd, size + offset)
            except (OSError, OverflowError, ValueError) as error:
                raise GuestMemoryError(
                    f"cannot map memory region at {guest_start:#x} ({size:#x} bytes): {error}"
                ) from error
            regions.append((guest_start, qemu_start, size, memoryview(mapped)[offset:]))
        regions.sort(key=lambda region: -region[2])  # nearly all addresses are in the largest one
        self._by_guest = [(guest, size, view) for guest, _, size, view in regions]
        self._by_qemu = [(qemu, size, view) for _, qemu, size, view in regions]

    def view(self, address: int, length: int) -> memoryview:
        """The `length` bytes at guest-physical `address`, or GuestMemoryError."""
        for start, size, region in self._by_guest:
            offset = address - start
            if 0 <= offset <= size - length:
                return region[offset : offset + length]
        raise GuestMemoryError(f"guest address {address:#x}+{length:#x} is outside its memory")

    def view_qemu(self, address: int, length: int) -> memoryview:
        """The `length` bytes at `address` of QEMU's address space, or GuestMemoryError."""
        for start, size, region in self._by_qemu:
            offset = address - start
            if 0 <= offset <= size - length:
                return region[offset : offset + length]
        raise GuestMemoryError(f"ring address {address:#x}+{length:#x} is outside shared memory")


def _parse(table: bytes, fds: list[int]) -> list[tuple[int, int, int, int, int]]:
    if len(table) < _TABLE.size:
        raise GuestMemoryError(f"memory table of {len(table)} bytes")
    regions, _padding = _TABLE.unpack_from(table)
    if not 1 <= regions <= MAX_REGIONS:
        raise GuestMemoryError(f"memory table of {regions} regions, at most {MAX_REGIONS}")
    if len(fds) != regions or len(table) < _TABLE.size + regions * _REGION.size:
        raise GuestMemoryError(
            f"memory table of {regions} regions in {len(table)} bytes with {len(fds)} descriptors"
        )
    entries = _REGION.iter_unpack(table[_TABLE.size : _TABLE.size + regions * _REGION.size])
    return [(*entry, fd) for entry, fd in zip(entries, fds, strict=True)]
