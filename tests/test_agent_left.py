"""What a process has left behind takes its output out of the pipe, and writes on for ever.

Every process can open its own stdout for reading through /proc. Neither its end nor its status may
wait for what somebody else has taken.
"""

import pathlib
import sys
from collections.abc import Iterator

import pytest
from agentharness import AgentProcess, Host, Result
from machinekit import wait_until

from microguest.guest.wire.messages import Keep

# Fills its stdout until nothing moves, and exits with 5. The one that it leaves empties the pipe
# then, says so in a file, and writes a byte every 5 ms.
THIEF = """
import fcntl, os, sys, time
fcntl.fcntl(1, fcntl.F_SETPIPE_SZ, 1 << 20)
taker = os.open("/proc/self/fd/1", os.O_RDONLY | os.O_NONBLOCK)
writer = os.open("/proc/self/fd/1", os.O_WRONLY | os.O_NONBLOCK)
me = os.getpid()
if os.fork() == 0:
    os.close(0)
    os.close(2)
    while os.getppid() == me:
        time.sleep(0.01)
    time.sleep(0.2)  # until the agent has noticed the end
    idle = time.monotonic()
    while time.monotonic() - idle < 0.5:
        try:
            os.read(taker, 1 << 20)
        except BlockingIOError:
            time.sleep(0.001)
        else:
            idle = time.monotonic()
    open(sys.argv[1], "w").close()
    os.set_blocking(1, True)
    while True:
        os.write(1, b".")
        time.sleep(0.005)
full = time.monotonic()
while time.monotonic() - full < 0.5:
    try:
        os.write(writer, bytes(4096))
    except BlockingIOError:
        time.sleep(0.001)
    else:
        full = time.monotonic()
os._exit(5)
"""
CAP = 0.2  # seconds; nothing is ever idle for as long as `drain_idle` says


@pytest.fixture
def agent() -> Iterator[AgentProcess]:
    with AgentProcess() as agent:
        yield agent


def rob(host: Host, emptied: pathlib.Path, keep: Keep | None = None) -> Result:
    """Everything that comes of it, where the host reads nothing before the pipe was emptied."""
    command = (sys.executable, "-S", "-E", "-c", THIEF, str(emptied))
    host.start(*command, keep=keep, drain_cap=CAP, drain_idle=60.0)
    wait_until("the pipe is emptied", emptied.exists)
    return host.collect()


@pytest.mark.parametrize("keep", [None, Keep(buffer=64 * 1024)], ids=["plain", "kept"])
def test_who_takes_what_is_owed_postpones_no_end(
    agent: AgentProcess, tmp_path: pathlib.Path, keep: Keep | None
) -> None:
    with Host(agent) as host:
        result = rob(host, tmp_path / "emptied", keep)
    assert result.exited.code == 5
    assert result.exited.open_streams == ("stdout",)
    assert result.stdout.startswith(bytes(16 * 1024))
    with Host(agent) as other:
        other.ping()
