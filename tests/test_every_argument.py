"""Every switch and time that a public call takes: wrong ones are said before anything is done.

The calls are found by a walk over what the packages give, so that a new argument is in it. Most of
the objects here have nothing in them: a call that goes on with a wrong value is an AttributeError.
"""

import asyncio
import contextlib
import inspect
import math
import types
import typing
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from agentharness import TOKEN
from hostkit import Peer, agent_at, serving
from test_public_api import hints_of, sample

import microguest
from microguest import Agent, Machine, MachineError, NamedMachine, Process, UnixAddress, aio
from microguest.guest import bounds
from microguest.guest.record import Record
from microguest.host_client.machines.when import Moment

NOWHERE = "/nowhere/agent.sock"
FILLED: dict[str, Any] = {"url": f"unix://{NOWHERE}", "token": TOKEN, "argv": ["true"]}

NO_SWITCH: list[Any] = ["no", "", 0, 1, [], ["x"], {}, b"", 1.5, object()]
NO_TIME: list[Any] = ["5", b"5", [5], {}, True, object()]
NEVER: list[Any] = [-1, -0.001, math.nan, math.inf, -math.inf, 10**400, bounds.SECONDS_MAX * 2]


class Taken(NamedTuple):
    """One argument of a public call."""

    face: types.ModuleType
    owner: str  # the class; "" for a function
    call: str
    name: str
    none: bool  # None can be given, or stands for the default

    def __str__(self) -> str:
        face = "aio." if self.face is aio else ""
        return f"{face}{self.owner or 'function'}.{self.call}.{self.name}"


def calls(face: types.ModuleType) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every public function, and method of a public class, with the name of that."""
    for name in face.__all__:
        value = getattr(face, name)
        if inspect.isfunction(value):
            yield "", value
        elif isinstance(value, type) and not issubclass(value, Record | BaseException):
            for _, method in inspect.getmembers(value, inspect.isfunction):
                if not method.__name__.startswith("_") and not typing.is_typeddict(value):
                    yield name, method


def arguments(call: Callable[..., Any]) -> dict[str, Any]:
    """The type of each that has a name, those of `**options: Unpack[…]` too."""
    hints = hints_of(call)
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(call).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            (options,) = typing.get_args(hints[name])
            found.update({name: kind | None for name, kind in hints_of(options).items()})
        elif name in hints:
            found[name] = hints[name]
    return found


def choices(kind: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if is_union else (kind,)


def taking(kind: type) -> list[Taken]:
    """Every argument that can be of that type; a moment is no time."""
    return [
        Taken(face, owner, call.__name__, name, types.NoneType in choices(hint))
        for face in (microguest, aio)
        for owner, call in calls(face)
        for name, hint in arguments(call).items()
        if kind in choices(hint) and not set(typing.get_args(Moment)) <= set(choices(hint))
    ]


SWITCHES, TIMES = taking(bool), taking(float)


def test_the_walk_finds_them() -> None:
    assert {"check", "clear_env", "step_clock", "modules", "write", "reboot", "all", "follow"} <= {
        each.name for each in SWITCHES
    }
    waits = {(each.face, each.owner, each.call) for each in TIMES}
    for face in (microguest, aio):
        for owner, call in [
            *(("", "connect"), ("", "boot"), ("Agent", "exec"), ("Agent", "wait")),
            *(("Agent", "shutdown"), ("Process", "wait"), ("Process", "communicate")),
            *(("Machine", "stop"), ("NamedMachine", "wait")),
        ]:
            assert (face, owner, call) in waits


# ── calling them ─────────────────────────────────────────────────────────────────────────────────


def starts(peer: Peer) -> None:
    """A process that says nothing."""
    peer.start()
    while True:
        peer.next()


@contextlib.asynccontextmanager
async def owner_of(each: Taken, path: Path) -> AsyncIterator[Any]:
    """What has that call. Where it is not of a process, no agent and no machine is behind it."""
    kind = getattr(each.face, each.owner, each.face)
    nowhere = Agent(UnixAddress(NOWHERE), TOKEN)
    if kind is Process:
        with serving(path, starts), agent_at(path) as agent, agent.start(["cat"]) as process:
            yield process
    elif kind is aio.Process:
        with serving(path, starts):
            async with aio.Agent.of(agent_at(path)) as agent, await agent.start(["cat"]) as process:
                yield process
    elif kind in (Agent, aio.Agent):
        yield nowhere if kind is Agent else aio.Agent.of(nowhere)
    elif kind in (NamedMachine, aio.NamedMachine):
        machine = NamedMachine("nowhere")
        yield machine if kind is NamedMachine else aio.NamedMachine(machine)
    elif kind in (Machine, aio.Machine):
        owner = object.__new__(kind)
        owner._machine = object.__new__(Machine)
        yield owner
    else:
        yield kind


async def done(result: Any) -> None:
    if inspect.isawaitable(result):
        await result


async def check_refused(each: Taken, values: list[Any], path: Path) -> None:
    async with owner_of(each, path) as owner:
        call = getattr(owner, each.call)
        needed = {
            name: sample(kind)
            for name, kind in arguments(call).items()
            if name in (parameters := inspect.signature(call).parameters)
            and parameters[name].default is inspect.Parameter.empty
        }
        given = {**needed, **{n: v for n, v in FILLED.items() if n in arguments(call)}}
        for value in values:
            with pytest.raises((TypeError, ValueError, MachineError), match=f"^{each.name}: "):
                await done(call(**{**given, each.name: value}))


@pytest.mark.parametrize("each", SWITCHES, ids=str)
def test_a_switch_is_true_or_false(each: Taken, tmp_path: Path) -> None:
    """And not what Python takes for either."""
    values = [*NO_SWITCH, *(() if each.none else (None,))]
    asyncio.run(check_refused(each, values, tmp_path / "agent.sock"))


@pytest.mark.parametrize("each", TIMES, ids=str)
def test_a_time_is_neither_negative_nor_endless(each: Taken, tmp_path: Path) -> None:
    values = [*NO_TIME, *NEVER, *(() if each.none else (None,))]
    asyncio.run(check_refused(each, values, tmp_path / "agent.sock"))
