"""What a step that cannot be done looks like: the call, its object and errno, beside a sentence.

Everything in this package that asks the kernel for something does it inside `call(...)`, so that no
failure reaches a person as a bare "No such file or directory".
"""

import os

TYPE_CHECKING = False  # typing itself is too heavy for PID 1
if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Failure", "call"]


class Failure(Exception):
    """Something that PID 1 or the launcher has to do did not work.

    `syscall`, `path` and `errno` are "", "" and 0 where no system call was involved.
    """

    def __init__(self, message: str, *, syscall: str = "", path: str = "", errno: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.syscall = syscall
        self.path = path
        self.errno = errno


class call:  # noqa: N801  reads as a statement: with call("mount", "/proc"):
    """Turns an OSError inside its block into a Failure of `syscall` on `path`.

    `hint` is appended to the sentence: what to do about it, where that is known.
    """

    def __init__(self, syscall: str, path: str = "", *, hint: str = "") -> None:
        self.syscall = syscall
        self.path = path
        self.hint = hint

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: "type[BaseException] | None",
        error: BaseException | None,
        trace: "TracebackType | None",
    ) -> None:
        if not isinstance(error, OSError):
            return
        number = error.errno or 0
        sentence = " ".join(filter(None, (self.syscall, self.path)))
        sentence += f": {os.strerror(number) if number else error}"
        if self.hint:
            sentence += f"; {self.hint}"
        raise Failure(sentence, syscall=self.syscall, path=self.path, errno=number) from error
