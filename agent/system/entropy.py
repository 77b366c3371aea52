"""Random numbers that nobody else has: seed the kernel's generator and let it forget its past.

Copies of one machine give the same random numbers until their kernels collect enough of their own,
up to a minute later. RNDADDENTROPY mixes bytes into the pool, RNDRESEEDCRNG makes a new key out of
the pool at once: random(4). Both need CAP_SYS_ADMIN.
"""

import errno
import fcntl
import os
import stat
import struct

__all__ = ["reseed", "seed", "seed_from_hardware"]

RNDADDENTROPY = 0x40085203  # linux/random.h
RNDRESEEDCRNG = 0x5207
DEVICES = ("/dev/urandom", "/dev/random")
DEVICE_NUMBERS = (os.makedev(1, 8), os.makedev(1, 9))
HARDWARE = "/dev/hwrng"
HARDWARE_NUMBERS = (os.makedev(10, 183),)
HARDWARE_BYTES = 64


def seed(data: bytes) -> None:
    """Mix bytes into the kernel's pool, each counted as 8 bits. Raises OSError."""
    # struct rand_pool_info: entropy in bits, size in bytes, the bytes in whole words
    padded = data + bytes(-len(data) % 4)
    request = struct.pack("ii", len(data) * 8, len(padded)) + padded
    fd = open_device()
    try:
        fcntl.ioctl(fd, RNDADDENTROPY, request)
    finally:
        os.close(fd)


def reseed() -> None:
    """Let random numbers depend on all that is in the pool from now on. Raises OSError."""
    fd = open_device()
    try:
        fcntl.ioctl(fd, RNDRESEEDCRNG)
    finally:
        os.close(fd)


def seed_from_hardware() -> bool:
    """The same from the machine's own source, as virtio-rng, which is its host's. May block.

    False where there is none.
    """
    try:
        fd = os.open(HARDWARE, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if not is_device(fd, HARDWARE_NUMBERS):  # the image's /dev may have anything there
            return False
        os.set_blocking(fd, True)
        seed(os.read(fd, HARDWARE_BYTES))
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def open_device() -> int:
    """The image's /dev may have anything under these names. Raises OSError."""
    for path in DEVICES:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue
        if is_device(fd, DEVICE_NUMBERS):
            return fd
        os.close(fd)
    raise FileNotFoundError(errno.ENOENT, "the root has no such device", DEVICES[0])


def is_device(fd: int, numbers: tuple[int, ...]) -> bool:
    """Whether it is a character device with one of these numbers: admin-guide/devices.txt."""
    status = os.fstat(fd)
    return stat.S_ISCHR(status.st_mode) and status.st_rdev in numbers
