"""Frozen records that check themselves when they come from outside.

`Record` gives what a keyword-only frozen dataclass gives (and type checkers see it as one), and
turns itself into and out of plain maps with every field's type checked. It exists because importing
`dataclasses` costs as much as everything else that PID 1 imports together, and because boot config,
messages and manifest need the same strict decoder anyway.

Field types: str, int, float, bool, bytes, other records, `tuple[X, ...]`, `dict[str, X]`,
`X | None` and unions of scalars. Every number has a range, whatever its field: an int is one of 64
bits with a sign, a float is finite and no larger. Texts and lists are as long as their document.
"""

from types import GenericAlias, UnionType

from microguest.guest import plainjson

TYPE_CHECKING = False  # type checkers know this name; importing typing would cost start-up time
if TYPE_CHECKING:
    from inspect import Signature
    from typing import Any, Self, dataclass_transform
else:

    def dataclass_transform(**_options):
        """At run time the decorator has nothing to do."""
        return lambda cls: cls


__all__ = ["Catalogue", "Record", "RecordError", "misfit"]

SCALARS = (str, int, float, bool, bytes)
NUMBERS = (int, float)
NUMBER_MAX = 2**63 - 1  # a signed integer of 64 bits: what kernels and other languages have
_TEXTS = frozenset((str,))  # the types in a list of texts
_NONE = object()  # the default of a field that has none


class RecordError(ValueError):
    """A map does not fit the record; the message names the field by its path."""


class _Signature:
    """What `inspect.signature` and `help` find of a class of records, made when they ask."""

    def __get__(self, _record: object, kind: "type[Record]") -> "Signature":
        from microguest.guest.signature import signature_of  # inspect is heavy, and PID 1 starts

        return signature_of(kind._fields, kind._defaults)  # noqa: SLF001


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Record:
    """Base of frozen records: fields are the class's annotations, defaults its attributes."""

    # Worked out once for each class: every message is made, checked and packed through them.
    _fields: "dict[str, Any]" = {}  # noqa: RUF012  typing.ClassVar would import typing
    _defaults: "dict[str, Any]" = {}  # noqa: RUF012  of the fields that have one
    _required: "frozenset[str]" = frozenset()
    __signature__ = _Signature()

    def __init_subclass__(cls) -> None:
        own = {k: v for k, v in cls.__annotations__.items() if k[0] != "_"}
        cls._fields = {**cls._fields, **own}
        cls._defaults = {name: getattr(cls, name) for name in cls._fields if hasattr(cls, name)}
        cls._required = frozenset(cls._fields.keys() - cls._defaults.keys())

    def __init__(self, *unnamed: "Any", **values: "Any") -> None:
        """Takes the fields by name, as the class says. TypeError, RecordError."""
        given = values.keys()
        if unnamed:
            fields = ", ".join(f"{name}=..." for name in self._fields if name in self._required)
            raise TypeError(
                f"{type(self).__name__} takes its fields by name: {fields or 'NAME=...'}"
            )
        if not self._required <= given:
            missing = next(name for name in self._fields if name not in values | self._defaults)
            raise TypeError(f"{type(self).__name__} needs {missing}")
        if not given <= self._fields.keys():
            unknown = ", ".join(sorted(given - self._fields.keys()))
            raise TypeError(f"{type(self).__name__} has no field {unknown}")
        self.__dict__.update(values)
        try:
            self.check()
        except RecordError:
            raise
        except (AttributeError, TypeError, ValueError):
            if wrong := misfit(self, type(self), ""):  # says of which field
                raise TypeError(wrong) from None
            raise

    def check(self) -> None:
        """Raise RecordError where the values contradict each other; subclasses override it."""

    def check_types(self) -> None:
        """Raise TypeError, naming the field, where a value is not of its type, however deep.

        What comes from outside is checked by `from_map`; this is for what a program has made.
        """
        if wrong := misfit(self, type(self), ""):
            raise TypeError(wrong)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen: cannot set {name}")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash((type(self), _hashable(tuple(self._values().values()))))

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self._values().items())
        return f"{type(self).__name__}({fields})"

    def _values(self) -> "dict[str, Any]":
        return {name: getattr(self, name) for name in self._fields}

    def replace(self, **changes: "Any") -> "Self":
        """A copy with some fields changed."""
        return type(self)(**{**self._values(), **changes})

    def to_map(self) -> "dict[str, Any]":
        """A map of plain values, without the fields that equal their default."""
        given, defaults = self.__dict__, self._defaults
        return {
            name: value if type(value) in SCALARS else _plain(value)
            for name in self._fields
            if name in given
            and (value := given[name]) is not (default := defaults.get(name, _NONE))
            and value != default
        }

    def to_json(self) -> str:
        """One line of ASCII JSON: how boot configs, manifests and reports travel."""
        return plainjson.dumps(self.to_map())

    @classmethod
    def from_json(cls, text: str | bytes, *, ignore_unknown: bool = False) -> "Self":
        """The record in a JSON document. Raises RecordError, also where it is not JSON."""
        try:
            values = plainjson.loads(text)
        except (ValueError, RecursionError) as error:
            raise RecordError(f"not a JSON document: {error}") from None
        return cls.from_map(values, ignore_unknown=ignore_unknown)

    @classmethod
    def from_map(cls, values: object, *, where: str = "", ignore_unknown: bool = False) -> "Self":
        """Check a map from outside and build the record.

        `where` is the path put before field names in errors. Unknown fields are an error that names
        them unless `ignore_unknown` (what a newer peer may add). Raises RecordError.
        """
        if not isinstance(values, dict):
            raise RecordError(f"{where or cls.__name__}: expected a map, got {_name(values)}")
        dot = f"{where}." if where else ""
        if not ignore_unknown and not values.keys() <= cls._fields.keys():
            unknown = next(key for key in values if key not in cls._fields)
            raise RecordError(f"unknown field {dot}{unknown!s:.100}")
        if not cls._required <= values.keys():
            missing = next(name for name in cls._fields if name not in values | cls._defaults)
            raise RecordError(f"missing field {dot}{missing}")
        checked = {
            name: value
            if type(value := values[name]) is kind and kind not in NUMBERS
            else _checked(value, kind, f"{dot}{name}", ignore_unknown)
            for name, kind in cls._fields.items()
            if name in values
        }
        try:
            return cls(**checked)
        except RecordError as error:
            raise RecordError(f"{dot}{error}") from None


