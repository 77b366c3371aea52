# Generated into the frozen binary; it exists nowhere else.

# What the binary is made of: "microguest", "cpython", "trio", "msgpack", "pyroute2", "musl", "zig".
VERSIONS: dict[str, str]
# Modules that `--self-check` imports.
MODULES: tuple[str, ...]
