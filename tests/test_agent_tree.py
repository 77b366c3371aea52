"""Everything that descends from a process can be signalled and killed, wherever it has gone.

Each test runs with cgroups and without, as far as this machine has them: without, the agent looks
for descendants in /proc.
"""

import ctypes
import os
import pathlib
import signal
import time
from collections.abc import Iterator

import pytest
from agentharness import AgentProcess, Host, execute
from patience import PATIENCE
from sleepers import Sleeper

from microguest.agent.process.cgroups import MOUNTS, Cgroups, open_cgroups
from microguest.agent.process.leaf import Leaf
from microguest.guest.wire.messages import Signal, SignalProcess, SignalResult

STORM = 500  # processes that each of four loops starts, at most
LIBC = ctypes.CDLL(None, use_errno=True)
NEW_MOUNTS = 0x20000  # CLONE_NEWNS
PRIVATE = 0x40000 | 0x4000  # MS_PRIVATE | MS_REC
DETACH = 2  # MNT_DETACH

DAEMON = "setsid sh -c 'sh -c \"setsid sleep {id} & exit\" & exit' </dev/null >/dev/null 2>&1"


def hide_cgroups() -> None:
    """No cgroup v2 from here on."""
    if LIBC.unshare(NEW_MOUNTS) or LIBC.mount(None, b"/", None, PRIVATE, None):
        raise OSError(ctypes.get_errno(), "cannot have mounts of its own")
    for path in MOUNTS:
        LIBC.umount2(path.encode(), DETACH)


@pytest.fixture(scope="module", params=["cgroups", "proc"])
def agent(request: pytest.FixtureRequest) -> Iterator[AgentProcess]:
    if os.geteuid() != 0:
        pytest.skip("cgroups can be made and hidden only by root")
    hidden = request.param == "proc"
    if not hidden:
        require_cgroups().close()
    with start_agent(hidden=hidden) as process:
        assert is_hidden(process) == hidden
        yield process


def start_agent(*, hidden: bool) -> AgentProcess:
    if not hidden:
        return AgentProcess()
    agent = AgentProcess(root=None, prepare=hide_cgroups)
    agent.send_root(f"/proc/{agent.pid}/root")  # with its own mounts
    return agent


def is_hidden(agent: AgentProcess) -> bool:
    return b"MICROGUEST_PROCESS=" in execute(agent, "env").stdout


def require_cgroups() -> Cgroups:
    cgroups = open_cgroups()
    if cgroups is None:
        pytest.skip("this machine has no cgroup v2 that can be written")
    return cgroups


def start_daemon(host: Host, sleeper: Sleeper, **options: object) -> str:
    """A process that waits, with a daemon of its own in another session."""
    script = DAEMON.format(id=sleeper.argument) + "; sleep 60"
    started = host.start("sh", "-c", script, **options)
    sleeper.wait_for(1)
    return started.id


def test_kill_of_the_tree_finds_daemons(agent: AgentProcess, sleeper: Sleeper) -> None:
    with Host(agent) as host:
        start_daemon(host, sleeper)
        host.send(Signal(signal=signal.SIGKILL, target="tree"))
        assert host.collect().exited.signal == signal.SIGKILL
        sleeper.wait_until_gone()


def test_lost_connection_kills_daemons(agent: AgentProcess, sleeper: Sleeper) -> None:
    with Host(agent) as host:
        start_daemon(host, sleeper)
    sleeper.wait_until_gone()


def test_timeout_kills_daemons(agent: AgentProcess, sleeper: Sleeper) -> None:
    with Host(agent) as host:
        start_daemon(host, sleeper, timeout=3.0, grace=0.2)  # by when it has started all of them
        assert host.collect().exited.timed_out
    sleeper.wait_until_gone()


