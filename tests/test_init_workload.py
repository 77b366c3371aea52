"""The workload as OCI says: who it is, what it may do, where it sees what, and how it ends.

What the kernel tells of it is read from /proc/self/status; docs/design/workload.md has the rules.
"""

import base64
import contextlib
import errno
import os
import shutil
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from init_machine import (
    TOKEN,
    Machine,
    boot_config,
    make_root,
    require_program,
    shell,
    wait_for,
)
from rights import open_to_all
from test_host_seccomp import ENGINES
from vm_machine import make_erofs, run_vm, vm_config

from microguest import seccomp
from microguest.guest.privileges import CAPABILITIES
from microguest.host_client.client.process import Process
from microguest.host_client.connecting import connect

ALL = {name: 1 << number for number, name in enumerate(CAPABILITIES)}
NOBODY = 65534
NO_MKDIR = seccomp.deny(["mkdir", "mkdirat"], arch=os.uname().machine)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_program()
    folder = make_root(tmp_path_factory.mktemp("image"))
    (folder / "home" / "tester").mkdir(parents=True)
    (folder / "home" / "tester").chmod(0o700)  # root's: only PID 1 may enter
    (folder / "secret").mkdir()
    (folder / "secret" / "inside").write_text("inside\n")
    (folder / "key").write_text("key\n")
    (folder / "way-out").symlink_to("../../../../secret")
    (folder / "open").mkdir()
    (folder / "open" / "file").write_text("as it was\n")
    return folder


def console(root: Path, script: str, **workload: Any) -> list[str]:
    """The lines that the script writes as the workload, which has to end well."""
    with Machine(root, boot_config(["/bin/sh", "-c", script], **workload)) as machine:
        assert machine.wait() == 0, machine.console
        return machine.console.splitlines()


def status(root: Path, **workload: Any) -> dict[str, str]:
    lines = console(root, "cat /proc/self/status", **workload)
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {name: value.strip() for name, value in fields.items()}


def mask(*names: str) -> str:
    return f"{sum(ALL[name] for name in names):016x}"


# ── privileges ───────────────────────────────────────────────────────────────────────────────────


def test_the_five_sets_are_as_told(root: Path) -> None:
    sets = {
        "bounding": ["chown", "kill", "net_raw"],
        "permitted": ["chown", "kill"],
        "effective": ["kill"],
        "inheritable": ["chown", "kill"],
        "ambient": ["kill"],
    }
    found = status(root, user="tester", capabilities=sets)
    # Over an exec of who is not root the ambient set becomes permitted and effective.
    assert found["CapBnd"] == mask("chown", "kill", "net_raw")
    assert found["CapPrm"] == found["CapEff"] == found["CapAmb"] == mask("kill")
    assert found["CapInh"] == mask("chown", "kill")
    assert found["NoNewPrivs"] == "0"


def test_root_has_what_the_bounding_set_has(root: Path) -> None:
    names = ["chown", "net_bind_service"]
    sets = {"bounding": names, "permitted": names, "effective": names}
    found = status(root, capabilities=sets)
    assert found["CapPrm"] == found["CapEff"] == found["CapBnd"] == mask(*names)
    assert found["CapInh"] == found["CapAmb"] == mask()
    nothing = status(root, capabilities={})
    assert {nothing[f"Cap{name}"] for name in ("Prm", "Eff", "Bnd", "Inh", "Amb")} == {mask()}


def test_nothing_said_leaves_the_sets_alone(root: Path) -> None:
    found = status(root)
    assert found["CapPrm"] == found["CapEff"] == found["CapBnd"]
    assert int(found["CapEff"], 16) & ALL["sys_admin"]


@pytest.mark.parametrize(
    ("workload", "sentence"),
    [
        ({"capabilities": {"bounding": ["flight"]}}, "no capability is called 'flight'"),
        ({"capabilities": {"effective": ["kill"]}}, "effective: one is not permitted"),
        ({"capabilities": {"permitted": ["kill"], "ambient": ["kill"]}}, "not inheritable"),
        ({"rlimits": {"files": [1, 1]}}, "no resource limit is called 'files'"),
        ({"rlimits": {"nofile": [2, 1]}}, "the soft limit is above"),
        ({"seccomp": "AAAA"}, "seccomp: must be"),
        ({"seccomp": "not base64"}, "seccomp: must be"),
    ],
)
def test_what_cannot_be_is_said(root: Path, workload: dict[str, Any], sentence: str) -> None:
    with Machine(root, boot_config(["true"], **workload)) as machine:
        machine.report("ready")
        failed = machine.report("workload_failed")
        assert failed["code"] == "bad_request"
        assert sentence in failed["message"]
        assert machine.wait() == 0


