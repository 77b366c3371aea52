"""Records what attrs compiles while trio is imported. Runs under the guest's own Python version.

    recorder.py OUTPUT.py

The output is the frozen module `_guest_compiled`; `_guest_compile` explains what it is for.
"""

import builtins
import importlib
import marshal
import sys
from types import CodeType
from typing import Any

import _guest_compile

RECORDED_IMPORT = "trio"


def main(output: str) -> None:
    """Import, record, write."""
    recorded: dict[tuple[str, str], CodeType] = {}

    def recording(source: Any, filename: Any, mode: str, *rest: Any, **options: Any) -> Any:
        if rest or options or not str(filename).startswith(_guest_compile.PREFIX):
            return _guest_compile.real_compile(source, filename, mode, *rest, **options)
        flags = sys._getframe(1).f_code.co_flags & _guest_compile.FUTURE_FLAGS  # noqa: SLF001
        code = _guest_compile.real_compile(source, filename, mode, flags, dont_inherit=True)
        recorded[_guest_compile.key_of(source, filename)] = code
        return code

    builtins.compile = recording
    importlib.import_module(RECORDED_IMPORT)
    builtins.compile = _guest_compile.real_compile
    if not recorded:
        raise SystemExit("attrs compiled nothing: does it still call its sources the same?")
    with open(output, "w", encoding="utf-8") as file:
        file.write("import marshal\n\n")
        file.write(f"CODES = marshal.loads({marshal.dumps(dict(sorted(recorded.items())))!r})\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
