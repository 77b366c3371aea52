"""Files that are put in place before a process starts: whole, owned, exact, or not at all."""

import contextlib
import errno
import os
import pathlib
import tempfile
from collections.abc import Iterator

import pytest
from agentharness import AgentProcess, Host, Refused, execute

from microguest.guest.wire.messages import Failure, StagedFile


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentProcess]:
    with AgentProcess() as process:
        yield process


def refusal(agent: AgentProcess, *argv: str, **options: object) -> Failure:
    with Host(agent) as host, pytest.raises(Refused) as caught:
        host.start(*argv, **options)
    return caught.value.failure


def test_files_are_there_when_the_process_starts(
    agent: AgentProcess, tmp_path: pathlib.Path
) -> None:
    data = bytes(range(256)) * 4096
    files = (
        StagedFile(path="relative", data=b"one", mode=0o600),
        StagedFile(path=str(tmp_path / "absolute"), data=data),
        StagedFile(path=str(tmp_path / "empty"), data=b"", mode=0o777),
    )
    script = "cat relative; stat -c %a relative absolute empty"
    result = execute(agent, "sh", "-c", script, cwd=str(tmp_path), files=files, umask=0o077)
    assert result.stdout == b"one600\n644\n777\n"
    assert (tmp_path / "absolute").read_bytes() == data
    assert sorted(os.listdir(tmp_path)) == ["absolute", "empty", "relative"]


def test_program_itself_can_be_staged(agent: AgentProcess, tmp_path: pathlib.Path) -> None:
    program = StagedFile(path="run", data=b"#!/bin/sh\necho ran $1\n", mode=0o755)
    result = execute(agent, "./run", "it", cwd=str(tmp_path), files=(program,))
    assert result.stdout == b"ran it\n"


AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
USER, GROUP, OTHER = 1234, 4321, 5555


@pytest.fixture
def home() -> Iterator[pathlib.Path]:
    """A folder of USER's that others can get to, beside `etc`, which is root's."""
    with tempfile.TemporaryDirectory(prefix="staging-") as name:
        folder = pathlib.Path(name)
        folder.chmod(0o755)
        (folder / "etc").mkdir()
        (folder / "home").mkdir()
        os.chown(folder / "home", USER, GROUP)
        yield folder / "home"


@AS_ROOT
def test_owner_is_the_processes_user(agent: AgentProcess, home: pathlib.Path) -> None:
    file = StagedFile(path=str(home / "file"), data=b"x", mode=0o400)
    execute(agent, "true", user=f"{USER}:{GROUP}", files=(file,))
    status = os.stat(home / "file")
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (USER, GROUP, 0o400)


@AS_ROOT
def test_a_folder_that_passes_on_its_group_does_not(
    agent: AgentProcess, home: pathlib.Path
) -> None:
    os.chown(home, USER, OTHER)
    home.chmod(0o2775)
    file = StagedFile(path=str(home / "file"), data=b"x", mode=0o640)
    execute(agent, "true", user=f"{USER}:{GROUP}", files=(file,))
    status = os.stat(home / "file")
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (USER, GROUP, 0o640)


@AS_ROOT
def test_a_users_link_does_not_lead_to_what_is_roots(
    agent: AgentProcess, home: pathlib.Path
) -> None:
    """The host stages into a folder that the user has made a link of."""
    etc = home.parent / "etc"
    (etc / "profile").write_text("root's")
    (home / "conf").symlink_to(etc)
    for name in ("conf/profile", "conf/new", "../etc/profile"):
        files = (StagedFile(path="before", data=b"x"), StagedFile(path=name, data=b"mine"))
        failure = refusal(agent, "true", user=str(USER), cwd=str(home), files=files)
        assert (failure.code, failure.fields["step"]) == ("bad_file", "files")
        assert (failure.fields["errno"], failure.fields["path"]) == (errno.EACCES, name)
        assert str(USER) in failure.message
    assert (etc / "profile").read_text() == "root's"
    assert os.stat(etc / "profile").st_uid == 0
    assert os.listdir(etc) == ["profile"]
    assert os.listdir(home) == ["conf"]


@AS_ROOT
def test_what_a_user_may_not_enter_is_not_entered_for_it(
    agent: AgentProcess, home: pathlib.Path
) -> None:
    inside = home.parent / "etc" / "inside"
    inside.mkdir()
    os.chown(inside, USER, GROUP)
    inside.parent.chmod(0o700)
    file = StagedFile(path=str(inside / "file"), data=b"x")
    assert refusal(agent, "true", user=str(USER), files=(file,)).fields["errno"] == errno.EACCES
    assert os.listdir(inside) == []


@AS_ROOT
def test_groups_count_and_only_those_of_the_process(
    agent: AgentProcess, home: pathlib.Path
) -> None:
    os.chown(home, OTHER, OTHER)
    home.chmod(0o770)
    file = StagedFile(path=str(home / "file"), data=b"x")
    execute(agent, "true", user=f"{USER}:{GROUP}", groups=(str(OTHER),), files=(file,))
    assert os.stat(home / "file").st_gid == GROUP
    failure = refusal(agent, "true", user=f"{USER}:{GROUP}", files=(file,))
    assert failure.fields["errno"] == errno.EACCES


