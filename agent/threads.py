"""Work that may hang is done in a thread, as a file system of the image may never answer.

The one way to one: a guest that has as many processes and threads as it can have gives none, and
that is an answer for the host, not a fault of the agent's.
"""

import errno
import threading
from collections.abc import Callable
from typing import TypeVar

import trio

from microguest.guest.errors import operation_error

__all__ = ["in_thread", "run_beside"]

T = TypeVar("T")


async def in_thread(work: Callable[[], T], *, abandon_on_cancel: bool = False) -> T:
    """What `work` returns or raises.

    `abandon_on_cancel`: where the caller is cancelled, it goes on alone and nobody waits for it.
    Raises OperationError resource_limit where no thread can be started; then nothing was done.
    """
    begun = False

    def begin() -> T:
        nonlocal begun
        begun = True
        return work()

    try:
        return await trio.to_thread.run_sync(begin, abandon_on_cancel=abandon_on_cancel)
    except RuntimeError as error:  # "can't start new thread": Python does not say why
        if begun:
            raise
        raise operation_error(
            "resource_limit",
            "the agent cannot start a thread: the guest, or the agent's user or cgroup, has as many"
            " processes and threads as it may; end some of them or raise the limit, and try again",
            {"step": "thread", "errno": errno.EAGAIN},
        ) from error


def run_beside(work: Callable[[], None], name: str) -> bool:
    """Start a thread that ends with the agent. False where the guest has none left for it."""
    try:
        threading.Thread(target=work, name=name, daemon=True).start()
    except RuntimeError:
        return False
    return True
