"""What `boot` and `run` can ask of a machine: each option in effect, as the guest sees it."""

import contextlib
import json
import os
import stat
import subprocess
from pathlib import Path

import machinekit
import pytest
from clikit import microguest
from imagefactory import directory, layer, make_layout, member
from patience import PATIENCE

import microguest as library
from microguest import Machine, Mount, boot, seccomp
from microguest.errors import BootFailed, ConnectionLost, MachineError
from microguest.host_client.machines.folder import names, sweep
from microguest.host_client.machines.mounts import parse_mount, parse_tmpfs, parse_volume
from microguest.host_client.machines.settings import MachineOptions, Settings, restart_of
from microguest.host_client.machines.workload import capabilities_of

ALL_CAPABILITIES = 41

pytestmark = pytest.mark.usefixtures("machines_home")


def said(machine: Machine, line: str, **options: object) -> str:
    """What a shell in it prints, its complaints included."""
    return machine.agent.exec(shell=f"{{ {line}; }} 2>&1", **options).stdout.decode()  # type: ignore[arg-type]


# ── one machine with everything ──────────────────────────────────────────────────────────────────


def everything(tmp_path: Path) -> MachineOptions:
    for name in ("seen", "shared"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(f"{name}\n")
    return {
        "read_only": True,
        "writable": ["/opt/state"],
        "mounts": [
            Mount(source=str(tmp_path / "shared"), target="/srv/shared"),
            Mount(source=str(tmp_path / "seen"), target="/srv/shared/seen", read_only=True),
            Mount(kind="tmpfs", target="/scratch", size="1m", mode=0o750),
        ],
        "command": ["sh", "-c", "grep -E '^(Cap|NoNewPrivs)' /proc/self/status; umask; sleep 999"],
        "cap_drop": ["ALL"],
        "cap_add": ["CAP_NET_RAW", "kill"],
        "no_new_privileges": True,
        "rlimits": {"nofile": (100, 200), "core": (0, 0)},
        "umask": 0o077,
        "groups": ["7", "8"],
        "masked": ["/proc/keys"],
        "read_only_paths": ["/proc/sys"],
        "hosts": {"db": "192.0.2.1", "cache": "192.0.2.1"},
        "dns": ["192.0.2.53"],
        "dns_search": ["example.org"],
        "hostname": "options",
        "machine_id": "0123456789abcdef" * 2,
        "stop_signal": "USR1",
    }


@pytest.mark.parametrize("kind", machinekit.KINDS)
def test_everything_at_once(image: str, tmp_path: Path, kind: str) -> None:
    options = everything(tmp_path)
    if kind == "qemu":
        machinekit.require_shares()
        options |= {"network": "user", "upper": str(tmp_path / "upper"), "upper_size": "200M"}
        disk = Mount(kind="disk", source=str(tmp_path / "disk"), size="64M", target="/srv/disk")
        options["mounts"] = [*options["mounts"], disk]
        options["hosts"] = {**options["hosts"], "outside": "host-gateway"}
        options |= {"sysctls": {"kernel.msgmax": "4321"}, "modules": True}
    with boot(image, machine=kind, **options) as machine:
        check_files(machine, tmp_path)
        check_process(machine)
        check_names(machine)
        if kind == "qemu":
            check_virtual_machine(machine)
            said(machine, "echo kept > /srv/disk/file; echo kept > /opt/state/file; sync")
    assert machine.state.status == "shutdown"
    if kind == "qemu":
        check_second_boot(image, tmp_path)


def check_files(machine: Machine, tmp_path: Path) -> None:
    assert "Read-only" in said(machine, "touch /new")
    assert "Read-only" in said(machine, "touch /srv/shared/seen/new")
    assert said(machine, "cat /srv/shared/file /srv/shared/seen/file") == "shared\nseen\n"
    assert said(machine, "touch /opt/state/new && echo > /srv/shared/new && echo yes") == "yes\n"
    assert (tmp_path / "shared" / "new").read_text() == "\n"
    assert said(machine, "stat -c %a /scratch; df -k /scratch | tail -1 | awk '{print $2}'") == (
        "750\n1024\n"
    )
    mounts = {line.split()[2]: line for line in said(machine, "mount").splitlines()}
    assert "noexec" in mounts["/scratch"]
    for target in ("/scratch", "/srv/shared", "/srv/shared/seen"):
        assert "nosuid" in mounts[target]
        assert "nodev" in mounts[target]
    assert said(machine, "cat /proc/keys") == ""
    assert "Read-only" in said(machine, "echo x > /proc/sys/kernel/hostname")


def check_process(machine: Machine) -> None:
    machinekit.wait_until("it has spoken", lambda: "0077" in machine.console())
    told = dict(
        line.split(":\t") for line in machine.console().splitlines() if line.count(":\t") == 1
    )
    kept = (1 << 13) | (1 << 5)  # net_raw, kill
    for name in ("CapPrm", "CapEff", "CapBnd"):
        assert int(told[name], 16) == kept, name
    assert int(told["CapInh"], 16) == int(told["CapAmb"], 16) == 0
    assert told["NoNewPrivs"] == "1"
    pid = machine.state.workload_pid
    limits = said(machine, f"grep -e 'open files' -e core /proc/{pid}/limits").split()
    assert limits[4:6] == ["0", "0"]
    assert limits[-3:-1] == ["100", "200"]
    groups = said(machine, f"grep Groups /proc/{pid}/status").split()[1:]
    assert sorted(map(int, groups)) == [0, 7, 8]


def check_names(machine: Machine) -> None:
    assert said(machine, "hostname; cat /etc/machine-id") == f"options\n{'0123456789abcdef' * 2}\n"
    hosts = said(machine, "cat /etc/hosts").splitlines()
    assert ["192.0.2.1", "db", "cache"] in [line.split() for line in hosts]
    resolver = said(machine, "cat /etc/resolv.conf")
    assert "nameserver 192.0.2.53" in resolver
    assert "search example.org" in resolver


def check_virtual_machine(machine: Machine) -> None:
    assert "10.0.2.15/24" in said(machine, "ip -4 addr show eth0")
    assert "default via 10.0.2.2" in said(machine, "ip route")
    assert said(machine, "grep outside /etc/hosts").split() == ["10.0.2.2", "outside"]
    assert said(machine, "cat /proc/sys/kernel/msgmax") == "4321\n"
    assert said(machine, "cat /proc/sys/kernel/modules_disabled") == "0\n"
    assert "ext4" in said(machine, "mount | grep /srv/disk")


def check_second_boot(image: str, tmp_path: Path) -> None:
    """What was written to the upper and to the disk is there again; a third writer is refused."""
    disk = Mount(kind="disk", source=str(tmp_path / "disk"), target="/elsewhere", read_only=True)
    upper = str(tmp_path / "upper")
    packed = str(tmp_path / "seen.erofs")
    subprocess.run(["mkfs.erofs", packed, str(tmp_path / "seen")], check=True, capture_output=True)
    packed_disk = Mount(kind="disk", source=packed, fstype="erofs", target="/packed")
    with boot(image, upper=upper, mounts=[disk, packed_disk]) as machine:
        assert said(machine, "cat /packed/file") == "seen\n"
        assert said(machine, "cat /proc/sys/kernel/modules_disabled") == "1\n"
        assert said(machine, "cat /elsewhere/file /opt/state/file") == "kept\nkept\n"
        assert "Read-only" in said(machine, "touch /elsewhere/new")
        with pytest.raises(BootFailed, match="Is another process using the image"):
            boot(image, upper=upper)
        assert said(machine, "mv /opt/state /opt/moved; cat /opt/moved/file") == "kept\n"
        with contextlib.suppress(ConnectionLost):  # it may have ended before it could answer
            machine.agent.shutdown(grace=1, reboot=True)
        assert machine.wait(timeout=PATIENCE).status == "reboot"
    assert names() == []


@pytest.mark.qemu
@pytest.mark.parametrize("victim", ["virtiofsd", "monitor"])
def test_a_share_ends_with_its_machine_and_a_machine_with_its_share(
    image: str, tmp_path: Path, victim: str
) -> None:
    machinekit.require_shares()
    awkward = tmp_path / "a, b\\c"
    awkward.mkdir()
    (awkward / "file").write_text("found\n")
    mounts = [
        Mount(source=str(awkward), target="/mnt"),
        Mount(source=str(awkward), target="/seen", read_only=True),
    ]
    with boot(image, mounts=mounts) as machine:
        assert said(machine, "cat /mnt/file") == "found\n"
        # Not even root of the guest can write to what is shown read-only.
        assert "Read-only" in said(machine, "mount -o remount,rw /seen; echo > /seen/file")
        pids = machinekit.family(machine.state.monitor)
        daemons = [pid for pid in pids if b"virtiofsd" in cmdline(pid)]
        assert daemons
        if victim == "monitor":
            machinekit.kill(machine.state.monitor)
            machinekit.wait_until("all end", lambda: not any(map(machinekit.runs, pids)))
        else:
            for pid in daemons:
                machinekit.kill(pid)
            state = machine.wait(timeout=PATIENCE)
            assert state.status == "crashed"
            assert "virtiofsd" in state.error
            assert str(tmp_path) in state.error
    sweep()
    machinekit.nothing_is_left(machine.name, pids, within=PATIENCE)


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


# ── volumes of the image, restarts, events ───────────────────────────────────────────────────────


def test_volumes_of_the_image_stay_writable(image: str, tmp_path: Path) -> None:
    """As in docker, where they are volumes of their own."""
    busybox = Path("/bin/busybox").read_bytes()
    members = [directory("bin"), member("bin/sh", busybox, mode=0o755), directory("var")]
    config = {"Cmd": ["sh"], "Volumes": {"/var/data": {}, "/other": {}}}
    own = make_layout(tmp_path / "own", [layer(members)], config=config)
    (tmp_path / "source").mkdir()
    mounts = [Mount(source=str(tmp_path / "source"), target="/other", read_only=True)]
    with boot(own, machine="namespaces", read_only=True, mounts=mounts) as machine:
        assert (
            said(machine, "echo > /var/data/x; echo > /var/x; echo > /other/x").count("only") == 2
        )
        assert said(machine, "echo /var/data/*") == "/var/data/x\n"


def test_volumes_of_the_image_are_there(tmp_path: Path) -> None:
    """Whether its layers have them or not, and however it writes them."""
    busybox = Path("/bin/busybox").read_bytes()
    members = [directory("bin"), member("bin/sh", busybox, mode=0o755), directory("srv")]
    volumes = {"/var/lib/data/": {}, "//twice": {}, "/srv/../srv/app": {}, "/": {}, "/mnt": {}}
    own = make_layout(
        tmp_path / "own", [layer(members)], config={"Cmd": ["sh"], "Volumes": volumes}
    )
    mounts = [Mount(kind="tmpfs", target="/mnt", mode=0o700)]
    script = "for at in /var/lib/data /twice /srv/app /mnt; do cd $at && echo > x && pwd; done"
    for read_only in (False, True):
        with boot(own, machine="namespaces", mounts=mounts, read_only=read_only) as machine:
            assert said(machine, script).split() == ["/var/lib/data", "/twice", "/srv/app", "/mnt"]


@pytest.mark.parametrize(
    ("size", "kib"), [(None, 65536), ("16m", 16384), ("8MB", 8192), ("1048576", 1024)]
)
def test_size_of_shared_memory(image: str, size: str | None, kib: int) -> None:
    options: MachineOptions = {"machine": "namespaces"}
    if size is not None:
        options["shm_size"] = size
    with boot(image, **options) as machine:
        assert said(machine, "df -k /dev/shm").split()[-5] == str(kib)


def test_restarts(image: str) -> None:
    script = "echo life >> /lives; [ $(wc -l < /lives) -ge 3 ] && exit 0; exit 5"
    with boot(
        image, machine="namespaces", command=["sh", "-c", script], restart="on-failure:5"
    ) as machine:
        state = machine.wait(timeout=PATIENCE)
    assert state.workload_starts == 3
    assert state.workload_exited is not None
    assert state.workload_exited.code == 0
    assert [event.kind for event in state.events] == ["workload-restarts"] * 2
    assert "(5)" in state.events[0].message
    assert state.status == "done"


def test_agent_that_dies_is_told(image: str) -> None:
    with boot(image, machine="namespaces") as machine:
        assert machine.state.agent == "serving"
        machinekit.kill(agent_of(machine))
        machinekit.wait_until("it is back", lambda: len(machine.state.events) == 2)
        assert [event.kind for event in machine.state.events] == ["agent-exited", "agent-serves"]
        assert machine.state.agent == "serving"
        assert len(machine.state.agent_exits) == 1


def test_ls_tells_restarts(image: str) -> None:
    words = ("--name", "again", "--machine", "namespaces", "--restart", "always", image)
    assert microguest("run", "-d", *words, "sh", "-c", "exit 3").stdout == b"again\n"
    machinekit.wait_until("it waits", lambda: b"restarting (3)" in microguest("ls").stdout)
    machinekit.wait_until("it does", lambda: machinekit.state_of("again").workload_starts > 2)
    assert microguest("stop", "again").returncode == 0
    assert microguest("rm", "again").returncode == 0
    assert names() == []


def agent_of(machine: Machine) -> int:
    """Its process id on this host: a child of PID 1, which is the launcher's."""
    for pid in machinekit.family(machine.state.vmm):
        if b"agent" in cmdline(pid).split(b"\0")[:2]:
            return pid
    raise AssertionError("no agent")


def test_stop_signal_is_the_images_or_ours(tmp_path: Path, elf: Path) -> None:
    busybox = Path("/bin/busybox").read_bytes()
    members = [
        directory("bin"),
        *(member(f"bin/{n}", busybox, mode=0o755) for n in ("sh", "sleep")),
    ]
    config = {"Cmd": ["sh"], "StopSignal": "SIGUSR2"}
    own = make_layout(tmp_path / "own", [layer(members)], config=config)
    for given, expected in ((None, 12), ("SIGUSR1", 10)):
        script = f"trap 'exit {expected}' {expected}; echo ready; while :; do sleep 0.1; done"
        with boot(
            own, machine="namespaces", command=["sh", "-c", script], stop_signal=given
        ) as machine:
            machinekit.wait_until("the trap is set", lambda: "ready" in machine.console())
            state = machine.stop(grace=PATIENCE)
        assert state.workload_exited is not None
        assert state.workload_exited.code == expected


def test_seccomp(image: str) -> None:
    refuse = seccomp.deny(["mkdir", "mkdirat"], arch=os.uname().machine)
    with boot(
        image,
        machine="namespaces",
        seccomp=refuse,
        command=["sh", "-c", "mkdir /tmp/x; echo done; sleep 99"],
    ) as machine:
        machinekit.wait_until("it tried", lambda: "done" in machine.console())
        assert "not permitted" in machine.console()


def test_seccomp_profile_of_docker(image: str, tmp_path: Path) -> None:
    """`includes` is about the capabilities that the process was left."""
    profile = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [
            {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95},
            {"names": ["sethostname"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95,
             "excludes": {"caps": ["CAP_SYS_ADMIN"]}},
        ],
    }  # fmt: skip
    (tmp_path / "profile.json").write_text(json.dumps(profile))
    script = "mkdir /tmp/x; hostname new"
    for dropped, count in ((), 1), (("--cap-drop", "SYS_ADMIN"), 2):
        done = microguest(
            *("run", "--rm", "--machine", "namespaces", *dropped),
            *("--security-opt", f"seccomp={tmp_path}/profile.json", image, "sh", "-c", script),
        )
        assert done.stderr.decode().count("not supported") == count, done.stderr


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cap_drop": ["flying"]}, "no capability is called 'flying'"),
        ({"rlimits": {"wishes": (3, 3)}}, "no resource limit is called 'wishes'"),
        ({"rlimits": {"nofile": (3, 2)}}, "soft limit is above"),
        ({"restart": "sometimes"}, "none of: no, on-failure"),
        ({"restart": "on-failure:x"}, "none of: no, on-failure"),
        ({"restart": "on-failure:" + "9" * 5000}, "none of: no, on-failure"),
        ({"processes": 5}, "no cgroup to limit processes in"),
        ({"machine": "qemu", "processes": 10**30}, "processes: must be an integer"),
        ({"stop_signal": "BLINK"}, "stop_signal: 'BLINK'"),
        ({"network": "user"}, "no network"),
        ({"network": "wifi"}, "none or user"),
        ({"upper": "/tmp/x"}, "no disks"),
        ({"upper": "/tmp/x", "upper_size": "big"}, "not a size"),
        ({"writable": ["/opt"]}, "not read_only"),
        ({"read_only": True, "writable": ["opt"]}, "writable: 'opt'"),
        ({"sysctls": {"../x": "1"}}, "sysctl"),
        ({"hosts": {"a b": "192.0.2.1"}}, "hosts"),
        ({"umask": 0o1000}, "umask"),
        ({"machine_id": "x"}, "machine_id"),
        ({"seccomp": "{"}, "seccomp: "),
        ({"seccomp": b"1234567"}, "seccomp: "),
        ({"mounts": [Mount(source="/no/such", target="/mnt")]}, "/no/such does not exist"),
        ({"mounts": [Mount(source="/etc/passwd", target="/mnt")]}, "/etc/passwd is no directory"),
        ({"mounts": [Mount(kind="disk", source="/x", target="/mnt")]}, "no disks"),
        ({"mounts": [Mount(kind="tmpfs", size="much", target="/mnt")]}, "'much'"),
        ({"mounts": [Mount(kind="tmpfs", target="/a/../b")]}, "without . and .."),
        ({"mounts": [Mount(kind="tmpfs", target="/mnt")] * 65}, "at most 64"),
    ],
)
def test_refused_before_anything_is_started(
    image: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(MachineError) as caught:
        boot(image, command=["true"], **{"machine": "namespaces", **options})  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert names() == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target": "mnt", "source": "/x"}, "absolute path"),
        ({"target": "/mnt"}, "needs a source"),
        ({"target": "/mnt", "kind": "tmpfs", "source": "/x"}, "has a source"),
        ({"target": "/mnt", "kind": "nfs", "source": "/x"}, "none of: bind, tmpfs, disk"),
        ({"target": "/mnt", "source": "/x", "size": "1M"}, "has a size"),
        ({"target": "/mnt", "kind": "disk", "source": "/x", "size": "0"}, "not a size"),
        ({"target": "/mnt", "source": "/x\0y"}, "NUL"),
    ],
)
def test_mounts_that_make_no_sense(fields: dict[str, str], message: str) -> None:
    with pytest.raises(MachineError, match=message):
        Mount(**fields)  # type: ignore[arg-type]


