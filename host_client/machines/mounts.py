"""What is mounted into a machine's root: `Mount`, and the ways in which docker writes one.

Pure but for what is relative to the current directory. Whether a source is there is found out when
the machine is prepared.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Final

from microguest.guest.record import misfit
from microguest.host_client.errors import MachineError
from microguest.host_client.values import absolute_path

__all__ = ["SIZE", "Mount", "byte_count", "byte_size", "parse_mount", "parse_tmpfs", "parse_volume"]

KINDS: Final = ("bind", "tmpfs", "disk")
SIZE: Final = re.compile(r"([0-9]{1,15})([kKmMgGtT]?)(?:[iI]?[bB])?")  # as docker writes it
PAGE: Final = 4096  # bytes
SHIFTS: Final = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}


@dataclass(frozen=True, kw_only=True)
class Mount:
    """One of `boot`'s `mounts`.

    target: absolute path in the image; a missing one is made unless `create` is false.
    kind: "bind" shows a directory of the host, `source`; for qemu by virtiofsd, which sees the
    directory as the user that this program is. "disk" is a file system in the file `source`, for
    qemu only; an ext4 that is not read_only may be blank (it is formatted then), or missing if
    `size` (as 2G) says how large to make it, sparse. "tmpfs" is memory, at most `size` (as 64M or
    a percentage; "": half of the memory), its root has the `mode`.
    fstype: of a disk: "ext4", "erofs" or "squashfs".
    suid, dev: setuid bits and device nodes work on it. Of a bind for qemu, and as root, they say as
    well what the guest can leave on this host: without suid no file gets a set-user-id or a
    set-group-id bit or capabilities, without dev none is a device node.
    exec: programs on it can be run; None: yes,
    but not on a tmpfs, as docker has it.
    """

    target: str
    kind: str = "bind"
    source: str = ""
    read_only: bool = False
    size: str = ""
    mode: int = 0o1777
    fstype: str = "ext4"
    suid: bool = False
    dev: bool = False
    exec: bool | None = None
    create: bool = True

    def __post_init__(self) -> None:
        where = f"mount {self.target or '?'}"
        for each in fields(self):
            if wrong := misfit(getattr(self, each.name), each.type, each.name):
                raise TypeError(f"{where}: {wrong}")
        if self.kind not in KINDS:
            raise MachineError(f"{where}: kind {self.kind!r:.40} is none of: {', '.join(KINDS)}")
        if not self.target.startswith("/"):
            raise MachineError(f"{where}: the target must be an absolute path in the image")
        if (self.kind == "tmpfs") == bool(self.source):
            given = "has a source" if self.source else "needs a source"
            raise MachineError(f"{where}: a {self.kind} {given}")
        if "\0" in self.source + self.target:
            raise MachineError(f"{where}: a path with a NUL byte")
        if self.kind == "bind" and self.size:
            raise MachineError(f"{where}: only a tmpfs or a disk has a size")
        if self.size and (self.kind == "disk" or SIZE.fullmatch(self.size)):
            byte_size(self.size, where)

    @property
    def executable(self) -> bool:
        """Whether programs on it can be run."""
        return self.kind != "tmpfs" if self.exec is None else self.exec


def byte_size(text: str, name: str = "") -> int:
    """Bytes of "512M", "2G" or a number. MachineError where it is none; `name`: what it is of.

    Nor is less than a page one: who writes 64 means 64M.
    """
    size = byte_count(text, name)
    if size < PAGE:
        where = f"{name}: " if name else ""
        raise MachineError(
            f"{where}{text!r:.40} is {size} bytes, less than a page: write 512M or 2G"
        )
    return size


def byte_count(text: str, name: str = "") -> int:
    """As `byte_size`, for what has a minimum of its own."""
    match = SIZE.fullmatch(text)
    where = f"{name}: " if name else ""
    if match is None or not int(match[1]):
        raise MachineError(f"{where}{text!r:.40} is not a size: write 512M or 2G")
    return int(match[1]) << SHIFTS[match[2].lower()]


def parse_volume(text: str) -> Mount:
    """SRC:DST[:OPTION,...], as `docker run -v`; SRC is a directory. MachineError."""
    source, colon, rest = text.partition(":")
    target, _, options = rest.partition(":")
    if not (colon and source and target):
        raise MachineError(f"volume {text!r:.200}: expected SRC:DST or SRC:DST:ro")
    if "/" not in source and source not in (".", ".."):
        raise MachineError(
            f"volume {text!r:.200}: there are no named volumes: give a directory, as ./{source}"
        )
    return Mount(target=target, source=absolute_path(source), **_flags(options, "volume", text))


def parse_tmpfs(text: str) -> Mount:
    """DST[:OPTION,...] with size= and mode=, as `docker run --tmpfs`. MachineError."""
    target, _, options = text.partition(":")
    return Mount(kind="tmpfs", target=target, **_flags(options, "tmpfs", text))


def parse_mount(text: str) -> Mount:
    """type=bind|tmpfs|disk,src=…,dst=…[,readonly]…, as `docker run --mount`. MachineError."""
    given: dict[str, Any] = {}
    for word in text.split(","):
        key, equals, value = word.partition("=")
        field, convert = MOUNT_KEYS.get(key, ("", str))
        if not field or (not equals and convert is not _boolean):
            raise MachineError(
                f"mount {text!r:.200}: {key!r:.40} is none of: {', '.join(MOUNT_KEYS)}"
            )
        given[field] = _converted(convert, value if equals else "true", f"mount {text!r:.200}")
    if given.get("kind") == "volume":
        raise MachineError(
            f"mount {text!r:.200}: there are no named volumes: give a directory, as "
            "type=bind,src=./data"
        )
    if "kind" not in given:
        raise MachineError(f"mount {text!r:.200}: say type=bind, type=tmpfs or type=disk")
    if "target" not in given:
        raise MachineError(f"mount {text!r:.200}: say where, as dst=/data")
    if given.get("source"):
        given["source"] = absolute_path(given["source"])
    return Mount(**given)


def _flags(options: str, option: str, text: str) -> dict[str, Any]:
    """ro, noexec and so on, as mount(8) writes them."""
    found: dict[str, Any] = {}
    for word in filter(None, options.split(",")):
        key, equals, value = word.partition("=")
        if option == "tmpfs" and equals and key in ("size", "mode"):
            convert = MOUNT_KEYS[f"tmpfs-{key}"][1]
            found[key] = _converted(convert, value, f"{option} {text!r:.200}")
        elif word in FLAGS:
            field, flag = FLAGS[word]
            found[field] = flag
        else:
            known = (*FLAGS, *(("size=", "mode=") if option == "tmpfs" else ()))
            raise MachineError(
                f"{option} {text!r:.200}: {word!r:.40} is none of: {', '.join(known)}"
            )
    return found


def _converted(convert: Callable[[str], Any], value: str, where: str) -> Any:
    try:
        return convert(value)
    except ValueError:
        raise MachineError(f"{where}: {value!r:.40} makes no sense there") from None


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "1", "false", "0"):
        raise ValueError(text)
    return text.lower() in ("true", "1")


def _octal(text: str) -> int:
    return int(text, 8)


FLAGS: Final = {
    "rw": ("read_only", False),
    "ro": ("read_only", True),
    "suid": ("suid", True),
    "nosuid": ("suid", False),
    "dev": ("dev", True),
    "nodev": ("dev", False),
    "exec": ("exec", True),
    "noexec": ("exec", False),
}
MOUNT_KEYS: Final[dict[str, tuple[str, Callable[[str], Any]]]] = {
    "type": ("kind", str),
    "source": ("source", str),
    "src": ("source", str),
    "target": ("target", str),
    "dst": ("target", str),
    "destination": ("target", str),
    "readonly": ("read_only", _boolean),
    "ro": ("read_only", _boolean),
    "tmpfs-size": ("size", str),
    "tmpfs-mode": ("mode", _octal),
    "size": ("size", str),
    "fstype": ("fstype", str),
    "suid": ("suid", _boolean),
    "dev": ("dev", _boolean),
    "exec": ("exec", _boolean),
    "create": ("create", _boolean),
}
