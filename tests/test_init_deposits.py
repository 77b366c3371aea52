"""What PID 1 takes from an agent: bounded, and nothing of it can do it harm."""

import os
import resource
from collections.abc import Iterator

import pytest

from microguest.guest import bounds
from microguest.guest.supervision import Deposit, KeptExited
from microguest.init_shim.life.deposits import Deposits

USAGE = resource.getrusage(resource.RUSAGE_SELF)


@pytest.fixture
def deposits() -> Iterator[Deposits]:
    deposits = Deposits()
    yield deposits
    for process_id in deposits.ids():
        deposits.withdraw(process_id)


def descriptors(count: int) -> list[int]:
    return [os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC) for _ in range(count)]


def is_open(fd: int) -> bool:
    return os.path.exists(f"/proc/self/fd/{fd}")


def deposit(process_id: str = "p1", pid: int = 4000, names: int = 2) -> Deposit:
    named = tuple(f"d{number}" for number in range(names))
    return Deposit(id=process_id, pid=pid, meta="{}", names=named)


def test_a_deposit_comes_back_in_order(deposits: Deposits) -> None:
    for number in (3, 1, 2):
        deposits.take(deposit(f"p{number}", 4000 + number), descriptors(3))
    assert deposits.ids() == ["p3", "p1", "p2"]
    back = deposits.restored("p1")
    assert back is not None
    restored, fds = back
    assert (restored.pid, restored.meta, restored.names) == (4001, "{}", ("d0", "d1"))
    assert restored.exited is None
    assert all(map(is_open, fds))
    deposits.withdraw("p1")
    assert not any(map(is_open, fds))
    assert deposits.restored("p1") is None
    deposits.withdraw("p1")


def test_the_same_id_replaces_and_closes(deposits: Deposits) -> None:
    first, second = descriptors(3), descriptors(2)
    deposits.take(deposit(), first)
    deposits.note_exit(KeptExited(id="p1", code=4))
    deposits.take(deposit(names=1), second)
    assert not any(map(is_open, first))
    back = deposits.restored("p1")
    assert back is not None
    assert back[1] == second
    assert back[0].exited is not None
    assert back[0].exited.code == 4


def test_what_came_without_its_descriptors_is_not_taken(deposits: Deposits) -> None:
    fds = descriptors(2)
    assert not deposits.take(deposit(names=2), fds)
    assert not any(map(is_open, fds))
    assert len(deposits) == 0


def test_there_is_an_end_to_them(deposits: Deposits) -> None:
    most = bounds.KEPT_PROCESSES + 1  # and the agent's own
    for number in range(most):
        assert deposits.take(deposit(f"p{number}", 4000 + number, names=0), descriptors(1))
    fds = descriptors(1)
    assert not deposits.take(deposit("one more", names=0), fds)
    assert not any(map(is_open, fds))
    assert deposits.take(deposit("p0", names=0), descriptors(1))
    assert len(deposits) == most


def test_an_end_is_told_once_and_kept(deposits: Deposits) -> None:
    deposits.take(deposit(pid=4711), descriptors(3))
    assert deposits.reaped(4712, 0, USAGE) is None
    message = deposits.reaped(4711, 9, USAGE)
    assert message is not None
    assert (message.id, message.signal, message.max_rss_kib) == ("p1", 9, USAGE.ru_maxrss)
    assert deposits.reaped(4711, 0, USAGE) is None  # by now another's pid
    back = deposits.restored("p1")
    assert back is not None
    assert back[0].exited is not None
    assert back[0].exited.signal == 9


def test_what_the_agent_saw_first_stays(deposits: Deposits) -> None:
    deposits.take(deposit(pid=4711), descriptors(3))
    deposits.note_exit(KeptExited(id="p1", code=4))
    deposits.note_exit(KeptExited(id="p1", code=5))
    deposits.note_exit(KeptExited(id="nobody", code=5))
    assert deposits.reaped(4711, 0, USAGE) is None
    back = deposits.restored("p1")
    assert back is not None
    assert back[0].exited is not None
    assert back[0].exited.code == 4
