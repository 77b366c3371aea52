"""Handlers that are put off: none is lost, none runs too early, all are given back."""

import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import pytest

from microguest.host_client.interrupts import interrupts_later

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Came(BaseException):
    pass


def handler(number: int, frame: FrameType | None) -> None:
    raise Came(number)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in NUMBERS}
    for number in NUMBERS:
        signal.signal(number, handler)
    yield
    for number in NUMBERS:
        signal.signal(number, before[number])


def interrupted(*numbers: int, fails: bool = False) -> Iterator[str]:
    """A block to which these come; says when it is through."""
    with interrupts_later():
        for number in numbers:
            os.kill(os.getpid(), number)
        yield "through"
        if fails:
            raise OSError("its own")


@pytest.mark.parametrize("number", NUMBERS)
def test_raised_as_the_block_is_left(number: int) -> None:
    block = interrupted(number)
    assert next(block) == "through"
    with pytest.raises(Came) as raised:
        next(block)
    assert raised.value.args == (number,)
    assert [signal.getsignal(each) for each in NUMBERS] == [handler] * 3


def test_all_handlers_are_back_where_several_came() -> None:
    with pytest.raises(Came):
        list(interrupted(*NUMBERS))
    assert [signal.getsignal(each) for each in NUMBERS] == [handler] * 3


def test_each_handler_runs_once() -> None:
    ran = []
    for number in NUMBERS:
        signal.signal(number, lambda which, _frame: ran.append(which))
    with interrupts_later():
        for number in (*NUMBERS, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert ran == []
    assert ran == list(NUMBERS)


def test_what_is_ignored_stays_so() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with interrupts_later():
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_an_error_of_the_block_is_kept() -> None:
    with pytest.raises(OSError, match="its own"):
        list(interrupted(fails=True))
    with pytest.raises(Came) as raised:
        list(interrupted(signal.SIGINT, fails=True))
    assert isinstance(raised.value.__context__, OSError)


def test_another_thread_has_none_to_put_off() -> None:
    def work() -> None:
        with interrupts_later():
            seen.append(signal.getsignal(signal.SIGINT))

    seen: list[object] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [handler]
