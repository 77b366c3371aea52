"""What the contract names is there: who acts on it, a way to ask for it, and its docs.

A name in a table and nobody who answers would pass types and unit tests, and fail a user as
`internal`. All is read from the sources, so that nothing has to be imported that only runs in the
guest. Each check is also given a name that nobody has ever heard of, and must find it.
"""

import ast
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from microguest import aio
from microguest.guest import report, supervision
from microguest.guest.record import Catalogue, Record
from microguest.guest.wire import messages
from microguest.host_client.client.agent import Agent
from microguest.host_client.machines.plan import COMMANDS

PROJECT = Path(__file__).parent.parent
PROTOCOL = (PROJECT / "docs" / "reference" / "protocol.md").read_text()
ARCHITECTURE = (PROJECT / "docs" / "design" / "architecture.md").read_text()
VECTORS = json.loads((PROJECT / "tests" / "data" / "protocol-vectors.json").read_text())


class Unheard(Record):
    """A record that no side has."""


UNHEARD = {"unheard": Unheard}


# ── what the sources say ─────────────────────────────────────────────────────────────────────────


def nodes(*places: str) -> Iterator[ast.AST]:
    """All syntax of modules, and of packages with all that is in them."""
    for place in places:
        path = PROJECT / place
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            yield from ast.walk(ast.parse(file.read_text()))


def name_of(node: ast.expr) -> str:
    """The last part of a name with dots; "" of anything else."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def choices(node: ast.expr) -> Iterator[str]:
    """The classes that the second argument of isinstance names."""
    match node:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            yield from choices(left)
            yield from choices(right)
        case ast.Tuple(elts=items):
            for item in items:
                yield from choices(item)
        case _:
            yield name_of(node)


def told_apart(*places: str) -> set[str]:
    """The classes that code there acts on: by a case of a match, by isinstance or by a table."""
    found: set[str] = set()
    for node in nodes(*places):
        match node:
            case ast.MatchClass(cls=cls):
                found.add(name_of(cls))
            case ast.Call(func=ast.Name(id="isinstance"), args=[_, kinds]):
                found.update(choices(kinds))
            case ast.Dict(keys=keys):
                found.update(name_of(key) for key in keys if key is not None)
    return found


def made(*places: str) -> set[str]:
    """The classes that code there makes records of, as `Name(…)` or `Name.from_map(…)`."""
    found = set()
    for node in nodes(*places):
        match node:
            case ast.Call(func=ast.Attribute(value=cls, attr="from_map") | cls):
                found.add(name_of(cls))
    return found


def keys_of_table(place: str, table: str) -> set[str]:
    """The keys of a table in a module, which are texts."""
    for node in nodes(place):
        match node:
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.Dict(keys=keys)):
                if name == table:
                    return {key.value for key in keys if isinstance(key, ast.Constant)}
    raise AssertionError(f"{place} has no {table}")


def names_in(records: Iterable[type[Record]]) -> set[str]:
    return {record.__name__ for record in records}


# ── operations ───────────────────────────────────────────────────────────────────────────────────

HANDLED = keys_of_table("agent/operations.py", "handlers")
STEPS = [event for each in VECTORS["conversations"] for s in each["steps"] for event in s["events"]]
REQUESTED = {event["Request"]["op"] for event in STEPS if "Request" in event}
ANSWERED = {event["Response"]["record"] for event in STEPS if "Response" in event}


def lacking(operations: dict[str, tuple[type[Record], type[Record]]]) -> list[str]:
    """What is missing of these operations, a sentence each."""
    wrong = [
        f"{name} has no handler in agent/operations.py" for name in operations.keys() - HANDLED
    ]
    for name, (args, result) in operations.items():
        for face in (Agent, aio.Agent):
            if not callable(getattr(face, name, None)):
                wrong.append(f"{face.__module__}.Agent has no {name}()")
        row = f"| `{name}` | `{args.__name__}` | `{result.__name__}` |"
        if row not in PROTOCOL:
            wrong.append(f"docs/reference/protocol.md has no row {row}")
        wrong += [
            f"{each} has no section in docs/reference/protocol.md" for each in undescribed(args)
        ]
        wrong += [
            f"{each} has no section in docs/reference/protocol.md" for each in undescribed(result)
        ]
        if name not in REQUESTED:
            wrong.append(f"no stored conversation requests {name}")
        if result.__name__ not in ANSWERED | {"Exited"} or result.__name__ not in str(STEPS):
            wrong.append(f"no stored conversation answers with {result.__name__}")
    return wrong


def undescribed(record: type[Record]) -> list[str]:
    """The record's name where it has fields and no section, or no sentence that begins with it."""
    name = record.__name__
    begun = re.search(rf"^### `{name}`|\*\*`{name}`\*\*", PROTOCOL, re.MULTILINE)
    return [] if begun or not record._fields else [name]


