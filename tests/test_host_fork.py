"""Programs that fork: what parent and child have of connections, processes and machines.

Programs that are killed here run apart; a child of the test itself ends with `os._exit`.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from agentharness import TOKEN, AgentProcess
from hostkit import agent_at, answer_pings, serving
from machinekit import wait_until

from microguest import Agent, aio, boot, connect
from microguest.errors import ConnectionLost
from microguest.host_client.machines.folder import claim, is_alive

PATIENCE = 60  # seconds until a child that hangs is ended, which fails its test


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentProcess]:
    with AgentProcess() as process:
        yield process


@pytest.fixture
def client(agent: AgentProcess) -> Iterator[Agent]:
    with connect(f"unix://{agent.path}", token=TOKEN) as connected:
        yield connected


class Child:
    """A forked child that calls `function`; `result` gives, or raises, what that did."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(writer)
            return
        signal.alarm(PATIENCE)
        try:
            outcome: tuple[bool, Any] = True, function()
        except BaseException as error:  # noqa: BLE001  the parent raises it
            outcome = False, f"{type(error).__name__}: {error}"
        try:
            os.write(writer, pickle.dumps(outcome))
        finally:
            os._exit(0)

    def result(self) -> Any:
        with open(self._reader, "rb") as pipe:
            said = pipe.read()
        _, status = os.waitpid(self.pid, 0)
        assert said, f"the child ended with status {status}"
        good, value = pickle.loads(said)
        assert good, value
        return value


def in_child(function: Callable[[], Any]) -> Any:
    return Child(function).result()


def error_of(function: Callable[[], Any]) -> str:
    """What it raises, as text."""
    try:
        function()
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return "nothing"


# ── the pool ─────────────────────────────────────────────────────────────────────────────────────


def test_a_child_dials_a_connection_of_its_own(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "s", answer_pings, answer_pings),
        agent_at(tmp_path / "s") as agent,
    ):
        assert agent.ping().root_ready
        assert in_child(lambda: agent.ping().root_ready)
        assert agent.ping().root_ready  # on the first one, which the child has not ended


def test_parent_and_children_get_their_own_answers(client: Agent) -> None:
    ids = []
    for code in range(4):
        with client.start(["sh", "-c", f"exit {code}"], keep=True) as process:
            process.wait(PATIENCE)
            ids.append(process.id)

    def ask(mine: int) -> set[int]:
        return {client.wait(ids[mine]).returncode for _ in range(200)}

    children = [Child(lambda mine=mine: ask(mine)) for mine in (1, 2, 3)]  # type: ignore[misc]
    assert ask(0) == {0}
    assert [child.result() for child in children] == [{1}, {2}, {3}]
    for each in ids:
        client.forget(each)


shared: Agent | None = None


def status_of(code: int) -> int:
    assert shared is not None
    return shared.exec(["sh", "-c", f"exit {code}"]).returncode


def test_a_pool_of_forked_workers(client: Agent) -> None:
    global shared  # noqa: PLW0603  that is how workers get it
    shared = client
    client.ping()
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.map(status_of, range(60), chunksize=1) == list(range(60))


def test_forks_while_threads_hold_every_lock(client: Agent) -> None:
    """Locks that another thread had when the child was made are nobody's there."""
    over = threading.Event()

    def use(call: Callable[[], object]) -> None:
        while not over.is_set():
            call()

    with client.start(["cat"], stdin=True) as process:
        threads = [
            threading.Thread(target=use, args=(call,))
            for call in (process.poll, client.ping, lambda: process.stdin.write(b""))
        ]
        for thread in threads:
            thread.start()
        try:
            for _ in range(30):

                def child() -> bool:
                    process.close()
                    return client.ping().root_ready

                assert in_child(child)
        finally:
            over.set()
            for thread in threads:
                thread.join()
        assert process.communicate(b"untouched").stdout == b"untouched"


# ── what was inherited ───────────────────────────────────────────────────────────────────────────


def test_an_inherited_process_is_the_parents(client: Agent) -> None:
    with client.start(["cat"], stdin=True) as process:
        process.stdin.write(b"one")
        assert process.stdout.read(3) == b"one"

        def child() -> list[str]:
            errors = [
                error_of(call)
                for call in (
                    lambda: process.stdout.read(1),
                    lambda: process.stdin.write(b"from the child"),
                    process.kill,
                    process.poll,
                    process.detach,
                    lambda: process.wait(1),
                )
            ]
            process.__exit__(None, None, None)
            return errors

        for error in in_child(child):
            assert error.startswith("ConnectionLost: ")
            assert f"belongs to process {os.getpid()}" in error
        assert process.communicate(b"two").stdout == b"two"


