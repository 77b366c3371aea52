"""Whether this Python has what the agent and PID 1 import beyond packages of the index."""

import importlib.util

import pytest

MODULES = ("_guestsys", "_guest_build")

# For tests that import the agent or PID 1 themselves.
needs_guestsys = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in MODULES),
    reason="this Python has no _guestsys: `make setup` says why, and needs a C compiler for it",
)
