"""For tests of the command line: the program that a person types, run to its end."""

import subprocess
import sys
from pathlib import Path

PROGRAM = str(Path(sys.executable).parent / "microguest")
TYPED = 120.0  # seconds for one of them; reached only by a failure

Done = subprocess.CompletedProcess[bytes]


def microguest(*words: str, stdin: bytes = b"") -> Done:
    """What it wrote, and its exit code."""
    return subprocess.run(
        [PROGRAM, *words], input=stdin, capture_output=True, timeout=TYPED, check=False
    )
