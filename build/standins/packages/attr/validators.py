"""Takes the place of attrs' validators in the frozen guest: the one that outcome uses.

The original defines fifteen attrs classes, one of which needs inspect's signatures: together with
them a fifth of the agent's start.
"""

from collections.abc import Callable

__all__ = ["instance_of"]

Validator = Callable[[object, object, object], None]


def instance_of(kind: type | tuple[type, ...]) -> Validator:
    """A validator that raises TypeError for values of another type."""

    def check(_instance: object, attribute: object, value: object) -> None:
        if not isinstance(value, kind):
            name = getattr(attribute, "name", attribute)
            raise TypeError(f"{name!r} must be {kind!r}, not {value!r}", attribute, kind, value)

    return check


def __getattr__(name: str) -> object:
    raise AttributeError(f"attrs.validators.{name}: the frozen guest has only instance_of")
