"""Images of every kind: each does what docker does with it."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import imagefactory
import machinekit
import pytest
from clikit import microguest
from imagefactory import directory, layer, make_layout, member, symlink
from patience import PATIENCE

from microguest import Machine, boot
from microguest.guest.errors import MicroguestError
from microguest.host_client.machines.find import find
from microguest.host_client.machines.folder import names

BUSYBOX = "/bin/busybox"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


pytestmark = pytest.mark.usefixtures("machines_home", "elf")


def program(name: str, mode: int = 0o755) -> Any:
    """busybox, which does what its name says."""
    return member(name, Path(BUSYBOX).read_bytes(), mode=mode)


def image(folder: Path, *members: Any, **config: Any) -> str:
    return make_layout(folder / "image", [layer(members)], config=config or {"Env": ["A=1"]})


def run(*words: str, machine: str = "namespaces", left: Sequence[str] = ()) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `microguest run`."""
    done = microguest("run", "--rm", "--machine", machine, *words)
    assert names() == list(left)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


# ── kinds of images ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", machinekit.KINDS)
def test_nothing_but_one_program(tmp_path: Path, kind: str) -> None:
    """FROM scratch: no folder, no passwd, no shell."""
    scratch = image(tmp_path, program("env"), Entrypoint=["/env"], Env=["A=b c"])
    code, out, _ = run("--hostname", "bare", "-e", "B=2", scratch, machine=kind)
    assert code == 0
    assert sorted(out.splitlines()) == ["A=b c", "B=2", "HOME=/", "HOSTNAME=bare", f"PATH={PATH}"]
    if kind == "qemu":
        return
    code, out, error = run(scratch, "-i", "C=3", "/bin/sh")
    assert (code, out) == (127, "")  # env looks for it and finds nothing
    code, out, error = run("--entrypoint", "sh", scratch)
    assert (code, out) == (127, "")
    assert "sh" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("kind", machinekit.KINDS)
def test_no_shell_and_an_ordinary_user(tmp_path: Path, kind: str) -> None:
    """As distroless images are."""
    own = image(
        tmp_path,
        directory("etc"),
        member("etc/passwd", b"root:x:0:0::/root:/sbin/nologin\nnonroot:x:65532:65532::/home/n:\n"),
        member("etc/group", b"root:x:0:\nnonroot:x:65532:\nextra:x:70:nonroot\n"),
        directory("home"),
        directory("home/n", owner=(65532, 65532), mode=0o700),
        directory("usr"),
        directory("usr/bin"),
        program("usr/bin/id"),
        program("usr/bin/env"),
        program("usr/bin/pwd"),
        User="nonroot",
        WorkingDir="/home/n",
        Entrypoint=["/usr/bin/id"],
    )
    assert run(own, machine=kind)[:2] == (
        0,
        "uid=65532(nonroot) gid=65532(nonroot) groups=70(extra),65532(nonroot)\n",
    )
    if kind == "qemu":
        return
    assert run("--entrypoint", "pwd", own)[:2] == (0, "/home/n\n")
    assert "HOME=/home/n\n" in run("--entrypoint", "env", own)[1]
    assert run("-u", "0", own)[1].startswith("uid=0(root) gid=0(root)")
    with boot(own, machine="namespaces") as machine:
        assert machine.agent.exec(["id", "-u"]).stdout == b"65532\n"
        assert machine.agent.exec(["id", "-u"], user="root").stdout == b"0\n"


