"""An interrupt at each moment of a call at which CPython may raise one, one after the other.

A signal's handler runs, and its exception is raised, where the interpreter looks for signals: at a
function's entry, behind a call, at a jump back. So `at_each_moment` raises there, in the code under
test and in the standard library alike; a timer of the kernel's would meet each of them by luck.
Not in the frames of a test: what a call has returned is its caller's.
"""

import dis
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

__all__ = ["Interrupted", "at_each_moment", "interrupted_at"]

MOMENTS_MAX = 5000
TESTS = str(Path(__file__).parent)


class Interrupted(BaseException):
    """As KeyboardInterrupt, which pytest would take for itself."""


class _Tracer:
    """Counts moments and raises at one of them."""

    def __init__(self, number: int, within: str = "") -> None:
        self._left = number
        self._within = within
        self._looked: dict[CodeType, frozenset[int]] = {}
        self._behind_call: set[FrameType] = set()
        self.raised = False

    def __call__(self, frame: FrameType, event: str, _argument: object) -> Any:
        file = frame.f_code.co_filename
        if self.raised or file.startswith(TESTS) or self._within not in file:
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        if event == "call":
            self._moment()
        elif event == "opcode":
            if frame in self._behind_call:
                self._behind_call.discard(frame)
                self._moment()
            if frame.f_lasti in self._calls(frame.f_code):
                self._behind_call.add(frame)
        elif event in ("return", "exception"):
            self._behind_call.discard(frame)
        return self

    def _moment(self) -> None:
        if not self._left:
            self.raised = True
            self._behind_call.clear()
            raise Interrupted
        self._left -= 1

    def _calls(self, code: CodeType) -> frozenset[int]:
        found = self._looked.get(code)
        if found is None:
            found = self._looked[code] = frozenset(
                each.offset
                for each in dis.get_instructions(code)
                if each.opname.startswith(("CALL", "JUMP_BACKWARD"))
            )
        return found


@contextmanager
def interrupted_at(number: int, within: str) -> Iterator[_Tracer]:
    """Raise at that moment of what runs in this, in files whose path has `within`."""
    tracer, before = _Tracer(number, within), sys.gettrace()
    sys.settrace(tracer)
    try:
        yield tracer
    finally:
        sys.settrace(before)


def at_each_moment(call: Callable[[], object]) -> Iterator[tuple[bool, object]]:
    """Make the call until it came to its end without an interrupt.

    Each time gives whether it was interrupted, and what it returned or raised. What is yielded to
    runs without any.
    """
    for number in range(MOMENTS_MAX):
        tracer = _Tracer(number)
        outcome: object
        before = sys.gettrace()
        sys.settrace(tracer)
        try:
            outcome = call()
        except BaseException as error:  # noqa: BLE001 the test looks at it
            outcome = error
        finally:
            sys.settrace(before)
        yield tracer.raised, outcome
        if not tracer.raised:
            return
    raise AssertionError(f"more than {MOMENTS_MAX} moments")
