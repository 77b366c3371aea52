"""Words that this program does not have, and values that nothing can be made of: what it says."""

import io
import os
import re
import shlex
import subprocess
import tarfile
from pathlib import Path

import machinekit
import pytest
from clikit import PROGRAM, microguest

from microguest.host_client.cli.arguments import make_parser
from microguest.host_client.cli.completion import commands_of
from microguest.host_client.cli.dockerwords import COMMANDS, OPTIONS

pytestmark = pytest.mark.usefixtures("machines_home")
BOX = ("run", "--rm", "--machine", "namespaces")
KEPT = ("run", "--machine", "namespaces")


def refused(*words: str) -> str:
    """The one line of an error of ours; nothing was started for it."""
    done = microguest(*words)
    assert (done.returncode, done.stdout) == (125, b"")
    text = done.stderr.decode()
    assert text.startswith("microguest")
    assert text.count("\n") == 1
    return text


# ── docker's words ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "-p", "80:80", "x"], "unknown option -p; no connections come in"),
        (["run", "-p80:80", "x"], "unknown option -p80:80; no connections come in"),
        (["run", "--publish=80:80", "x"], "--publish=80:80; no connections come in"),
        (["run", "--gpus", "all", "x"], "--gpus; no device of this host"),
        (["run", "--net=host", "x"], "--network user"),
        (["run", "--network", "host", "x"], "'host' is none of: none, user; user is"),
        (["run", "--machine", "vm", "x"], "'vm' is none of: qemu, namespaces"),
        (["run", "--hardening", "x", "y"], "'x' is none of: default, strict, off: see"),
        (["run", "--dns-opt", "x", "y"], "that is --dns-option here"),
        (["inspect", "x"], "'inspect' is no command; microguest ls -a --format json"),
        (["cp", "a", "b"], "run -v shares a directory"),
        (["images"], "run names one as oci:DIR:TAG"),
        (["pull", "x"], "skopeo copy"),
        (["build", "."], "docker-archive:FILE"),
        (["help", "cp"], "run -v shares a directory"),
        (["stop", "--timeout", "1", "x"], "that is --time here"),
        (["run", "--domainname", "d", "x"], "--domainname; --hostname takes the whole name"),
        (["run", "--oom-score-adj", "5", "x"], "a kernel and memory of its own"),
        (["run", "--annotation", "a=b", "x"], "--annotation; --label is"),
        (["ps", "-l"], "unknown option -l; ps -a lists all"),
        (["ps", "-n", "5"], "unknown option -n; ps -a lists all"),
        (["ps", "--last=5"], "--last=5; ps -a lists all"),
        (["kill", "x"], "required: ID; microguest stop -t 0 NAME"),
        (["kill", "-9", "x"], "unknown option -9; that is -s 9 here, as in docker"),
        (["kill", "-SIGTERM", "x", "p1"], "-SIGTERM; that is -s SIGTERM here"),
        (["kill", "-RTMIN+3", "x", "p1"], "-RTMIN+3; that is -s RTMIN+3 here"),
        (["logs", "--details", "x"], "--details; microguest ls --format '{{.Labels}}' shows"),
        (["exec", "--privileged", "x", "true"], "run --privileged says it of the machine"),
        (["rm", "-fl", "x"], "unknown option -l in -fl; no machine is linked"),
        (["rm", "-fx", "x"], "unknown option -x in -fx: see"),
        (["run", "-itp", "80:80", "x"], "unknown option -p in -itp; no connections come in"),
        (["list"], "'list' is no command; that is microguest ls"),
        (["stop", "-t", "7200", "x"], "'7200': at most 3600 seconds, which -1 is, too"),
    ],
)
def test_what_does_here_what_docker_s_word_does(words: list[str], message: str) -> None:
    text = refused(*words)
    assert message in text
    assert "did you mean" not in text


