"""Every number of every record has a range: what a peer sends can be held, written and sent on."""

from collections.abc import Iterator
from types import GenericAlias, UnionType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microguest.guest import report, supervision
from microguest.guest.boot import config
from microguest.guest.bundle import manifest
from microguest.guest.record import NUMBER_MAX, Record, RecordError
from microguest.guest.report import REPORTS
from microguest.guest.wire import messages, renewal
from microguest.guest.wire.messages import ProcessInfo
from microguest.host_client.machines import plan
from microguest.host_client.machines.plan import STATE_MAX, MachineState, clipped

MODULES = (config, manifest, messages, renewal, report, supervision, plan)
TOO_LARGE = [10**4000, -(10**4000), NUMBER_MAX + 2, -NUMBER_MAX - 3]
NO_NUMBERS = [float("inf"), float("-inf"), float("nan"), 1e300, -1e300]


def all_records(base: type[Record] = Record) -> Iterator[type[Record]]:
    for kind in base.__subclasses__():
        if not kind.__module__.startswith("test"):
            yield kind
        yield from all_records(kind)


def number_kinds(kind: Any) -> set[type]:
    """int and float, as far as the field takes them directly or in a container."""
    if isinstance(kind, UnionType | GenericAlias):
        return set().union(*(number_kinds(choice) for choice in kind.__args__))
    return {kind} & {int, float}


def plausible(kind: Any) -> Any:
    """A value of the field's type; whether it makes sense is not asked before the types are."""
    if isinstance(kind, UnionType):
        return None if type(None) in kind.__args__ else plausible(kind.__args__[0])
    if isinstance(kind, GenericAlias):
        return [] if kind.__origin__ is tuple else {}
    if issubclass(kind, Record):
        return {name: plausible(kind._fields[name]) for name in kind._required}
    return kind()


def inside(kind: Any, value: object) -> object:
    """The value where the field has its numbers."""
    if isinstance(kind, UnionType):
        return inside(next(choice for choice in kind.__args__ if number_kinds(choice)), value)
    if isinstance(kind, GenericAlias):
        item = inside(next(choice for choice in kind.__args__ if number_kinds(choice)), value)
        return [item] if kind.__origin__ is tuple else {"x": item}
    return value


FIELDS = sorted(
    {(record, name) for record in all_records() for name, kind in record._fields.items()
     if number_kinds(kind)},
    key=str,
)  # fmt: skip


def test_there_are_many() -> None:
    assert len(FIELDS) > 80
    assert {record.__module__ for record, _ in FIELDS} >= {m.__name__ for m in MODULES}


@pytest.fixture
def types_alone() -> Iterator[None]:
    """Records within the record make sense, whatever they hold."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in all_records():
            if "check" in vars(kind):
                patch.setattr(kind, "check", lambda self: None)
        yield


@pytest.mark.usefixtures("types_alone")
@pytest.mark.parametrize(("record", "name"), FIELDS)
def test_no_number_is_larger_than_any_is(record: type[Record], name: str) -> None:
    kind = record._fields[name]
    values = {field: plausible(record._fields[field]) for field in record._required}
    wrong = TOO_LARGE + (NO_NUMBERS if float in number_kinds(kind) else [])
    for number in wrong:
        with pytest.raises(RecordError, match=name):
            record.from_map({**values, name: inside(kind, number)})


numbers = st.one_of(st.integers(), st.just(10**4000), st.floats(), st.integers(-1, 300))
texts = st.text(max_size=3) | st.just("\U0001f600" * 20_000)
values = st.none() | st.booleans() | numbers | texts


@given(
    st.sampled_from(sorted(REPORTS.records)).flatmap(
        lambda name: st.tuples(
            st.just(name),
            st.fixed_dictionaries(
                {field: values for field in REPORTS.records[name]._fields if field != "steps"}
            ),
        )
    )
)
def test_whatever_a_guest_reports_the_state_can_be_read(said: tuple[str, Any]) -> None:
    name, fields = said
    fields = {key: value for key, value in fields.items() if value is not None}
    if "steps" in REPORTS.records[name]._fields:
        fields["steps"] = [{"name": "x" * 9000, "start_ms": 1.0, "end_ms": 1}] * 70
    try:
        taken = clipped(REPORTS.records[name].from_map(fields, ignore_unknown=True))
    except RecordError:
        return
    place = {"workload_exited": "workload_exited", "boot_failed": "boot_failed",
             "workload_failed": "workload_failed"}.get(name)  # fmt: skip
    if name == "agent_exited":
        state = MachineState(name="m", agent_exits=(taken,) * 16)
    elif place is not None:
        state = MachineState(name="m", **{place: taken})  # type: ignore[arg-type]
    else:
        return
    text = state.to_json()
    assert len(text) < STATE_MAX
    assert MachineState.from_json(text) == state


@pytest.mark.parametrize(
    "fields",
    [{"label": "x" * 257}, {"id": "x" * 65}, {"argv": ["x" * 1025]}, {"argv": [""] * 1026}],
)
def test_no_listed_process_is_longer_than_any_is(fields: dict[str, Any]) -> None:
    """A list is padded to its longest: one of these would make gigabytes of thousands of rows."""
    usual: dict[str, Any] = {"id": "p1", "pid": 7, "argv": ["sh"]}
    assert ProcessInfo.from_map(usual)
    with pytest.raises(RecordError):
        ProcessInfo.from_map(usual | fields)
