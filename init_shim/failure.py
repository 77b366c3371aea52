"""What a step that cannot be done looks like: the call, its object and errno, beside a sentence.

Everything in this package that asks the kernel for something does it inside `call(...)`, so that no
failure reaches a person as a bare "No such file or directory".
"""

import errno
import os
import resource  # here: where it is needed, no file can be opened any more

TYPE_CHECKING = False  # typing itself is too heavy for PID 1
if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["SHORT", "Failure", "call", "reason"]

# What has run out, and what to do. {limit}: of this process's open files. musl has another name for
# EMFILE, by which nobody finds anything.
SHORT = {
    errno.EMFILE: "Too many open files: a process of this machine may have {limit} open; raise the"
    " limit (ulimit -n) of the program that boots it",
    errno.ENFILE: "Too many open files in system: end programs, or raise the limit (sysctl"
    " fs.file-max)",
}
# What fork(2) means by EAGAIN; elsewhere it means to try again.
NO_PROCESS = (
    "there are as many processes as there may be; end some, or raise the limit (ulimit -u, or"
    " pids.max of the cgroup)"
)


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

    `hint` is appended to the sentence: what to do about it, where that is known. Where a limit is
    met, that is said instead.
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
        sentence += f": {reason(number, self.syscall) if number else error}"
        if self.hint and number not in SHORT:
            sentence += f"; {self.hint}"
        raise Failure(sentence, syscall=self.syscall, path=self.path, errno=number) from error


def reason(number: int, syscall: str = "") -> str:
    """What the kernel calls this errno; where a limit is met, which one and what to do."""
    if number in SHORT:
        return SHORT[number].format(limit=resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    if number == errno.EAGAIN and syscall == "fork":
        return f"{os.strerror(number)}: {NO_PROCESS}"
    return os.strerror(number)
