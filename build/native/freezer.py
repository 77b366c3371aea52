"""Compiles modules into one blob of marshalled code. Runs under the guest's own Python version.

    freezer.py MODULES.json BLOB TABLE.json

MODULES.json is a list of [name, source path or "", is_package]; TABLE.json gets a list of
[name, offset, size, is_package]. Asserts stay in, docstrings go: -OO would take both, and trio's
asserts are what stands between a scheduler bug and a silently wrong result.
"""

import ast
import json
import marshal
import sys
from types import CodeType

# Start of each module in the blob: marshal reads it in words.
ALIGNMENT = 16


def main(modules_file: str, blob_file: str, table_file: str) -> None:
    """Freeze what `modules_file` lists."""
    with open(modules_file, encoding="utf-8") as file:
        modules = json.load(file)
    blob = bytearray()
    table = []
    for name, path, is_package in sorted(modules):
        code = marshal.dumps(compiled(name, path))
        blob.extend(bytes(-len(blob) % ALIGNMENT))
        table.append([name, len(blob), len(code), is_package])
        blob.extend(code)
    with open(blob_file, "wb") as file:
        file.write(blob)
    with open(table_file, "w", encoding="utf-8") as file:
        json.dump(table, file)


def compiled(name: str, path: str) -> CodeType:
    """The module's code object. Its file name is no path: tracebacks must not look for a source."""
    source = b""
    if path:
        with open(path, "rb") as file:
            source = file.read()
    tree = without_docstrings(ast.parse(source, path))
    return compile(tree, f"<frozen {name}>", "exec", dont_inherit=True, optimize=0)


def without_docstrings(tree: ast.Module) -> ast.Module:
    """Remove what the compiler would store as __doc__."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            while node.body and is_string(node.body[0]):
                removed = node.body.pop(0)
                if not node.body and not isinstance(node, ast.Module):
                    node.body.append(ast.copy_location(ast.Pass(), removed))
    return tree


def is_string(node: ast.stmt) -> bool:
    """Whether the statement is a bare string."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