@pytest.mark.parametrize("name", ["no-such-\udcff", "/no/such-\udcff"])
def test_a_program_whose_name_is_not_utf_8_is_not_found(root: Path, name: str) -> None:
    with Machine(root, boot_config([name])) as machine:
        machine.report("ready")
        failed = machine.report("workload_failed")
        assert (failed["code"], failed["errno"]) == ("not_found", errno.ENOENT)
        assert machine.wait() == 0


def test_limits_umask_and_groups(root: Path) -> None:
    lines = console(
        root,
        "ulimit -n; ulimit -Hn; umask; id -u; id -g; id -G; ulimit -c",
        user="1000:2000",
        groups=["tester", "4242"],
        umask=0o077,
        rlimits={"nofile": [100, 200], "core": [0, -1]},
    )
    assert lines == ["100", "200", "0077", "1000", "2000", "2000 1000 4242", "0"]


@pytest.mark.parametrize("no_new_privs", [False, True])
def test_a_filter_is_in_force(root: Path, no_new_privs: bool) -> None:
    lines = console(
        root,
        "mkdir /tmp/no 2>&- || echo refused; id -u;"
        "grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/self/status",
        seccomp=base64.b64encode(NO_MKDIR).decode(),
        no_new_privs=no_new_privs,
        user="tester",
        capabilities={},
    )
    assert lines == [
        "refused",
        "1000",
        f"CapEff:\t{mask()}",
        f"NoNewPrivs:\t{int(no_new_privs)}",
        "Seccomp:\t2",
    ]


@pytest.mark.parametrize("user", ["", "tester"])
def test_a_profile_as_engines_have_it(root: Path, user: str) -> None:
    names = ["chown", "dac_override", "setgid", "setuid", "sys_chroot"]
    program = seccomp.profile(ENGINES, arch=os.uname().machine, capabilities=names)
    script = """
        touch /tmp/x && ls /tmp && (echo one | cat) && umask && id -u
        for command in 'unshare -m true' 'mount -t tmpfs x /tmp' 'hostname x'; do
            $command > /dev/null 2>&1 && echo $command || echo refused
        done
        chroot / true 2>/dev/null && echo changed root; grep NoNewPrivs /proc/self/status
    """
    lines = console(
        root,
        script,
        user=user,
        seccomp=base64.b64encode(program).decode(),
        capabilities=dict.fromkeys(("bounding", "permitted", "effective"), names),
    )
    expected = ["x", "one", "0022", "1000" if user else "0", *["refused"] * 3]
    assert lines == [*expected, *([] if user else ["changed root"]), "NoNewPrivs:\t0"]


def test_a_filter_that_forbids_the_way_to_the_user(root: Path) -> None:
    program = seccomp.deny(["setresuid"], arch=os.uname().machine)
    text = base64.b64encode(program).decode()
    with Machine(root, boot_config(["true"], seccomp=text, user="tester")) as machine:
        machine.report("ready")
        assert machine.report("workload_failed")["step"] == "setuid"
        assert machine.wait() == 0
    assert console(root, "id -u", seccomp=text, user="tester", no_new_privs=True) == ["1000"]


def test_a_filter_that_kills_is_a_start_that_failed_or_an_end(root: Path) -> None:
    program = struct.pack("=HBBI", 0x06, 0, 0, 0x80000000)  # SECCOMP_RET_KILL_PROCESS
    with Machine(
        root, boot_config(["true"], seccomp=base64.b64encode(program).decode())
    ) as machine:
        machine.report("ready")
        machine.report("workload_started")
        assert machine.report("workload_exited")["signal"] == signal.SIGSYS
        assert machine.wait() == 0


def test_no_new_privs(root: Path) -> None:
    assert status(root, no_new_privs=True)["NoNewPrivs"] == "1"


