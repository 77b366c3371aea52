"""Machines by their names from a program: what `microguest ls`, `stop` and `logs` do."""

import asyncio
import contextlib
import datetime as dt
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import machinekit
import pytest
from clikit import PROGRAM, microguest
from machinekit import family, has_folder, has_vmm, nothing_is_left, state_of, wait_until
from patience import PATIENCE
from terminalkit import root_of_programs

import microguest as library
from microguest import (
    ConnectionLost,
    DeadlineExceeded,
    ImageError,
    Machine,
    MachineError,
    aio,
    boot,
    find,
    list_machines,
)
from microguest.guest import bounds
from microguest.host_client.machines.console import Piece
from microguest.host_client.machines.folder import names
from microguest.host_client.machines.logs import LINE_MAX, Splitter

BACKENDS = ["asyncio", "trio"]
SCRIPT = "echo one; echo two; sleep 0.2; echo three; exit 3"
GATED = "echo one; echo two; until test -e /go; do sleep 0.05; done; printf three; exit 3"


MACHINES = 10  # that follow each other under one name, at most
LEFT: list[int] = []  # monitors of machines that were detached


pytestmark = pytest.mark.usefixtures("reaped", "machines_home")


@pytest.fixture
def reaped() -> Iterator[None]:
    """Monitors of detached machines are our children here; by now `machines_home` has ended all."""
    yield
    while LEFT:
        os.waitpid(LEFT.pop(), 0)  # a detached machine's monitor, which is our child here


def detached(image: str, name: str, **options: Any) -> set[int]:
    """Start a machine that outlives its caller; its processes."""
    machine = boot(image, machine="namespaces", name=name, **options)
    pids = family(machine.state.monitor)
    LEFT.append(machine.state.monitor)
    machine.detach()
    return pids


def kept(image: str, name: str, script: str) -> set[int]:
    """As `microguest run -d`: state and console stay after the end."""
    from microguest.host_client.machines.boot import start
    from microguest.host_client.machines.settings import Settings

    options: Any = {"machine": "namespaces", "name": name, "command": ["sh", "-c", script]}
    machine = start(Settings.of(image, options, keep=True))
    pids = family(machine.state.monitor)
    LEFT.append(machine.state.monitor)
    machine.detach()
    return pids


def test_machines_are_listed_found_and_stopped(image: str) -> None:
    assert list_machines() == []
    pids = detached(image, "first", command=["sleep", "1000"])
    detached(image, "second")
    listed = list_machines()
    assert [each.name for each in listed] == ["first", "second"]
    first = listed[0]
    assert (first.phase, first.status, first.running, first.exit_code) == (
        "running",
        "up",
        True,
        None,
    )
    assert (first.machine, first.image, first.command) == ("namespaces", image, "sleep 1000")
    assert abs(first.created - time.time()) < PATIENCE

    with find("first") as machine:
        assert machine.info == first
        assert machine.state.phase == "running"
        assert machine.agent.exec(["echo", "here"]).stdout == b"here\n"
        with pytest.raises(MachineError, match="no processors of its own"):
            machine.pause()
        with pytest.raises(DeadlineExceeded, match=r"first still runs after 0\.1 s"):
            machine.wait(0.1)
        machine.stop(grace=1.0)
        assert not machine.info.running
        assert machine.stop().name == "first"  # once more is fine
    nothing_is_left("first", pids, within=PATIENCE)
    find("second").kill()
    assert list_machines(all=True) == []


WAITERS = {
    "command line": [PROGRAM, "wait", "again"],
    "library": [
        *(sys.executable, "-c"),
        "from microguest import find; assert find('again').wait().ended; exit(1)",
    ],
}