def test_normal_exit_leaves_daemons_alone(agent: AgentProcess, sleeper: Sleeper) -> None:
    assert execute(agent, "sh", "-c", DAEMON.format(id=sleeper.argument)).exited.code == 0
    sleeper.wait_for(1)
    for _ in range(20):  # their cgroup is not used again
        assert execute(agent, "true").exited.code == 0
    assert len(sleeper.pids()) == 1


def test_any_signal_can_go_to_the_tree(agent: AgentProcess, sleeper: Sleeper) -> None:
    with Host(agent) as host, Host(agent) as other:
        process_id = start_daemon(host, sleeper)
        result = other.request(
            "signal", SignalProcess(id=process_id, signal=signal.SIGTERM, target="tree")
        )
        assert result == SignalResult(delivered=True)
        # The shell may see its child's end before it gets the signal itself.
        assert host.collect().exited.shell_code == 128 + signal.SIGTERM
        sleeper.wait_until_gone()


def test_kill_is_faster_than_what_forks(agent: AgentProcess, sleeper: Sleeper) -> None:
    # A bounded storm: where the kill fails, the machine of the test must survive it.
    fork = f"for i in $(seq {STORM}); do setsid sleep {sleeper.argument} & sleep 0.005; done; wait"
    with Host(agent) as host:
        host.start("sh", "-c", f"({fork}) & ({fork}) & ({fork}) & ({fork}) & wait")
        sleeper.wait_for(20)
        assert len(sleeper.pids()) < 4 * STORM, "it was over before it could be killed"
        host.send(Signal(signal=signal.SIGKILL, target="tree"))
        host.collect()
        sleeper.wait_until_gone()
        time.sleep(0.1)
        assert sleeper.pids() == []


def test_agent_shutdown_kills_daemons(agent: AgentProcess, sleeper: Sleeper) -> None:
    with start_agent(hidden=is_hidden(agent)) as other, Host(other) as host:
        start_daemon(host, sleeper)
        other.close()
        sleeper.wait_until_gone()


def test_nothing_escapes_from_a_cgroup(sleeper: Sleeper) -> None:
    require_cgroups().close()
    with AgentProcess() as agent, Host(agent) as host:
        script = f"env -i setsid sh -c 'setsid sleep {sleeper.argument} & exit' & sleep 60"
        host.start("sh", "-c", script)
        sleeper.wait_for(1)
        host.send(Signal(signal=signal.SIGKILL, target="tree"))
        host.collect()
        sleeper.wait_until_gone()


# ── cgroups themselves ───────────────────────────────────────────────────────────────────────────


@pytest.fixture
def leaf() -> Iterator[Leaf]:
    cgroups = require_cgroups()
    leaf = cgroups.take()
    yield leaf
    leaf.kill()
    leaf.give_back()
    cgroups.close()
    assert not os.path.exists(cgroups.path)


def test_kill_process_by_process_where_the_kernel_cannot(leaf: Leaf, sleeper: Sleeper) -> None:
    pid = os.fork()
    if pid == 0:
        pathlib.Path(leaf.path, "cgroup.procs").write_text("0")
        script = f"setsid sleep {sleeper.argument} & setsid sleep {sleeper.argument} & wait"
        os.execvp("sh", ["sh", "-c", script])
    try:
        sleeper.wait_for(2)
        assert len(leaf.members()) == 3
        leaf.kill_each()
        sleeper.wait_until_gone()
    finally:
        leaf.kill()
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL


def test_agents_that_died_leave_nothing_for_good() -> None:
    first = require_cgroups()
    first.take().close()
    os.close(first._lock)  # as if its process had ended
    second = require_cgroups()
    assert not os.path.exists(first.path)
    assert os.path.exists(second.path)
    second.close()


def test_emptied_leaf_is_used_again() -> None:
    cgroups = require_cgroups()
    leaf = cgroups.take()
    leaf.give_back()
    again = cgroups.take()
    assert again.name == leaf.name
    os.mkdir(f"{again.path}/inner")
    again.give_back()
    other = cgroups.take()
    assert other.name != leaf.name
    other.give_back()
    cgroups.close()
    assert not os.path.exists(cgroups.path)


