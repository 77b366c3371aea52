"""Handles of what is open: closed while they are used, dropped, and taken elsewhere."""

import asyncio
import copy
import gc
import pickle
import threading
import time
import warnings
from collections.abc import Callable, Iterator

import pytest
from agentharness import TOKEN, AgentProcess
from machinekit import wait_until
from patience import PATIENCE, SLACK

from microguest import Agent, ConnectionLost, OperationError, aio, boot, connect, find


@pytest.fixture(scope="module")
def server(elf: object) -> Iterator[AgentProcess]:
    with AgentProcess() as process:
        yield process


@pytest.fixture
def agent(server: AgentProcess) -> Iterator[Agent]:
    with connect(f"unix://{server.path}", token=TOKEN) as agent:
        yield agent


# ── closed while others use it ───────────────────────────────────────────────────────────────────


def ended_by(
    close: Callable[[], None], busy: Callable[[], bool], call: Callable[[], object]
) -> Exception:
    """What a call in another thread raises soon after the close."""
    caught: list[Exception] = []

    def run() -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 the test looks at it
            caught.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    wait_until("it is under way", busy)
    began = time.monotonic()
    close()
    thread.join(PATIENCE)
    assert time.monotonic() - began < SLACK
    (error,) = caught
    return error


def runs(agent: Agent, argv: tuple[str, ...]) -> bool:
    return any(each.argv == argv for each in agent.processes())


def test_a_close_ends_what_runs_in_another_thread(server: AgentProcess, agent: Agent) -> None:
    with connect(f"unix://{server.path}", token=TOKEN) as other:
        error = ended_by(
            other.close,
            lambda: runs(agent, ("sleep", "1001")),
            lambda: other.exec(["sleep", "1001"]),
        )
        assert isinstance(error, ConnectionLost)
        assert "was closed here, by Agent.close" in str(error)
        wait_until("its command ends", lambda: not runs(agent, ("sleep", "1001")))
        assert other.exec(["echo", "again"]).stdout == b"again\n"


def test_a_close_ends_a_wait_in_another_thread(agent: Agent, server: AgentProcess) -> None:
    with (
        agent.start(["sleep", "1002"]) as process,
        connect(f"unix://{server.path}", token=TOKEN) as other,
    ):
        error = ended_by(
            other.close, lambda: bool(other.driver._busy), lambda: other.wait(process.id)
        )
        assert isinstance(error, ConnectionLost)
        assert "was closed here" in str(error)
        other.close()
        assert process.poll() is None


def test_a_close_leaves_a_process_alone(server: AgentProcess) -> None:
    other = connect(f"unix://{server.path}", token=TOKEN)
    with other.start(["cat"], stdin=True) as process:
        other.close()
        assert process.communicate(b"goes on").stdout == b"goes on"


def test_a_close_ends_what_runs_in_another_task(server: AgentProcess, agent: Agent) -> None:
    async def closed() -> None:
        other = await aio.connect(f"unix://{server.path}", token=TOKEN)
        task = asyncio.create_task(other.exec(["sleep", "1003"]))
        while not runs(agent, ("sleep", "1003")):
            await asyncio.sleep(0.01)
        other.close()
        with pytest.raises(ConnectionLost, match="was closed here"):
            await asyncio.wait_for(task, SLACK)

    asyncio.run(closed())


@pytest.mark.usefixtures("machines_home")
def test_what_a_kill_of_the_machine_ends_is_told_so(image: str) -> None:
    with boot(image, machine="namespaces") as machine:
        error = ended_by(
            lambda: void(machine.kill()),
            lambda: runs(machine.agent, ("sleep", "1004")),
            lambda: machine.agent.exec(["sleep", "1004"]),
        )
    assert isinstance(error, ConnectionLost)
    assert f"machine {machine.name} has ended: it was killed" in str(error)


def void(_result: object) -> None:
    pass


# ── where it cannot go ───────────────────────────────────────────────────────────────────────────


def refused(handle: object, instead: str) -> None:
    for call in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=f"cannot be pickled or copied.*{instead}"):
            call(handle)


def test_handles_are_neither_pickled_nor_copied(agent: Agent) -> None:
    refused(agent, "connect by the machine's name")
    refused(aio.Agent.of(agent), "connect by the machine's name")
    with agent.start(["sleep", "1005"]) as process:
        refused(process, "attach to it by its id")


@pytest.mark.usefixtures("machines_home")
def test_machines_are_neither_pickled_nor_copied(image: str) -> None:
    with boot(image, machine="namespaces") as machine:
        refused(machine, "connect by the machine's name")
        refused(aio.Machine(machine), "connect by the machine's name")
        with find(machine.name) as found:
            refused(found, "connect by the machine's name")


# ── dropped, and wrong ───────────────────────────────────────────────────────────────────────────


def test_a_process_that_is_dropped_is_named(agent: Agent) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        number = agent.start(["sleep", "1006"]).id
        gc.collect()
    (said,) = caught
    assert said.category is ResourceWarning
    assert f"'sleep' (process {number}) was dropped" in str(said.message)
    wait_until("it ends", lambda: not runs(agent, ("sleep", "1006")))


def test_a_stream_keeps_its_process(agent: Agent) -> None:
    output = agent.start(["sh", "-c", "echo all of it; exec sleep 1007"]).stdout
    gc.collect()
    assert output.read(100) == b"all of it\n"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del output
        gc.collect()
    (said,) = caught
    assert "'sh'" in str(said.message)
    wait_until("it ends", lambda: not runs(agent, ("sleep", "1007")))


@pytest.mark.parametrize("user", [None, "root"])
def test_a_wrong_group_is_named(agent: Agent, user: str | None) -> None:
    with pytest.raises(OperationError, match="group 'nope': no group 'nope'"):
        agent.exec(["true"], user=user, groups=["nope"])