@AS_ROOT
def test_root_without_capabilities_is_no_more_than_it_will_be(
    agent: AgentProcess, home: pathlib.Path
) -> None:
    file = StagedFile(path=str(home / "file"), data=b"x")
    options = {"cwd": "/", "files": (file,), "user": "0:0"}
    failure = refusal(agent, "true", capabilities=("kill",), **options)
    assert failure.fields["errno"] == errno.EACCES
    assert execute(agent, "true", capabilities=("dac_override",), **options).exited.code == 0
    assert os.stat(home / "file").st_uid == 0


@AS_ROOT
def test_a_thread_that_was_a_users_is_the_agents_again(
    agent: AgentProcess, home: pathlib.Path
) -> None:
    """Root's files after a user's, by the same threads; and nothing is left of a user's rights."""
    mine = StagedFile(path=str(home / "mine"), data=b"x")
    roots = StagedFile(path=str(home.parent / "etc" / "roots"), data=b"x")
    for _ in range(20):
        options = {"user": f"{USER}:{GROUP}", "groups": (str(OTHER),)}
        refusal(agent, "/no/such/program", files=(mine,), **options)
        refusal(agent, "true", files=(roots,), **options)
        assert execute(agent, "true", files=(roots,)).exited.code == 0
    assert os.listdir(home) == []
    before = pathlib.Path(f"/proc/{agent.pid}/status").read_text()
    for task in pathlib.Path(f"/proc/{agent.pid}/task").iterdir():
        for line in (task / "status").read_text().splitlines():
            if line.startswith(("Uid", "Gid", "Groups", "Cap")):
                assert line in before.splitlines()
    assert "Uid:\t0\t0\t0\t0" in before


@AS_ROOT
def test_links_that_change_all_the_time_lead_nowhere(
    agent: AgentProcess, home: pathlib.Path
) -> None:
    """A user that races against the agent; there is no moment between a look and a use."""
    etc = home.parent / "etc"
    script = """
    mkdir real; ln -s real good; ln -s ../etc bad
    while :; do ln -sfn real conf; ln -sfn ../etc conf; done
    """
    with Host(agent) as host:
        host.start("sh", "-c", f"{script} 2>/dev/null", user=f"{USER}:{GROUP}", cwd=str(home))
        for _ in range(100):
            file = StagedFile(path="conf/profile", data=b"x")
            with Host(agent) as other, contextlib.suppress(Refused):
                other.start("true", user=f"{USER}:{GROUP}", cwd=str(home), files=(file,))
    assert os.listdir(etc) == []


def test_old_file_is_replaced_and_a_symlink_not_followed(
    agent: AgentProcess, tmp_path: pathlib.Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (tmp_path / "link").symlink_to(victim)
    (tmp_path / "old").write_text("old")
    files = tuple(StagedFile(path=name, data=b"new") for name in ("link", "old"))
    execute(agent, "true", cwd=str(tmp_path), files=files)
    assert victim.read_text() == "untouched"
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "old").read_text() == "new"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("no/such/folder/file", errno.ENOENT),
        ("folder", errno.EISDIR),
        ("folder/", errno.EISDIR),
        ("file/inside", errno.ENOTDIR),
        ("x" * 300, errno.ENAMETOOLONG),
        ("nul\0inside", None),
        ("", None),
    ],
)
def test_one_bad_file_and_nothing_has_changed(
    agent: AgentProcess, tmp_path: pathlib.Path, path: str, expected: int | None
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    execute(agent, "true")
    before = agent.open_descriptors()
    files = (StagedFile(path="good", data=b"x"), StagedFile(path=path, data=b"x"))
    failure = refusal(agent, "true", cwd=str(tmp_path), files=files)
    assert failure.code == "bad_file"
    assert failure.fields.get("errno") == expected
    assert failure.fields["path"] == path
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert os.listdir(tmp_path / "folder") == []
    assert agent.open_descriptors() <= before + 1  # the connection may not be closed yet


def test_failed_start_takes_its_files_back(agent: AgentProcess, tmp_path: pathlib.Path) -> None:
    (tmp_path / "old").write_text("old")
    files = tuple(StagedFile(path=name, data=b"new") for name in ("fresh", "old"))
    failure = refusal(agent, "/no/such/program", cwd=str(tmp_path), files=files)
    assert failure.code == "not_found"
    assert os.listdir(tmp_path) == ["old"]
    assert (tmp_path / "old").read_text() == "new"  # cannot be undone


def test_full_disk_is_an_error_and_leaves_nothing(agent: AgentProcess) -> None:
    files = (StagedFile(path="/dev/full/file", data=b"x"),)
    assert refusal(agent, "true", files=files).fields["errno"] == errno.ENOTDIR
    assert refusal(agent, "true", files=(StagedFile(path="/proc/x", data=b"x"),)).code == "bad_file"