def test_every_operation_has_a_handler_a_method_docs_and_a_vector() -> None:
    assert lacking(messages.OPERATIONS) == []
    assert messages.OPERATIONS.keys() == HANDLED


def test_an_operation_that_nobody_has_is_found() -> None:
    assert lacking({"unheard": (Unheard, Unheard)}) == [
        "unheard has no handler in agent/operations.py",
        "microguest.host_client.client.agent.Agent has no unheard()",
        "microguest.host_client.aio.agent.Agent has no unheard()",
        "docs/reference/protocol.md has no row | `unheard` | `Unheard` | `Unheard` |",
        "no stored conversation requests unheard",
        "no stored conversation answers with Unheard",
    ]


# ── controls, and the other frames of a connection ───────────────────────────────────────────────

# A process that is not kept has one of them, a kept one the other.
PROCESS_CONNECTIONS = ("agent/process/plain.py", "agent/process/attaching.py")


def uncontrolled(controls: dict[str, type[Record]]) -> list[str]:
    wrong = []
    for name, record in controls.items():
        for place in PROCESS_CONNECTIONS:
            if record.__name__ not in told_apart(place):
                wrong.append(f"{place} does not know {name}")
        if f"| `{name}` | `{record.__name__}` |" not in PROTOCOL:
            wrong.append(f"docs/reference/protocol.md has no row for {name}")
        if not any(record.__name__ in event for event in STEPS):
            wrong.append(f"no stored conversation has {name}")
        if record.__name__ not in made("host_client"):
            wrong.append(f"no host sends {name}")
    return wrong


def test_every_control_has_who_sends_it_and_who_obeys() -> None:
    assert uncontrolled(messages.CONTROLS) == []


def test_a_control_that_nobody_has_is_found() -> None:
    assert len(uncontrolled(UNHEARD)) == len(PROCESS_CONNECTIONS) + 3


# ── reports, supervision, commands to a monitor ──────────────────────────────────────────────────


def one_sided(
    records: Iterable[type[Record]], one: tuple[str, ...], other: tuple[str, ...]
) -> list[str]:
    """What nobody sends, and what is sent by one and not acted on by the other."""
    names = names_in(records)
    sent, heard = {}, {}
    for places in (one, other):
        sent[places], heard[places] = names & made(*places), names & told_apart(*places)
    wrong = [f"nobody sends {name}" for name in sorted(names - sent[one] - sent[other])]
    for sender, receiver in ((one, other), (other, one)):
        missed = sorted(sent[sender] - heard[receiver])
        wrong += [f"{receiver[0]} does not act on {name}" for name in missed]
    return wrong


PID_1, AGENT = ("init_shim",), ("agent",)
HOST = ("host_client/monitor", "host_client/machines")


def test_every_report_has_who_sends_it_and_who_acts_on_it() -> None:
    assert one_sided(report.REPORTS.records.values(), PID_1, HOST) == []
    rows = [f"| `{name}` | `{each.__name__}` |" for name, each in report.REPORTS.records.items()]
    assert [row for row in rows if row not in PROTOCOL] == []


def test_every_supervision_message_has_who_sends_it_and_who_acts_on_it() -> None:
    assert one_sided(supervision.MESSAGES.records.values(), PID_1, AGENT) == []
    assert "guest/supervision.py" in ARCHITECTURE  # where their docs are: a docstring each
    assert undocumented(supervision.MESSAGES) == []


def test_every_command_to_a_monitor_has_who_sends_it_and_who_obeys() -> None:
    users = tuple(
        str(path.relative_to(PROJECT)) for path in (PROJECT / "host_client/machines").glob("*.py")
    )
    assert one_sided(COMMANDS.records.values(), users, ("host_client/monitor/main.py",)) == []
    assert undocumented(COMMANDS) == []


def undocumented(catalogue: Catalogue) -> list[str]:
    """Records without a docstring of their own, which says who sends them."""
    found = catalogue.records.values()
    return [each.__name__ for each in found if not (vars(each).get("__doc__") or "").strip()]


def test_a_message_that_nobody_has_is_found() -> None:
    assert one_sided([Unheard], PID_1, HOST) == ["nobody sends Unheard"]
    silent: Any = type("Silent", (Record,), {})
    assert undocumented(Catalogue({"silent": silent}, maximum=1)) == ["Silent"]


@pytest.mark.parametrize("receiver", [PID_1, AGENT])
def test_a_message_that_is_sent_to_nobody_is_found(receiver: tuple[str, ...]) -> None:
    sender = AGENT if receiver is PID_1 else PID_1
    deaf = ("guest/bounds.py",)
    wrong = one_sided(supervision.MESSAGES.records.values(), sender, deaf)
    assert [line for line in wrong if line.startswith("guest/bounds.py does not act on ")]
