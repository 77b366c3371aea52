"""Ctrl-C at every moment of a blocking call: nobody else's call hangs, and nothing hides it."""

import select
import threading
from collections.abc import Callable, Iterator

import pytest
from agentharness import TOKEN, AgentProcess
from interrupts import Interrupted, at_each_moment
from patience import PATIENCE

from host_client import Agent, ConnectionLost, DeadlineExceeded, connect

# Between two bytecodes an interrupt can leave a socket to its reference count, which closes it.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def client(elf: object) -> Iterator[Agent]:
    with AgentProcess() as agent, connect(f"unix://{agent.path}", token=TOKEN) as client:
        yield client


def in_thread(call: Callable[[], object]) -> object:
    """What the call returns or raises in another thread, within PATIENCE."""
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(call())
        except Exception as error:  # noqa: BLE001 the test looks at it
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert outcome, "the call of another thread hangs"
    return outcome[0]


def test_an_interrupted_wait_leaves_the_process_to_other_threads(client: Agent) -> None:
    process = client.start(["sleep", "1000"])
    moments = 0
    for interrupted, outcome in at_each_moment(lambda: process.wait(0.001)):
        moments += 1
        assert isinstance(outcome, Interrupted if interrupted else DeadlineExceeded), outcome
        assert in_thread(process.poll) is None
    assert moments > 50
    process.close()


def test_an_interrupted_wait_beside_another_one_leaves_that_alone(client: Agent) -> None:
    process = client.start(["sleep", "1000"], keep=True)
    watcher: list[object] = []
    thread = threading.Thread(target=lambda: watcher.append(process.wait(PATIENCE)), daemon=True)
    thread.start()
    while not process._session._reading:
        pass
    for interrupted, outcome in at_each_moment(lambda: process.wait(0.001)):
        assert isinstance(outcome, Interrupted if interrupted else DeadlineExceeded), outcome
        assert isinstance(in_thread(lambda: process.wait(0.0)), DeadlineExceeded)
    process.kill()
    thread.join(PATIENCE)
    assert len(watcher) == 1
    process.close()


def test_an_interrupted_poll_loses_no_output_silently(client: Agent) -> None:
    """Either all of it is there, or the connection says that it is of no use any more."""
    process = client.start(["cat"], stdin=True, keep=True)

    def write(number: int) -> bytes:
        """A line that has come back and nobody has taken."""
        line = b"%06d\n" % number
        process.stdin.write(line)
        assert select.select([process._session.exchange.channel.sock], [], [], PATIENCE)[0]
        return line

    def poll() -> object:
        return process.poll()

    line, told = write(0), 0
    for number, (interrupted, outcome) in enumerate(at_each_moment(poll), 1):
        assert isinstance(outcome, Interrupted) if interrupted else outcome is None, outcome
        try:
            read = next(process.stdout.lines())
            process.poll()
        except ConnectionLost:
            told += 1
            process.close()
            process = client.attach(process.id, offsets=process.offsets)
            read = line if process.offsets["stdout"] == 7 * number else next(process.stdout.lines())
        assert read == line
        line = write(number)
    assert told > 10
    process.kill()
    process.close()
    client.forget(process.id)
