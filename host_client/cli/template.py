"""`--format` and `--filter` of listings: docker's words, and of Go's templates what people type."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from microguest.guest.errors import printable
from microguest.host_client.cli.parser import hint
from microguest.host_client.cli.table import show
from microguest.host_client.cli.tell import say
from microguest.host_client.errors import MachineError

__all__ = ["Row", "filtered", "formatted"]

Row = Mapping[str, object]  # what one line is about, by the name that templates have for it
ACTION: Final = re.compile(r"\{\{(-?)\s*(.*?)\s*(-?)\}\}", re.DOTALL)
FIELD: Final = re.compile(r"(?:(json|upper|lower)\s+)?\.(\w*)")
ESCAPES: Final = {r"\t": "\t", r"\n": "\n", r"\r": "\r", r"\\": "\\"}
TEMPLATE_MAX: Final = 4096  # characters


def formatted(rows: Sequence[Row], form: str, fields: Sequence[str]) -> None:
    """Print each row by the template; `json` is an object per line. MachineError.

    fields: all that rows have. A template that begins with `table` has heads and columns.
    """
    if form == "json":
        form = "{{json .}}"
    table, form = form.startswith("table "), form.removeprefix("table ")
    form = re.sub(r"\\[tnr\\]", lambda match: ESCAPES[match[0]], form)
    # What a row has must not look like the template's own columns and lines.
    fill = compiled(form, fields, keep="" if table else "\t")
    if table:
        heads = fill({field: field.upper() for field in fields})
        show(heads.split("\t"), [fill(row).split("\t") for row in rows])
        return
    for row in rows:
        for line in fill(row).split("\n"):
            say(line)


def compiled(form: str, fields: Sequence[str], keep: str) -> Callable[[Row], str]:
    """What makes text of a row. MachineError for what is no template, or names no field.

    keep: of what a row has and is not printable, what is not shown as an escape.
    """
    if len(form) > TEMPLATE_MAX:
        raise MachineError(f"format: longer than {TEMPLATE_MAX} characters")
    for _, action, _ in ACTION.findall(form):
        match = FIELD.fullmatch(action)
        if match is None:
            raise MachineError(
                f"format: {{{{{action}}}}} is not understood: write {{{{.Field}}}}, "
                "{{json .Field}}, {{upper .Field}}, {{lower .Field}} or {{json .}}"
            )
        if match[2] and match[2] not in fields:
            raise MachineError(
                f"format: there is no field .{match[2]}{hint(match[2], fields)}: "
                f"there are {', '.join(fields)}"
            )
    if "{{" in ACTION.sub("", form):
        raise MachineError("format: a {{ has no }}")

    def fill(row: Row) -> str:
        return ACTION.sub(lambda match: printable(value_of(match[2], row), keep), form)

    return fill


def value_of(action: str, row: Row) -> str:
    """What stands for one {{…}}."""
    match = FIELD.fullmatch(action)
    assert match is not None
    function, name = match.groups()
    value = row[name] if name else dict(row)
    if function == "json":
        return json.dumps(value)
    if name and isinstance(value, Mapping):  # as docker has labels
        text = ",".join(f"{key}={of}" for key, of in value.items())
    else:
        text = value if isinstance(value, str) else json.dumps(value)
    return {"upper": text.upper, "lower": text.lower}.get(function or "", lambda: text)()


def filtered(
    rows: Sequence[Row],
    filters: Sequence[str],
    keys: Mapping[str, str],
    known: Mapping[str, Sequence[str]],
) -> list[Row]:
    """Those that fit: one of the values of each key that is given. MachineError.

    keys: by key of a filter, the field that it looks at. A mapping has to have KEY, or KEY=VALUE;
    of a Name a part is enough. known: all values that there are, of a key that has few.
    """
    wanted: dict[str, list[str]] = {}
    for text in filters:
        key, equals, value = text.partition("=")
        if not equals or key not in keys:
            raise MachineError(f"filter {text!r:.80}: write KEY=VALUE; KEY is {', '.join(keys)}")
        if value not in known.get(key, (value,)):
            raise MachineError(
                f"filter {text!r:.80}: there is no {key} {value!r:.40}{hint(value, known[key])}: "
                f"there are {', '.join(known[key])}"
            )
        wanted.setdefault(key, []).append(value)
    return [
        row
        for row in rows
        if all(
            any(fits(keys[key], row[keys[key]], value) for value in values)
            for key, values in wanted.items()
        )
    ]


def fits(field: str, found: object, wanted: str) -> bool:
    """Whether what a row has is what a filter wants."""
    if isinstance(found, Mapping):
        name, equals, value = wanted.partition("=")
        return name in found and (not equals or found[name] == value)
    if field == "Name":
        return wanted in str(found)
    return str(found) == wanted
