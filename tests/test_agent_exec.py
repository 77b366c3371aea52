"""What a host gets from processes that the agent starts: every byte, the status, a typed error."""

import contextlib
import hashlib
import os
import pathlib
import resource
import shutil
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from agentharness import (
    WAIT,
    AgentProcess,
    Host,
    Refused,
    Result,
    execute,
    run_into_timeout,
)
from patience import PATIENCE, SLACK

from microguest.guest import bounds
from microguest.guest.boot.workload import ImageDefaults
from microguest.guest.wire import frames, messages
from microguest.host_client.cli.exec import SHELL_OF_USER

MIB = 1024 * 1024
GONE = PATIENCE  # seconds in which a killed process must have disappeared


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentProcess]:
    image = ImageDefaults(env={"FROM_IMAGE": "yes"})
    with AgentProcess(image=image) as process:
        yield process


def shell(agent: AgentProcess, script: str, **options: object) -> Result:
    return execute(agent, "sh", "-c", script, **options)


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + GONE
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """Not gone, and no zombie that only waits for whoever inherited it."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


# ── output and status ────────────────────────────────────────────────────────────────────────────


def test_output_and_errors_are_separate(agent: AgentProcess) -> None:
    result = shell(agent, "echo out; echo err >&2")
    assert (result.stdout, result.stderr) == (b"out\n", b"err\n")
    assert result.exited.code == 0
    assert 0 < result.exited.duration < 10 + SLACK
    assert result.exited.open_streams == ()


@pytest.mark.parametrize("code", [0, 1, 7, 126, 255])
def test_exit_codes_are_exact(agent: AgentProcess, code: int) -> None:
    assert shell(agent, f"exit {code}").exited.code == code


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, 34])
def test_death_by_signal_is_not_an_exit_code(agent: AgentProcess, number: int) -> None:
    exited = shell(agent, f"kill -{int(number)} $$").exited
    assert exited.signal == number
    assert exited.code is None


def test_every_byte_written_before_the_exit_arrives(agent: AgentProcess) -> None:
    for size in (1, 4095, 65536):
        for _ in range(10):
            result = execute(agent, "head", "-c", str(size), "/dev/zero")
            assert len(result.stdout) == size


def test_large_output_arrives_whole(agent: AgentProcess) -> None:
    script = "seq 1 400000; seq 1 100000 >&2"
    expected = [b"".join(b"%d\n" % n for n in range(1, end + 1)) for end in (400000, 100000)]
    result = shell(agent, script)
    assert [result.stdout, result.stderr] == expected


def test_stdin_is_at_its_end_unless_asked_for(agent: AgentProcess) -> None:
    assert execute(agent, "cat").stdout == b""


def test_stdin_arrives_with_the_request(agent: AgentProcess) -> None:
    with Host(agent) as host:
        host.start("cat", stdin=True)
        host.write(b"one ")
        host.write(b"two", end=True)
        assert host.collect().stdout == b"one two"


def test_stdin_that_nobody_reads_is_discarded(agent: AgentProcess, tmp_path: pathlib.Path) -> None:
    script = f"exec <&-; until test -e {tmp_path}/sent; do sleep 0.05; done; echo done"
    with Host(agent) as host:
        host.start("sh", "-c", script, stdin=True)
        for _ in range(4):
            host.write(b"x" * MIB)
        host.write(b"", end=True)
        (tmp_path / "sent").touch()
        assert host.collect().stdout == b"done\n"


def test_bulk_in_both_directions(agent: AgentProcess) -> None:
    chunk = os.urandom(MIB)
    expected = hashlib.sha256(chunk * 20).hexdigest()
    with Host(agent) as host:
        host.start("cat", stdin=True)
        digest, size, exited = host.exchange([chunk] * 20)
    assert (digest, size, exited.code) == (expected, 20 * MIB, 0)


# ── what the process sees ────────────────────────────────────────────────────────────────────────


def test_environment_is_the_images_with_dockers_defaults(agent: AgentProcess) -> None:
    lines = execute(agent, "env", env={"A": "b c"}).stdout.decode().splitlines()
    assert sorted(lines) == [
        "A=b c",
        "FROM_IMAGE=yes",
        "HOME=/root",
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    ]


def test_process_has_a_clean_state(agent: AgentProcess) -> None:
    script = (
        "ls /proc/self/fd; umask; pwd; ulimit -n; cat /proc/self/oom_score_adj; cut -d' ' -f5,6 "
        "/proc/self/stat; grep -E 'Sig(Blk|Ign)' /proc/self/status"
    )
    limit = str(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    with Host(agent) as host:
        started = host.start("sh", "-c", script)
        lines = host.collect().stdout.decode().splitlines()
    assert lines == [
        *["0", "1", "2", "3", "0022", "/", limit, "0"],
        f"{started.pid} {started.pid}",
        "SigBlk:\t0000000000000000",
        "SigIgn:\t0000000000000000",
    ]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_user_is_taken_from_the_roots_files(agent: AgentProcess) -> None:
    script = "id -u; id -g; id -G; echo $HOME"
    by_name = shell(agent, script, user="daemon").stdout.decode().split("\n")
    assert by_name[:2] == ["1", "1"]
    assert by_name[3] == "/usr/sbin"
    by_number = shell(agent, script, user="4711:4712").stdout.decode().split("\n")
    assert by_number[:4] == ["4711", "4712", "4712", "/"]


def test_cwd_and_relative_program(agent: AgentProcess, tmp_path: pathlib.Path) -> None:
    program = tmp_path / "here"
    program.write_text("#!/bin/sh\npwd\n")
    program.chmod(0o755)
    result = execute(agent, "./here", cwd=str(tmp_path))
    assert result.stdout.decode() == f"{tmp_path}\n"


def test_any_bytes_in_arguments(agent: AgentProcess) -> None:
    raw = bytes(range(1, 256))
    assert execute(agent, "printf", "%s", os.fsdecode(raw)).stdout == raw


@pytest.fixture
def small_root(tmp_path: pathlib.Path) -> pathlib.Path:
    """A root with a static busybox and nothing else."""
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("busybox (Debian: busybox-static) is not installed")
    tmp_path.chmod(0o755)  # it is the root of other users, too
    (tmp_path / "bin").mkdir()
    (tmp_path / "etc").mkdir()
    shutil.copy(busybox, tmp_path / "bin" / "busybox")
    return tmp_path


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change its root")
def test_processes_see_the_image_only(small_root: pathlib.Path) -> None:
    (small_root / "etc" / "passwd").write_text("app:x:77:78::/home/app:/bin/sh\n")
    (small_root / "etc" / "group").write_text("app:x:78:\nextra:x:79:app\n")
    with AgentProcess(root=str(small_root)) as agent:
        assert execute(agent, "busybox", "ls", "/").stdout == b"bin\netc\n"
        script = "busybox id -u; busybox id -G; echo $HOME; busybox readlink /proc/self/fd/0"
        result = execute(agent, "busybox", "sh", "-c", script, user="app")
        assert result.stdout == b"77\n78 79\n/home/app\n"


# Of busybox: the uid and the supplementary groups; id(1) would read the files.
IDS = ("awk", '/^Uid/ {uid = $2} /^Groups/ {$1 = ""; print uid $0}', "/proc/self/status")


def set_trap(path: pathlib.Path, trap: str) -> None:
    """Put something there that nobody can read, or that nobody should."""
    if trap == "fifo":
        os.mkfifo(path)
    elif trap == "huge":
        with path.open("wb") as file:
            file.truncate(4 * 1024**3)
    elif trap == "folder":
        path.mkdir()
    else:
        path.symlink_to(trap)


TRAPS = pytest.mark.parametrize(
    "trap", ["fifo", "huge", "folder", "/proc/kmsg", "/proc/self/fd/0", "passwd"]
)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change its root")
@TRAPS
def test_account_files_that_are_traps_do_not_hold_the_agent(
    small_root: pathlib.Path, trap: str
) -> None:
    """Whatever is there: numbers need no file, and nothing of it is read."""
    (small_root / "proc").mkdir()
    set_trap(small_root / "etc" / "passwd", trap)
    set_trap(small_root / "etc" / "group", trap)
    with AgentProcess(root=str(small_root)) as agent, proc_of(agent):
        resident = agent.resident_kib()
        for user in ("app", "1:app", "root"):
            with Host(agent) as host, pytest.raises(Refused) as caught:
                host.start("busybox", "true", user=user)
            assert caught.value.failure.code == "bad_user"
        for user, found in (("1:2", b"1 2\n"), ("0:0", b"0 0\n"), ("0", b"0 0\n"), ("", b"0 0\n")):
            assert execute(agent, "busybox", *IDS, user=user).stdout == found
        assert execute(agent, "busybox", "true", user="1:1", groups=("7",)).exited.code == 0
        assert agent.resident_kib() - resident < 2 * 1024


@contextlib.contextmanager
def proc_of(agent: AgentProcess) -> Iterator[None]:
    """A /proc in its root."""
    if execute(agent, "busybox", "mount", "-t", "proc", "proc", "/proc").exited.code:
        pytest.skip("no proc can be mounted here")
    try:
        yield
    finally:
        execute(agent, "busybox", "umount", "-l", "/proc", user="0:0")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change its root")
def test_a_group_file_that_is_a_trap_leaves_out_what_it_would_say(
    small_root: pathlib.Path,
) -> None:
    (small_root / "proc").mkdir()
    (small_root / "etc" / "passwd").write_text("app:x:77:78::/home/app:/bin/sh\n")
    set_trap(small_root / "etc" / "group", "huge")
    with AgentProcess(root=str(small_root)) as agent:
        with proc_of(agent):
            assert execute(agent, "busybox", *IDS, user="77").stdout == b"77 78\n"
        result = execute(agent, "busybox", "sh", "-c", "echo $HOME", user="77")
        assert result.stdout == b"/home/app\n"
        with Host(agent) as host, pytest.raises(Refused, match="/etc/group") as caught:
            host.start("busybox", "true", user="app")
        assert caught.value.failure.code == "bad_user"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change its root")
@TRAPS
def test_a_shell_is_found_past_account_files_that_are_traps(
    small_root: pathlib.Path, trap: str
) -> None:
    (small_root / "proc").mkdir()
    for name in ("sh", "head"):
        (small_root / "bin" / name).symlink_to("busybox")
    set_trap(small_root / "etc" / "passwd", trap)
    with AgentProcess(root=str(small_root)) as agent, proc_of(agent), Host(agent) as host:
        host.start("sh", "-c", SHELL_OF_USER, user="0:0", stdin=True, timeout=WAIT)
        host.write(b"echo $SHELL\n", end=True)
        assert host.collect().stdout == b"/bin/sh\n"


# ── whose the streams are ────────────────────────────────────────────────────────────────────────

AGAIN = """
read line </dev/stdin; echo "got $line" >/dev/stdout; echo err >/dev/stderr
echo 1 >>/proc/self/fd/1; echo 2 >>/proc/$$/fd/2; stat -L -c %u /dev/stdin /dev/stdout /dev/stderr
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("user", ["65534", "1234:4321", "0"])
def test_streams_can_be_opened_again_by_the_user(agent: AgentProcess, user: str) -> None:
    with Host(agent) as host:
        host.start("sh", "-c", AGAIN, user=user, stdin=True)
        host.write(b"line\n", end=True)
        result = host.collect()
    uid = user.partition(":")[0].encode() + b"\n"
    assert (result.stdout, result.stderr) == (b"got line\n1\n" + 3 * uid, b"err\n2\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_streams_of_others_cannot(agent: AgentProcess) -> None:
    """They are the user's, not everybody's."""
    with Host(agent) as host:
        host.start("sh", "-c", "echo $$; read wait", user="1234", stdin=True)
        pid = int(host.read_until(b"\n"))
        result = shell(agent, f"echo x >/proc/{pid}/fd/1 || echo refused", user="1235")
        host.write(b"", end=True)
        assert host.collect().stdout == b""
    assert result.stdout == b"refused\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_server_without_root_logs_to_its_streams(agent: AgentProcess) -> None:
    """As nginx and apache do in their images: log files that are links to /dev/stdout."""
    script = """
    dir=$(mktemp -d) && ln -s /dev/stdout $dir/access.log && ln -s /dev/stderr $dir/error.log
    sh -c "echo GET >>$dir/access.log; echo oops >>$dir/error.log"
    rm -r $dir
    """
    result = shell(agent, script, user="65534:65534")
    assert (result.stdout, result.stderr) == (b"GET\n", b"oops\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change its root")
def test_input_is_the_users_in_a_root_without_devices(small_root: pathlib.Path) -> None:
    (small_root / "proc").mkdir()
    with AgentProcess(root=str(small_root)) as agent, proc_of(agent):
        script = "busybox cat /proc/self/fd/0 && echo whole >/proc/self/fd/1"
        result = execute(agent, "busybox", "sh", "-c", script, user="77:78")
    assert (result.stdout, result.stderr) == (b"whole\n", b"")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change its root")
def test_what_looks_like_cgroups_does_not_hold_the_agent(small_root: pathlib.Path) -> None:
    """As root in a machine can mount over them."""
    cgroups = small_root / "sys" / "fs" / "cgroup"
    (cgroups / "microguest").mkdir(parents=True)
    (cgroups / "cgroup.controllers").write_text("cpu memory pids\n")
    os.mkfifo(cgroups / "cgroup.subtree_control")
    os.mkfifo(cgroups / "microguest" / "cgroup.subtree_control")
    with AgentProcess(root=str(small_root)) as agent:
        assert execute(agent, "busybox", "true", user="0:0").exited.code == 0
    assert sorted(os.listdir(cgroups / "microguest")) == ["cgroup.subtree_control"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change its root")
def test_a_fifo_as_null_device_does_not_hold_the_agent(small_root: pathlib.Path) -> None:
    (small_root / "dev").mkdir()
    os.mkfifo(small_root / "dev" / "null")
    with AgentProcess(root=str(small_root)) as agent:
        assert execute(agent, "busybox", "cat").stdout == b""


# ── what cannot be started ───────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("programs")
    for name, content, mode in (
        ("plain", "echo hi\n", 0o644),
        ("no-format", "\x00\x01 not a program", 0o755),
        ("lost", "#!/no/such/interpreter\n", 0o755),
    ):
        (folder / name).write_text(content)
        (folder / name).chmod(mode)
    return folder


@pytest.mark.parametrize(
    ("argv", "options", "code"),
    [
        (["no-such-program"], {}, "not_found"),
        (["/no/such/program"], {}, "not_found"),
        (["/etc/passwd/x"], {}, "not_found"),
        (["/no/such/\udcff"], {}, "not_found"),
        (["\udcff"], {}, "not_found"),
        (["/tmp/\udcff/\udcff"], {}, "not_found"),
        (["true"], {"cwd": "/no/such/\udcff"}, "bad_cwd"),
        (["true"], {"user": "\udcff"}, "bad_user"),
        (["{files}/plain"], {}, "permission_denied"),
        (["/"], {}, "permission_denied"),
        (["{files}/no-format"], {}, "not_executable"),
        (["{files}/lost"], {}, "bad_interpreter"),
        (["true"], {"cwd": "/no/such/folder"}, "bad_cwd"),
        (["true"], {"cwd": "/etc/passwd"}, "bad_cwd"),
        (["true"], {"cwd": "relative"}, "bad_cwd"),
        (["true"], {"user": "no-such-user"}, "bad_user"),
        (["true"], {"user": "root:no-such-group"}, "bad_user"),
        (["true", "x" * 3 * MIB], {}, "argument_list_too_long"),
        (["x" * 3 * MIB], {}, "not_found"),
        (["true"], {"user": "x" * 3 * MIB}, "bad_user"),
        (["true"], {"cwd": "x" * 3 * MIB}, "bad_cwd"),
        (["true"], {"cwd": "/" + "x" * 3 * MIB}, "bad_cwd"),
        (["true"], {"env": {"x" * 3 * MIB: "\0"}}, "bad_request"),
        ([], {}, "bad_request"),
        (["a\0b"], {}, "bad_request"),
    ],
    ids=lambda value: f"{value!a:.40}",
)
def test_refused_starts_are_typed(
    agent: AgentProcess,
    files: pathlib.Path,
    argv: list[str],
    options: dict[str, object],
    code: str,
) -> None:
    execute(agent, "true")  # it has all of its own then
    before = agent.open_descriptors()
    with Host(agent) as host, pytest.raises(Refused) as caught:
        host.start(*(word.replace("{files}", str(files)) for word in argv), **options)
    assert caught.value.failure.code == code
    settle(agent, before)


# ── endings ──────────────────────────────────────────────────────────────────────────────────────


def test_grandchild_that_holds_stdout_does_not_hold_the_result(agent: AgentProcess) -> None:
    started = time.monotonic()
    result = shell(agent, "sleep 30 & echo $!; exit 4")
    os.kill(int(result.stdout), signal.SIGKILL)
    assert time.monotonic() - started < bounds.STREAM_CAP_AFTER_EXIT + SLACK
    assert result.exited.code == 4
    assert result.exited.open_streams == ("stdout", "stderr")


def test_grandchild_that_keeps_writing_is_cut_at_the_cap(agent: AgentProcess) -> None:
    script = "(while :; do echo tick; sleep 0.02; done) 2>&- & echo $! >&2"
    started = time.monotonic()
    result = shell(agent, script, drain_idle=60.0)  # a writer that is kept waiting is not idle
    os.kill(int(result.stderr), signal.SIGKILL)
    elapsed = time.monotonic() - started
    assert bounds.STREAM_CAP_AFTER_EXIT <= elapsed < bounds.STREAM_CAP_AFTER_EXIT + SLACK
    assert result.exited.open_streams == ("stdout",)
    assert result.stdout.count(b"tick") > 5


def test_slow_host_gets_what_was_written_before_the_exit(agent: AgentProcess) -> None:
    """The cut of a held stream counts only while somebody reads."""
    with Host(agent) as host:
        host.start("sh", "-c", "head -c 900000 /dev/zero; sleep 30 & echo $! >&2")
        time.sleep(bounds.STREAM_CAP_AFTER_EXIT + 0.5)
        result = host.collect()
    os.kill(int(result.stderr), signal.SIGKILL)
    assert len(result.stdout) == 900000
    assert "stdout" in result.exited.open_streams


def test_lost_host_ends_the_whole_tree(agent: AgentProcess) -> None:
    with Host(agent) as host:
        host.start("sh", "-c", "trap '' TERM HUP; sleep 100 & echo $$ $!; wait; sleep 100")
        event = host.receive()
        pids = [int(word) for word in event.data.split()]  # type: ignore[union-attr]
    for pid in pids:
        wait_until_gone(pid)


def test_lost_host_is_noticed_while_stdin_is_stuck(agent: AgentProcess) -> None:
    with Host(agent) as host:
        started = host.start("sleep", "100", stdin=True)
        host.sock.settimeout(0.5)
        with pytest.raises(TimeoutError):
            fill_input(host)
    wait_until_gone(started.pid)


def fill_input(host: Host) -> None:
    for _ in range(4):
        host.write(b"x" * MIB)


def test_lost_host_is_noticed_while_output_is_stuck(agent: AgentProcess) -> None:
    with Host(agent) as host:
        started = host.start("yes")
        time.sleep(0.2)
    wait_until_gone(started.pid)


def test_signals_reach_the_process_or_its_group(agent: AgentProcess) -> None:
    child = "trap 'echo child; exit' USR1; echo up; while :; do sleep 0.05; done"
    script = f'trap "echo parent" USR1; sh -c "{child}" & wait; wait'
    for target, expected in (("group", b"child"), ("process", b"parent")):
        with Host(agent) as host:
            host.start("sh", "-c", script)
            assert host.receive().data == b"up\n"  # type: ignore[union-attr]
            host.signal(signal.SIGUSR1, target)
            seen = host.receive().data  # type: ignore[union-attr]
            if target == "process":
                assert seen == b"parent\n"
            while expected not in seen:
                seen += host.receive().data  # type: ignore[union-attr]


def test_unknown_signal_is_an_error(agent: AgentProcess) -> None:
    with Host(agent) as host:
        started = host.start("sleep", "100")
        payload = messages.pack({"signal": 99})
        host.send_raw(frames.header(len(payload), frames.Kind.CONTROL) + payload)
        assert host.refusal().code == "bad_request"
    wait_until_gone(started.pid)


def test_timeout_ends_the_tree_gently(agent: AgentProcess) -> None:
    script = "trap 'echo bye; exit 9' TERM; echo up; while :; do sleep 0.02; done"
    result, _ = run_into_timeout(agent, script)
    assert result.exited.timed_out
    assert (result.stdout, result.exited.code) == (b"up\nbye\n", 9)


def test_timeout_ends_what_ignores_it(agent: AgentProcess) -> None:
    script = "trap '' TERM; echo up; echo $$; while :; do sleep 0.02; done"
    result, timeout = run_into_timeout(agent, script)
    assert result.exited.timed_out
    assert result.exited.signal == signal.SIGKILL
    assert result.exited.duration < timeout + bounds.TIMEOUT_GRACE + SLACK
    wait_until_gone(int(result.stdout.split()[1]))


def test_no_timeout_no_flag(agent: AgentProcess) -> None:
    assert not shell(agent, "exit 0", timeout=10.0).exited.timed_out


# ── many ─────────────────────────────────────────────────────────────────────────────────────────


def settle(agent: AgentProcess, descriptors: int) -> None:
    """The agent must return to what it had; closing may be a moment behind the last frame."""
    deadline = time.monotonic() + GONE
    while agent.open_descriptors() > descriptors or agent.children():
        assert time.monotonic() < deadline, (agent.open_descriptors(), agent.children())
        time.sleep(0.01)


def test_nothing_grows_over_many_processes(agent: AgentProcess) -> None:
    execute(agent, "true")
    before = agent.open_descriptors()
    for number in range(300):
        assert shell(agent, f"exit {number % 8}").exited.code == number % 8
    settle(agent, before)


def test_many_at_once_do_not_mix(agent: AgentProcess) -> None:
    execute(agent, "true")
    before = agent.open_descriptors()
    failures: list[object] = []

    def run(number: int) -> None:
        result = shell(agent, f"echo {number}; sleep 0.05; echo {number} >&2; exit {number}")
        expected = b"%d\n" % number
        if (result.stdout, result.stderr, result.exited.code) != (expected, expected, number):
            failures.append((number, result.stdout, result.stderr, result.exited))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    settle(agent, before)


def test_a_host_that_does_not_read_disturbs_nobody(agent: AgentProcess) -> None:
    resident = agent.resident_kib()
    stalled = [Host(agent) for _ in range(8)]
    try:
        for host in stalled:
            host.start("yes")
        time.sleep(0.3)
        started = time.monotonic()
        for _ in range(10):
            assert execute(agent, "echo", "ok").stdout == b"ok\n"
        assert time.monotonic() - started < SLACK
        assert agent.resident_kib() - resident < 4096
    finally:
        for host in stalled:
            host.sock.close()
    deadline = time.monotonic() + GONE
    while agent.children():
        assert time.monotonic() < deadline
        time.sleep(0.01)