@pytest.mark.parametrize("kind", machinekit.KINDS)
def test_what_is_said_of_export_ends_and_has_all_files(image: str, kind: str) -> None:
    """As it stands there: without what the kernel has in the root, some of it without end."""
    words = ("-d", "--rm", "--name", "out", "--machine", kind, image, "sleep", "1000")
    assert microguest("run", *words).returncode == 0
    program, *typed = shlex.split(COMMANDS["export"].partition(" writes out")[0])
    assert program == "microguest"
    done = microguest(*("out" if word == "NAME" else word for word in typed))
    assert (done.returncode, done.stderr) == (0, b"")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        names = {name.partition("/")[0] for name in archive.getnames()}
    there = set(microguest("exec", "out", "ls", "-A", "/").stdout.decode().split())
    assert names == there - {"proc", "sys", "dev"}
    assert names >= {"bin", "etc"}
    assert microguest("stop", "-t", "0", "out").returncode == 0


@pytest.mark.parametrize("word", ["--zebra", "--cups-of-tea", "--", "--x"])
def test_no_guess_is_better_than_a_wrong_one(word: str) -> None:
    assert "did you mean" not in refused("run", f"{word}-", "x")


@pytest.mark.parametrize(
    ("typed", "meant"), [("LS", "ls"), ("Run", "run"), ("Boot-Chart", "boot-")]
)
def test_capitals(typed: str, meant: str) -> None:
    assert f"; did you mean {meant}" in refused(typed)


# All that docker 27 has of the commands that have one of its names, and ours have not.
OF_DOCKER = {
    "exec": "--privileged",
    "attach": "--sig-proxy",
    "logs": "--details",
    "rm": "-l --link",
    "stop": "-s --signal --timeout",
    "ps": "-n --last -l --latest -s --size",
}


@pytest.mark.parametrize("command", OF_DOCKER)
def test_options_of_docker_s_are_no_slips(command: str) -> None:
    for option in OF_DOCKER[command].split():
        assert "did you mean" not in refused(command, option, "x", "y")


@pytest.mark.parametrize(
    "words", [("-h",), *(("-h", name)[::-1] for name in commands_of(make_parser()))]
)
def test_h_alone_is_help(words: tuple[str, ...]) -> None:
    done = microguest(*words)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == microguest(*words[:-1], "--help").stdout


def test_docker_s_spellings(image: str) -> None:
    assert microguest(*KEPT, "-d", "--name", "spelt", image, "echo", "life").returncode == 0
    assert microguest("wait", "spelt").returncode == 0
    machinekit.wait_until("it is over", lambda: microguest("ls", "-q").stdout == b"")
    assert microguest("logs", "--tail", "-1", "spelt").stdout == b"life\n"
    assert microguest("logs", "--tail=-5", "spelt").stdout == b"life\n"
    assert microguest("version", "-f", "{{.Version}}").stdout.count(b".")
    assert microguest("info", "-f", "{{.Running}}").stdout == b"0\n"
    stopped = microguest("stop", "-t", "-1", "spelt")  # it has ended
    assert (stopped.returncode, stopped.stdout) == (0, b"spelt\n")
    assert microguest("rm", "-fv", "spelt").stdout == b"spelt\n"
    assert microguest(*KEPT, "-d", "--name", "spelt", image, "sleep", "1000").returncode == 0
    assert microguest("stop", "-t", "-1", "spelt").stdout == b"spelt\n"
    assert microguest("rm", "--volumes", "spelt").returncode == 0


@pytest.mark.parametrize(
    "words", [["-x"], ["--"], ["--", "-x"], ["--", "a", "--"], ["-x", "--", "--rm"], ["--rm=maybe"]]
)
def test_what_stands_behind_the_image_is_the_command_s(image: str, words: list[str]) -> None:
    options = (*BOX, "--entrypoint", "echo")
    said = (" ".join(words) + "\n").encode()
    assert microguest(*options, image, *words).stdout == said
    assert microguest(*options, "--", image, *words).stdout == said