@pytest.mark.parametrize("words", WAITERS.values(), ids=WAITERS)
def test_who_waits_for_a_machine_does_not_wait_for_the_next_of_its_name(
    image: str, words: list[str]
) -> None:
    detached(image, "again")
    with subprocess.Popen(words, stderr=subprocess.PIPE) as waiter:
        for _ in range(MACHINES):  # it sees one of them, and then another
            waiter.send_signal(signal.SIGSTOP)
            find("again").stop(grace=0.0)
            detached(image, "again")
            waiter.send_signal(signal.SIGCONT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                waiter.wait(1.0)
                break
        _, said = waiter.communicate(timeout=PATIENCE)
    assert waiter.returncode == 1
    assert said.startswith(b"microguest: machine again has ended" if words[0] == PROGRAM else b"")
    assert find("again").info.running


def test_what_has_ended_is_found_while_it_is_kept(image: str) -> None:
    kept(image, "job", SCRIPT)
    machine = find("job")
    state = machine.wait(PATIENCE)
    assert state.workload_exited is not None
    assert state.workload_exited.code == 3
    assert list(machine.logs()) == [b"one\n", b"two\n", b"three\n"]
    assert list(machine.logs(tail=1)) == [b"three\n"]
    assert list(machine.logs(tail=0)) == []
    with pytest.raises(TypeError, match="tail: expected a number of lines, got str"):
        machine.logs(tail="1")  # type: ignore[arg-type]
    assert list_machines() == []
    (info,) = list_machines(all=True)
    assert (info.status, info.exit_code, info.phase, info.running) == (
        "exited (3)",
        3,
        "ended",
        False,
    )
    assert find("job").wait() == state
    with pytest.raises(MachineError, match="job has ended"):
        _ = machine.agent


def test_a_detached_machine_outlives_its_with_block(image: str) -> None:
    with boot(image, machine="namespaces", name="gone-on") as machine:
        LEFT.append(machine.state.monitor)
        machine.detach()
    assert [each.name for each in list_machines()] == ["gone-on"]
    for change in (machine.stop, machine.kill, machine.wait, machine.detach):
        with pytest.raises(MachineError, match="gone-on was detached"):
            change()
    assert machine.state.phase == "running"
    find("gone-on").stop()
    assert machine.state.phase == "ended"
    assert "gone-on" in repr(machine)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_detached_machine_outlives_its_async_with_block(image: str, backend: str) -> None:
    async def main() -> None:
        async with await aio.boot(image, machine="namespaces", name="gone-on") as machine:
            LEFT.append(machine.state.monitor)
            machine.detach()
        async with await aio.find("gone-on") as found:
            await found.agent.ping()
            with pytest.raises(MachineError, match="was detached"):
                await machine.stop()
            await found.stop()

    anyio.run(main, backend=backend)


@pytest.mark.parametrize("words", [["nosuch"], ["-u", "nope"]])
@pytest.mark.parametrize("detach", [[], ["-d"]])
def test_a_machine_whose_command_cannot_start_keeps_the_reason(
    image: str, words: list[str], detach: list[str]
) -> None:
    user = words if words[0] == "-u" else []
    command = ["true"] if user else words
    run = ["run", *detach, "--name", "job", "--machine", "namespaces", *user, image, *command]
    assert microguest(*run).returncode == (125 if user else 127)
    (left,) = list_machines(all=True)
    assert left.status == "workload-failed"
    with pytest.raises(MachineError, match=rf"could not be started: .*'{words[-1]}'"):
        _ = find("job").agent


def test_logs_are_followed_until_the_end(image: str) -> None:
    kept(image, "job", GATED)
    with find("job") as machine:
        lines = machine.logs(follow=True, tail=1)
        assert next(lines) == b"two\n"
        with machine.agent.start(["touch", "/go"]):  # which the machine's end may overtake
            assert list(lines) == [b"three"]
        assert machine.wait(PATIENCE).workload_exited is not None


LONG = """
head -c 1048576 /dev/zero | tr '\\0' x
printf 'microguest: not a line of PID 1'
until test -e /go; do sleep 0.05; done
head -c 2000000 /dev/zero | tr '\\0' y
echo; echo last
"""


def test_a_line_without_end_does_not_wait_for_it(image: str) -> None:
    """It comes in pieces, so that whoever follows a log needs no more memory than for one."""
    text = b"x" * LINE_MAX + b"microguest: not a line of PID 1"
    kept(image, "job", LONG)
    with find("job") as machine:
        wait_until("it is logged", lambda: b"".join(machine.logs()) == text, PATIENCE)
        lines = machine.logs(follow=True)
        assert next(lines) == text[:LINE_MAX]
        machine.agent.exec(["touch", "/go"])
        rest = list(lines)
        text += b"y" * 2_000_000 + b"\n"
        assert rest[-1] == b"last\n"
        assert b"".join(rest[:-1]) == text[LINE_MAX:]
        assert max(map(len, rest)) <= LINE_MAX
        assert b"".join(machine.logs(tail=2)) == text + b"last\n"
        assert b"".join(machine.logs(tail=1)) == b"last\n"
        (first, *others) = machine.logs(timestamps=True)
        assert stamped(first)[1] + b"".join(others[:-1]) == text
        assert stamped(others[-1])[1] == b"last\n"


PID_1S = (
    "microguest: a line of its own",
    "microguest-report: {}",
    "microguest 0123456789ab: a guess",
    "[    1.234567] reboot: Power down",
    "[    1.234567] reboot: Restarting system",
    "[    1.234567] reboot: machine restart",
)


@pytest.mark.parametrize("kind", machinekit.KINDS)
def test_no_line_of_a_workload_is_taken_for_another_s(
    image: str, machines_home: Path, kind: str
) -> None:
    """However it begins."""
    lines = "".join(f"echo '{line}'; " for line in PID_1S)
    text = "".join(f"{line}\n" for line in PID_1S)
    script = f"{lines} until test -e /go; do sleep 0.05; done; echo on; {lines} exit 3"
    words = ("run", "-d", "--name", "sly", "--machine", kind, image, "sh", "-c", script)
    assert microguest(*words).returncode == 0
    wait_until("it waits", lambda: microguest("logs", "sly").stdout.decode() != "", PATIENCE)
    follow = [PROGRAM, "logs", "-f", "sly"]
    with subprocess.Popen(follow, stdout=subprocess.PIPE) as follower:
        microguest("exec", "sly", "touch", "/go")  # which the machine's end may overtake
        followed = follower.communicate(timeout=PATIENCE)[0].decode()
    assert followed == f"{text}on\n{text}"
    assert microguest("logs", "sly").stdout.decode() == followed
    assert microguest("logs", "--tail", "1", "sly").stdout.decode() == f"{PID_1S[-1]}\n"
    if kind == "qemu":
        raw = (machines_home / "sly" / "console.log").read_bytes()
        assert re.search(rb"\] reboot: [A-Za-z ]+\r\n\Z", raw)
        assert len(raw.splitlines()) > len(followed.splitlines())


def test_what_pid_1_says_is_not_in_the_logs(machines_home: Path, tmp_path: Path) -> None:
    root_of_programs(tmp_path)
    for number in range(bounds.RUN_ENTRIES + 100):
        (tmp_path / "run" / str(number)).touch()
    words = ("run", "--name", "told", "--machine", "namespaces", f"dir:{tmp_path}")
    assert microguest(*words, "cat", "/etc/group").returncode == 0
    raw = (machines_home / "told" / "console.log").read_text()
    assert re.match(r"microguest [0-9a-f]{12}: \d+ entries of the image's /run are not there", raw)
    assert microguest("logs", "told").stdout == b""


def test_a_line_of_pid_1_within_another() -> None:
    """What the workload writes is whole again; nothing is lost where the end is missing."""
    split = Splitter("job", timed=False, mark=b"microguest 0123: ", kernel=True)
    data = (
        b"half microguest 0123: PID 1\r\nmicroguest 0123: and again\r\n_whole\r\n"
        b"[ 1.0] reboot: Power down\r\nunfinished[   12.345678] reboot: Restarting system\r\n"
        b"[   12.345680] reboot: machine restart\r\n"
    )
    lines = [*split.feed(Piece(data, 0, None)), *split.end()]
    assert [line.text for line in lines] == [
        *(b"half _whole\r\n", b"[ 1.0] reboot: Power down\r\n", b"unfinished"),
    ]
    assert [line.begins for line in lines] == [True, True, True]


def test_a_line_is_not_cut_within_its_end() -> None:
    """The console of a virtual machine writes two bytes for a newline."""
    split = Splitter("job", timed=False)
    data = b"x" * (LINE_MAX - 1) + b"\r\n"
    assert [line.text for line in split.feed(Piece(data, 0, None))] == [data[:-2], b"\r\n"]


def stamped(line: bytes) -> tuple[float, bytes]:
    """A line of `timestamps`: when, to the microsecond, and what."""
    when, text = line.split(b" ", 1)
    assert re.fullmatch(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", when)
    date = dt.datetime.fromisoformat(f"{when[:-4].decode()}+00:00")
    return date.timestamp(), text


TIMED = "echo one; until test -e /go; do sleep 0.05; done; echo two; echo 1970-01-01T00:00:00Z x"


def test_logs_by_their_times(image: str) -> None:
    before = time.time()
    kept(image, "job", TIMED)
    with find("job") as machine:
        wait_until("the first line", lambda: list(machine.logs()) == [b"one\n"], PATIENCE)
        between = time.time()
        lines = machine.logs(follow=True, timestamps=True, since=before)
        first, text = stamped(next(lines))
        assert text == b"one\n"
        assert before - 0.001 <= first <= between
        with contextlib.suppress(ConnectionLost):  # the machine may end before it can answer
            machine.agent.exec(["touch", "/go"])
        rest = [stamped(line) for line in lines]
        assert [text for _, text in rest] == [b"two\n", b"1970-01-01T00:00:00Z x\n"]
        assert all(between <= when + 0.001 <= time.time() for when, _ in rest)
        machine.wait(PATIENCE)
        later = [b"two\n", b"1970-01-01T00:00:00Z x\n"]
        moment = dt.datetime.fromtimestamp(between, dt.UTC)
        for since in (between, f"{between:.9f}", moment, moment.isoformat(), "0.000001s", "1h30m"):
            got = list(machine.logs(since=since))
            expected = {"0.000001s": [], "1h30m": [b"one\n", *later]}
            assert got == (expected.get(since, later) if isinstance(since, str) else later), since
        assert list(machine.logs(until=between)) == [b"one\n"]
        assert list(machine.logs(until=between, tail=1)) == [b"one\n"]
        assert list(machine.logs(until=between, follow=True)) == [b"one\n"]
        assert list(machine.logs(since=between, until=between)) == []
        assert list(machine.logs(since=between, tail=1)) == later[1:]


def test_logs_are_followed_until_a_time(image: str) -> None:
    kept(image, "job", "echo one; sleep 1000")
    with find("job") as machine:
        wait_until("the first line", lambda: list(machine.logs()) == [b"one\n"])
        assert list(machine.logs(follow=True, until=time.time() + 1)) == [b"one\n"]
        assert machine.info.running
        machine.kill()


@pytest.mark.parametrize("backend", BACKENDS)
def test_times_of_logs_in_an_event_loop(image: str, backend: str) -> None:
    kept(image, "job", SCRIPT)

    async def main() -> None:
        async with await aio.find("job") as machine:
            await machine.wait(PATIENCE)
            lines = [stamped(line) async for line in machine.logs(timestamps=True, since="1h")]
            assert [text for _, text in lines] == [b"one\n", b"two\n", b"three\n"]
            assert [line async for line in machine.logs(until=lines[0][0] - 1)] == []

    anyio.run(main, backend=backend)


def test_a_machine_whose_times_are_not_kept(image: str, machines_home: Path) -> None:
    """As an older version has left it."""
    kept(image, "job", SCRIPT)
    machine = find("job")
    machine.wait(PATIENCE)
    (machines_home / "job" / "console.times").unlink()
    assert len(list(machine.logs())) == 3
    for options in ({"timestamps": True}, {"since": "1h"}, {"until": 0}):
        with pytest.raises(MachineError, match=r"job: no times .* older version"):
            list(machine.logs(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"since": "yesterday"}, ValueError),
        ({"until": "2026-02-30"}, ValueError),
        ({"since": "10x"}, ValueError),
        ({"since": float("nan")}, ValueError),
        ({"since": 1e300}, ValueError),
        ({"since": b"10m"}, TypeError),
        ({"until": True}, TypeError),
        ({"timestamps": 1}, TypeError),
        ({"follow": "no"}, TypeError),
    ],
)
def test_what_is_no_time(image: str, options: Any, error: type[Exception]) -> None:
    detached(image, "first")
    with find("first") as machine, pytest.raises(error, match=next(iter(options))):
        machine.logs(**options)