class Catalogue:
    """A closed set of named records, written as JSON documents of one entry: `{"name": {…}}`."""

    def __init__(self, records: "dict[str, type[Record]]", *, maximum: int) -> None:
        self.records = records
        self.maximum = maximum  # bytes of an encoded record
        self._names = {record: name for name, record in records.items()}

    def encode(self, record: Record) -> bytes:
        """The JSON document, without a newline in it.

        Who puts text of any length into a record cuts it first: `decode` refuses over `maximum`.
        """
        document = {self._names[type(record)]: record.to_map()}
        return plainjson.dumps(document).encode("ascii")

    def decode(self, text: str | bytes) -> Record:
        """The record in a document from outside. Raises RecordError for anything else."""
        if len(text) > self.maximum:
            raise RecordError(f"document of {len(text)} bytes, at most {self.maximum}")
        try:
            values = plainjson.loads(text)
        except (ValueError, RecursionError) as error:
            raise RecordError(f"not a JSON document: {error}") from None
        if not isinstance(values, dict) or len(values) != 1:
            raise RecordError("not a map with one entry")
        ((name, fields),) = values.items()
        if name not in self.records:
            raise RecordError(f"unknown record {name!r:.100}")
        return self.records[name].from_map(fields, where=name, ignore_unknown=True)


def misfit(value: "Any", kind: "Any", where: str) -> str:
    """What is wrong with a value that should be of that type, "" for nothing.

    Beside the types of fields, `kind` may be a Sequence, a Mapping or a tuple of a fixed length.
    """
    got = "None" if value is None else type(value).__name__
    wrong = f"{where}: expected {_kind_name(kind)}, got {got}{_advice(value, kind)}"
    if isinstance(kind, UnionType):
        found = [misfit(value, choice, where) for choice in kind.__args__]
        inside = [each for each in found if not each.startswith(f"{where}: expected ")]
        return "" if "" in found else (inside or [wrong])[0]
    if isinstance(kind, GenericAlias):
        inner = _misfit_inside(value, kind, where)
        return wrong if inner is None else inner
    if issubclass(kind, Record) and isinstance(value, kind):
        dot = f"{where}." if where else ""
        fields = vars(value).items()
        found = [misfit(each, kind._fields[name], f"{dot}{name}") for name, each in fields]
        return next(filter(None, found), "")
    return "" if type(value) is kind or (kind is float and type(value) is int) else wrong


def _misfit_inside(value: "Any", kind: GenericAlias, where: str) -> str | None:
    """The same for what is in a container; None where it is none of that kind."""
    origin: Any = kind.__origin__
    kinds = kind.__args__
    if issubclass(dict, origin):
        if not isinstance(value, origin):
            return None
        found = [misfit(name, kinds[0], f"{where}: {name!r:.80}") for name in value]
        found += [misfit(each, kinds[1], f"{where}: {name!r:.80}") for name, each in value.items()]
        return next(filter(None, found), "")
    if isinstance(value, str | bytes) or not isinstance(value, (list, tuple, origin)):
        return None
    if origin is tuple and kinds[-1] is not Ellipsis:
        if len(value) != len(kinds):
            return None
    else:
        kinds = kinds[:1] * len(value)
    found = [misfit(value[i], kinds[i], f"{where}[{i}]") for i in range(len(value))]
    return next(filter(None, found), "")


