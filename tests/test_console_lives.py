"""A console that an earlier life of the workload has stopped or locked: the next one has it."""

import fcntl
import os
import pty
import termios
from collections.abc import Iterator

import pytest

from microguest.init_shim.life.console import undo_earlier_life
from microguest.init_shim.reporter import device_number

TIOCGEXCL = 0x80045440  # ioctl_tty(2)


@pytest.fixture
def terminal() -> Iterator[int]:
    master, slave = pty.openpty()
    yield slave
    os.close(slave)
    os.close(master)


def locked(terminal: int) -> bool:
    return bool(int.from_bytes(fcntl.ioctl(terminal, TIOCGEXCL, bytes(4)), "little"))


def test_what_was_stopped_and_locked_is_neither(terminal: int) -> None:
    os.set_blocking(terminal, False)
    termios.tcflow(terminal, termios.TCOOFF)
    fcntl.ioctl(terminal, termios.TIOCEXCL)
    assert locked(terminal)
    with pytest.raises(BlockingIOError):
        os.write(terminal, b"x")
    undo_earlier_life(terminal)
    assert not locked(terminal)
    assert os.write(terminal, b"x") == 1


def test_what_is_no_terminal_stays_as_it_is() -> None:
    reader, writer = os.pipe()
    undo_earlier_life(writer)
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("device", [(4, 64), (5, 1), (136, 300), (229, 0), (4095, 2**20 - 1)])
def test_device_numbers_are_as_the_kernel_encodes_them(device: tuple[int, int]) -> None:
    """linux/kdev_t.h, new_encode_dev."""
    major, minor = device
    told = minor & 0xFF | major << 8 | (minor & ~0xFF) << 12
    assert device_number(told) == os.makedev(major, minor)