@pytest.mark.qemu
def test_disks_that_are_refused(image: str, tmp_path: Path) -> None:
    fifo = str(tmp_path / "fifo")  # which nobody would open the other end of
    os.mkfifo(fifo)
    used = tmp_path / "used"
    used.write_bytes(b"my letters" * 1000 + bytes(64 * 1024 * 1024))
    for mount, message in (
        (Mount(kind="disk", source=str(tmp_path / "none"), target="/mnt"), "there is no disk"),
        (Mount(kind="disk", source=str(tmp_path), target="/mnt"), "Is a directory"),
        (Mount(kind="disk", source="/dev/null", target="/mnt"), "no regular file"),
        (Mount(kind="disk", source=fifo, target="/mnt", read_only=True), "no regular file"),
    ):
        with pytest.raises(MachineError, match=message):
            boot(image, mounts=[mount])
    with pytest.raises(BootFailed) as caught:
        boot(image, mounts=[Mount(kind="disk", source=str(used), target="/mnt")])
    assert caught.value.step == "volumes"
    assert used.read_bytes().startswith(b"my letters")
    assert names() == []


# ── the command line ─────────────────────────────────────────────────────────────────────────────


def test_volumes_as_docker_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_volume("./x:/y") == Mount(source=f"{tmp_path}/x", target="/y")
    assert parse_volume("/x:/y:ro,exec") == Mount(
        source="/x", target="/y", read_only=True, exec=True
    )
    assert parse_tmpfs("/run:size=16m,mode=755,exec") == Mount(
        kind="tmpfs", target="/run", size="16m", mode=0o755, exec=True
    )
    assert parse_mount("type=bind,src=x,dst=/y,readonly") == Mount(
        source=f"{tmp_path}/x", target="/y", read_only=True
    )
    assert parse_mount("type=tmpfs,target=/t,tmpfs-size=1m,tmpfs-mode=0700") == Mount(
        kind="tmpfs", target="/t", size="1m", mode=0o700
    )
    assert parse_mount("type=disk,source=/d,destination=/y,size=1G,ro=false") == Mount(
        kind="disk", source="/d", target="/y", size="1G"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-v", "data:/x"], "no named volumes"),
        (["-v", "/x"], "expected SRC:DST"),
        (["-v", "/x:/y:shiny"], "'shiny' is none of"),
        (["--tmpfs", "/x:mode=9"], "'9' makes no sense"),
        (["--mount", "src=/x,dst=/y"], "say type="),
        (["--mount", "type=bind,src=/x"], "say where"),
        (["--mount", "type=bind,src=/x,dst=/y,bind-propagation=shared"], "'bind-propagation'"),
        (["--security-opt", "apparmor=x"], "none of: no-new-privileges"),
        (["--security-opt", "no-new-privileges:maybe"], "none of: no-new-privileges"),
        (["--security-opt", "seccomp=/no/such"], "cannot read the seccomp profile /no/such: No"),
        (["--security-opt", "seccomp=/etc/passwd"], "profile /etc/passwd is no JSON"),
        (["--security-opt", "seccomp=/dev/zero"], "profile /dev/zero has more than 1 MiB"),
        (["--ulimit", "nofile"], "NAME=SOFT"),
        (["--add-host", "db"], "NAME:ADDRESS"),
        (["--sysctl", "x"], "NAME=VALUE"),
        (["--restart", "always"], "run -d"),
        (["--restart", "sometimes"], "none of: no, on-failure"),
        (["--umask", "9"], "'9' is not an octal number"),
        (["--handoff"], "run -d"),
        (["--network", "bridge"], "--network"),
    ],
)
def test_wrong_words(image: str, words: list[str], message: str) -> None:
    done = microguest("run", "--rm", "--machine", "namespaces", *words, image, "true")
    assert done.returncode == 125
    assert message in done.stderr.decode()
    assert done.stderr.count(b"\n") == 1


