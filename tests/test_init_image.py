"""What an image brings and a machine must not hide: its /run, its volumes; and memory's own files.

In namespaces; what they do with a small machine's memory is in tests/test_vm_roots.py.
"""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from init_machine import Config, Machine, boot_config, make_root, require_program, shell
from rights import open_to_all

from microguest.guest import bounds
from microguest.guest.boot.config import BootConfig, parse
from microguest.init_shim.root.memory_sizes import sizes_of

MIB = 2**20
LIST = "cd /run; find . -mindepth 1 | sort | xargs -r stat -c '%n %F %a %u:%g'"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    require_program()
    return make_root(tmp_path / "image")


def lines_of(image: Path, script: str, user: int | None = None, **config: Any) -> list[str]:
    """What a workload prints, and PID 1 with it."""
    with Machine(image, {**boot_config(shell(script)), **config}, user=user) as machine:
        machine.report("ready")
        assert machine.wait() == 0, machine.console
        return machine.console.splitlines()


# ── its /run ─────────────────────────────────────────────────────────────────────────────────────


def fill_run(folder: Path) -> None:
    """What the images of well-known servers have there."""
    folder.mkdir()
    for name, mode, owner in (("sshd", 0o755, 0), ("postgresql", 0o2775, 999), ("lock", 0o1777, 0)):
        (folder / name).mkdir()
        os.chown(folder / name, owner, owner)
        (folder / name).chmod(mode)
    (folder / "lock" / "apache2").mkdir()
    (folder / "app.conf").write_text("port 80\n")
    os.chown(folder / "app.conf", 1000, 2000)
    (folder / "app.conf").chmod(0o640)
    (folder / "shm").symlink_to("/dev/shm")
    os.mkfifo(folder / "fifo")
    (folder / "fifo").chmod(0o622)


def test_an_image_has_its_run(root: Path) -> None:
    fill_run(root / "run")
    seen = lines_of(root, f"{LIST}; cat app.conf; readlink shm; touch new && echo writable")
    assert seen == [
        "./app.conf regular file 640 1000:2000",
        "./fifo fifo 622 0:0",
        "./lock directory 1777 0:0",
        "./lock/apache2 directory 755 0:0",
        "./postgresql directory 2775 999:999",
        "./shm symbolic link 777 0:0",
        "./sshd directory 755 0:0",
        "port 80",
        "/dev/shm",
        "writable",
    ]
    assert not (root / "run" / "new").exists()


def test_whose_run_it_is_stays(root: Path) -> None:
    """As in images that are made for any user of group 0."""
    (root / "run").mkdir()
    os.chown(root / "run", 1000, 0)
    (root / "run").chmod(0o775)
    script = "stat -c '%a %u:%g' /run; su -s /bin/sh tester -c 'touch /run/pid' && echo written"
    assert lines_of(root, script) == ["775 1000:0", "written"]


def test_an_ordinary_users_machine_has_it_too(root: Path) -> None:
    """Owners that have no number there become root."""
    fill_run(root / "run")
    open_to_all(root.parent)
    seen = lines_of(root, LIST, user=65534)
    assert "./postgresql directory 2775 0:0" in seen


def test_an_init_of_the_images_own_finds_it_empty(root: Path) -> None:
    fill_run(root / "run")
    config = {**boot_config(["/bin/sh", "-c", "ls -A /run; echo listed"]), "mode": "handoff"}
    config["workload"]["argv"] = ["/bin/sh", "-c", "echo have $(ls -A /run); poweroff -f"]
    with Machine(root, config) as machine:
        machine.report("ready")
        machine.report("handed_off")
        machine.wait()
        assert "have\n" in machine.console


def test_a_run_without_end_is_cut_and_that_is_said(root: Path) -> None:
    run = root / "run"
    run.mkdir()
    deep = run
    for _ in range(bounds.RUN_DEPTH + 4):
        deep /= "d"
        deep.mkdir()
    with socket.socket(socket.AF_UNIX) as sock:
        here = os.open(run, os.O_PATH)
        sock.bind(f"/proc/self/fd/{here}/socket")
        os.close(here)
    with (run / "huge").open("wb") as file:
        file.truncate(bounds.RUN_BYTES + 1)
    said, *seen = lines_of(root, "find /run -name d | wc -l; ls /run")
    assert "3 entries of the image's /run are not there" in said
    assert seen == [str(bounds.RUN_DEPTH), "d"]
    many = run / "many"
    many.mkdir()
    for number in range(bounds.RUN_ENTRIES * 2):
        (many / str(number)).touch()
    said, count = lines_of(root, "find /run -mindepth 1 | wc -l")
    assert "are not there" in said
    assert bounds.RUN_ENTRIES - 10 < int(count) <= bounds.RUN_ENTRIES


