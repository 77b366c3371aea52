"""Small requests about processes: the list, waiting, signals, forgetting."""

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from agentharness import AgentProcess, Host, Refused, execute
from machinekit import wait_until
from patience import PATIENCE, SLACK

from microguest.guest import bounds
from microguest.guest.wire.connection import Request, Response
from microguest.guest.wire.messages import (
    Exited,
    Forget,
    ListProcesses,
    ProcessInfo,
    ProcessList,
    SignalProcess,
    SignalResult,
    Wait,
)


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentProcess]:
    with AgentProcess() as process:
        yield process


def listed(agent: AgentProcess) -> list[ProcessInfo]:
    with Host(agent) as host:
        result = host.request("processes", ListProcesses())
    assert isinstance(result, ProcessList)
    return list(result.processes)


def wait_until_unlisted(agent: AgentProcess) -> None:
    deadline = time.monotonic() + PATIENCE
    while listed(agent):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def refused(agent: AgentProcess, op: str, args: object) -> str:
    with Host(agent) as host, pytest.raises(Refused) as caught:
        host.request(op, args)  # type: ignore[arg-type]
    return caught.value.failure.code


def test_list_tells_what_runs(agent: AgentProcess) -> None:
    with Host(agent) as first, Host(agent) as second:
        one = first.start("sleep", "60", label="the first")
        two = second.start(shell="sleep 60; true")
        infos = listed(agent)
        assert [info.id for info in infos] == [one.id, two.id]
        assert [info.pid for info in infos] == [one.pid, two.pid]
        assert infos[0].argv == ("sleep", "60")
        assert infos[0].label == "the first"
        assert infos[1].argv == ("/bin/sh", "-c", "sleep 60; true")
        assert infos[0].exited is None
        assert not infos[0].kept
        assert infos[0].attached == 1
        assert 0 <= infos[1].running_seconds <= infos[0].running_seconds < 60
    wait_until_unlisted(agent)


def test_long_arguments_are_cut_in_the_list(agent: AgentProcess) -> None:
    with Host(agent) as host:
        host.start("sh", "-c", "sleep 60", *["word"] * 5000, "x" * 100_000)
        argv = listed(agent)[0].argv
        assert sum(map(len, argv)) <= bounds.LISTED_ARGV
        assert argv[-1].endswith("…")
    wait_until_unlisted(agent)


def test_list_of_many_fits_into_an_answer(agent: AgentProcess) -> None:
    hosts = [Host(agent) for _ in range(300)]
    try:
        for host in hosts:
            host.start("sh", "-c", "sleep 1000", "\u2603" * 5000, label="\u2603" * bounds.LABEL)
        infos = listed(agent)
        assert len(infos) == 300
        assert all(info.argv[0] == "sh" for info in infos)
    finally:
        for host in hosts:
            host.sock.close()
    wait_until_unlisted(agent)


def test_wait_is_answered_at_the_end(agent: AgentProcess) -> None:
    with Host(agent) as owner, Host(agent) as other:
        started = owner.start("sh", "-c", "read line; exit 9", stdin=True)
        other.send(Request(op="wait", args=Wait(id=started.id, timeout=PATIENCE)))
        for _ in range(3):  # the agent has seen it by then
            listed(agent)
        owner.write(b"go on\n")
        response = other.receive()
        assert isinstance(response, Response)
        assert isinstance(response.result, Exited)
        assert response.result.code == 9
        assert other.ping().root_ready  # the connection is free again
        assert owner.collect().exited.code == 9


def test_wait_ends_when_it_has_waited_long_enough(agent: AgentProcess) -> None:
    with Host(agent) as owner:
        started = owner.start("sleep", "60")
        for timeout in (0, 0.1):
            begun = time.monotonic()
            assert refused(agent, "wait", Wait(id=started.id, timeout=timeout)) == "still_running"
            assert timeout <= time.monotonic() - begun < timeout + SLACK


def test_wait_is_given_up_with_its_connection(agent: AgentProcess) -> None:
    with Host(agent) as owner:
        started = owner.start("sleep", "1000")
        with Host(agent) as asking:
            wait_until("only these two", lambda: asking.info().connections == 2)
            with Host(agent) as waiting:
                waiting.send(Request(op="wait", args=Wait(id=started.id, timeout=600)))
                wait_until("a third one", lambda: asking.info().connections == 3)
            wait_until("it is given up", lambda: asking.info().connections == 2)


def test_signal_reaches_any_process(agent: AgentProcess) -> None:
    with Host(agent) as owner:
        started = owner.start(
            "sh", "-c", "trap 'exit 5' USR1; echo up; while :; do sleep 0.02; done"
        )
        assert owner.receive().data == b"up\n"  # type: ignore[union-attr]
        with Host(agent) as other:
            request = SignalProcess(id=started.id, signal=signal.SIGUSR1, target="process")
            assert other.request("signal", request) == SignalResult(delivered=True)
        assert owner.collect().exited.code == 5
    request = SignalProcess(id=started.id, signal=signal.SIGUSR1)
    wait_until_unlisted(agent)
    assert refused(agent, "signal", request) == "no_such_process"


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("wait", Wait(id="p999999")),
        ("signal", SignalProcess(id="", signal=9)),
        ("forget", Forget(id="nobody" * 100)),
    ],
)
def test_strangers_are_refused(agent: AgentProcess, op: str, args: object) -> None:
    assert refused(agent, op, args) == "no_such_process"


def test_process_that_is_not_kept_cannot_be_forgotten(agent: AgentProcess) -> None:
    with Host(agent) as owner:
        started = owner.start("sleep", "60")
        assert refused(agent, "forget", Forget(id=started.id)) == "bad_request"
        assert len(listed(agent)) == 1
    wait_until_unlisted(agent)


def test_ids_are_never_used_again(agent: AgentProcess) -> None:
    ids = set()
    for _ in range(20):
        with Host(agent) as host:
            ids.add(host.start("true").id)
            host.collect()
    assert len(ids) == 20


# ── what the end tells ───────────────────────────────────────────────────────────────────────────


def test_end_tells_what_was_used(agent: AgentProcess) -> None:
    script = "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done"
    used = execute(agent, "sh", "-c", script).exited
    assert 0 < used.user_seconds + used.system_seconds <= used.duration * os.cpu_count()  # type: ignore[operator]
    hungry = execute(agent, "sh", "-c", "head -c 64M /dev/zero | tail -c 64M >/dev/null").exited
    assert hungry.max_rss_kib > 50 * 1024
    assert execute(agent, "sleep", "0.1").exited.max_rss_kib < 50 * 1024


def test_usage_is_each_processes_own(agent: AgentProcess) -> None:
    busy = threading.Thread(
        target=execute, args=(agent, "timeout", "0.5", "sh", "-c", "while :; do :; done")
    )
    busy.start()
    idle = execute(agent, "sleep", "0.8").exited
    busy.join()
    assert idle.user_seconds + idle.system_seconds < 0.2