@pytest.mark.parametrize(
    "trap", ["fifo", "huge", "/proc/kmsg", "/proc/self/fd/0", "/dev/console", "passwd"]
)
@pytest.mark.parametrize("user", ["", "0:0", "4711", "4711:4712"])
def test_numbers_need_no_account_files(tmp_path: Path, trap: str, user: str) -> None:
    root = make_root(tmp_path / "image")
    for name in ("passwd", "group"):
        place = root / "etc" / name
        place.unlink()
        if trap == "fifo":
            os.mkfifo(place)
        elif trap == "huge":
            with place.open("wb") as file:
                file.truncate(4 * 1024**3)
        else:
            place.symlink_to(trap)
    uid, _, gid = user.partition(":")
    found = status(root, user=user)  # id(1) would read the files
    assert (found["Uid"].split()[0], found["Groups"]) == (uid or "0", gid or "0")
    with Machine(root, boot_config(["true"], user="tester")) as machine:
        machine.report("ready")
        failed = machine.report("workload_failed")
        assert failed["code"] == "bad_user"


# ── whose the streams are ────────────────────────────────────────────────────────────────────────

AGAIN = "echo out >/dev/stdout; echo err >>/proc/self/fd/2; cat /dev/stdin"
# The end of nobody's business: to read what goes to the console, or to let others do so.
TAKE = "head -c 1 /dev/stdout || echo unread; chmod 0666 /proc/self/fd/1 || echo unchanged"


@pytest.mark.parametrize("user", ["tester", "4711:4712", "0"])
def test_pipes_can_be_opened_again_by_the_user(root: Path, user: str) -> None:
    config = boot_config(shell(f"{AGAIN}; head -c 0 /dev/stdin"), user=user, stdio="attached")
    with Machine(root, config) as machine:
        machine.report("ready")
        with attached(machine) as process:
            result = process.communicate(b"in\n")
    assert (result.stdout, result.stderr) == (b"out\nin\n", b"err\n")


def test_console_can_be_opened_again_to_write_only(root: Path) -> None:
    reader, writer = os.pipe()
    config = boot_config(shell(f"({AGAIN}; {TAKE}) 2>/dev/stdout"), user="4711:4712")
    with open(reader, "rb") as console, Machine(root, config, console_fd=writer) as machine:
        os.close(writer)
        assert machine.wait() == 0
        lines = console.read().decode().splitlines()
    assert [line for line in lines if "denied" not in line and "permitted" not in line] == [
        "out", "err", "unread", "unchanged",
    ]  # fmt: skip


@pytest.mark.qemu
def test_console_of_a_vm_can_be_opened_again_to_write_only(root: Path, tmp_path: Path) -> None:
    disk = make_erofs(root, tmp_path / "root.erofs")
    script = f"""
    {AGAIN}; ({TAKE}) 2>/dev/null
    ls /dev | grep -c microguest; echo x 2>/dev/null >/dev/console || echo closed
    setsid -c true 2>/dev/null; test -t 1 && echo terminal
    """
    config = vm_config(shell(script), user="4711:4712")
    lines = run_vm(config, disks={"root": disk}).lines
    assert lines == ["out", "err", "unread", "unchanged", "0", "closed", "terminal"]


# ── where it is ──────────────────────────────────────────────────────────────────────────────────


def test_a_missing_working_directory_is_made_by_root(root: Path) -> None:
    script = "pwd; ls -ldn . | cut -d' ' -f1; ls -ldn . | tr -s ' ' | cut -d' ' -f3,4"
    lines = console(root, script, user="tester", cwd="/srv/new/place")
    assert lines == ["/srv/new/place", "drwxr-xr-x", "0 0"]


def test_a_working_directory_is_not_made_through_a_users_link(root: Path, tmp_path: Path) -> None:
    """A user's link leads where the user likes; root's own, as /var/run, are followed."""
    image = tmp_path / "image"
    shutil.copytree(root, image, symlinks=True)
    (image / "etc" / "link").symlink_to("/srv")
    (image / "srv").mkdir()
    for name, owner in (("users", 1000), ("roots", 0)):
        (image / "tmp" / name).symlink_to("../etc/link/./../srv")
        os.lchown(image / "tmp" / name, owner, owner)
    script = "pwd; stat -c %u ."
    lines = console(image, script, user="tester", cwd="/tmp/roots/new/place")
    assert lines == ["/srv/new/place", "0"]
    config = boot_config(shell(script), user="tester", cwd="/tmp/users/new/place")
    with Machine(image, config) as machine:
        machine.report("ready")
        failed = machine.report("workload_failed")
    assert (failed["code"], failed["step"], failed["errno"]) == ("bad_cwd", "mkdir", errno.ELOOP)


def test_a_working_directory_that_only_root_may_enter(root: Path) -> None:
    assert console(root, "readlink /proc/self/cwd", user="tester", cwd="/home/tester") == [
        "/home/tester"
    ]