@pytest.mark.parametrize("words", [["--", "true"], ["-x"], ["--"]])
def test_what_stands_behind_the_name_is_the_command_s(image: str, words: list[str]) -> None:
    assert microguest(*BOX, "-d", "--name", "behind", image, "sleep", "1000").returncode == 0
    done = microguest("exec", "behind", *words)
    assert done.returncode == 127
    assert f"{words[0]!r}" in done.stderr.decode()
    assert microguest("exec", "--", "behind", "echo", "--", "-x").stdout == b"-- -x\n"
    assert microguest("stop", "-t", "0", "behind").returncode == 0


def test_docker_s_words_are_none_of_ours() -> None:
    """Or the sentence about them would be wrong."""
    ours = commands_of(make_parser())
    assert COMMANDS.keys() & ours.keys() == set()
    assert OPTIONS.keys() <= ours.keys()
    for name, options in OPTIONS.items():
        assert options.keys() & set(ours[name]._option_string_actions) == set()


# ── values ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dns", "foo"], "dns 'foo': not an IP address, as 10.0.0.53"),
        (["--dns", "1.2.3"], "dns '1.2.3': not an IP address"),
        (["--dns", "fe80::1%eth0"], "not an IP address"),
        (["--dns-search", "a b"], "dns_search: at most"),
        (["--dns-option", "a b"], "dns_options: at most"),
        (["--add-host", "bad"], "add-host 'bad': expected NAME:ADDRESS"),
        (["--add-host", "db:foo"], "hosts: 'db' at 'foo': not an IP address"),
        (["--add-host", "db:"], "expected NAME:ADDRESS"),
        (["--add-host", "a b:1.1.1.1"], "names without spaces"),
        (["--add-host", "me:host-gateway"], "only a machine with network user"),
        (["--sysctl", "a:b"], "expected NAME=VALUE"),
        (["--restart", "sometimes"], "on-failure:N, always, unless-stopped"),
        (["-d", "--restart", "always"], "--rm and --restart exclude each other"),
        (["--cpus", "0.5"], "argument --cpus: '0.5' is not a whole number of processors"),
        (["--pids-limit", "x"], "'x' is not a whole number of processes"),
        (["--rm=maybe"], "argument --rm: 'maybe' is neither true nor false"),
        (["--timeout", "x"], "argument --timeout: 'x' is not a number of seconds"),
        (["--timeout", "nan"], "'nan' is not a number of seconds"),
        (["-l", "=x"], r"label '=x': expected KEY\[=VALUE\]"),
        (["-e", ""], r"env: '' has no name: expected NAME\[=VALUE\]"),
        (["-e", "=x"], "env: 'x' has no name"),
        (["--detach-keys", "foo"], "foo"),
        (["-w", "rel"], "cwd 'rel' is not an absolute path"),
        (["--shm-size", "64"], "shm_size: '64' is 64 bytes, less than a page"),
        (
            ["--mount", "type=volume,src=v,dst=/x"],
            "no named volumes: give a directory, as type=bind",
        ),
        (["--tmpfs", "/tmp:uid=5"], "'uid=5' is none of: rw, .*noexec, size=, mode="),
        (
            ["--pids-limit", "5"],
            r"no cgroup to limit processes in: leave processes \(--pids-limit\)",
        ),
        (["-m", "256M"], r"limits neither: leave memory \(-m\) and cpus out"),
    ],
)
def test_values_are_looked_at_before_a_boot(
    image: str, machines_home: Path, words: list[str], message: str
) -> None:
    assert re.search(message, refused(*BOX, *words, image, "true"))
    assert not machines_home.exists() or os.listdir(machines_home) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stop", "-t", "x", "m"], "argument -t/--time: 'x' is not a number of seconds"),
        (["exec", "-e", "", "m", "true"], "env: '' has no name"),
        (["exec", "--drain", "x", "m", "true"], "--drain: 'x' is not a number of seconds"),
        (["exec", "--detach-keys", "foo", "m", "true"], "foo"),
        (["exec", "-d", "--detach-keys", "foo", "m", "true"], "foo"),
        (["attach", "--detach-keys", "foo", "m"], "foo"),
        (["exec"], "required: NAME"),
    ],
)
def test_values_are_looked_at_before_a_machine_is(words: list[str], message: str) -> None:
    assert message in refused(*words)


