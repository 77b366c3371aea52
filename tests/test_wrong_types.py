"""Values of the wrong type, for every option: said at once, by the option's name.

Nobody listens where these agents are, so that an error other than ConnectError proves that nothing
was dialled, let alone started.
"""

import asyncio
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from agentharness import TOKEN, AgentProcess
from hostkit import Peer, agent_at, serving
from hypothesis import given
from hypothesis import strategies as st

from microguest import (
    Agent,
    ConnectError,
    ConnectionLost,
    ImageError,
    MachineError,
    Mount,
    UnixAddress,
    aio,
    boot,
    connect,
    list_machines,
)
from microguest.guest import bounds
from microguest.guest.errors import MicroguestError
from microguest.guest.wire.connection import Connection, Request, Response, Role
from microguest.guest.wire.messages import Hello, Keep, Limits, StagedFile, Start, Started, Welcome
from microguest.host_client.client.request import Options, start_record
from microguest.host_client.machines.settings import MachineOptions, Settings

NOWHERE = "/nowhere/agent.sock"

ODD: list[Any] = [
    *(5, -1, 10**40, 1.5, float("nan"), float("inf"), True, "text", "", "nul\0", b"bytes", b""),
    *(Path("/there"), [], ["text"], [5], (1, 2), {}, {"A": 1}, {"A": "b"}, {5: "b"}, {"a": b"b"}),
    *({"text"}, object(), len, Keep(), Limits(), [StagedFile(path="a", data=b"")], [None]),
    *({"f": 5}, {"f": "text"}, [("a", b"b")], [Mount(target="/x", kind="tmpfs")]),
    *("\udcff", "\ud800", {"A": "\ud800"}, {"\ud800": b""}, ["\ud800"]),
]  # fmt: skip
ANYTHING = st.recursive(
    st.sampled_from(ODD) | st.integers() | st.floats() | st.text() | st.binary() | st.none(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=5,
)


def named(error: Exception, name: str, value: Any) -> None:
    """The error speaks of the option."""
    assert name in str(error), f"{name}={value!r}: {error!r}"


def travels(start: Start) -> None:
    """What was accepted can be sent, and is taken by an agent."""
    host, agent = Connection(Role.HOST), Connection(Role.AGENT)
    agent.receive(host.send(Hello(token=TOKEN)))
    host.receive(agent.send(Welcome(agent="test")))
    (request,) = agent.receive(host.send(Request(op="start", args=start)))
    assert request == Request(op="start", args=start)


def check_start(name: str, value: Any) -> None:
    argv = () if name == "shell" and value is not None else ("true",)
    try:
        start = start_record(argv, {name: value}, stdin=False)  # type: ignore[misc]
    except (TypeError, ValueError, MicroguestError) as error:
        named(error, name, value)
    else:
        travels(start)


@pytest.mark.parametrize("name", Options.__annotations__)
def test_every_option_of_a_start(name: str) -> None:
    for value in ODD:
        check_start(name, value)


@given(st.sampled_from(sorted(Options.__annotations__)), ANYTHING)
def test_anything_as_an_option_of_a_start(name: str, value: Any) -> None:
    check_start(name, value)


def check_machine(name: str, value: Any) -> None:
    try:
        Settings.of("oci:x", {name: value})  # type: ignore[misc]
    except (TypeError, ValueError, MicroguestError) as error:
        named(error, name, value)


def test_none_is_the_default_of_a_machine_s_option() -> None:
    names = sorted(MachineOptions.__annotations__.keys() - {"timeout"})
    assert Settings.of("oci:x", dict.fromkeys(names)) == Settings.of("oci:x", {})  # type: ignore[arg-type]


def test_fields_have_names() -> None:
    wrong = r"StagedFile takes its fields by name: path=\.\.\., data=\.\.\."
    with pytest.raises(TypeError, match=wrong):
        StagedFile("path", b"data")  # type: ignore[misc]
    with pytest.raises(TypeError, match=r"Limits takes its fields by name: NAME=\.\.\."):
        Limits(5)  # type: ignore[misc]
    with pytest.raises(TypeError, match="mode: expected int, got str") as caught:
        StagedFile(path="f", data=b"", mode="0755")  # type: ignore[arg-type]
    assert caught.value.__suppress_context__


def test_capabilities_are_taken_in_both_forms() -> None:
    start = start_record(["x"], {"capabilities": ["CAP_NET_ADMIN", "kill"]}, stdin=False)
    assert start.capabilities == ("net_admin", "kill")


@pytest.mark.parametrize("name", MachineOptions.__annotations__)
def test_every_option_of_a_machine(name: str) -> None:
    for value in ODD:
        check_machine(name, value)


@given(st.sampled_from(sorted(MachineOptions.__annotations__)), ANYTHING)
def test_anything_as_an_option_of_a_machine(name: str, value: Any) -> None:
    check_machine(name, value)


@given(st.sampled_from(["target", "kind", "source", "read_only", "size", "mode", "exec"]), ANYTHING)
def test_anything_as_an_option_of_a_mount(name: str, value: Any) -> None:
    try:
        Mount(**{"target": "/x", "kind": "tmpfs", name: value})
    except (TypeError, ValueError, MicroguestError) as error:
        named(error, "mount", value)


@given(
    st.sampled_from([(Keep, "buffer"), (Keep, "on_full"), (Keep, "retain"), (Limits, "memory"),
                     (Limits, "cpu"), (Limits, "processes"), (Limits, "rlimits"),
                     (StagedFile, "mode")]),
    ANYTHING,
)  # fmt: skip
def test_anything_as_a_field_of_a_record(field: tuple[type, str], value: Any) -> None:
    kind, name = field
    given = {"path": "f", "data": b""} if kind is StagedFile else {}
    try:
        record = kind(**given, **{name: value})
        record.check_types()
    except (TypeError, ValueError) as error:
        named(error, name, value)


# ── the calls themselves ─────────────────────────────────────────────────────────────────────────

WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("exec", {"input": "text"}, "input: expected bytes, got str: encode it"),
    ("exec", {"input": 5}, "input: expected bytes"),
    ("exec", {"max_output": "1M"}, "max_output"),
    ("exec", {"max_output": -1}, "max_output"),
    ("exec", {"timeout": "5"}, "timeout: expected float | None, got str"),
    ("exec", {"tty": True}, r"no option tty: start\(tty=True\) gives"),
    ("exec", {"env": {"A=B": "1"}}, "env: 'A=B' cannot be the name"),
    ("exec", {"env": {"": "1"}}, "env: '' cannot be the name"),
    ("exec", {"capabilities": ["NET_ADMI"]}, "capabilities: no capability is called 'net_admi'"),
    ("exec", {"limits": Limits(rlimits={"nofiles": (1, 1)})}, "limits: rlimits: .*nofiles"),
    ("exec", {"timout": 5}, "did you mean timeout"),
    ("exec", {"text": True}, "no option text: output is bytes: decode it"),
    ("start", {"text": True}, "no option text: output is bytes: decode it"),
    ("exec", {"stdin": True}, r"no option stdin: exec takes input, and start\(stdin=True\)"),
    ("exec", {"capture_output": True}, "both outputs are always"),
    ("start", {"input": b"x"}, r"no option input: .* stdin\.write"),
    ("exec", {"env": {"A": 1}}, "env: 'A'"),
    ("exec", {"env": ["A=1"]}, "env: expected a mapping"),
    ("exec", {"files": {"f": 5}}, "files: 'f': expected bytes, got int"),
    ("exec", {"files": {"f": "text"}}, "files: 'f': expected bytes, got str: encode it"),
    ("exec", {"files": ["f"]}, "files: expected StagedFile"),
    ("exec", {"files": {"f": bytes(bounds.CONTROL_PAYLOAD)}}, "files: the request has .* 4194304"),
    ("exec", {"env": {"A": "x" * bounds.CONTROL_PAYLOAD}}, "env: the request has .* 4194304"),
    ("exec", {"limits": {"memory": 5}}, "limits: .*, got dict: write Limits"),
    ("exec", {"capabilities": "net_admin"}, "capabilities: expected a list"),
    ("exec", {"groups": "audio"}, "groups: expected a list"),
    ("exec", {"keep": "yes"}, "keep: expected True or a Keep"),
    ("exec", {"cwd": 5}, "cwd: expected a path"),
    ("exec", {"user": 1.5}, "user: expected a name or a number"),
    ("start", {"tty": 80}, "tty: expected True or"),
    ("start", {"tty": ("24", "80")}, "tty: rows and columns"),
    ("start", {"stdin": b"data"}, "stdin: expected True or False"),
    ("start", {"max_unread": "1"}, "max_unread"),
    ("start", {"acknowledge": "no"}, "acknowledge"),
    ("attach", {"process": 5}, "process: expected text"),
    ("attach", {"offsets": [1, 2]}, "offsets: expected a mapping"),
    ("attach", {"offsets": {"stdout": "1"}}, "offsets: 'stdout'"),
    ("attach", {"write": "no"}, "write"),
    ("wait", {"process": "x", "timeout": "5"}, "timeout: expected seconds"),
    ("wait", {"process": 5}, "process"),
    ("wait", {"process": "x", "timeout": -1}, "^timeout: must be 0 to 315360000 seconds"),
    ("signal", {"process": "x", "name": 1.5}, "signal: expected a name"),
    ("forget", {"process": None}, "process"),
    ("shutdown", {"grace": "5"}, "grace"),
    ("step_clock", {"beyond": "5"}, "beyond"),
]


