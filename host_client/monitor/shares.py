"""Directories of the host in a virtual machine: virtiofs, served by one virtiofsd each.

virtiofsd accepts the VMM on a socket that is bound and listens before it is started, so nobody has
to wait for it.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from select import EPOLLIN
from typing import Final

from microguest.host_client.event_loop import EventLoop
from microguest.host_client.machines.plan import Share, filled
from microguest.host_client.monitor.vmm import has_ended, spawn

__all__ = ["Shares"]

CHUNK: Final = 64 * 1024
END_WAIT: Final = 2.0  # seconds from TERM to KILL
# virtiofsd ends by itself when the VMM does. Its end is the cause only if the VMM outlives it.
VMM_FIRST: Final = 0.5


class Shares:
    """The daemons of one machine, as its monitor has them."""

    def __init__(
        self,
        shares: tuple[Share, ...],
        loop: EventLoop,
        on_message: Callable[[bytes], None],
        on_failure: Callable[[str], None],
    ) -> None:
        self._shares = shares
        self._loop = loop
        self._on_message = on_message
        self._on_failure = on_failure
        self._output = -1  # what they complain about
        self._last = b""
        self._running: dict[int, subprocess.Popen[bytes]] = {}  # by pidfd
        self._kept: list[subprocess.Popen[bytes]] = []  # that have ended, and cannot be reaped yet
        self._closed = False

    def start(self) -> None:
        """All of them. OSError; `close` ends those that run."""
        if not self._shares:
            return
        self._output, output = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._loop.add(self._output, lambda _events: self._read(), EPOLLIN)
        try:
            for share in self._shares:
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                    listener.bind(share.socket)
                    listener.listen(1)
                    self._start(share, listener.fileno(), output)
        finally:
            os.close(output)

    def close(self, deadline: float) -> list[int]:
        """End those that have not ended with the VMM; which have not until then, though killed.

        deadline: time.monotonic().
        """
        self._closed = True
        for pidfd, process in self._running.items():
            self._loop.remove(pidfd)
            os.close(pidfd)
            process.send_signal(signal.SIGTERM)
        terminated = min(time.monotonic() + END_WAIT, deadline)
        left = [each for each in self._running.values() if not has_ended(each, terminated)]
        for process in left:
            process.kill()
        self._running = {}
        self._close_output()
        left += self._kept
        return [process.pid for process in left if not has_ended(process, deadline)]

    def _start(self, share: Share, listener: int, output: int) -> None:
        argv = [filled(word, {"listener": str(listener)}) for word in share.argv]
        process = spawn(
            argv, stdout=output, stderr=output, keep=(listener,), filtered=share.seccomp
        )
        pidfd = os.pidfd_open(process.pid)
        self._running[pidfd] = process
        self._loop.add(pidfd, lambda _events: self._ended(share, pidfd), EPOLLIN)

    def _ended(self, share: Share, pidfd: int) -> None:
        self._loop.remove(pidfd)
        os.close(pidfd)
        process = self._running.pop(pidfd)
        code = process.poll()  # which is not to be waited for: who traces it comes first
        if code is None:
            self._kept.append(process)
            how = "a debugger keeps how"
        else:
            how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        reason = f"virtiofsd, which shows it {share.source}, ended ({how})"
        self._loop.call_later(VMM_FIRST, lambda: self._outlived(reason))

    def _outlived(self, reason: str) -> None:
        if not self._closed:
            last = self._last.decode("utf-8", "replace").strip().splitlines()[-1:]
            self._on_failure(f"{reason}: {last[0]:.300}" if last else reason)

    def _read(self) -> None:
        try:
            data = os.read(self._output, CHUNK)
        except BlockingIOError:
            return
        if data:
            self._last = data
            self._on_message(data)
        else:
            self._close_output()

    def _close_output(self) -> None:
        if self._output >= 0:
            self._loop.remove(self._output)
            os.close(self._output)
            self._output = -1
