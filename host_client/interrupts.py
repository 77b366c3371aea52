"""An interrupt that waits until what must not be done by half is done.

The handler of a signal runs in the main thread, wherever that is, and what it raises comes out
there. Blocking the signal in that thread does not prevent it: the kernel gives it to another
thread, and the interpreter still calls the handler in the main one. So the handler is put off.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Final

__all__ = ["interrupts_later"]

ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # their handlers may raise

Handler = Callable[[int, FrameType | None], Any]


@contextlib.contextmanager
def interrupts_later() -> Iterator[None]:
    """Put off the program's handlers of SIGINT, SIGTERM and SIGHUP until the block has ended.

    They run, and raise, as it is left: whoever must undo it needs a `try` around this. A signal
    without a handler of the program's does what it always does. In other threads than the main one
    there is nothing to put off.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers: dict[int, Handler] = {
        number: handler for number in ENDING if callable(handler := signal.getsignal(number))
    }
    came: list[int] = []
    over = False

    def put_off(number: int, frame: FrameType | None) -> None:
        if over:  # another handler has raised before this one was given back
            handlers[number](number, frame)
        else:
            came.append(number)

    try:
        for number in handlers:
            signal.signal(number, put_off)
        yield
    finally:
        over = True
        _give_back(list(handlers.items()))
        for number in dict.fromkeys(came):
            handlers[number](number, None)


def _give_back(handlers: list[tuple[int, Handler]]) -> None:
    """All of them, although one that is back may raise at once."""
    if handlers:
        try:
            signal.signal(*handlers[0])
        finally:
            _give_back(handlers[1:])
