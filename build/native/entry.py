"""The frozen program's `__main__`.

The garbage collector stays off while modules are imported: nothing they make is garbage, and
looking costs a tenth of the start. Who serves for long turns it on again: `gc.freeze`, `gc.enable`.
"""

import gc
import sys

import _guest_compile

gc.disable()
_guest_compile.install()

if sys.argv[1:] == ["--self-check"]:
    from _guest_check import main
else:
    from microguest.init_shim.dispatch import main

main()