# ── many at once, where they have to be looked for ───────────────────────────────────────────────


MANY = 60


@pytest.fixture
def hidden_agent() -> Iterator[AgentProcess]:
    if os.geteuid() != 0:
        pytest.skip("cgroups can be hidden only by root")
    with start_agent(hidden=True) as agent:
        yield agent


def stat_reads(agent: AgentProcess) -> int:
    """System calls that read, of the agent so far: proc_pid_io(5)."""
    text = pathlib.Path(f"/proc/{agent.pid}/io").read_text()
    return int(text.split("syscr: ")[1].split()[0])


def closing_costs(agent: AgentProcess, sleeper: Sleeper, count: int) -> tuple[int, float]:
    """Of `count` connections that close at once: reads, and a ping's longest wait meanwhile."""
    hosts = [Host(agent) for _ in range(count)]
    for host in hosts:
        host.start("sleep", sleeper.argument)
    sleeper.wait_for(count)
    longest = 0.0
    with Host(agent) as asking:
        asking.ping()
        before = stat_reads(agent)
        for host in hosts:
            host.sock.close()
        deadline = time.monotonic() + PATIENCE
        while agent.children():
            begun = time.monotonic()
            asking.ping()
            longest = max(longest, time.monotonic() - begun)
            assert time.monotonic() < deadline
    return stat_reads(agent) - before, longest


def test_one_look_at_all_processes_serves_all_kills(
    hidden_agent: AgentProcess, sleeper: Sleeper
) -> None:
    one, _ = closing_costs(hidden_agent, sleeper, 1)
    many, _ = closing_costs(hidden_agent, sleeper, MANY)
    assert many < MANY / 3 * one


def test_the_agent_answers_while_it_looks(hidden_agent: AgentProcess, sleeper: Sleeper) -> None:
    """One ping waits for a step, not for a look at everybody, let alone for one each."""
    for _ in range(5):  # a busy machine may hold up one ping, or two
        begun = time.monotonic()
        _, longest = closing_costs(hidden_agent, sleeper, MANY)
        took = time.monotonic() - begun
        if longest < took / 4:
            return
    pytest.fail(f"a ping took {longest} s of {took} s, as in all tries before")


def test_the_end_of_an_agent_is_one_look_too(sleeper: Sleeper) -> None:
    with start_agent(hidden=True) as agent:
        hosts = [Host(agent) for _ in range(MANY)]
        for host in hosts:
            host.start("sleep", sleeper.argument)
        sleeper.wait_for(MANY)
        agent.close()
        sleeper.wait_until_gone()
        for host in hosts:
            host.sock.close()


def test_a_process_ends_with_its_group_where_proc_is_covered(
    hidden_agent: AgentProcess, sleeper: Sleeper
) -> None:
    with Host(hidden_agent) as host, Host(hidden_agent) as other:
        script = f"mount -t tmpfs none /proc; sleep {sleeper.argument} & wait"
        process_id = host.start("sh", "-c", script).id
        sleeper.wait_for(1)
        args = SignalProcess(id=process_id, signal=signal.SIGKILL, target="tree")
        assert other.request("signal", args) == SignalResult(delivered=True)
        assert host.collect().exited.signal == signal.SIGKILL
        sleeper.wait_until_gone()


def test_every_kill_is_said_to_have_been_delivered_or_not(hidden_agent: AgentProcess) -> None:
    with Host(hidden_agent) as host, Host(hidden_agent) as other:
        started = host.start("sh", "-c", "trap '' USR1; sleep 1000 & echo up; wait")
        host.read_until(b"up\n")
        for number in (signal.SIGUSR1, signal.SIGKILL):
            args = SignalProcess(id=started.id, signal=number, target="tree")
            assert other.request("signal", args) == SignalResult(delivered=True)
        assert host.collect().exited.signal == signal.SIGKILL
