"""What people's hands do by themselves who know docker."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import machinekit
import pytest
from clikit import PROGRAM, microguest
from machinekit import wait_until
from patience import PATIENCE

from microguest.host_client.cli.arguments import parse
from microguest.host_client.machines.folder import is_alive
from microguest.host_client.machines.named import shortened

pytestmark = pytest.mark.usefixtures("machines_home")
PROJECT = Path(__file__).parent.parent


def output(*words: str) -> str:
    done = microguest(*words)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout.decode()


def start(
    image: str, name: str, *options: str, command: tuple[str, ...] = ("sleep", "1000")
) -> None:
    words = ("run", "-d", "--name", name, "--machine", "namespaces", *options, image, *command)
    assert output(*words) == f"{name}\n"


def end(*names: str) -> None:
    assert microguest("stop", "-t", "0", *names).returncode == 0


# ── words ────────────────────────────────────────────────────────────────────────────────────────


def test_switches_with_a_truth_value() -> None:
    assert parse(["run", "--rm=false", "-d=true", "-i=0", "--tty=T", "x"]).rm is False
    options = parse(["run", "--rm", "--rm=false", "-d=true", "-i=0", "--tty=T", "x", "--rm=true"])
    assert (options.rm, options.detach, options.interactive, options.tty) == (
        *(False, True, False, True),
    )
    assert options.command == ["--rm=true"]
    for together in ("-it", "-ti", "-itd"):
        options = parse(["run", together, "x"])
        assert options.interactive
        assert options.tty
    options = parse(["run", "-it=false", "x", "-it=0"])
    assert (options.interactive, options.tty, options.command) == (True, False, ["-it=0"])
    options = parse(["run", "-ditm=512M", "-ti=true", "x"])
    assert (options.detach, options.interactive, options.tty) == (True, True, True)
    assert parse(["exec", "-ie", "A=true", "m", "x"]).env == ["A=true"]
    done = microguest("run", "--rm=maybe", "x")
    assert done.returncode == 125
    assert b"maybe" in done.stderr


def test_short_words_of_run() -> None:
    options = parse(["run", "-m", "1G", "-h", "box", "-l", "a=b", "--label", "c", "--init", "x"])
    assert (options.memory, options.hostname, options.label) == ("1G", "box", ["a=b", "c"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--memor", "1G", "x"], "run: unknown option --memor; did you mean --memory"),
        (["exec", "--usr", "1", "x", "y"], "exec: unknown option --usr; did you mean --user"),
        (["stpo", "x"], "'stpo' is no command; did you mean stop?"),
        (["rnu", "x"], "'rnu' is no command; did you mean run?"),
        (["lgos", "x"], "'lgos' is no command; did you mean logs?"),
        (["strat", "x"], "did you mean start? a machine that has ended is not started again"),
        (["run", "--nmae", "a", "x"], "unknown option --nmae; did you mean --name?"),
        (["run", "-it=maybe", "x"], "'maybe' is neither true nor false"),
        (["ls", "x"], "ls: unknown argument x"),
        (["ls", "--al"], "see microguest ls --help"),
        (["ls", "--format", "{{.Nam}}"], "did you mean Name"),
        (["ls", "--format", "{{range .}}"], "{{range .}} is not understood"),
        (["ls", "--format", "{{.Name"], "no }}"),
        (["ls", "--filter", "color=red"], "KEY is name, status"),
        (["logs", "--tail", "-x", "m"], "tail"),
        (["logs", "--since", "yesterday", "m"], "since: 'yesterday' is no time: write 10m"),
        (["logs", "--until", "2026-02-30", "m"], "until"),
        (["help", "stpo"], "did you mean stop?"),
    ],
)
def test_errors_say_what_was_meant_and_where_the_help_is(words: list[str], message: str) -> None:
    done = microguest(*words)
    text = done.stderr.decode()
    assert (done.returncode, done.stdout) == (125, b"")
    assert message in text
    assert text.count("\n") == 1


def test_help_and_versions(elf: Path) -> None:
    assert output("help", "ps") == output("ps", "--help")
    assert output("help") == output("--help") == output()
    assert output("-v") == output("--version")
    version = json.loads(output("version", "--format", "json"))
    assert output("--version") == f"microguest {version['Version']}\n"
    assert output("version", "--format", "{{.GuestVersion}}") == f"{version['GuestVersion']}\n"
    assert f"Version:      {version['Version']}\n" in output("version")
    assert json.loads(output("info", "--format", "{{json .}}"))["Running"] == 0
    assert "Machines:     0\n" in output("info")
    assert output("version", "--format", "table") == output("version")


def test_version_says_why_it_knows_of_no_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICROGUEST_BUNDLE", "/nope")
    done = microguest("version", "--format", "json")
    assert json.loads(done.stdout)["GuestVersion"] == ""
    assert done.stderr.startswith(b"microguest: no guest bundle in /nope")


# ── machines ─────────────────────────────────────────────────────────────────────────────────────


def test_what_a_row_has_is_no_column_and_no_line(image: str) -> None:
    start(image, "odd", "-l", "note=a\tb\nc", command=("sh", "-c", "\tsleep 1000\n:"))
    # By itself it is the listing, but for how long each machine has been up.
    assert output("ls", "--format", "table").split()[:5] == output("ls").split()[:5]
    table = output("ls", "--format", "table {{.Name}}\\t{{.Command}}\\t{{.State}}").splitlines()
    assert [line.split()[0] for line in table] == ["NAME", "odd"]
    assert table[1].split()[-1] == "running"
    assert r"\tsleep 1000\n" in table[1].replace("\\x09", r"\t").replace("\\x0a", r"\n")
    lines = output("ls", "--format", "{{.Labels}}\\n{{.Name}}").splitlines()
    assert lines[0].replace("\\x09", "\t") == "note=a\tb\\nc"
    assert lines[1:] == ["odd"]
    assert len(output("ls", "--format", "{{.Command}}").splitlines()) == 1
    end("odd")


def test_a_machine_whose_monitor_was_killed_is_one_that_has_ended(image: str) -> None:
    start(image, "orphan")
    os.kill(machinekit.state_of("orphan").monitor, signal.SIGKILL)
    wait_until("nobody holds it", lambda: not is_alive("orphan"))
    done = microguest("stop", "orphan")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"orphan\n", b"")


@pytest.mark.parametrize("kind", machinekit.KINDS)
def test_a_machine_that_was_killed_says_so_first(image: str, kind: str) -> None:
    """A list has little room for how one ended."""
    words = ("--name", "killed", "--machine", kind, image, "sleep", "1000")
    assert microguest("run", "-d", *words).returncode == 0
    os.kill(machinekit.state_of("killed").vmm, signal.SIGKILL)
    wait_until("nobody holds it", lambda: not is_alive("killed"))
    name = {"qemu": "qemu", "namespaces": "microguest"}[kind]
    assert output("ls", "-a", "--format", "{{.Status}}") == f"{name} was killed (signal 9)\n"


def test_how_one_ended_is_cut_between_words() -> None:
    assert shortened("as long as there is room") == "as long as there is room"
    assert shortened("the guest switched itself off, or was restarted") == (
        "the guest switched itself off, or was…"
    )
    assert shortened("x" * 41) == "x" * 39 + "…"


def test_listings_by_template_and_filter(image: str) -> None:
    start(image, "My_App.1", "-l", "tier=web", "-l", "new")
    start(image, "db", "--label", "tier=db")
    microguest("run", "--name", "over", "--machine", "namespaces", image, "sh", "-c", "exit 3")
    for listing in ("ls", "ps"):
        assert (
            output(listing, "--format", "{{.Name}}\\t{{.State}}")
            == "My_App.1\trunning\ndb\trunning\n"
        )
        assert output(listing, "-q") == "My_App.1\ndb\n"
    assert output("ps", "-a", "--format", "table {{.Names}}\\t{{.Status}}").splitlines()[0::3] == [
        "NAMES     STATUS",
        "over      exited (3)",
    ]
    rows = [json.loads(line) for line in output("ls", "--format", "json").splitlines()]
    assert [row["Labels"] for row in rows] == [{"tier": "web", "new": ""}, {"tier": "db"}]
    assert rows[0]["Image"] == image
    assert output("ls", "--format", "{{.Labels}}") == "tier=web,new=\ntier=db\n"
    assert output("ls", "--format", "table {{upper .Labels}}").splitlines() == [
        "LABELS",
        "TIER=WEB,NEW=",
        "TIER=DB",
    ]
    assert output("ls", "--format", "{{json .Labels}} {{upper .Name}}", "-f", "name=db") == (
        '{"tier": "db"} DB\n'
    )
    for words, names in (
        (("label=tier=web",), "My_App.1\n"),
        (("label=tier",), "My_App.1\ndb\n"),
        (("label=new", "name=db"), ""),
        (("status=exited",), "over\n"),
        (("status=exited", "status=running"), "My_App.1\ndb\nover\n"),
        (("machine=qemu",), ""),
    ):
        filters = [word for each in words for word in ("--filter", each)]
        assert output("ls", "-q", *filters) == names
    start_words = ("exec", "-d", "--label", "night", "db", "sh", "-c", "sleep 1000; :")
    name = output(*start_words).strip()
    assert (
        output("ps", "--format", "{{.ID}} {{.Label}}", "-f", "label=night", "db")
        == f"{name} night\n"
    )
    end("My_App.1", "db")


def test_several_names_and_one_is_missing(image: str) -> None:
    start(image, "one")
    start(image, "two")
    done = microguest("stop", "-t", "0", "one", "nobody", "two")
    assert (done.returncode, done.stdout) == (1, b"one\ntwo\n")
    assert b"nobody" in done.stderr
    assert done.stderr.count(b"\n") == 1
    assert output("ls", "-q") == ""


def test_several_processes_and_one_is_missing(image: str) -> None:
    start(image, "box")
    ids = [output("exec", "-d", "box", "sleep", "1000").strip() for _ in range(2)]
    done = microguest("kill", "box", ids[0], "p999", ids[1])
    assert (done.returncode, done.stdout.decode()) == (1, f"{ids[0]}\n{ids[1]}\n")
    assert b"p999" in done.stderr
    done = microguest("wait", "box", ids[0], "p999", ids[1])
    assert (done.returncode, done.stdout) == (1, b"137\n137\n")
    end("box")


def test_rm(image: str, machines_home: Path) -> None:
    start(image, "runs")
    microguest("run", "--name", "over", "--machine", "namespaces", image, "true")
    done = microguest("rm", "runs", "over", "nobody")
    assert (done.returncode, done.stdout) == (1, b"over\n")
    assert b"machine runs runs: stop it first" in done.stderr
    assert b"no machine named nobody" in done.stderr
    pids = machinekit.family(machinekit.state_of("runs").monitor)
    assert output("rm", "-f", "runs", "nobody") == "runs\n"
    wait_until("its processes end", lambda: not any(map(machinekit.runs, pids)))
    assert os.listdir(machines_home) == []


def test_cidfile(image: str, tmp_path: Path) -> None:
    file = tmp_path / "cid"
    words = ("run", "--rm", "--machine", "namespaces", "--cidfile", str(file))
    assert output(*words, "--name", "box", image, "echo", "x") == "x\n"
    assert file.read_text() == "box"
    done = microguest(*words, image, "true")
    assert done.returncode == 125
    assert str(file) in done.stderr.decode()


def test_hostname_and_init(image: str) -> None:
    words = ("run", "--rm", "--init", "--machine", "namespaces", "-h", "Web_1.example", image)
    assert output(*words, "hostname") == "Web_1.example\n"


def test_last_lines_of_logs(image: str) -> None:
    start(image, "box", command=("sh", "-c", "seq 1 100; printf end; sleep 1000"))
    wait_until("it is logged", lambda: output("logs", "box").endswith("end"), PATIENCE)
    assert output("logs", "--tail", "3", "box") == "99\n100\nend"
    assert output("logs", "-n", "0", "box") == ""
    assert output("logs", "--tail=all", "box").count("\n") == 100
    with subprocess.Popen([PROGRAM, "logs", "-f", "-n", "1", "box"], stdout=subprocess.PIPE) as log:
        assert log.stdout is not None
        assert log.stdout.readline() == b"100\n"
        end("box")
        assert log.communicate()[0].startswith(b"end")


def test_logs_by_their_times(image: str) -> None:
    start(image, "box", command=("sh", "-c", "echo one; sleep 1; echo two; sleep 1000"))
    wait_until("it is logged", lambda: output("logs", "box").endswith("two\n"), PATIENCE)
    lines = output("logs", "-t", "box").splitlines()
    times = [line.split(" ")[0] for line in lines]
    assert lines == [f"{times[0]} one", f"{times[1]} two"]
    assert all(re.fullmatch(r"20\d\d-[-\d]{5}T[:\d]{8}\.\d{9}Z", when) for when in times)
    assert times[0] < times[1]
    for words, expected in (
        (("--since", times[1]), "two\n"),
        (("--until", times[0]), "one\n"),
        (("--since", "1h30m", "-n", "1"), "two\n"),
        (("--since", times[1], "--until", times[0]), ""),
        (("-f", "--until", times[0]), "one\n"),
        (("--until=10m", "--timestamps"), ""),
        (("-t", "--since=" + times[1]), f"{lines[1]}\n"),
    ):
        assert output("logs", *words, "box") == expected, words
    log = [PROGRAM, "logs", "-ft", "--since", times[1], "box"]
    with subprocess.Popen(log, stdout=subprocess.PIPE) as follower:
        assert follower.stdout is not None
        assert follower.stdout.readline() == f"{lines[1]}\n".encode()
        end("box")
        assert follower.wait(PATIENCE) == 0
    assert output("logs", "-t", "box").splitlines() == lines


def test_labels_are_bounded(image: str) -> None:
    words = ("run", "--rm", "--machine", "namespaces", "-l", f"a={'x' * 5000}", image, "true")
    done = microguest(*words)
    assert done.returncode == 125
    assert b"labels" in done.stderr


# ── completion ───────────────────────────────────────────────────────────────────────────────────


def test_completion_of_bash(image: str, tmp_path: Path) -> None:
    start(image, "My_App.1")
    (tmp_path / "completion").write_text(output("completion", "bash"))
    script = f"""
        PATH={Path(PROGRAM).parent}:$PATH; source {tmp_path}/completion
        complete_words() {{
            COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
            $(complete -p microguest | sed 's/.*-F \\([^ ]*\\).*/\\1/')
            echo "${{COMPREPLY[@]}}"
        }}
        complete_words microguest st
        complete_words microguest run --mem
        complete_words microguest logs --si
        complete_words microguest stop My
        complete_words microguest exec My
        complete_words microguest run --machine n
        complete_words microguest run --restart un
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [
        *("stop", "--memory", "--since", "My_App.1", "My_App.1", "namespaces", "unless-stopped"),
    ], done.stderr
    assert output("completion", "zsh").startswith("#compdef microguest")
    end("My_App.1")


def test_manual_page(tmp_path: Path) -> None:
    """It is the parser's: `make man` after a change."""
    made = tmp_path / "microguest.1"
    script = PROJECT / "build" / "man_page.py"
    subprocess.run([sys.executable, str(script), str(made)], check=True)
    assert made.read_text() == (PROJECT / "docs" / "reference" / "microguest.1").read_text()
    for words in ("MICROGUEST RUN", r"\-\-memory", r"\-\-env\-file", "MICROGUEST COMPLETION"):
        assert words in made.read_text()