def test_a_working_directory_below_a_file(root: Path) -> None:
    with Machine(root, boot_config(["true"], cwd="/key/below")) as machine:
        machine.report("ready")
        failed = machine.report("workload_failed")
        assert (failed["code"], failed["step"]) == ("bad_cwd", "mkdir")
        assert "/key/below" in failed["message"]
        assert machine.wait() == 0


# ── what it cannot see ───────────────────────────────────────────────────────────────────────────


def test_masked_and_read_only_paths(root: Path) -> None:
    script = """
        ls -A /secret; cat /key; cat /proc/version; touch /secret/x 2>/dev/null || echo covered
        echo x 2>/dev/null > /open/file || echo protected; cat /open/file
        echo x 2>/dev/null > /proc/sys/kernel/hostname || echo protected
        echo x 2>/dev/null >> /etc/passwd || echo protected
        echo x > /tmp/elsewhere && echo end
    """
    config = boot_config(
        ["/bin/sh", "-c", f"({script}); sleep 1000"],
        masked=["/secret", "/key", "/proc/version", "/not/there", "/key/below"],
        read_only_paths=["/open", "/proc/sys", "/not/there", "/etc/passwd"],
    )
    with Machine(root, config) as machine:
        machine.report("ready")
        wait_for(lambda: "end" in machine.console, "the script")
        expected = ["covered", "protected", "as it was", "protected", "protected", "end"]
        assert machine.console.splitlines() == expected
        with connect(f"unix://{machine.host}/agent.sock", token=TOKEN) as agent:
            assert agent.exec(["sh", "-c", script]).stdout.decode().splitlines() == expected


def test_a_masked_link_covers_what_is_in_the_root(root: Path) -> None:
    lines = console(root, "ls -A /secret; ls -A /way-out; echo end", masked=["/way-out"])
    assert lines == ["end"]


def test_masks_inside_of_read_only_paths(root: Path) -> None:
    lines = console(
        root,
        "cat /open/file; touch /open/x 2>&- || echo protected",
        masked=["/open/file"],
        read_only_paths=["/open"],
    )
    assert lines == ["protected"]


@pytest.mark.parametrize("path", ["/proc", "/sys/", "/dev/./", "/"])
def test_what_the_guest_lives_on_cannot_be_masked(root: Path, path: str) -> None:
    with Machine(root, boot_config(["true"], masked=[path])) as machine:
        failed = machine.report("boot_failed")
        assert failed["step"] == "hardening"
        assert machine.wait() == 0


# ── its terminal ─────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def attached(machine: Machine) -> Iterator[Process]:
    with (
        connect(f"unix://{machine.host}/agent.sock", token=TOKEN) as agent,
        agent.attach("main") as main,
    ):
        yield main


def read_until(main: Process, wanted: str) -> str:
    seen = ""
    while wanted not in seen:
        name, data = next(iter(main))
        assert name == "stdout"
        seen += data.decode()
    return seen


def test_a_terminal_is_served_resized_left_and_kept_over_the_agents_death(root: Path) -> None:
    script = """
        trap 'stty size; echo resized' WINCH
        tty; stty size; echo $TERM; ls -l $(tty) | tr -s ' ' | cut -d' ' -f1,3
        set -m; (exec 3</dev/tty && echo controlling)
        while :; do read line && echo "<$line>"; [ "$line" = end ] && exit 7; done
    """
    config = boot_config(
        ["/bin/sh", "-c", script], stdio="terminal", rows=31, columns=97, user="tester"
    )
    with Machine(root, config) as machine:
        machine.report("ready")
        with attached(machine) as main:
            seen = read_until(main, "controlling").split()
            assert seen == [
                "/dev/pts/0",
                "31",
                "97",
                "xterm",
                "crw--w----",
                "tester",
                "controlling",
            ]
            main.resize(11, 22)
            read_until(main, "11 22")
            main.stdin.write(b"one\n")
            read_until(main, "<one>")
            main.detach()
        os.kill(machine.agent_pid(), signal.SIGKILL)
        machine.report("workload_started")
        assert machine.report("agent_exited")["signal"] == signal.SIGKILL
        with attached(machine) as main:
            main.stdin.write(b"two\n")
            read_until(main, "<two>")
            main.resize(5, 6)
            main.stdin.write(b"end\n")
            assert main.wait().returncode == 7
        assert machine.report("workload_exited")["code"] == 7
        assert machine.wait() == 0


# ── its cgroup ───────────────────────────────────────────────────────────────────────────────────