def test_an_inherited_stream_is_the_parents(client: Agent) -> None:
    from microguest.guest.wire.messages import Start

    with client.open_process(Start(argv=("cat",), stdin=True)) as stream:

        def child() -> str:
            error = error_of(stream.take)
            stream.close()
            return error

        assert "was forked" in in_child(child)
        stream.write(b"here")
        stream.end_input()
        assert stream.exited is None
        assert list(stream)
        assert stream.exited is not None


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_inherited_awaiting_process_is_the_parents(client: Agent, backend: str) -> None:
    async def main() -> None:
        async with await aio.Agent.of(client).start(["cat"], stdin=True) as process:

            def child() -> str:
                try:
                    process.stdout.read(1).send(None)  # as a loop would begin it
                except ConnectionLost as error:
                    return str(error)
                finally:
                    process.close()
                return "nothing"

            assert "was forked" in in_child(child)
            await process.stdin.send(b"here")
            await process.stdin.aclose()
            assert await process.stdout.read() == b"here"

    anyio.run(main, backend=backend)


def test_an_inherited_machine_is_the_parents(machines_home: Path, image: str) -> None:
    with boot(image, machine="namespaces") as machine:

        def child() -> tuple[list[str], bytes, str]:
            calls = (machine.stop, machine.kill, machine.detach, lambda: machine.wait(1))
            errors = [error_of(call) for call in calls]
            said = machine.agent.exec(["echo", "from the child"]).stdout
            machine.__exit__(None, None, None)
            machine.__exit__(SystemExit, SystemExit(), None)
            return errors, said, machine.state.phase

        errors, said, phase = in_child(child)
        for error in errors:
            assert error.startswith("MachineError: ")
            assert f"belongs to process {os.getpid()}" in error
        assert said == b"from the child\n"
        assert phase == machine.state.phase
        assert machine.agent.exec(["echo", "still here"]).stdout == b"still here\n"
    assert not is_alive(machine.name)


def test_a_child_keeps_no_name_taken(machines_home: Path) -> None:
    folder = claim("forked")
    go_on, tell = os.pipe()
    child = Child(lambda: os.read(go_on, 1))
    folder.remove()
    try:
        claim("forked").remove()
    finally:
        os.write(tell, b"x")
        assert child.result() == b"x"
        os.close(go_on)
        os.close(tell)


# ── a child that lives on ────────────────────────────────────────────────────────────────────────

# Ways in which another process is left behind, with copies of all descriptors that it can get.
FORK = "child = os.fork() or time.sleep(1000)"
C_FORK = "child = ctypes.CDLL(None).fork() or ctypes.CDLL(None).sleep(1000)"
SPAWN = 'child = subprocess.Popen(["sleep", "1000"], close_fds=False).pid'


@contextlib.contextmanager
def program(*lines: str, environment: dict[str, str] | None = None) -> Iterator[Any]:
    """A program of this test, which prints a child's pid as its last line; both are ended."""
    source = "\n".join(("import ctypes, os, subprocess, sys, threading, time", *lines))
    child = 0
    with subprocess.Popen(
        [sys.executable, "-c", source],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        env={**os.environ, **(environment or {})},
    ) as running:
        try:
            assert running.stdout is not None
            child = int(running.stdout.readline())
            os.kill(child, 0)
            yield running
            os.kill(child, 0)  # it has lived until here
        finally:
            running.kill()
            if child:
                os.kill(child, signal.SIGKILL)


def begins(url: str, label: str) -> str:
    return f"""
from microguest import connect
agent = connect({url!r}, token={TOKEN!r})
agent.ping()
execution = threading.Thread(
    target=lambda: agent.exec(["sleep", "1000"], label={label!r}), daemon=True)
execution.start()
process = agent.start(["sleep", "1000"], label={label!r})
while sum(each.label == {label!r} for each in agent.processes()) < 2:
    time.sleep(0.01)
"""


@pytest.mark.parametrize("way", [FORK, SPAWN], ids=["fork", "spawn"])
def test_a_living_child_keeps_no_process_of_a_dead_parent(
    agent: AgentProcess, client: Agent, way: str
) -> None:
    label = f"dead-{way[8:14]}"
    url = f"unix://{agent.path}"
    with program(begins(url, label), way, "print(child, flush=True); time.sleep(1000)") as parent:
        parent.kill()
        wait_until("all ended", lambda: label not in [each.label for each in client.processes()])


@pytest.mark.parametrize("way", [FORK, C_FORK, SPAWN], ids=["fork", "c-fork", "spawn"])
def test_a_living_child_keeps_no_process_that_was_closed(
    agent: AgentProcess, client: Agent, way: str
) -> None:
    label = f"closed-{way[8:14]}"
    lines = (
        begins(f"unix://{agent.path}", label),
        way,
        "print(child, flush=True); process.close(); time.sleep(1000)",
    )
    with program(*lines):
        wait_until(
            "the closed one has ended",
            lambda: [each.label for each in client.processes()].count(label) == 1,
        )
    wait_until("all ended", lambda: label not in [each.label for each in client.processes()])


def test_a_living_child_keeps_no_machine_of_a_dead_parent(machines_home: Path, image: str) -> None:
    lines = (
        "from microguest import boot",
        f"machine = boot({image!r}, machine='namespaces', name='orphan')",
        FORK,
        "print(child, flush=True); time.sleep(1000)",
    )
    with program(*lines) as parent:
        assert is_alive("orphan")
        parent.kill()
        wait_until("the machine has ended", lambda: not is_alive("orphan"))
