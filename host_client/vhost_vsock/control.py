"""The vhost-user conversation with QEMU: features, guest memory, rings, configuration.

QEMU is trusted not to be malicious, not to be right: sizes, indexes and descriptors are checked
all the same, because the guest chooses some of the numbers it passes on. The messages are those of
QEMU's docs/interop/vhost-user.rst. What rings carry is the device's business.
"""

import array
import os
import socket
import struct
from collections.abc import Callable
from select import EPOLLIN
from typing import Final, Protocol

from microguest.host_client.event_loop import EventLoop
from microguest.host_client.vhost_vsock.memory import MAX_REGIONS, GuestMemory, GuestMemoryError
from microguest.host_client.vhost_vsock.virtqueue import MAX_SIZE, Virtqueue, VirtqueueError

MAX_PAYLOAD: Final = 4096
"""Bytes of payload accepted; the largest message here, a memory table, has 264."""
CONFIG_SIZE: Final = 256
"""VHOST_USER_MAX_CONFIG_SIZE."""

F_INDIRECT: Final = 1 << 28
F_EVENT_INDEX: Final = 1 << 29
F_PROTOCOL: Final = 1 << 30
F_VERSION_1: Final = 1 << 32
FEATURES: Final = F_INDIRECT | F_EVENT_INDEX | F_PROTOCOL | F_VERSION_1

PF_REPLY_ACK: Final = 1 << 3
PF_CONFIG: Final = 1 << 9
PROTOCOL_FEATURES: Final = PF_REPLY_ACK | PF_CONFIG

_HEADER: Final = struct.Struct("<III")
_U64: Final = struct.Struct("<Q")
_STATE: Final = struct.Struct("<II")
_ADDRESSES: Final = struct.Struct("<IIQQQQ")
_CONFIG: Final = struct.Struct("<III")
_VERSION: Final = 1
_REPLY: Final = 4
_NEED_REPLY: Final = 8
_NO_FD: Final = 0x100


class ControlError(Exception):
    """QEMU sent a message that makes no sense here, or one that was never negotiated."""


class RingOwner(Protocol):
    """The device, as the control channel sees it."""

    rings: tuple[Virtqueue, ...]

    def ring_started(self, index: int, *, resumed: bool) -> None:
        """Ring `index` is mapped. `resumed`: it continues where it was stopped (a pause of the
        machine); otherwise the guest's driver starts afresh."""

    def ring_stopping(self, index: int) -> None:
        """Ring `index` is about to stop; what the guest has put there is still readable."""

    def control_ended(self, reason: str | None) -> None:
        """QEMU has closed the channel (None), or it is unusable because of `reason`."""