@pytest.mark.parametrize("kind", machinekit.KINDS)
def test_an_init_of_its_own(tmp_path: Path, kind: str) -> None:
    inittab = b"""\
::sysinit:/bin/sh -c 'echo up > /run/up'
::respawn:/bin/sleep 1000
::ctrlaltdel:/bin/sh -c 'kill -TERM 1'
"""
    own = image(
        tmp_path,
        *(directory(name) for name in ("bin", "sbin", "etc", "run", "tmp")),
        member("etc/inittab", inittab),
        program("sbin/init"),
        *(program(f"bin/{name}") for name in ("sh", "sleep", "cat", "pidof")),
        Entrypoint=["/sbin/init"],
    )
    with boot(own, machine=kind, handoff=True) as machine:
        machinekit.wait_until("the init is PID 1", lambda: machine.state.handed_off)
        machinekit.wait_until(
            "it has worked", lambda: machine.agent.exec(["cat", "/run/up"]).stdout == b"up\n"
        )
        assert machine.agent.exec(["cat", "/proc/1/comm"]).stdout == b"init\n"
        machinekit.wait_until(
            "it has respawned", lambda: machine.agent.exec(["pidof", "sleep"]).returncode == 0
        )
        state = machine.stop(grace=PATIENCE)
    assert (state.status, state.error) == ("shutdown", "")
    # By reboot(8), by poweroff(8), and by a host where nobody is left who could pass that on.
    for asked, status in (("TERM 1", "reboot"), ("USR2 1", "done"), ("KILL $KEEPER", "shutdown")):
        with boot(own, machine=kind, handoff=True) as machine:
            up = partial(machine.agent.exec, ["cat", "/run/up"])
            machinekit.wait_until("it is up", lambda up=up: up().returncode == 0)
            script = f"sleep 0.2; kill -{asked}".replace("$KEEPER", str(keeper_of(machine)))
            machine.agent.start(["sh", "-c", script], keep=True).detach()
            if status == "shutdown":
                machine.agent.driver.timeout = 1.0
                machinekit.wait_until("it is deaf", lambda m=machine: not answers(m))
                assert (machine.stop().status, machine.state.error) == (status, "")
            else:
                assert machine.wait(PATIENCE).status == status
    if kind == "namespaces":
        assert run("-d", "--handoff", "--name", "own", own, left=["own"])[:2] == (0, "own\n")
        machinekit.wait_until("others can see it", lambda: machinekit.state_of("own").handed_off)
        find("own").stop()
        assert names() == []


def keeper_of(machine: Machine) -> int:
    """The agent's parent, as the guest numbers it."""
    stat = machine.agent.exec(["cat", f"/proc/{machine.agent.info().agent_pid}/stat"]).stdout
    return int(stat.rpartition(b")")[2].split()[1])


def answers(machine: Machine) -> bool:
    try:
        machine.agent.ping()
    except MicroguestError:
        return False
    return True


def test_debian(elf: Path) -> None:
    debian = imagefactory.debian_layout(machinekit.PROJECT / "dist" / "test-images" / "debian")
    assert run(debian, "sh", "-c", "id -un; pwd; . /etc/os-release; echo $ID; echo $HOME")[:2] == (
        0,
        "root\n/\ndebian\n/root\n",
    )
    code, out, _ = run(
        "--read-only", "--tmpfs", "/tmp", debian, "sh", "-c", "echo > /tmp/x; echo > /x"
    )
    assert (code, out) == (2, "")
    assert run("-u", "nobody", debian, "sh", "-c", "id -u; ls /root")[:2] == (2, "65534\n")


# ── the process ──────────────────────────────────────────────────────────────────────────────────


def shell_image(folder: Path, **config: Any) -> str:
    return image(
        folder,
        directory("bin"),
        *(program(f"bin/{name}") for name in ("sh", "id", "echo", "pwd", "stat")),
        directory("etc"),
        member(
            "etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nann:x:1000:1000::/home/ann:/bin/sh\n"
        ),
        member("etc/group", b"root:x:0:\nann:x:1000:\nwheel:x:10:ann\n"),
        member("bin/data", b"\x00\x01", mode=0o755),
        member("bin/plain", b"#!/bin/sh\n"),
        member("bin/lost", b"#!/no/such/interpreter\n", mode=0o755),
        symlink("bin/loop", "loop"),
        **config,
    )


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("1000", "1000 1000 1000 10 /home/ann"),
        ("ann", "1000 1000 1000 10 /home/ann"),
        ("ann:root", "1000 0 0 /home/ann"),
        ("4321", "4321 0 0 /"),
        ("4321:99", "4321 99 99 /"),
        ("0:wheel", "0 10 10 /root"),
    ],
)
def test_users(tmp_path: Path, user: str, expected: str) -> None:
    own = shell_image(
        tmp_path, User=user, Cmd=["sh", "-c", "echo $(id -u) $(id -g) $(id -G) $HOME"]
    )
    assert run(own)[:2] == (0, f"{expected}\n")


