"""A boot that works: its reports, its root, its workload and how that one's end is told."""

import hashlib
import signal
from pathlib import Path

import pytest
from init_machine import STEPS, TOKEN, Machine, boot_config, make_root, require_program, shell


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_program()
    return make_root(tmp_path_factory.mktemp("image"))


def output_of(root: Path, script: str, **workload: object) -> str:
    """The console of a machine whose workload is a shell script, after its clean end."""
    with Machine(root, boot_config(shell(script), **workload)) as machine:
        assert machine.wait() == 0
        machine.report("ready")
        machine.report("workload_started")
        assert machine.report("workload_exited")["code"] == 0, machine.console
        return machine.console


def test_reports_every_step_then_the_workload_then_the_end(root: Path) -> None:
    with Machine(root, boot_config(shell("exit 0"))) as machine:
        ready = machine.report("ready")
        assert tuple(step["name"] for step in ready["steps"]) == STEPS
        times = [moment for step in ready["steps"] for moment in (step["start_ms"], step["end_ms"])]
        assert times == sorted(times)
        assert ready["token_proof"] == hashlib.sha256(TOKEN.encode()).hexdigest()
        started = machine.report("workload_started")
        assert started["pid"] > 2
        exited = machine.report("workload_exited")
        assert exited["code"] == 0
        begun = ready["steps"][STEPS.index("workload")]["start_ms"]
        assert exited["boot_ms"] >= started["boot_ms"] >= begun
        assert machine.report("stopping")["status"] == "done"
        machine.no_more_reports()
        assert machine.wait() == 0
        assert machine.console == ""


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("exit 7", {"code": 7}),
        ("exit 255", {"code": 255}),
        ("kill -KILL $$", {"signal": signal.SIGKILL}),
        ("ulimit -c 0; kill -SEGV $$", {"signal": signal.SIGSEGV}),
        ("kill -40 $$", {"signal": 40}),
    ],
)
def test_workload_exit_status_is_exact(
    root: Path, script: str, expected: dict[str, object]
) -> None:
    with Machine(root, boot_config(shell(script))) as machine:
        machine.report("ready")
        machine.report("workload_started")
        exited = machine.report("workload_exited")
        del exited["boot_ms"]
        assert exited == expected
        assert machine.wait() == 0


def test_core_dump_is_told(root: Path) -> None:
    if Path("/proc/sys/kernel/core_pattern").read_text().startswith("|"):
        pytest.skip("core_pattern pipes cores out of the namespaces")
    with Machine(root, boot_config(shell("ulimit -c unlimited; kill -ABRT $$"))) as machine:
        machine.report("ready")
        machine.report("workload_started")
        exited = machine.report("workload_exited")
        assert (exited["signal"], exited["core_dumped"]) == (signal.SIGABRT, True)
        assert machine.wait() == 0


@pytest.mark.parametrize(
    ("argv", "code", "step"),
    [
        (["/bin/nothing"], "not_found", "exec"),
        (["nothing"], "not_found", "exec"),
        (["/etc/passwd"], "permission_denied", "exec"),
        (["/bin"], "permission_denied", "exec"),
    ],
)
def test_workload_that_cannot_start(root: Path, argv: list[str], code: str, step: str) -> None:
    with Machine(root, boot_config(argv)) as machine:
        machine.report("ready")
        failed = machine.report("workload_failed")
        assert (failed["code"], failed["step"]) == (code, step)
        assert argv[0] in failed["message"]
        assert failed["errno"] > 0
        assert machine.report("stopping")["status"] == "workload-failed"
        assert machine.wait() == 0


def test_workload_of_an_unknown_user_or_bad_cwd(root: Path) -> None:
    with Machine(root, boot_config(["true"], user="nobody-here")) as machine:
        machine.report("ready")
        assert machine.report("workload_failed")["code"] == "bad_user"
        assert machine.wait() == 0
    with Machine(root, boot_config(["true"], cwd="/bin/sh")) as machine:
        machine.report("ready")
        failed = machine.report("workload_failed")
        assert (failed["code"], failed["step"]) == ("bad_cwd", "chdir")
        assert machine.wait() == 0


def test_workload_runs_as_the_image_says(root: Path) -> None:
    script = (
        "id -u; id -g; id -G; pwd; echo $COLOUR $SHAPE $HOME; umask; cat /proc/self/oom_score_adj"
    )
    config = boot_config(shell(script), user="tester", cwd="/tmp", env={"COLOUR": "red"})
    config["image"] = {"env": {"COLOUR": "blue", "SHAPE": "round"}}
    with Machine(root, config) as machine:
        assert machine.wait() == 0
        lines = machine.console.split("\n")
    assert lines == [
        "1000", "1000", "1000 2000", "/tmp", "red round /home/tester", "0022", "0", ""
    ]  # fmt: skip