class ControlChannel:
    """Reads messages, acts on the rings, answers. One per device, for the device's whole life."""

    def __init__(
        self, loop: EventLoop, control: socket.socket, owner: RingOwner, config: bytes
    ) -> None:
        """Takes over `control`. `config`: the device's configuration space."""
        self._loop = loop
        self._control = control
        self._owner = owner
        self._config = config.ljust(CONFIG_SIZE, b"\0")
        self._memory: GuestMemory | None = None
        self._stopped_at: dict[int, int] = {}
        self._reply_ack = False
        self._buffer = bytearray()
        self._fds: list[int] = []
        self._handlers: dict[int, Callable[[bytes], bytes | None]] = {
            1: self._get_features,
            2: self._set_features,
            3: self._ignore,  # SET_OWNER: there is one owner, the other end of the socket
            4: self._ignore,  # RESET_OWNER: deprecated, documented as having no effect
            5: self._set_mem_table,
            8: self._set_vring_num,
            9: self._set_vring_addr,
            10: self._set_vring_base,
            11: self._get_vring_base,
            12: self._set_vring_kick,
            13: self._set_vring_call,
            14: self._ignore,  # SET_VRING_ERR: errors go to the machine's owner, not to QEMU
            15: self._get_protocol_features,
            16: self._set_protocol_features,
            17: self._get_queue_num,
            18: self._set_vring_enable,
            24: self._get_config,
            25: self._set_config,
        }
        control.setblocking(False)
        loop.add(control.fileno(), self._on_readable, EPOLLIN)

    def close(self) -> None:
        """Leave the loop, close the socket and whatever descriptors QEMU had passed."""
        if self._control.fileno() >= 0:
            self._loop.remove(self._control.fileno())
            self._control.close()
        for ring in self._owner.rings:
            if ring.kick is not None:
                self._loop.remove(ring.kick)
            ring.close()
        self._close_fds()
        self._memory = None

    # -- messages ------------------------------------------------------------------------------

    def _on_readable(self, _events: int) -> None:
        try:
            message = self._receive()
            if message is not None:
                self._handle(*message)
        except EOFError:
            self._owner.control_ended(None)
        except (ControlError, GuestMemoryError, VirtqueueError, OSError) as error:
            self._owner.control_ended(f"vhost-user channel to QEMU: {error}")
        except struct.error as error:
            self._owner.control_ended(f"vhost-user channel to QEMU: short message: {error}")

    def _receive(self) -> tuple[int, int, bytes] | None:
        """One whole message as (request, flags, payload), or None when its rest is still to come.

        Header and payload are received separately, so that descriptors, which come with the first
        byte of a message, are never those of the next one.
        """
        buffer = self._buffer
        if len(buffer) < _HEADER.size:
            self._receive_header()
            if len(buffer) < _HEADER.size:
                return None
        request, flags, size = _HEADER.unpack_from(buffer)
        if size > MAX_PAYLOAD or flags & 3 != _VERSION:
            raise ControlError(f"request {request} with flags {flags:#x} and {size} bytes")
        missing = _HEADER.size + size - len(buffer)
        if missing:
            try:
                data = self._control.recv(missing)
            except BlockingIOError:
                return None
            if not data:
                raise EOFError
            buffer += data
            if len(data) < missing:
                return None
        payload = bytes(buffer[_HEADER.size :])
        buffer.clear()
        return request, flags, payload

    def _receive_header(self) -> None:
        descriptors = array.array("i")
        try:
            data, ancillary, flags, _address = self._control.recvmsg(
                _HEADER.size - len(self._buffer),
                socket.CMSG_SPACE(MAX_REGIONS * descriptors.itemsize),
                socket.MSG_CMSG_CLOEXEC,
            )
        except BlockingIOError:
            return
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors.frombytes(content[: len(content) - len(content) % 4])
        self._fds.extend(descriptors)
        if flags & socket.MSG_CTRUNC:
            raise ControlError(f"more than {MAX_REGIONS} descriptors in one message")
        if not data:
            raise EOFError
        self._buffer += data

    def _handle(self, request: int, flags: int, payload: bytes) -> None:
        handler = self._handlers.get(request)
        try:
            if handler is not None:
                reply = handler(payload)
            elif flags & _NEED_REPLY and self._reply_ack:
                reply = _U64.pack(1)
            else:
                raise ControlError(f"unknown request {request}")
        finally:
            self._close_fds()
        if reply is None and flags & _NEED_REPLY and self._reply_ack:
            reply = _U64.pack(0)
        if reply is not None:
            header = _HEADER.pack(request, _VERSION | _REPLY, len(reply))
            self._control.sendall(header + reply)

    def _take_fd(self) -> int:
        if len(self._fds) != 1:
            raise ControlError(f"{len(self._fds)} descriptors where one belongs")
        return self._fds.pop()

    def _close_fds(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    # -- features and configuration ------------------------------------------------------------

    def _ignore(self, _payload: bytes) -> None:
        return None

    def _get_features(self, _payload: bytes) -> bytes:
        return _U64.pack(FEATURES)

    def _set_features(self, payload: bytes) -> None:
        features = _U64.unpack_from(payload)[0]
        if features & ~FEATURES:
            raise ControlError(f"features {features:#x} were not offered")
        for ring in self._owner.rings:
            ring.event_index = bool(features & F_EVENT_INDEX)

    def _get_protocol_features(self, _payload: bytes) -> bytes:
        return _U64.pack(PROTOCOL_FEATURES)

    def _set_protocol_features(self, payload: bytes) -> None:
        features = _U64.unpack_from(payload)[0]
        if features & ~PROTOCOL_FEATURES:
            raise ControlError(f"protocol features {features:#x} were not offered")
        self._reply_ack = bool(features & PF_REPLY_ACK)

    def _get_queue_num(self, _payload: bytes) -> bytes:
        return _U64.pack(len(self._owner.rings))

    def _get_config(self, payload: bytes) -> bytes:
        offset, size, flags = _CONFIG.unpack_from(payload)
        if offset + size > CONFIG_SIZE:
            raise ControlError(f"configuration of {size} bytes at {offset}")
        return _CONFIG.pack(offset, size, flags) + self._config[offset : offset + size]

    def _set_config(self, _payload: bytes) -> bytes | None:
        return _U64.pack(1) if self._reply_ack else None  # the CID is read-only

    # -- memory and rings ----------------------------------------------------------------------

    def _set_mem_table(self, payload: bytes) -> None:
        self._memory = memory = GuestMemory(payload, self._fds)
        for ring in self._owner.rings:
            if ring.running:
                ring.start(memory)

    def _ring(self, index: int) -> Virtqueue:
        if index >= len(self._owner.rings):
            raise ControlError(f"ring {index} of {len(self._owner.rings)}")
        return self._owner.rings[index]

    def _stopped_ring(self, index: int) -> Virtqueue:
        ring = self._ring(index)
        if ring.running:
            raise ControlError(f"the {ring.name} ring is changed while it runs")
        return ring

    def _set_vring_num(self, payload: bytes) -> None:
        index, size = _STATE.unpack_from(payload)
        if not 1 <= size <= MAX_SIZE or size & (size - 1):
            raise ControlError(f"ring {index} of {size} entries")
        self._stopped_ring(index).size = size

    def _set_vring_addr(self, payload: bytes) -> None:
        index, _flags, descriptors, used, avail, _log = _ADDRESSES.unpack_from(payload)
        if descriptors % 16 or used % 4 or avail % 2:
            raise ControlError(f"ring {index} is not aligned")
        ring = self._ring(index)
        ring.addresses = (descriptors, used, avail)
        if ring.running and self._memory is not None:
            ring.start(self._memory)

    def _set_vring_base(self, payload: bytes) -> None:
        index, base = _STATE.unpack_from(payload)
        if base > 0xFFFF:
            raise ControlError(f"ring {index} starts at {base}")
        self._stopped_ring(index).next = base

    def _get_vring_base(self, payload: bytes) -> bytes:
        index, _unused = _STATE.unpack_from(payload)
        ring = self._ring(index)
        self._stop(index)
        self._stopped_at[index] = ring.next
        return _STATE.pack(index, ring.next)

    def _set_vring_kick(self, payload: bytes) -> None:
        value = _U64.unpack_from(payload)[0]
        index = value & 0xFF
        ring = self._ring(index)
        self._stop(index)
        if ring.kick is not None:
            os.close(ring.kick)
            ring.kick = None
        if value & _NO_FD:
            raise ControlError(f"the {ring.name} ring is to be polled")
        ring.kick = self._take_fd()
        self._start(index)

    def _set_vring_call(self, payload: bytes) -> None:
        value = _U64.unpack_from(payload)[0]
        ring = self._ring(value & 0xFF)
        if ring.call is not None:
            os.close(ring.call)
            ring.call = None
        if not value & _NO_FD:
            ring.call = self._take_fd()

    def _set_vring_enable(self, payload: bytes) -> None:
        index, enabled = _STATE.unpack_from(payload)
        ring = self._ring(index)
        if ring.enabled != bool(enabled):
            ring.enabled = bool(enabled)
            if ring.running and ring.enabled:
                self._owner.ring_started(index, resumed=True)

    def _start(self, index: int) -> None:
        ring = self._owner.rings[index]
        if self._memory is None or ring.addresses is None or not ring.size:
            raise ControlError(f"the {ring.name} ring is started before it is described")
        ring.start(self._memory)
        resumed = ring.next != 0 and self._stopped_at.get(index) == ring.next
        self._owner.ring_started(index, resumed=resumed)

    def _stop(self, index: int) -> None:
        ring = self._owner.rings[index]
        if ring.running:
            self._owner.ring_stopping(index)
            ring.stop()
