"""The frozen agent without a machine around it, on a Unix socket, rooted at this machine's root.

So that it, the C floor and its peers start the very same file. Only the wire is spoken to it.
"""

import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Self

from startup import ELF

from microguest.guest.boot.workload import ImageDefaults
from microguest.guest.supervision import AGENT_FD, MESSAGES, Configure, RootReady

__all__ = ["TOKEN", "AgentAlone"]

TOKEN = "benchmark " * 4
READY_WITHIN = 30.0  # seconds
END_WITHIN = 10.0


class AgentAlone:
    """A context manager. `socket_path`: where it listens. `pid`: its process."""

    def __init__(self, folder: Path) -> None:
        self.socket_path = folder / "agent.sock"
        self._pid1, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid1.settimeout(READY_WITHIN)
        configure = Configure(
            transport="unix", token=TOKEN, image=ImageDefaults(), starts=1, versions={}
        )
        with theirs, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self.socket_path))
            listener.listen(1024)
            socket.send_fds(self._pid1, [MESSAGES.encode(configure)], [listener.fileno()])
            # bash, because the descriptor's number and the program's name must both be chosen
            command = f'exec -a agent "$0" {AGENT_FD}<&{theirs.fileno()} {theirs.fileno()}<&-'
            self._popen = subprocess.Popen(
                ["bash", "-c", command, ELF], pass_fds=[theirs.fileno()], env={}
            )
        self.pid = self._popen.pid
        try:
            self._pid1.recv(65536)  # AgentReady; where it has ended, the next send fails
            root = os.open("/", os.O_PATH | os.O_DIRECTORY)
            socket.send_fds(self._pid1, [MESSAGES.encode(RootReady())], [root])
            os.close(root)
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        return f"unix://{self.socket_path}"

    def children(self) -> list[int]:
        """Its processes, those that have ended and wait for it included."""
        path = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        return [int(word) for word in path.read_text().split()]

    def resident_kib(self) -> int:
        """Its resident memory now."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
        raise RuntimeError("the agent has ended")

    def settled_kib(self, seconds: float = 0.5) -> int:
        """As `resident_kib`, after a moment in which it has nothing to do."""
        time.sleep(seconds)
        return self.resident_kib()

    def close(self) -> None:
        """PID 1 is gone: the agent ends by itself, or is killed."""
        self._pid1.close()
        try:
            self._popen.wait(END_WITHIN)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_how: object) -> None:
        self.close()