def test_workload_has_nothing_of_pid_1(root: Path) -> None:
    script = """
        until grep -q agent /proc/2/cmdline; do sleep 0.05; done
        ls /proc/self/fd | tr '\\n' ' '; echo
        grep -E 'SigBlk|SigIgn' /proc/self/status | tr '\\n' ' '; echo
        cat /proc/1/cmdline | tr '\\0' ' '; echo
        for i in 1 2; do tr '\\0' ' ' < /proc/$i/cmdline; done; echo
        tr '\\0' ' ' < /proc/1/environ; echo
    """
    lines = output_of(root, script).split("\n")
    assert lines[0].split() == ["0", "1", "2", "3"]  # 3 is of ls itself
    assert lines[1].split() == ["SigBlk:", "0" * 16, "SigIgn:", "0" * 16]
    assert lines[2] == "init "
    assert lines[3] == "init agent "
    assert lines[4] == ""


def test_root_is_the_image_and_the_rest_is_out_of_reach(root: Path) -> None:
    script = """
        ls / | tr '\\n' ' '; echo
        cut -d' ' -f5 /proc/self/mountinfo | sort | tr '\\n' ' '; echo
        grep -cE '/microguest|/tmp/mg-' /proc/self/mounts
        touch /new-file /bin/other && rm /etc/passwd && ls /etc
        hostname
        cat /sys/class/net/lo/operstate; ip -4 -o addr show lo | grep -c 127.0.0.1
        mount -t tmpfs none /microguest 2>&1 | grep -c 'No such file'
    """
    # /proc/self/mounts names the lower layer in the options of the overlay itself.
    lines = output_of(root, script).split("\n")
    assert lines[0].split() == ["bin", "dev", "etc", "proc", "run", "sys", "tmp"]
    assert "/microguest" not in lines[1]
    assert lines[1].split()[:2] == ["/", "/dev"]
    assert lines[2] == "1"
    assert lines[3] == "group"
    assert lines[4] == "microguest"
    assert lines[6] == "1"
    assert lines[7] == "1"
    assert (root / "etc" / "passwd").exists()
    assert not (root / "new-file").exists()


def test_devices_and_api_file_systems(root: Path) -> None:
    script = """
        for d in null zero full random urandom tty; do test -c /dev/$d || echo no $d; done
        head -c 3 /dev/zero | wc -c
        echo x > /dev/null && echo y | cat /dev/fd/0
        test -d /dev/pts && test -e /dev/ptmx && echo z > /dev/shm/file && ls /dev/mqueue
        touch /run/file && ! touch /sys/file 2>/dev/null && echo done
    """
    assert output_of(root, script).split() == ["3", "y", "done"]


def test_orphans_are_reaped_and_leave_no_zombie(root: Path) -> None:
    script = """
        i=0
        while [ $i -lt 300 ]; do (sh -c 'sleep 0.01 & exit' &); i=$((i + 1)); done
        while cat /proc/[0-9]*/stat 2>/dev/null | grep -q ') Z ' ||
            [ $(ls -d /proc/[0-9]* | wc -l) -ge 10 ]
        do
            sleep 0.1
        done
        echo none is left
    """
    assert output_of(root, script) == "none is left\n"


def test_layers_merge_topmost_first_and_root_mode_is_kept(root: Path, tmp_path: Path) -> None:
    # Both layers are inside the one tree that the launcher shows.
    both = tmp_path / "both"
    make_root(both / "base")
    (both / "top" / "etc").mkdir(parents=True)
    (both / "top" / "etc" / "passwd").write_text("from the top\n")
    (both / "top").chmod(0o750)
    config = boot_config(shell("cat /etc/passwd; stat -c %a /; cat /etc/group | wc -l"))
    config["root"]["lower"] = [
        {"kind": "directory", "path": "/microguest/lower/top"},
        {"kind": "directory", "path": "/microguest/lower/base"},
    ]
    with Machine(both, config) as machine:
        assert machine.wait() == 0
        assert machine.console.split("\n") == ["from the top", "750", "3", ""]


def test_an_image_cannot_redirect_the_mounts(root: Path, tmp_path: Path) -> None:
    image = make_root(tmp_path / "image")
    (image / "proc").symlink_to("/etc")
    (image / "run").write_text("a file")
    config = boot_config(shell("test -d /proc/1 && test -d /run && ls /etc | wc -l"))
    with Machine(image, config) as machine:
        assert machine.wait() == 0
        assert machine.console.split() == ["2"]


def test_tmpfs_upper_is_limited(root: Path) -> None:
    config = boot_config(shell("head -c 3000000 /dev/zero > /big; stat -c %s /big"))
    config["root"]["upper"] = {"size": "1m"}
    with Machine(root, config) as machine:
        assert machine.wait() == 0
        assert int(machine.console.split()[-1]) <= 1024 * 1024
