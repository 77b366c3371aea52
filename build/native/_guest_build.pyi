# Generated into the frozen binary, and for a plain Python by build/host_module.py.

# What the binary is made of: "microguest", "cpython", "trio", "msgpack", "pyroute2", "musl", "zig".
VERSIONS: dict[str, str]
# Modules that `--self-check` imports.
MODULES: tuple[str, ...]
