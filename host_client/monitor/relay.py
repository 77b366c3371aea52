"""The console of a machine in namespaces, read by a thread of the monitor's.

It is a pipe that the guest's processes have, and one of them can keep the kernel's mutex of it:
splice(2) waits with it for its source. Who reads then hangs, and no signal ends that. So the
monitor itself never touches that pipe: it reads another one, that nobody else has.
"""

import os
import signal
import threading
from typing import Final

from microguest.host_client.shortage import start_thread

__all__ = ["relayed"]

CHUNK: Final = 64 * 1024


def relayed(pipe: int) -> int:
    """A descriptor that gives what comes from the pipe, which belongs to the thread from here.

    A pipe that is held does not keep this process from ending. OSError where there is no room for
    it; then the pipe is still the caller's.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    # Signals are commands for the loop's thread.
    before = signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    try:
        start_thread(threading.Thread(target=_copy, args=(pipe, writer), daemon=True))
    except OSError:
        os.close(reader)
        os.close(writer)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return reader


def _copy(pipe: int, writer: int) -> None:
    """To its end, or until nobody reads the copy any more."""
    try:
        while data := os.read(pipe, CHUNK):
            while data:
                data = data[os.write(writer, data) :]
    except OSError:
        pass
    os.close(writer)
    os.close(pipe)  # the last one, which takes the mutex, too
