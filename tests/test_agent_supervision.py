"""What the agent says to PID 1 unasked and when it is asked whether it is there."""

import signal
import subprocess

import pytest
from agentharness import AgentProcess, Host, Refused, execute

from microguest.guest.supervision import (
    AreYouThere,
    Deposit,
    ExecStarted,
    Here,
    MainExited,
    MainStarted,
    Message,
    ShutdownRequest,
)
from microguest.guest.wire.messages import (
    Attach,
    Exited,
    Forget,
    ListProcesses,
    ProcessInfo,
    ProcessList,
    Shutdown,
    ShutdownResult,
    SignalProcess,
    SignalResult,
    Wait,
)


def heard(agent: AgentProcess) -> Message:
    """The next message but for the agent's deposit of itself."""
    while True:
        message = agent.receive_any()
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


# ── a workload on the console ────────────────────────────────────────────────────────────────────


def main_of(host: Host) -> ProcessInfo:
    result = host.request("processes", ListProcesses())
    assert isinstance(result, ProcessList)
    (main,) = result.processes
    assert main.id == "main"
    return main


def main_of_or_none(host: Host) -> int | None:
    result = host.request("processes", ListProcesses())
    assert isinstance(result, ProcessList)
    return result.processes[0].pid if result.processes else None


def test_a_workload_on_the_console_is_signalled_and_waited_for_through_its_lives() -> None:
    hup = SignalProcess(id="main", signal=signal.SIGHUP)
    with AgentProcess() as agent, Host(agent) as host:
        for last in (False, True):
            with subprocess.Popen(["sleep", "1000"], start_new_session=True) as workload:
                agent.send(MainStarted(pid=workload.pid, argv=("sleep", "1000"), console=True))
                while main_of_or_none(host) != workload.pid:
                    pass
                assert main_of(host).argv == ("sleep", "1000")
                for op, args in (("attach", Attach()), ("forget", Forget(id="main"))):
                    with (
                        Host(agent) as asking,
                        pytest.raises(Refused, match=r"log|stop the machine"),
                    ):
                        asking.request(op, args)
                assert host.request("signal", hup) == SignalResult(delivered=True)
                assert workload.wait() == -signal.SIGHUP
            agent.send(MainExited(signal=signal.SIGHUP, duration=1.0, restarts=not last))
            while main_of(host).pid:
                pass
            assert host.request("signal", hup) == SignalResult(delivered=False)
            assert (main_of(host).exited is not None) == last
        exited = host.request("wait", Wait(id="main"))
        assert exited == Exited(signal=signal.SIGHUP, duration=1.0)


def test_a_workload_on_the_console_outlives_the_agent() -> None:
    with subprocess.Popen(["sleep", "1000"], start_new_session=True) as workload:
        try:
            with AgentProcess() as agent, Host(agent) as host:
                agent.send(MainStarted(pid=workload.pid, argv=("sleep", "1000"), console=True))
                while main_of_or_none(host) != workload.pid:
                    pass
            assert workload.poll() is None
        finally:
            workload.kill()
