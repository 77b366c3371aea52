"""Boots that cannot work: each says which step failed on what, and ends within five seconds."""

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from init_machine import Config, Machine, boot_config, make_root, require_program
from patience import SLACK
from test_guest_bootconfig import FIELDS, FULL, changed, dotted

BOUND = 5.0 + SLACK  # seconds from the launch to the power-off


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_program()
    return make_root(tmp_path_factory.mktemp("image"))


def missing_lower(config: Config) -> None:
    config["root"]["lower"][0]["path"] = "/microguest/nothing"


def lower_is_a_file(config: Config) -> None:
    config["root"]["lower"][0]["path"] = "/init"


def no_such_listen_folder(config: Config) -> None:
    config["agent"]["listen"]["path"] = "/nowhere/agent.sock"


def same_layer_twice(config: Config) -> None:
    config["root"]["lower"] *= 2


def image_too_large(config: Config) -> None:
    config["image"] = {"env": {"BIG": "x" * 70_000}}


@pytest.mark.parametrize(
    ("damage", "step", "syscall", "path", "number"),
    [
        (missing_lower, "root-lower", "open", "/microguest/nothing", errno.ENOENT),
        (lower_is_a_file, "root-lower", "open", "/init", errno.ENOTDIR),
        (no_such_listen_folder, "listener", "bind", "/nowhere/agent.sock", errno.ENOENT),
        (same_layer_twice, "root-overlay", "mount", "/newroot", errno.ELOOP),
    ],
)
def test_a_failing_call_is_told_to_the_host_and_on_the_console(
    root: Path,
    damage: Callable[[Config], None],
    step: str,
    syscall: str,
    path: str,
    number: int,
) -> None:
    config = boot_config(["true"])
    damage(config)
    with Machine(root, config) as machine:
        assert machine.wait(BOUND) == 0
        failed = machine.report("boot_failed")
        assert (failed["step"], failed["syscall"]) == (step, syscall)
        assert (failed["path"], failed["errno"]) == (path, number)
        assert path in failed["message"]
        done = [entry["name"] for entry in failed.pop("steps")]
        assert done[:2] == ["api-mounts", "config"]
        assert step not in done
        assert machine.console_report() == ("boot_failed", failed)
        assert machine.report("stopping")["status"] == "boot-failed"


@pytest.mark.parametrize("letter", ["x", "é"])
def test_a_long_message_is_a_whole_report_on_the_console(root: Path, letter: str) -> None:
    config = boot_config(["true"])
    target = "/" + f"{letter * 200}/" * 19
    config["volumes"] = [{"kind": "tmpfs", "target": target, "create": False}]
    with Machine(root, config) as machine:
        assert machine.wait(BOUND) == 0
        _, failed = machine.console_report()
        whole = machine.report("boot_failed")
        assert whole["message"].startswith(f"openat2 {target[:300]}")
        assert whole["path"].startswith(failed["path"])
        assert whole["message"].startswith(failed["message"])
        assert failed["message"].startswith(f"openat2 {target[:200]}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not a JSON document"),
        ("", "not a JSON document"),
        ("[1]", "expected a map"),
        (json.dumps({**boot_config(), "colour": "red"}), "unknown field colour"),
        (json.dumps({**boot_config(), "root": {"lower": []}}), "root.lower"),
        (json.dumps({**boot_config(), "hostname": 7}), "hostname"),
        (json.dumps({**boot_config(), "schema": 99}), "schema: 99"),
    ],
)
def test_a_bad_config_is_told_on_the_console(root: Path, text: str, said: str) -> None:
    with Machine(root, text) as machine:
        assert machine.wait(BOUND) == 0
        name, failed = machine.console_report()
        assert (name, failed["step"]) == ("boot_failed", "config")
        assert said in failed["message"]
        assert failed["path"] == "/microguest/boot.json"


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, _, name in FIELDS], ids=str)
def test_a_bad_value_in_any_field_ends_the_boot(
    root: Path, path: tuple[str | int, ...], name: str
) -> None:
    with Machine(root, changed(path, **{name: {"wrong": [1.5]}})) as machine:
        assert machine.wait(BOUND) == 0
        kind, fields = machine.console_report()
    assert (kind, fields["step"]) == ("boot_failed", "config")
    assert dotted((*path, name)) in fields["message"]


