"""Spares the guest the compiler at start.

attrs writes Python source for each class it decorates and compiles it at import: for trio that is a
fifth of the time to import it. The build has recorded these sources and their code
(`_guest_compiled`, made by native/recorder.py), and `install` puts a look-up before the built-in
`compile`. The key is the whole source text with its file name (but for one number, see `key_of`),
so a hit is what the compiler would have made; anything else goes to the compiler. Nothing of attrs
is changed.
"""

import builtins
import sys

TYPE_CHECKING = False  # PID 1 imports this too, and typing costs more than the rest of its start
if TYPE_CHECKING:
    from typing import Any

# What attrs calls its sources; no other compile() is looked up.
PREFIX = "<attrs generated"
# What compile() inherits from its caller: the flags of `from __future__` (compile.h, PyCF_MASK).
FUTURE_FLAGS = 0x1FE0000

real_compile = builtins.compile


def install() -> None:
    """Use the recorded code until the last piece of it has been used; then leave no trace."""
    builtins.compile = looked_up


def key_of(source: str, filename: str) -> tuple[str, str]:
    """What a source is recorded under.

    A generated __hash__ starts from a number that attrs takes from a string's hash, which differs
    between processes. Any number serves: it keeps apart classes with equal fields. The recorded
    code has the build's, and the key leaves it out.
    """
    before, mark, after = source.partition("return hash((\n")
    _number, _, rest = after.partition("\n")
    return filename, before + mark + rest


def looked_up(
    source: "Any", filename: "Any", mode: str, *arguments: "Any", **options: "Any"
) -> "Any":
    """As `compile`, from the record where it has the source."""
    if not arguments and not options and mode == "exec" and str(filename).startswith(PREFIX):
        from _guest_compiled import CODES

        found = CODES.pop(key_of(source, filename), None)
        if not CODES:
            builtins.compile = real_compile
        if found is not None:
            return found
    if not arguments and "flags" not in options and "dont_inherit" not in options:
        # The caller's, not this function's, future statements count.
        options["flags"] = sys._getframe(1).f_code.co_flags & FUTURE_FLAGS  # noqa: SLF001
        options["dont_inherit"] = True
    return real_compile(source, filename, mode, *arguments, **options)
