"""A front for the standard library's inspect in the frozen guest.

Importing the original brings in ast, dis and tokenize: a tenth of the agent's start. What trio uses
while it runs is a look at a coroutine's attributes, which is here; for any other name the original
is imported, from where the build has put it (`_stdlib_inspect`).
"""

from types import AsyncGeneratorType, CoroutineType

CORO_CREATED = "CORO_CREATED"
CORO_RUNNING = "CORO_RUNNING"
CORO_SUSPENDED = "CORO_SUSPENDED"
CORO_CLOSED = "CORO_CLOSED"


def iscoroutine(value: object) -> bool:
    """Whether `value` is what calling an `async def` function gives."""
    return isinstance(value, CoroutineType)


def isasyncgen(value: object) -> bool:
    """Whether `value` is what calling an `async def` function with a yield gives."""
    return isinstance(value, AsyncGeneratorType)


def getcoroutinestate(coroutine: "CoroutineType[object, object, object]") -> str:
    """One of the four CORO_ names."""
    if coroutine.cr_running:
        return CORO_RUNNING
    if coroutine.cr_suspended:
        return CORO_SUSPENDED
    return CORO_CREATED if coroutine.cr_frame is not None else CORO_CLOSED


def cleandoc(text: str) -> str:
    """Docstrings are not in the binary, so their indentation is nobody's concern."""
    return text


def __getattr__(name: str) -> object:
    if name.startswith("__"):  # the importer asks every module for __path__
        raise AttributeError(name)
    import _stdlib_inspect

    value = getattr(_stdlib_inspect, name)
    globals()[name] = value
    return value
