"""What the agent says to PID 1 unasked and when it is asked whether it is there."""

from agentharness import AgentProcess, execute

from guest.supervision import MESSAGES, AreYouThere, Deposit, ExecStarted, Here, Message


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
