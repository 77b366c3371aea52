"""How a record is called, for `help` and `inspect.signature`: apart, for what it imports."""

from inspect import Parameter, Signature
from typing import Any

__all__ = ["signature_of"]


def signature_of(fields: dict[str, Any], defaults: dict[str, Any]) -> Signature:
    """Of a record with these fields, by name their types, and these defaults."""
    return Signature(
        [
            Parameter(
                name,
                Parameter.KEYWORD_ONLY,
                default=defaults.get(name, Parameter.empty),
                annotation=kind,
            )
            for name, kind in fields.items()
        ]
    )