@pytest.mark.parametrize(
    ("timeout", "error"), [("5", TypeError), (True, TypeError), (float("nan"), ValueError)]
)
def test_what_is_no_time_to_wait(image: str, timeout: Any, error: type[Exception]) -> None:
    with boot(image, machine="namespaces") as machine:
        for each in (machine, find(machine.name)):
            with pytest.raises(error, match="timeout"):
                each.wait(timeout)
        assert not machine.state.ended


def test_what_is_no_machine_of_a_list_is_left_out(image: str, machines_home: Path) -> None:
    """Files, and links, in the folder of machines are somebody's own affair."""
    detached(image, "first")
    (machines_home / "notes.txt").write_text("x")
    (machines_home / "link").symlink_to("first")
    assert [each.name for each in list_machines(all=True)] == ["first"]
    with boot(image, machine="namespaces") as second:
        assert [each.name for each in list_machines()] == sorted(["first", second.name])
    with pytest.raises(TypeError, match="all: expected True or False"):
        list_machines(all="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["no-such", "No Such", "", 5])
def test_what_is_not_there_is_an_error(name: Any) -> None:
    with pytest.raises((MachineError, TypeError), match="name"):
        find(name)


def test_agent_of_a_found_machine_says_how_it_ended(image: str) -> None:
    detached(image, "first")
    with find("first") as machine:
        process = machine.agent.start(["sleep", "1000"])
        find("first").kill()
        with pytest.raises(ConnectionLost, match="machine first has ended"):
            process.wait(PATIENCE)
        process.close()


# ── asyncio and trio ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("backend", BACKENDS)
def test_machines_in_an_event_loop(image: str, backend: str) -> None:
    async def main() -> None:
        async with await aio.boot(image, machine="namespaces", name="first") as machine:
            assert (machine.name, machine.state.phase) == ("first", "running")
            assert (await machine.agent.exec(["echo", "here"])).stdout == b"here\n"
            assert [each.name for each in await aio.list_machines()] == ["first"]
            async with await aio.find("first") as found:
                assert (await found.agent.exec(["echo", "again"])).stdout == b"again\n"
                with pytest.raises(DeadlineExceeded, match=r"still runs after 0\.1 s"):
                    await found.wait(0.1)
                with pytest.raises(TypeError, match="tail: expected a number of lines, got str"):
                    found.logs(tail="1")  # type: ignore[arg-type]
            with pytest.raises(DeadlineExceeded, match=r"still runs after 0\.1 s"):
                await machine.wait(0.1)
            with anyio.move_on_after(0.1) as scope:
                await machine.wait()
            assert scope.cancelled_caught
        assert await aio.list_machines(all=True) == []
        with pytest.raises(ImageError):
            await aio.boot("oci:/nowhere", machine="namespaces")

    anyio.run(main, backend=backend)
    assert names() == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_logs_in_an_event_loop(image: str, backend: str) -> None:
    kept(image, "job", GATED)

    async def main() -> None:
        async with await aio.find("job") as machine, contextlib.AsyncExitStack() as started:
            found = []
            async for line in machine.logs(follow=True):
                found.append(line)
                if line == b"two\n":
                    await started.enter_async_context(await machine.agent.start(["touch", "/go"]))
            assert found == [b"one\n", b"two\n", b"three"]
            state = await machine.wait(PATIENCE)
            assert state.workload_exited is not None

    anyio.run(main, backend=backend)


def test_cancelled_reads_of_logs_lose_no_line(image: str) -> None:
    counts = "for i in 1 2 3 4 5 6 7 8; do echo $i; sleep 0.05; done"
    kept(image, "job", f"until test -e /go; do sleep 0.05; done; {counts}")

    async def main() -> None:
        machine = await aio.find("job")
        going = None
        lines = machine.logs(follow=True)
        found: list[bytes] = []
        cancelled = 0
        while True:
            try:
                found.append(await asyncio.wait_for(anext(lines), 0.004))
            except TimeoutError:
                cancelled += 1
                going = going or await machine.agent.start(["touch", "/go"])
            except StopAsyncIteration:
                break
        assert going is not None
        going.close()
        assert found == [b"%d\n" % number for number in range(1, 9)]
        assert cancelled

    asyncio.run(main())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("moment", [has_folder, has_vmm], ids=lambda each: each.__name__)
def test_cancelled_boot_leaves_nothing(
    image: str, backend: str, moment: Callable[[str], bool]
) -> None:
    async def main() -> set[int]:
        pids: set[int] = set()
        async with anyio.create_task_group() as group:

            async def start() -> None:
                async with await aio.boot(image, machine="namespaces", name="first"):
                    await anyio.sleep_forever()  # where it is faster than who cancels it

            group.start_soon(start)
            with anyio.fail_after(PATIENCE):
                while not moment("first"):
                    await anyio.sleep(0.001)
            if has_vmm("first"):
                pids = family(state_of("first").monitor)
            group.cancel_scope.cancel()
        assert names() == []  # at once: when the cancelled call has returned
        return pids

    pids = anyio.run(main, backend=backend)
    nothing_is_left("first", pids, within=PATIENCE)


def test_boot_cancelled_by_asyncio_itself_leaves_nothing(image: str) -> None:
    async def main() -> None:
        for delay in (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5):
            task = asyncio.create_task(aio.boot(image, machine="namespaces"))
            await asyncio.sleep(delay)
            if task.done():
                await (await task).kill()
                continue
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert names() == []

    asyncio.run(main())


def test_boot_is_given_up_from_another_thread(image: str) -> None:
    abandoned = threading.Event()
    failed: list[BaseException] = []

    def start() -> None:
        try:
            boot(image, machine="namespaces", name="first", abandoned=abandoned)
        except MachineError as error:
            failed.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    wait_until("it is being started", lambda: has_vmm("first"))
    abandoned.set()
    thread.join(PATIENCE)
    assert names() == []
    # It may have been ready in that moment; then it was ended all the same.
    assert "given up" in str(failed[0])


def test_machine_that_nobody_holds_ends_without_a_garbage_collection(image: str) -> None:
    """As after a cancelled `asyncio.to_thread(boot)`, whose result nobody takes."""
    import gc

    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            machine: Machine | None = boot(image, machine="namespaces", name="first")
            assert machine is not None
            assert machine.agent.exec(["true"]).returncode == 0
            monitor = machine.state.monitor
            pids = family(monitor)
            machine = None
            nothing_is_left("first", pids, within=PATIENCE)
            os.waitpid(monitor, 0)
    finally:
        gc.enable()


def test_public_names() -> None:
    assert library.find is find
    assert library.list_machines is list_machines