def test_a_switch_s_value_in_the_command_is_the_command_s(image: str) -> None:
    assert microguest(*BOX, image, "echo", "--rm=maybe").stdout == b"--rm=maybe\n"


def test_addresses_of_either_family(image: str) -> None:
    words = ("--dns", "fd00::53", "--dns", "1.1.1.1", "--add-host", "db:fd00::5")
    files = ("cat", "/etc/resolv.conf", "/etc/hosts")
    told = microguest(*BOX, *words, "--add-host", "web=1.1.1.2", image, *files).stdout.decode()
    assert told.startswith("nameserver fd00::53\nnameserver 1.1.1.1\n")
    assert "fd00::5\tdb\n" in told
    assert "1.1.1.2\tweb\n" in told


@pytest.mark.parametrize("kind", ["docker-archive", "oci-archive"])
@pytest.mark.parametrize("content", [b"", b"root:x:0:0\n" * 100, b"\0" * 600 + b"x" * 600])
def test_what_is_no_archive(tmp_path: Path, kind: str, content: bytes) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    text = refused(*BOX, f"{kind}:{file}", "true")
    assert f"{file} is no " in text
    if content[:1] != b"\0":
        assert "is no tar archive" in text
        assert {"docker-archive": "docker save", "oci-archive": "skopeo copy"}[kind] in text


@pytest.mark.parametrize("words", [["ls"], ["version"]])
def test_stdout_that_takes_nothing(words: list[str]) -> None:
    done = on_full(words, "stdout")
    assert done.returncode == 125
    assert done.stderr.startswith(b"microguest: cannot write to stdout: No space left on device")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    ("words", "code"), [(["frobnicate"], 125), (["stop", "nobody"], 1), (["ls", "--x"], 125)]
)
def test_stderr_that_takes_nothing_changes_no_exit_code(words: list[str], code: int) -> None:
    assert on_full(words, "stderr").returncode == code


def on_full(words: list[str], stream: str) -> "subprocess.CompletedProcess[bytes]":
    """With one of the standard streams on a disk that is full."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with open("/dev/full", "wb") as full:
        return subprocess.run([PROGRAM, *words], check=False, **{**streams, stream: full})  # type: ignore[call-overload,no-any-return]


# ── listings ─────────────────────────────────────────────────────────────────────────────────────


def test_states_and_commands_of_listings(image: str) -> None:
    script = "sleep 1000; : a  b"
    words = ("-d", "--name", "box", image, "sh", "-c", script)
    assert microguest(*BOX, *words).returncode == 0
    for listing in (["ls"], ["ps"]):
        text = refused(*listing, "-f", "status=runing")
        assert "there is no status 'runing'; did you mean running?: there are created" in text
        assert "exited" in text
    assert "there are qemu, namespaces" in refused("ls", "-f", "machine=vm")
    assert "there are running, exited" in refused("ps", "-f", "status=paused", "box")
    command = f"sh -c '{script}'\n"
    assert microguest("ls", "--format", "{{.Command}}").stdout.decode() == command
    listed = microguest("ps", "--format", "{{.ID}} {{.Status}}: {{.Command}}", "box")
    (line,) = listed.stdout.decode().splitlines(keepends=True)
    assert line.startswith("main up ")
    assert line.endswith(f" (console): {command}")  # not kept: `attach` denies it
    assert "microguest logs box" in refused("attach", "box")
    assert microguest("stop", "-t", "0", "box").returncode == 0


def test_restart_in_docker_s_words(image: str) -> None:
    words = ("-d", "--name", "again", "--restart", "unless-stopped", image, "sh", "-c")
    assert microguest(*KEPT, *words, "echo life").returncode == 0
    machinekit.wait_until(
        "it lives again", lambda: microguest("logs", "again").stdout.count(b"life") > 1
    )
    assert microguest("stop", "-t", "0", "again").returncode == 0