def _advice(value: "Any", kind: "Any") -> str:
    """What to write instead, where that can be guessed."""
    kinds = kind.__args__ if isinstance(kind, UnionType) else (kind,)
    if str in kinds and hasattr(value, "__fspath__"):
        return ": write str(path)"
    if str in kinds and type(value) in (int, float):
        return f': write "{value}"'
    if bytes in kinds and isinstance(value, str):
        return ": encode it"
    for each in kinds:
        origin: Any = each.__origin__ if isinstance(each, GenericAlias) else dict
        if not issubclass(dict, origin) and type(value) in (str, each.__args__[0]):
            return ": write a list"
    records = [each for each in kinds if isinstance(each, type) and issubclass(each, Record)]
    return f": write {records[0].__name__}(…)" if records else ""


def _hashable(value: object) -> object:
    if isinstance(value, tuple):
        return tuple(map(_hashable, value))
    if isinstance(value, dict):
        return frozenset((key, _hashable(item)) for key, item in value.items())
    return value


def _plain(value: object) -> object:
    if isinstance(value, Record):
        return value.to_map()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _checked(value: object, kind: object, where: str, ignore_unknown: bool) -> object:
    if kind is int and type(value) is int:
        return _in_range(value, where)
    if isinstance(kind, UnionType):
        return _checked_union(value, kind, where, ignore_unknown)
    if isinstance(kind, GenericAlias):
        return _checked_container(value, kind, where, ignore_unknown)
    if isinstance(kind, type) and issubclass(kind, Record):
        return kind.from_map(value, where=where, ignore_unknown=ignore_unknown)
    if kind is float and type(value) in (int, float):
        return _finite(value, where)
    if kind in SCALARS and type(value) is kind:
        return value
    raise RecordError(f"{where}: expected {_kind_name(kind)}, got {_name(value)}")


def _checked_union(value: object, kind: UnionType, where: str, ignore_unknown: bool) -> object:
    if value is None and type(None) in kind.__args__:
        return None
    if type(value) is int and int not in kind.__args__ and float in kind.__args__:
        return _finite(value, where)
    for choice in kind.__args__:
        if choice is type(value) or not (choice in SCALARS or choice is type(None)):
            return _checked(value, choice, where, ignore_unknown)
    raise RecordError(f"{where}: expected {_kind_name(kind)}, got {_name(value)}")


def _checked_container(
    value: object, kind: GenericAlias, where: str, ignore_unknown: bool
) -> object:
    if kind.__origin__ is tuple and isinstance(value, list | tuple):
        item_kind = kind.__args__[0]
        if item_kind is str and _TEXTS.issuperset(map(type, value)):
            return tuple(value)
        return tuple(
            _checked(item, item_kind, f"{where}[{index}]", ignore_unknown)
            for index, item in enumerate(value)
        )
    if kind.__origin__ is dict and isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise RecordError(f"{where}: keys must be strings")
        item_kind = kind.__args__[1]
        if item_kind is str and _TEXTS.issuperset(map(type, value.values())):
            return dict(value)
        return {
            key: _checked(item, item_kind, f"{where}[{key:.100}]", ignore_unknown)
            for key, item in value.items()
        }
    raise RecordError(f"{where}: expected {_kind_name(kind)}, got {_name(value)}")


def _in_range(value: int, where: str) -> int:
    if not -NUMBER_MAX - 1 <= value <= NUMBER_MAX:
        raise RecordError(f"{where}: must be an integer of 64 bits")
    return value


def _finite(value: "Any", where: str) -> float:
    most = NUMBER_MAX + 1  # what a float makes of NUMBER_MAX
    if not -most <= value <= most:  # NaN is not, either; and JSON has integers of any size
        raise RecordError(f"{where}: must be a finite number, at most {most}")
    return float(value)


def _name(value: object) -> str:
    """Its type, for who wrote a document."""
    return "null" if value is None else type(value).__name__


def _kind_name(kind: "Any") -> str:
    """As it is written where its name was imported."""
    if isinstance(kind, UnionType):
        return " | ".join(map(_kind_name, kind.__args__))
    if isinstance(kind, GenericAlias):
        inner = ", ".join(map(_kind_name, kind.__args__))
        return f"{kind.__origin__.__name__}[{inner}]"
    if kind is Ellipsis:
        return "..."
    return "None" if kind is type(None) else str(kind.__name__)
