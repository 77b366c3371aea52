"""Files that are put in place before a process starts: whole, owned, exact, or not at all."""

import errno
import os
import pathlib
from collections.abc import Iterator

import pytest
from agentharness import AgentProcess, Host, Refused, execute

from guest.messages import Failure, StagedFile


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


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_owner_is_the_processes_user(agent: AgentProcess, tmp_path: pathlib.Path) -> None:
    file = StagedFile(path=str(tmp_path / "file"), data=b"x", mode=0o400)
    execute(agent, "true", user="1234:4321", files=(file,))
    status = os.stat(tmp_path / "file")
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (1234, 4321, 0o400)


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
