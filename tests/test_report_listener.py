"""Who may report for a machine: its own PID 1, and nobody else who reaches the port."""

import contextlib
import socket
from pathlib import Path

from machinekit import wait_until
from patience import PATIENCE

from microguest.guest.report import REPORTS, AgentServes
from microguest.host_client.event_loop import EventLoop
from microguest.host_client.monitor.reports import ReportReader

MACHINE, ANOTHER, THIS_HOST, LOOPBACK = 3, 77, 2, 1  # CIDs
REPORT = AgentServes(starts=1, boot_ms=1.0)


class VsockListener:
    """A listening Unix socket whose peers have the addresses that AF_VSOCK gives: (CID, port)."""

    def __init__(self, path: Path, cids: list[int]) -> None:
        self.cids = cids  # of who comes next
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        self.fileno = self._socket.fileno
        self.setblocking = self._socket.setblocking
        self.close = self._socket.close

    def accept(self) -> tuple[socket.socket, tuple[int, int]]:
        return self._socket.accept()[0], (self.cids.pop(0), 1024)

    def getsockname(self) -> tuple[int, int]:
        return socket.VMADDR_CID_ANY, 1024


def test_only_the_machine_reports_for_itself(tmp_path: Path) -> None:
    """On the kernel's vsock every guest of the host reaches the port, and every program of it."""
    heard: list[object] = []
    errors: list[str] = []
    loop = EventLoop()
    reader = ReportReader(loop, heard.append, errors.append)
    strangers = [ANOTHER, LOOPBACK, THIS_HOST]
    listener = VsockListener(tmp_path / "reports", [*strangers, MACHINE])

    def turn() -> bool:
        loop.defer(loop.stop)
        loop.run()
        return True

    with contextlib.ExitStack() as stack:
        stack.callback(loop.close)
        stack.callback(reader.close)
        reader.listen(listener, cid=MACHINE)  # type: ignore[arg-type]
        while listener.cids:
            dialled = stack.enter_context(socket.socket(socket.AF_UNIX))
            dialled.settimeout(PATIENCE)
            dialled.connect(str(tmp_path / "reports"))
            dialled.send(REPORTS.encode(REPORT) + b"\n")
            left = len(listener.cids) - 1
            wait_until(
                "somebody is let in", lambda left=left: turn() and len(listener.cids) == left
            )
            if left:
                turn()
                assert not heard
                with contextlib.suppress(ConnectionResetError):
                    assert dialled.recv(1) == b""
        wait_until("the machine is heard", lambda: turn() and len(heard) == 1)
    assert heard == [REPORT]
    assert not errors