@pytest.mark.parametrize("length", range(0, len(json.dumps(FULL)), 61))
def test_a_config_that_was_cut_ends_the_boot(root: Path, length: int) -> None:
    with Machine(root, json.dumps(FULL)[:length]) as machine:
        assert machine.wait(BOUND) == 0
        kind, fields = machine.console_report()
    assert (kind, fields["step"]) == ("boot_failed", "config")


def test_the_token_of_a_bad_config_is_not_shown(root: Path) -> None:
    config = boot_config()
    config["agent"]["token"] = "secret-but-7"
    with Machine(root, config) as machine:
        assert machine.wait(BOUND) == 0
        assert "token" in machine.console
        assert "secret" not in machine.console


def test_nobody_listens_for_reports(root: Path) -> None:
    with Machine(root, boot_config(["true"]), listen=False) as machine:
        assert machine.wait(BOUND) == 0
        _, failed = machine.console_report()
        assert (failed["step"], failed["syscall"]) == ("report", "connect")
        assert failed["path"] == "/microguest/host/report.sock"
        assert failed["errno"] == errno.ENOENT


def test_no_report_endpoint_is_no_failure(root: Path) -> None:
    config = boot_config(["echo", "ran"])
    del config["report"]
    with Machine(root, config, listen=False) as machine:
        assert machine.wait() == 0
        assert machine.console == "ran\n"


def test_image_defaults_that_no_message_holds(root: Path) -> None:
    config = boot_config(["true"])
    image_too_large(config)
    with Machine(root, config) as machine:
        assert machine.wait(BOUND) == 0
        _, failed = machine.console_report()
        assert failed["step"] in ("config", "agent-start")
        assert "environment" in failed["message"] or "image" in failed["message"]


def test_a_host_that_never_reads_does_not_hold_up_the_boot(root: Path) -> None:
    with Machine(root, boot_config(["true"])) as machine:
        assert machine.wait() == 0


def test_a_missing_disk_is_named_with_those_that_are_there(root: Path) -> None:
    config = boot_config(["true"])
    config["root"]["lower"] = [{"kind": "disk", "serial": "no-such", "fstype": "erofs"}]
    with Machine(root, config) as machine:
        assert machine.wait() == 0
        failed = machine.report("boot_failed")
        assert failed["step"] == "root-lower"
        assert "no-such" in failed["message"]
        assert "disks:" in failed["message"]


def with_terminal(config: Config) -> None:
    config["workload"]["stdio"] = "terminal"
    config["workload"]["output_wait"] = 0.1  # seconds: nobody comes for it


def with_pipes(config: Config) -> None:
    config["workload"]["stdio"] = "attached"
    config["workload"]["output_wait"] = 0.1
    config["volumes"] = [{"kind": "tmpfs", "target": "/volume"}]
    config["root"]["read_only"] = True


def handed_off(config: Config) -> None:
    config["mode"] = "handoff"


def masking(config: Config) -> None:
    config["workload"]["masked"] = ["/proc/kcore"]
    config["workload"]["read_only_paths"] = ["/proc/sys"]


@pytest.mark.parametrize(
    ("change", "steps"),
    [
        (lambda config: None, {"agent-start", "workload"}),
        (with_terminal, {"agent-start", "workload"}),
        (with_pipes, {"agent-start", "workload"}),
        (handed_off, {"agent-start", "keeper", "agent-ready"}),
        (masking, {"agent-start", "hardening"}),
    ],
)
def test_wherever_no_file_can_be_opened_any_more_the_limit_is_told(
    root: Path, change: Callable[[Config], None], steps: set[str]
) -> None:
    """Before there is a PID 1, in whichever step, in the child that starts the workload."""
    config = boot_config(["true"])
    change(config)
    failed = set()
    for files in range(3, 64):
        with Machine(root, config, under=("prlimit", f"--nofile={files}:{files}")) as machine:
            status = machine.wait()
            if status != 0 and not failed:  # there was no PID 1 yet
                said = machine.console.strip()
                assert said.count("\n") == 0, said
            else:
                reports = dict(iter(machine.next_report, ("", {})))
                if "boot_failed" in reports:
                    failed.add(reports["boot_failed"]["step"])
                    said = reports["boot_failed"]["message"]
                elif "workload_failed" in reports:
                    said = reports["workload_failed"]["message"]
                else:
                    break
        assert f"Too many open files: a process of this machine may have {files} open" in said
        assert "ulimit -n" in said
    assert "ready" in reports
    assert failed >= steps