@pytest.mark.parametrize(("user", "missing"), [("nosuch", "nosuch"), ("ann:nosuch", "nosuch")])
def test_users_that_are_not_there(tmp_path: Path, user: str, missing: str) -> None:
    """125: `unable to find user`."""
    own = shell_image(tmp_path, User=user, Cmd=["id"])
    code, out, error = run(own)
    assert (code, out) == (125, "")
    assert missing in error
    assert "passwd" in error or "group" in error
    assert error.count("\n") == 1
    assert run("-u", "ann", own, "id", "-u")[:2] == (0, "1000\n")


@pytest.mark.parametrize(
    ("entrypoint", "code"),
    [
        (["/bin/none"], 127),
        (["none"], 127),
        (["./none"], 127),
        (["/bin/lost"], 127),
        (["/bin/plain"], 126),
        (["/bin"], 126),
        (["/bin/data"], 126),
        (["/etc/passwd/x"], 127),
        (["/bin/loop"], 126),
    ],
)
def test_programs_that_cannot_be_run(tmp_path: Path, entrypoint: list[str], code: int) -> None:
    found, out, error = run(shell_image(tmp_path, Entrypoint=entrypoint, Cmd=["x"]))
    assert (found, out) == (code, "")
    assert entrypoint[0] in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("config", "words", "expected"),
    [
        ({"Cmd": ["echo", "c"]}, [], "c"),
        ({"Cmd": ["echo", "c"]}, ["echo", "w"], "w"),
        ({"Entrypoint": ["echo", "e"]}, [], "e"),
        ({"Entrypoint": ["echo", "e"], "Cmd": ["c"]}, [], "e c"),
        ({"Entrypoint": ["echo", "e"], "Cmd": ["c"]}, ["w"], "e w"),
        ({"Entrypoint": [], "Cmd": ["echo", "c"]}, [], "c"),
        ({"Entrypoint": None, "Cmd": ["echo", "$HOME"]}, [], "$HOME"),
    ],
)
def test_entrypoint_and_cmd(
    tmp_path: Path, config: dict[str, Any], words: list[str], expected: str
) -> None:
    assert run(shell_image(tmp_path, **config), *words)[:2] == (0, f"{expected}\n")


def test_entrypoint_given(tmp_path: Path) -> None:
    own = shell_image(tmp_path, Entrypoint=["echo", "e"], Cmd=["c"])
    assert run("--entrypoint", "echo", own)[:2] == (0, "\n")  # drops the image's Cmd as well
    assert run("--entrypoint", "echo", own, "w")[:2] == (0, "w\n")
    assert run("--entrypoint", "", own, "echo", "w")[:2] == (0, "w\n")


def test_no_command_at_all(tmp_path: Path) -> None:
    own = shell_image(tmp_path, Env=["A=1"])
    code, _, error = run(own)
    assert code == 125
    assert "name a command" in error
    with boot(own, machine="namespaces") as machine:  # a machine can do without
        assert machine.agent.exec(shell="echo $A").stdout == b"1\n"