def test_limits_without_a_hierarchy_are_refused(root: Path) -> None:
    for limit in ({"memory": 1 << 26}, {"cpu": 0.5}, {"processes": 10}):
        with Machine(root, boot_config(["true"], **limit)) as machine:
            machine.report("ready")
            failed = machine.report("workload_failed")
            if failed["code"] != "cgroup_unavailable":
                pytest.skip("namespaces have a writable cgroup v2 here")
            assert "limits: " in failed["message"]
            assert machine.wait() == 0


@pytest.mark.qemu
def test_limits_hold_in_a_machine_and_nothing_outlives_a_start(root: Path, tmp_path: Path) -> None:
    script = """
        cd /sys/fs/cgroup/microguest/workload
        grep -H oom_kill memory.events
        if [ -e /tmp/again ]; then pidof sleep || echo alone; exit 0; fi
        touch /tmp/again
        cat /proc/self/cgroup memory.max memory.swap.max cpu.max pids.max
        dd if=/dev/zero of=/dev/null bs=200M count=1; echo dd $?
        grep -H oom_kill memory.events
        setsid sleep 1000 & mkdir below && echo $! > below/cgroup.procs
        exit 1
    """
    config = vm_config(
        ["/bin/sh", "-c", script],
        memory=64 << 20,
        cpu=0.5,
        processes=20,
        restart={"policy": "on-failure", "limit": 1, "delay": 0.0},
    )
    ended = run_vm(config, disks={"root": make_erofs(root, tmp_path / "root.erofs")})
    assert ended.code == 0, ended.console[-4000:]
    found = [line for line in ended.lines if line != "Killed"]  # the shell says it
    assert found == [
        "memory.events:oom_kill 0",
        "0::/microguest/workload",
        str(64 << 20),
        "0",
        "50000 100000",
        "20",
        "dd 137",
        "memory.events:oom_kill 1",
        "memory.events:oom_kill 0",
        "alone",
    ]


# ── its lives ────────────────────────────────────────────────────────────────────────────────────


def test_starts_leave_nothing_behind_in_pid_1(root: Path) -> None:
    """Ten that work, until the working directory is none any more, and those that fail then."""
    script = """
        echo >> /tmp/count; [ $(wc -l < /tmp/count) = 10 ] || exit 1
        cd /; rmdir /tmp/place; touch /tmp/place; exit 1
    """
    restart = {"policy": "always", "delay": 0.01, "delay_max": 0.01}
    config = boot_config(["/bin/sh", "-c", script], cwd="/tmp/place", restart=restart)
    with Machine(root, config) as machine:
        machine.report("ready")
        descriptors = Path(f"/proc/{machine.init_pid()}/fd")
        counts = []
        for _ in range(10):
            machine.report("workload_started")
            machine.report("workload_exited")
            counts.append(len(list(descriptors.iterdir())))
        for _ in range(20):
            assert machine.report("workload_failed")["code"] == "bad_cwd"
            counts.append(len(list(descriptors.iterdir())))
        # Some are of a start that is being made just then.
        assert min(counts[-10:]) <= max(counts[:10])


def test_an_ordinary_users_machine_can_do_the_same(root: Path) -> None:
    """In a user namespace with one user, where nothing is allowed by the host."""
    script = """
        ls -A /secret; touch /open/x 2>&- || echo protected
        mkdir /tmp/no 2>&- || echo refused; grep -E 'CapEff|NoNewPrivs' /proc/self/status
    """
    config = boot_config(
        ["/bin/sh", "-c", script],
        stdio="terminal",
        masked=["/secret", "/key", "/proc/timer_list"],
        read_only_paths=["/open", "/proc/sys"],
        capabilities=dict.fromkeys(("bounding", "permitted", "effective"), ("chown",)),
        seccomp=base64.b64encode(NO_MKDIR).decode(),
    )
    open_to_all(root)
    with Machine(root, config, user=NOBODY) as machine:
        try:
            machine.report("ready")
        except AssertionError:
            if "unshare user namespace" in machine.console:
                pytest.skip("user namespaces are forbidden to users here")
            raise
        with attached(machine) as main:
            seen = main.communicate().stdout.decode().splitlines()
        assert seen == ["protected", "refused", f"CapEff:\t{mask('chown')}", "NoNewPrivs:\t0"]
        assert machine.wait() == 0
    config["workload"]["user"] = "tester"  # whom it does not have
    with Machine(root, config, user=NOBODY) as machine:
        machine.report("ready")
        assert machine.report("workload_failed")["code"] == "bad_user"
        assert machine.wait() == 0