# ── its volumes ──────────────────────────────────────────────────────────────────────────────────


def test_what_a_boot_does_without_is_reported(root: Path) -> None:
    """A sentence of each, and no more than the contract has."""
    for number in range(bounds.LEFT_OUT + 5):
        (root / f"file-{number}").touch()
    (root / ("x" * 200)).touch()
    paths = ["/" + "x" * 200, *(f"/file-{number}" for number in range(bounds.LEFT_OUT + 5))]
    config = boot_config(["true"])
    config["root"]["directories"] = paths
    with Machine(root, config) as machine:
        left_out = machine.report("ready")["left_out"]
        assert machine.wait() == 0
    assert len(left_out) == bounds.LEFT_OUT
    assert max(map(len, left_out)) == bounds.LEFT_OUT_TEXT
    assert left_out[1] == (
        "/file-0 is not made: /file-0 is a file and a directory is to be mounted there"
    )


def test_directories_are_made_where_they_are_missing(root: Path) -> None:
    (root / "there").mkdir()
    (root / "there").chmod(0o700)
    (root / "file").touch()
    (root / "dangling").symlink_to("/nowhere/at/all")
    (root / "link").symlink_to("/there/inner")
    paths = ["/data", "/var/lib/x y", "/there", "/file", "/dangling", "/there/inner/new"]
    config: Config = {"root": {**boot_config()["root"], "directories": paths}}
    script = "stat -c '%n %F %a %u:%g' /data '/var/lib/x y' /there /there/inner/new; ls -d /nowhere"
    seen = lines_of(root, f"{script} 2>&1; true", **config)
    assert [line for line in seen if line.startswith("microguest:")] == [
        "microguest: /file is not made: /file is a file and a directory is to be mounted there",
        (
            "microguest: /dangling is not made: /dangling is a symbolic link that leads nowhere; "
            "nothing is made through a link"
        ),
    ]
    assert seen[2:] == [
        "/data directory 755 0:0",
        "/var/lib/x y directory 755 0:0",
        "/there directory 700 0:0",
        "/there/inner/new directory 755 0:0",
        "ls: /nowhere: No such file or directory",
    ]


# ── files in memory ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("wanted", "kib"), [(None, 64 << 10), ("3m", 3 << 10), ("128M", 128 << 10)]
)
def test_shared_memory_is_as_large_as_dockers_or_as_asked(
    root: Path, wanted: str | None, kib: int
) -> None:
    config: Config = {} if wanted is None else {"shm_size": wanted}
    script = (
        "df -k /dev/shm | awk 'END { print $2 }'; dd if=/dev/zero of=/dev/shm/f bs=1M count=129"
    )
    size, *_, told = lines_of(root, f"{script} 2>&1; stat -c %s /dev/shm/f", **config)
    assert size == str(kib)
    assert told == str(kib << 10)


@pytest.mark.parametrize("memory", [96, 128, 256, 512, 2048, 65536])
@pytest.mark.parametrize(
    ("upper", "shm"), [("50%", "64m"), ("90%", "0"), ("0", "50%"), ("1g", "1g")]
)
def test_files_in_memory_leave_what_the_machine_needs(memory: int, upper: str, shm: str) -> None:
    free = (memory - 60) * MIB
    sizes = sizes_of(config_with(upper, shm), memory * MIB, free)
    files = sizes.root + sizes.shm + sizes.run
    assert files <= max(free - bounds.AGENT_MEMORY - bounds.MEMORY_RESERVE, memory * MIB / 3)
    assert min(sizes.root, sizes.shm, sizes.run) > 64 * 1024
    beside = max(free - bounds.AGENT_MEMORY - bounds.MEMORY_RESERVE - files, memory * MIB / 16)
    assert memory * MIB / 16 <= sizes.segments <= beside


def config_with(upper: str, shm: str) -> BootConfig:
    import json

    config = boot_config()
    config["root"]["upper"] = {"size": upper}
    return parse(json.dumps({**config, "shm_size": shm}))
