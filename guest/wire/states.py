"""Which kinds of frames each side may send in which state of a connection: `connection`'s."""

from enum import Enum

from microguest.guest.wire.frames import Kind

__all__ = ["AGENT_MAY_SEND", "AGENT_STREAMS", "HOST_MAY_SEND", "HOST_STREAMS", "Role", "State"]


class Role(Enum):
    HOST = "host"
    AGENT = "agent"


class State(Enum):
    __hash__ = object.__hash__  # Enum's own is Python, and each frame looks its state up

    HELLO = "hello"  # the host has not said hello yet
    WELCOME = "welcome"  # the agent has not answered the hello yet
    READY = "ready"
    BUSY = "busy"  # a small request is being answered
    STARTING = "starting"  # a start or attach is being answered
    PROCESS = "process"
    DONE = "done"  # nothing more may be sent or received
    FAILED = "failed"  # the peer broke the protocol; the agent may still say why, once


HOST_MAY_SEND: dict[State, frozenset[int]] = {
    State.HELLO: frozenset({Kind.HELLO}),
    State.WELCOME: frozenset({Kind.REQUEST}),
    State.READY: frozenset({Kind.REQUEST}),
    State.BUSY: frozenset(),
    State.STARTING: frozenset({Kind.DATA, Kind.END, Kind.CONTROL}),
    State.PROCESS: frozenset({Kind.DATA, Kind.END, Kind.CONTROL}),
    State.DONE: frozenset(),
    State.FAILED: frozenset(),
}

AGENT_MAY_SEND: dict[State, frozenset[int]] = {
    State.HELLO: frozenset({Kind.ERROR}),
    State.WELCOME: frozenset({Kind.WELCOME, Kind.ERROR}),
    State.READY: frozenset({Kind.ERROR}),
    State.BUSY: frozenset({Kind.RESPONSE, Kind.ERROR}),
    State.STARTING: frozenset({Kind.RESPONSE, Kind.ERROR}),
    State.PROCESS: frozenset({Kind.DATA, Kind.END, Kind.CREDIT, Kind.EXITED, Kind.ERROR}),
    State.DONE: frozenset(),
    State.FAILED: frozenset({Kind.ERROR}),
}

HOST_STREAMS = frozenset({0})
AGENT_STREAMS = frozenset({1, 2})