def test_run_with_options(image: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    done = microguest(
        *("run", "--rm", "--machine", "namespaces", "--read-only", "--tmpfs", "/tmp:size=1m"),
        *("-v", f"{tmp_path}/data:/data", "--cap-drop", "ALL", "--ulimit", "nofile=50"),
        *(
            "--security-opt",
            "no-new-privileges:true",
            "--security-opt",
            "mask=/proc/keys:/proc/kcore",
        ),
        *("--add-host", "db:192.0.2.1", "--dns", "192.0.2.53", "--umask", "027"),
        *("--group-add", "7", "--pids-limit", "-1", image, "sh", "-c"),
        "touch /tmp/x /data/x; ulimit -n; umask; id -G; grep NoNew /proc/self/status; grep db "
        "/etc/hosts; touch /x || exit 9",
    )
    assert done.returncode == 9
    assert done.stdout.split() == [
        *(b"50", b"0027", b"0", b"7", b"NoNewPrivs:", b"1", b"192.0.2.1", b"db")
    ]
    assert stat.S_IMODE((tmp_path / "data" / "x").stat().st_mode) == 0o640


# ── rules ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, None),
        ({"cap_add": ["NET_ADMIN"]}, None),
        ({"cap_drop": ["ALL"], "privileged": True}, None),
        ({"cap_drop": ["ALL"]}, set()),
        ({"cap_drop": ["all"], "cap_add": ["CAP_NET_ADMIN"]}, {"net_admin"}),
        ({"cap_drop": ["KILL"]}, ALL_CAPABILITIES - 1),
        ({"cap_drop": ["KILL", "CHOWN"], "cap_add": ["KILL"]}, ALL_CAPABILITIES - 1),
        ({"cap_drop": ["KILL"], "cap_add": ["ALL"]}, ALL_CAPABILITIES - 1),
    ],
)
def test_capabilities_as_docker_works_them_out(
    options: MachineOptions, kept: "set[str] | int | None"
) -> None:
    found = capabilities_of(Settings(image="oci:x", machine="qemu", **options))
    if kept is None:
        assert found is None
        return
    assert found is not None
    assert found.bounding == found.permitted == found.effective
    assert found.inheritable == found.ambient == ()
    assert (len(found.bounding) if isinstance(kept, int) else set(found.bounding)) == kept


