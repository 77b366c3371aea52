"""Plans for processes, and what a failed start is called."""

import errno
import os

import pytest

from microguest.guest import bounds
from microguest.guest.boot.workload import ImageDefaults
from microguest.guest.errors import START_CODES, OperationError
from microguest.guest.launch import DEFAULT_PATH, plan, share_of_processes, start_failure
from microguest.guest.users import Identity

APP = Identity(uid=1000, gid=1000, groups=(1000,), home="/srv/app", name="app")


def environment(**options: object) -> dict[str, str]:
    planned = plan(("true",), APP, **options)  # type: ignore[arg-type]
    return dict(entry.decode().split("=", 1) for entry in planned.env)


def test_defaults_are_dockers() -> None:
    assert environment() == {"PATH": DEFAULT_PATH, "HOME": "/srv/app"}


def test_request_goes_over_image_goes_over_default() -> None:
    image = ImageDefaults(env={"PATH": "/image", "A": "image", "B": "image"})
    assert environment(image=image, env={"B": "request", "C": "request"}) == {
        "PATH": "/image",
        "A": "image",
        "B": "request",
        "C": "request",
        "HOME": "/srv/app",
    }


def test_home_is_kept_where_it_is_set() -> None:
    assert environment(env={"HOME": "/x"})["HOME"] == "/x"
    assert environment(env={"HOME": ""})["HOME"] == "/srv/app"


def test_cwd_comes_from_request_then_image_then_root() -> None:
    image = ImageDefaults(cwd="/image")
    assert plan(("x",), APP, image=image).cwd == b"/image"
    assert plan(("x",), APP, image=image, cwd="/request").cwd == b"/request"
    assert plan(("x",), APP, image=ImageDefaults(cwd="")).cwd == b"/"


def test_candidates_are_searched_as_execvp_does() -> None:
    assert plan(("ls",), APP, env={"PATH": "/a::/b"}).candidates == (b"/a/ls", b"./ls", b"/b/ls")
    assert plan(("ls",), APP, env={"PATH": ""}).candidates == ()
    assert plan(("./ls",), APP).candidates == (b"./ls",)
    assert plan(("/bin/ls",), APP).candidates == (b"/bin/ls",)
    assert plan(("bin/ls",), APP, cwd="/usr").program_paths() == [b"/usr/bin/ls"]


def test_any_byte_that_linux_allows_goes_through() -> None:
    raw = bytes(range(1, 256))
    planned = plan(("x", os.fsdecode(raw)), APP, env={"RAW": os.fsdecode(raw)})
    assert planned.argv[1] == raw
    assert b"RAW=" + raw in planned.env


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"argv": ()}, "bad_request"),
        ({"argv": ("",)}, "bad_request"),
        ({"argv": ("a", "b\0c")}, "bad_request"),
        ({"argv": ("\ud800",)}, "bad_request"),
        ({"env": {"A": "\0"}}, "bad_request"),
        ({"env": {"A=B": "x"}}, "bad_request"),
        ({"env": {"": "x"}}, "bad_request"),
        ({"cwd": "relative"}, "bad_cwd"),
        ({"cwd": "/nul\0"}, "bad_request"),
    ],
)
def test_bad_requests_are_typed(options: dict[str, object], code: str) -> None:
    argv = options.pop("argv", ("true",))
    with pytest.raises(OperationError) as caught:
        plan(argv, APP, **options)  # type: ignore[arg-type]
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("step", "error", "code"),
    [
        ("exec", errno.ENOENT, "not_found"),
        ("exec", errno.ENOTDIR, "not_found"),
        ("exec", errno.EACCES, "permission_denied"),
        ("exec", errno.ENOEXEC, "not_executable"),
        ("exec", errno.E2BIG, "argument_list_too_long"),
        ("exec", errno.ENOMEM, "out_of_memory"),
        ("exec", errno.EIO, "setup_failed"),
        ("chdir", errno.ENOENT, "bad_cwd"),
        ("chdir", errno.EACCES, "bad_cwd"),
        ("mkdir", errno.ENOSPC, "bad_cwd"),
        ("mkdir", errno.EDQUOT, "bad_cwd"),
        ("clone", errno.EAGAIN, "resource_limit"),
        ("clone", errno.ENOMEM, "out_of_memory"),
        ("pipe", errno.EMFILE, "resource_limit"),
        ("setuid", errno.EINVAL, "bad_user"),
        ("setuid", errno.EAGAIN, "resource_limit"),
        ("rlimit", errno.EPERM, "setup_failed"),
    ],
)
def test_failures_are_named(step: str, error: int, code: str) -> None:
    got, message, fields = start_failure(step, error, "prog", "/work")
    assert got == code
    assert got in START_CODES
    assert os.strerror(error) in message
    assert ("/work" if step in ("chdir", "mkdir") else "prog") in message
    assert fields["step"] == step
    assert fields["errno"] == error


def test_missing_interpreter_is_not_a_missing_program() -> None:
    assert start_failure("exec", errno.ENOENT, "x", "/", program_exists=True)[0] == (
        "bad_interpreter"
    )


@pytest.mark.parametrize(
    ("threads_max", "pid_max", "others", "share"),
    [
        (1592, 32768, 50, (1592 - 50 - bounds.PIDS_RESERVE) // 2),
        (127_000, 32768, 200, (32768 - 300 - 200 - bounds.PIDS_RESERVE) // 2),
        (1592, 32768, -5, (1592 - bounds.PIDS_RESERVE) // 2),  # counted while they end
        (bounds.PIDS_RESERVE + 100, 32768, 40, None),
        (20, 301, 500, None),
    ],
)
def test_neither_share_of_processes_can_take_the_other_or_the_reserve(
    threads_max: int, pid_max: int, others: int, share: int | None
) -> None:
    assert share_of_processes(threads_max, pid_max, others) == share
    if share is not None:
        assert 2 * share + max(others, 0) + bounds.PIDS_RESERVE <= min(threads_max, pid_max - 300)
    assert bounds.LATE_PROCESSES < bounds.PIDS_RESERVE
