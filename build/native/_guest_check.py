"""`microguest --self-check`: the build runs its own result before anyone boots it.

Imports every module of the application and of what it stands on, and refuses a binary whose msgpack
fell back to its slow pure-Python packer.
"""

import importlib
import sys

import _guest_build


def main() -> None:
    """Import everything, print one line, exit 0; any failure is a traceback and exit 1."""
    for name in _guest_build.MODULES:
        importlib.import_module(name)
    import msgpack

    packer = msgpack.Packer.__module__
    if packer != "msgpack._cmsgpack":
        raise SystemExit(f"msgpack uses {packer}, not its C packer")
    import hashlib
    import random

    random.random()  # noqa: S311 - only to see that it works
    hashlib.sha256(b"").digest()
    "localhost".encode("idna")
    import inspect

    inspect.signature(main)  # beyond the front in standins/stdlib/inspect.py
    sys.stdout.write(f"{len(_guest_build.MODULES)} modules, packer {packer}\n")