def test_restart_policies() -> None:
    assert restart_of("no").policy == "never"
    assert (restart_of("on-failure:4").policy, restart_of("on-failure:4").limit) == (
        "on-failure",
        4,
    )
    assert restart_of("on-failure").limit == 0
    assert restart_of("always") == restart_of("unless-stopped")


def test_every_option_is_a_setting() -> None:
    """What `boot` takes and what the machine is made from are two lists, which must agree."""
    own = {"image", "workload", "stdio", "terminal", "output_wait", "keep"}
    assert set(Settings.__dataclass_fields__) == set(MachineOptions.__annotations__) | own


def test_mount_is_public() -> None:
    assert library.Mount is Mount


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cap_drop": ["ALLL"]}, "cap_drop: this machine runs no command .* command="),
        ({"restart": "always"}, "restart: this machine runs no command"),
        ({"umask": 0o077}, "umask: this machine runs no command"),
        ({"masked": ["/proc/keys"]}, "masked: this machine runs no command"),
        ({"cap_drop": ["ALLL"], "command": ["true"]}, "cap_drop: .*no capability is called 'alll'"),
        ({"rlimits": {"nofiles": (1, 1)}, "command": []}, "rlimits: .*nofiles"),
        ({"cwd": "rel", "command": ["true"]}, "cwd 'rel' is not an absolute path"),
        ({"shm_size": "64"}, "shm_size: '64' is 64 bytes, less than a page: write 512M"),
        ({"upper_size": "64"}, "upper_size: '64' is 64 bytes"),
    ],
)
def test_what_makes_no_sense_is_said_before_anything_is_made(
    image: str, machines_home: Path, options: MachineOptions, message: str
) -> None:
    with pytest.raises(MachineError, match=message):
        boot(image, machine="namespaces", **options)
    assert not machines_home.exists() or os.listdir(machines_home) == []


def test_a_tmpfs_of_a_few_bytes_is_a_slip() -> None:
    with pytest.raises(MachineError, match="mount /x: '64' is 64 bytes"):
        Mount(target="/x", kind="tmpfs", size="64")
    assert Mount(target="/x", kind="tmpfs", size="50%").size == "50%"
