"""An agent's "no" has a class of its own where a caller would branch on it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from agentharness import TOKEN, AgentProcess

from microguest import aio, connect
from microguest.errors import (
    IdTaken,
    NoSuchProcess,
    OperationError,
    ProgramNotFound,
    StartError,
    StdinTaken,
    Unauthorized,
)
from microguest.host_client.client.agent import Agent
from microguest.host_client.errors import OF_CODE, refusal

PROTOCOL = Path(__file__).parent.parent / "docs" / "reference" / "protocol.md"


@pytest.fixture
def agent(elf: Path) -> Iterator[AgentProcess]:
    with AgentProcess() as process:
        yield process


@pytest.fixture
def client(agent: AgentProcess) -> Iterator[Agent]:
    with connect(f"unix://{agent.path}", token=TOKEN) as client:
        yield client


def test_what_has_no_such_id(client: Agent) -> None:
    for ask in (client.wait, client.forget, client.attach, lambda name: client.signal(name, 15)):
        with pytest.raises(NoSuchProcess) as raised:
            ask("nobody")
        assert raised.value.code == "no_such_process"


def test_a_program_that_is_not_there(client: Agent) -> None:
    for ask in (client.exec, client.start):
        with pytest.raises(ProgramNotFound) as raised:
            ask(["no-such-program"])
        assert isinstance(raised.value, StartError)
    with pytest.raises(StartError) as other:
        client.exec(["true"], cwd="/no/such/folder")
    assert type(other.value) is StartError


def test_what_only_one_may_have(client: Agent) -> None:
    with client.start(["cat"], keep=True, id="one", stdin=True) as process:
        with pytest.raises(StdinTaken):
            client.attach("one")
        with pytest.raises(IdTaken):
            client.start(["cat"], keep=True, id="one")
        process.kill()


def test_a_token_of_another_machine(agent: AgentProcess) -> None:
    with pytest.raises(Unauthorized):
        connect(f"unix://{agent.path}", token="another")


async def awaiting(agent: AgentProcess) -> None:
    async with await aio.connect(f"unix://{agent.path}", token=TOKEN) as client:
        with pytest.raises(NoSuchProcess):
            await client.wait("nobody")
        with pytest.raises(ProgramNotFound):
            await client.exec(["no-such-program"])


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_awaiting_face_raises_the_same(agent: AgentProcess, backend: str) -> None:
    import anyio

    anyio.run(awaiting, agent, backend=backend)


def test_each_class_is_of_a_code_of_the_protocol() -> None:
    codes = {line.split("`")[1] for line in PROTOCOL.read_text().splitlines() if line[:3] == "| `"}
    for code, kind in OF_CODE.items():
        assert code in codes
        error = refusal(code, "why", {"errno": 2})
        assert type(error) is kind
        assert (error.code, error.message, error.fields) == (code, "why", {"errno": 2})
    assert type(refusal("of a newer agent", "why", {})) is OperationError
    assert type(refusal("bad_cwd", "why", {})) is StartError
