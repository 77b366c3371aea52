"""Machines: what runs a guest on this host, from the claim of a name to the removal of every trace.

A machine belongs to one *monitor*, a small process that starts the VMM, serves its vsock, keeps its
console and cleans up; `monitor` says how. The caller's side is `boot` and `machine`. Each kind of
machine (`qemu`, `namespaces`) only turns settings into a `plan` for the monitor.
"""

__all__: list[str] = []