def arguments(call: str, given: dict[str, Any]) -> dict[str, Any]:
    return {"argv": ["true"], **given} if call in ("exec", "start") else given


@pytest.mark.parametrize(("call", "given", "message"), WRONG)
def test_wrong_values_are_told_before_anything_is_dialled(
    call: str, given: dict[str, Any], message: str
) -> None:
    agent = Agent(UnixAddress(NOWHERE), TOKEN)
    with pytest.raises((TypeError, ValueError), match=message):
        getattr(agent, call)(**arguments(call, given))

    async def awaited() -> None:
        async with aio.Agent.of(agent) as other:
            await getattr(other, call)(**arguments(call, given))

    with pytest.raises((TypeError, ValueError), match=message):
        asyncio.run(awaited())


@pytest.mark.parametrize("argv", [[5], [None], "true", {"a": 1}, 5, [], [""], ["a\0"], [["a"]]])
def test_argv_that_cannot_be_run(argv: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="argv"):
        Agent(UnixAddress(NOWHERE), TOKEN).exec(argv)


@pytest.mark.parametrize(
    ("given", "message"),
    [({"url": 5}, "url"), ({"url": f"unix://{NOWHERE}", "timeout": "5"}, "timeout")],
)
def test_connect_takes_what_it_says(given: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        connect(**{"token": TOKEN, **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"memory": 512}, "memory: 512 of what"),
        ({"timeout": None}, "timeout: expected float, got None"),
        ({"cpus": "2"}, "cpus: expected int, got str"),
        ({"command": "sleep 5"}, "command: expected a list"),
        ({"command": ["sleep", 5]}, 'command: .*write "5"'),
        ({"hosts": {"a": 5}}, "hosts: 'a': expected str"),
        ({"env": {"A": 1}}, "env: 'A': expected str"),
        ({"mounts": ["/a:/b"]}, r"mounts\[0\]: expected Mount"),
        ({"dns": "192.0.2.1"}, "dns: .*write a list"),
        ({"rlimits": {"nofile": 5}}, "rlimits: 'nofile'"),
        ({"timeout": "5"}, "timeout: expected float"),
        ({"memoy": "1G"}, "did you mean memory"),
        ({"bundle": 5}, "bundle: expected a path"),
        ({"image": None}, "image: expected a name as oci:DIR:TAG, got None"),
        ({"shm_size": 64}, 'shm_size: 64 of what. Write "512M"'),
        ({"upper_size": 64}, "upper_size: 64 of what"),
        ({"detach": True}, "no option detach: there are machine, memory"),
        (
            {"mounts": Mount(target="/x", kind="tmpfs")},
            r"mounts: expected Sequence\[Mount\], got Mount: write a list",
        ),
        ({"hosts": 5}, r"hosts: expected Mapping\[str, str\], got int"),
        ({"rlimits": {"nofile": (1, None)}}, r"rlimits: 'nofile'\[1\]: expected int, got None"),
        ({"progress": 5}, "progress: expected a callable, got int"),
        ({"abandoned": True}, "abandoned: expected a threading.Event, got bool"),
    ],
)
def test_boot_says_it_before_anything_is_made(
    given: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(TypeError, match=message):
        boot(**{"image": "oci:/nowhere", **given})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"command": ["true"], "seccomp": b"x"}, "seccomp"),
        ({"command": ["true"], "seccomp": "{"}, "seccomp: .*JSON"),
        ({"handoff": True, "command": ["true"], "restart": "always"}, "workload.restart: cannot"),
        ({"handoff": True}, "name a command"),
        ({"command": []}, "name a command"),
        ({"command": ["true"], "stop_signal": "NOPE"}, "signal"),
        ({"hardening": "x"}, "^hardening 'x' is none of: default, strict, off"),
    ],
)
def test_what_a_workload_cannot_be_is_said_before_its_machine_is_made(
    given: dict[str, Any],
    message: str,
    elf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where it depends on the image, of which this one has no command of its own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises((MachineError, ImageError), match=message):
        boot(f"dir:{root}", machine="namespaces", **given)
    assert not list(tmp_path.glob("state/microguest/machines/*"))
    assert not (tmp_path / "state").exists()


def test_paths_and_numbers_are_taken_where_they_mean_something(elf: Path, tmp_path: Path) -> None:
    with AgentProcess() as process, connect(f"unix://{process.path}", token=TOKEN) as agent:
        look = [Path("/bin/sh"), b"-c", "pwd; id -u; id -G; cat $A"]
        done = agent.exec(
            look,
            cwd=tmp_path,
            user=os.getuid(),
            groups=[7, "8"],
            env={"A": Path("conf")},  # type: ignore[dict-item]
            files={Path("conf"): bytearray(b"green")},  # type: ignore[dict-item]
            input=bytearray(b""),
        )
        lines = done.stdout.decode().splitlines()
        assert lines[:2] == [str(tmp_path), str(os.getuid())]
        assert {"7", "8"} <= set(lines[2].split())
        assert lines[3] == "green"


# ── what the system and the connection say ───────────────────────────────────────────────────────


def test_no_descriptor_left_is_an_error_of_ours(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    agent = Agent(UnixAddress(str(tmp_path / "agent.sock")), TOKEN)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(ConnectError, match=r"Too many open files.*ulimit -n"):
            agent.ping()
        with pytest.raises(ConnectError, match="Too many open files"):
            agent.exec(["true"])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_no_descriptor_left_to_list_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    os.makedirs(tmp_path / "microguest" / "machines", mode=0o700)
    assert list_machines() == []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(MachineError, match=r"machines: Too many open files"):
            list_machines()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


AFTER: dict[str, Callable[[Any], Any]] = {
    "kill": lambda process: process.kill(),
    "signal": lambda process: process.signal("TERM"),
    "resize": lambda process: process.resize(24, 80),
    "write": lambda process: process.stdin.write(b"more"),
    "end of input": lambda process: process.stdin.close(),
    "communicate": lambda process: process.communicate(b"x"),
    "acknowledge": lambda process: process.acknowledge(),
    "wait": lambda process: process.wait(1),
    "poll": lambda process: process.poll(),
    "read": lambda process: process.stdout.read(),
    "detach": lambda process: process.detach(),
}


def leaves(peer: Peer) -> None:
    """An agent that dies as soon as the process runs."""
    peer.greet()
    peer.send(Response(result=Started(id="p1", pid=7)))


@pytest.mark.parametrize("then", AFTER)
def test_lost_connection_is_what_is_said_of_it_later(then: str, tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with serving(path, leaves), agent_at(path) as agent:
        process = agent.start(["cat"], stdin=True)
        with pytest.raises(ConnectionLost) as first:
            process.wait(60)
        with pytest.raises(ConnectionLost) as later:
            AFTER[then](process)
        assert str(later.value) == str(first.value)
        process.close()


def test_sizes_of_reads_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with serving(path, leaves), agent_at(path) as agent:
        process = agent.start(["cat"])
        for wrong in ("3", None, 1.5, True):
            with pytest.raises(TypeError, match="read: expected a number of bytes"):
                process.stdout.read(wrong)  # type: ignore[arg-type]
        process.close()


def test_lost_connection_is_what_a_process_stream_says_of_it_later(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    start = Start(argv=("cat",), stdin=True)
    with serving(path, leaves), agent_at(path) as agent, agent.open_process(start) as stream:
        with pytest.raises(ConnectionLost):
            list(stream)
        for say in (lambda: stream.signal(15), lambda: stream.write(b"x"), stream.end_input):
            with pytest.raises(ConnectionLost, match="lost the agent"):
                say()