def test_working_directory(tmp_path: Path) -> None:
    """One that is missing is made and belongs to root; one that cannot be is no command's fault."""
    show = "pwd; stat -c %u:%a ."
    own = shell_image(tmp_path, WorkingDir="/made/for/it", User="ann", Cmd=["sh", "-c", show])
    assert run(own)[:2] == (0, "/made/for/it\n0:755\n")
    assert run("-w", "/etc", own)[:2] == (0, "/etc\n0:755\n")
    for words, message in (
        (["-w", "/etc/passwd"], "/etc/passwd"),
        (["-w", "relative"], "not an absolute path"),
        (["--read-only", "-w", "/made/../for"], "/made/../for"),
        (["--read-only", "-w", "/etc/passwd"], "/etc/passwd"),
    ):
        code, out, error = run(*words, own)
        assert (code, out) == (125, "")
        assert message in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        (["--read-only"], "/made/for/it\n0:755\nread-only\n"),
        (["--read-only", "-w", "//new/./one/"], "/new/one\n0:755\nread-only\n"),
        (["--read-only", "-w", "/etc"], "/etc\n0:755\nread-only\n"),
        (["--read-only", "--writable", "/v", "-w", "/v/new"], "/v/new\n0:755\n"),
        (["--read-only", "--tmpfs", "/t", "-w", "/t/new"], "/t/new\n0:755\n"),
    ],
)
def test_working_directory_of_a_root_that_is_read_only(
    tmp_path: Path, words: list[str], seen: str
) -> None:
    """It is made before the root is; nothing can be written to it that could not be elsewhere."""
    show = "pwd; stat -c %u:%a .; (echo >x) 2>/dev/null || echo read-only"
    own = shell_image(tmp_path, WorkingDir="/made/for/it", User="root", Cmd=["sh", "-c", show])
    assert run(*words, own)[:2] == (0, seen)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"Env": ["A=1", ""]}, "the image's config has '' in Env"),
        ({"Env": ["=1"]}, "the image's config has '=1' in Env"),
        (
            {"Volumes": {f"/v{number}": {} for number in range(100)}},
            "the image's config has 100 Volumes, at most 64",
        ),
        ({"StopSignal": "SIGNONE"}, "the image's config has the StopSignal 'SIGNONE'"),
    ],
)
@pytest.mark.parametrize("words", [[], ["--read-only"]])
def test_config_that_makes_no_sense(
    tmp_path: Path, config: dict[str, Any], message: str, words: list[str]
) -> None:
    """Whoever has asked for none of it is told where it comes from."""
    code, out, error = run(*words, shell_image(tmp_path, **config), "sh", "-c", "true")
    assert (code, out) == (125, "")
    assert message in error
    assert error.count("\n") == 1


def test_environment(tmp_path: Path) -> None:
    """The image's over docker's own, ours over the image's."""
    own = shell_image(
        tmp_path,
        Env=["A=image", "B=image", "PATH=/bin", "HOME=/image", "EMPTY=", "X=a=b"],
        Cmd=["sh", "-c", "echo $A $B $C $PATH $HOME $HOSTNAME ${EMPTY-unset} $X"],
    )
    words = ("-e", "B=ours", "-e", "C=ours", "--hostname", "env", own)
    assert run(*words)[:2] == (0, "image ours ours /bin /image env a=b\n")
    os.environ["MICROGUEST_TEST_HERE"] = "here"
    try:
        words = ("-e", "MICROGUEST_TEST_HERE", own, "sh", "-c", "echo $MICROGUEST_TEST_HERE")
        assert run(*words)[:2] == (0, "here\n")
    finally:
        del os.environ["MICROGUEST_TEST_HERE"]


@pytest.mark.parametrize("kind", machinekit.KINDS)
def test_braces_in_a_path_are_a_users_own(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "{monitor}{vsock}{listener}"
    (folder / "rootfs").mkdir(parents=True)
    (folder / "rootfs" / "env").write_bytes(Path(BUSYBOX).read_bytes())
    (folder / "rootfs" / "env").chmod(0o755)
    code, out, error = run("--entrypoint", "/env", f"dir:{folder}/rootfs", machine=kind)
    assert (code, "PATH=" in out) == (0, True), error
