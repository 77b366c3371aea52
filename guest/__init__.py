"""The contract that host and guest share: wire, messages, errors, boot config, manifest.

Nothing here does I/O, starts anything or reads a clock. PID 1 imports from here, so a module of
this package may import only the standard library's cheap parts; `guest.wire.messages` and
`guest.wire.connection` need msgpack and are for the agent and the host.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
