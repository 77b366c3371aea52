"""What the agent says to PID 1 unasked and when it is asked whether it is there."""

from agentharness import AgentProcess, Host, execute

from guest.messages import Shutdown, ShutdownResult
from guest.supervision import (
    MESSAGES,
    AreYouThere,
    Deposit,
    ExecStarted,
    Here,
    Message,
    ShutdownRequest,
)


def heard(agent: AgentProcess) -> Message:
    """The next message but for the agent's deposit of itself."""
    while True:
        message = MESSAGES.decode(agent.pid1.recv(65536))
        if not isinstance(message, Deposit):
            assert isinstance(message, Message)
            return message


def test_the_first_exec_is_told_and_no_other() -> None:
    with AgentProcess() as agent:
        for _ in range(3):
            assert execute(agent, "true").exited.code == 0
        first = heard(agent)
        assert isinstance(first, ExecStarted)
        assert first.boot_ms > 0
        agent.send(AreYouThere(number=7))
        assert heard(agent) == Here(number=7)


def test_an_agent_that_waits_for_its_root_is_there() -> None:
    with AgentProcess(root=None) as agent:
        for number in (1, 2):
            agent.send(AreYouThere(number=number))
            assert heard(agent) == Here(number=number)


def test_a_host_that_ends_the_machine_is_answered_before_pid_1_can_end_the_agent() -> None:
    with AgentProcess() as agent, Host(agent) as host:
        questions = 1000  # whose answers are more than the pair holds
        for number in range(questions):
            agent.send(AreYouThere(number=number))
        assert isinstance(host.request("shutdown", Shutdown(grace=2.0)), ShutdownResult)
        answers = [heard(agent) for _ in range(questions + 1)]
        assert ShutdownRequest(grace=2.0) in answers
