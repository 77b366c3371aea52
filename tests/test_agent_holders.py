"""The search for who has a pipe open: nobody hides it behind many descriptors."""

import os
import resource
import signal
import time

import pytest
from patience import PATIENCE

from microguest.agent.process import holders
from microguest.guest import bounds

MANY = 15_000  # descriptors of each decoy
DECOYS = 16


def stay(*unwanted: int, decoy: bool = True) -> int:
    """A child that does not have these descriptors, and as a decoy very many others."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            for fd in unwanted:
                os.close(fd)
            if decoy:
                for _ in range(MANY):
                    os.dup(reader)
            os.write(writer, b"x")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    assert os.read(reader, 1) == b"x"
    os.close(reader)
    return child


@pytest.mark.skipif(
    resource.getrlimit(resource.RLIMIT_NOFILE)[0] < MANY + 1000, reason="ulimit -n is too low"
)
def test_many_descriptors_of_others_delay_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "LOCK_SEARCH", PATIENCE)
    kept, other = os.pipe()
    proc = os.open("/proc", os.O_PATH)
    decoys = [stay(kept, other) for _ in range(DECOYS)]
    holder = stay(decoy=False)  # the last one to be looked at
    found = holders.Found()

    def note(_: holders.Candidate) -> bool:
        moments.append(time.monotonic())
        return True

    try:
        moments = [time.monotonic()]
        name = os.readlink(f"/proc/self/fd/{kept}")
        spared = set(holders.listed(proc)) - {*decoys, holder}
        holders.search(proc, spared, holders.has_open(name), note, found)
        began, found_at, ended = *moments, time.monotonic()
    finally:
        for child in (*decoys, holder):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        for fd in (kept, other, proc):
            os.close(fd)
    assert found.pids == [holder]
    assert found_at - began < (ended - began) / 2, "of the time that it takes to look at all"
