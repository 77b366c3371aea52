"""What a caller can choose about a machine, checked before anything is made."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final, Self, TypedDict

from microguest.guest import bounds
from microguest.guest.boot.root import Upper
from microguest.guest.boot.workload import Restart
from microguest.guest.record import RecordError, misfit
from microguest.host_client.errors import MachineError
from microguest.host_client.machines.mounts import SIZE, Mount, byte_count, byte_size
from microguest.host_client.machines.networking import check_network
from microguest.host_client.values import Argument, identity, listed, nearest, path, word_of

__all__ = ["MEMORY", "MachineOptions", "Settings", "mebibytes", "restart_of"]

MEMORY: Final = "512M"
CPUS_MAX: Final = 256
TMPFS_SIZE: Final = "50%"
UPPER_SIZE: Final = "8G"
SHM_SIZE: Final = "64M"
HARDENINGS: Final = ("default", "strict", "off")
COUNT: Final = re.compile("[0-9]{1,9}")
LABELS_MAX: Final = 4 * 1024  # bytes of JSON; they are in the machine's state


class MachineOptions(TypedDict, total=False):
    """Everything that `boot` takes beside the image; docs/reference/host.md has the details.

    The machine:
    machine       "qemu", or "namespaces": the same PID 1 without a VM, which isolates nothing
    memory, cpus  of the virtual machine: 512M or 2G; a number (qemu)
    name          None makes one up
    labels        words of yours about it, by key: in its state, and shown by `ls`
    kernel        path of another one than the bundle's
    hostname      None: its name
    machine_id    32 hexadecimal digits for /etc/machine-id
    network       "none", or "user" (qemu): outgoing connections, IPv4, through this host
    dns, dns_search, dns_options   of /etc/resolv.conf; with network user QEMU's name server
    hosts         names and their addresses for /etc/hosts
    hardening     "default", "strict" or "off": see docs/design/security.md
    modules       kernel modules can be loaded after the boot
    sysctls       as {"net.core.somaxconn": "1024"}
    timeout       seconds from the launch to the ready agent

    Its root:
    read_only     nothing can be written to but the volumes, the `writable` paths and the image's
                  own volumes
    writable      paths that can be all the same
    upper         a file that takes all that is written to the root and keeps it for the next boot;
                  made where there is none (qemu)
    upper_size    of the tmpfs that takes the writes otherwise (tmpfs(5): 50%), or of a new `upper`
                  (8G, sparse)
    mounts        Mounts
    shm_size      of /dev/shm: 64M

    Its process; env, user and cwd hold for those that the agent starts, too:
    command, entrypoint   lists of words, by docker's rules; with neither the machine idles
    env, user, cwd   over the image's
    groups        names or ids, beside those that the user has
    umask         0o022
    rlimits       {"nofile": (soft, hard)}, -1 for no limit
    processes     how many it may have with its descendants, threads included
    cap_add, cap_drop   names or "ALL"; it has all of the virtual machine's to begin with
    privileged    all capabilities, nothing masked, no filter, no hardening
    no_new_privileges   setuid bits and file capabilities give it nothing
    seccomp       a filter as microguest.seccomp makes it, or the text of a profile (JSON, as
                  docker has it), which is compiled for the capabilities that it has
    masked, read_only_paths   paths that nobody can look into, or write to
    stop_signal   what asks it to end; None: the image's, else TERM
    restart       "no", "on-failure", "on-failure:N" or "always"
    handoff       it is an init of its own and becomes PID 1
    """

    machine: str
    memory: str
    cpus: int
    name: str | None
    labels: Mapping[str, str]
    kernel: str | os.PathLike[str] | None
    hostname: str | None
    machine_id: str
    network: str
    dns: Sequence[str]
    dns_search: Sequence[str]
    dns_options: Sequence[str]
    hosts: Mapping[str, str]
    hardening: str
    modules: bool
    sysctls: Mapping[str, str]
    timeout: float
    read_only: bool
    writable: Sequence[str]
    upper: str | os.PathLike[str] | None
    upper_size: str | None
    mounts: Sequence[Mount]
    shm_size: str
    command: Sequence[Argument] | None
    entrypoint: Sequence[Argument] | None
    env: Mapping[str, str] | None
    user: str | int | None
    cwd: str | os.PathLike[str] | None
    groups: Sequence[str | int]
    umask: int
    rlimits: Mapping[str, tuple[int, int]]
    processes: int | None
    cap_add: Sequence[str]
    cap_drop: Sequence[str]
    privileged: bool
    no_new_privileges: bool
    seccomp: bytes | str
    masked: Sequence[str]
    read_only_paths: Sequence[str]
    stop_signal: str | None
    restart: str
    handoff: bool


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of one machine, and what only the command line chooses."""

    image: str
    machine: str = "qemu"
    memory: str = MEMORY
    cpus: int = 1
    name: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    kernel: str | None = None
    hostname: str | None = None
    machine_id: str = ""
    network: str = "none"
    dns: Sequence[str] = ()
    dns_search: Sequence[str] = ()
    dns_options: Sequence[str] = ()
    hosts: Mapping[str, str] = field(default_factory=dict)
    hardening: str = "default"
    modules: bool = False
    sysctls: Mapping[str, str] = field(default_factory=dict)
    timeout: float = 60.0
    read_only: bool = False
    writable: Sequence[str] = ()
    upper: str | None = None
    upper_size: str | None = None
    mounts: Sequence[Mount] = ()
    shm_size: str = SHM_SIZE
    command: Sequence[str] | None = None
    entrypoint: Sequence[str] | None = None
    env: Mapping[str, str] | None = None
    user: str | None = None
    cwd: str | None = None
    groups: Sequence[str] = ()
    umask: int = 0o022
    rlimits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    processes: int | None = None
    cap_add: Sequence[str] = ()
    cap_drop: Sequence[str] = ()
    privileged: bool = False
    no_new_privileges: bool = False
    seccomp: bytes | str = b""
    masked: Sequence[str] = ()
    read_only_paths: Sequence[str] = ()
    stop_signal: str | None = None
    restart: str = "no"
    handoff: bool = False
    workload: bool | None = None  # None: where a command, an entrypoint or `handoff` is given
    stdio: str = "console"
    # Seconds that an ended process's output waits for who started the machine, who shall be there.
    output_wait: float = bounds.OUTPUT_GRACE
    terminal: tuple[int, int] = (24, 80)  # rows and columns, for stdio "terminal"
    keep: bool = False  # state and console stay after the end

    @classmethod
    def of(cls, image: str, options: MachineOptions, **own: Any) -> Self:
        """What a caller of `boot` has chosen. TypeError, naming the option, for wrong types.

        None is an option's default, but of `timeout`, where it is an error.
        Paths and ids are taken in every form that a person writes them. `own`: what is no option.
        """
        given = dict(own)
        for name, value in options.items():
            if name not in MachineOptions.__annotations__:
                known = nearest(name, MachineOptions.__annotations__)
                raise TypeError(f"there is no option {name}: {known}")
            if value is None and name != "timeout":  # that could be meant as no limit
                continue
            given[name] = value
            if name in ("kernel", "upper", "cwd"):
                given[name] = path(value, name)
            elif name == "user":
                given[name] = identity(value, name)
            elif name == "groups":
                given[name] = tuple(identity(each, name) for each in listed(value, name))
            elif name in ("memory", "upper_size", "shm_size") and isinstance(value, int):
                raise TypeError(f'{name}: {value} of what? Write "512M" or "2G"')
            elif name in ("command", "entrypoint"):
                given[name] = tuple(word_of(each, name) for each in listed(value, name))
        return cls(image=image, **given)

    def __post_init__(self) -> None:
        self._check_types()
        mebibytes(self.memory)
        self._check_upper()
        byte_size(self.shm_size, "shm_size")
        if len(json.dumps(dict(self.labels))) > LABELS_MAX:
            raise MachineError(f"labels: more than {LABELS_MAX} bytes, as JSON")
        if not 0 < self.timeout <= bounds.SECONDS_MAX:
            most = f"{bounds.SECONDS_MAX:.0f} seconds"
            raise MachineError(f"timeout: must be more than 0, and at most {most}")
        if not 1 <= self.cpus <= CPUS_MAX:
            raise MachineError(f"cpus must be 1 to {CPUS_MAX}, not {self.cpus}")
        self._check_environment()
        if self.network not in ("none", "user"):
            raise MachineError(f"network {self.network!r:.40} is not none or user")
        check_network(self)
        if self.writable and not self.read_only:
            raise MachineError("writable: the root is not read_only, all of it can be written to")
        if self.hardening not in HARDENINGS:
            names = ", ".join(HARDENINGS)
            raise MachineError(f"hardening {self.hardening!r:.40} is none of: {names}")
        restart_of(self.restart)
        if self.restart != "no" and self.stdio != "console":
            raise MachineError(
                "restart: only a command that writes to the console can be started again (run -d)"
            )
        if self.handoff and self.stdio != "console":
            raise MachineError("handoff: an init has the console, not our streams (run -d)")

    def _check_environment(self) -> None:
        if self.cwd is not None and not self.cwd.startswith("/"):
            raise MachineError(f"cwd {self.cwd!r:.100} is not an absolute path in the image")
        for name, value in (self.env or {}).items():
            if not name or "=" in name or "\0" in name + value:
                raise MachineError(f"{name!r:.80} cannot be the name of an environment variable")

    def _check_types(self) -> None:
        for each in fields(self):
            if wrong := misfit(getattr(self, each.name), each.type, each.name):
                raise TypeError(wrong)

    def _check_upper(self) -> None:
        if self.upper is not None:
            byte_size(self.upper_size or UPPER_SIZE, "upper_size")
            return
        if self.upper_size and SIZE.fullmatch(self.upper_size):
            byte_size(self.upper_size, "upper_size")
        try:
            Upper(size=self.upper_size or TMPFS_SIZE)
        except RecordError as error:
            raise MachineError(f"upper_size: {error}") from None

    @property
    def has_workload(self) -> bool:
        """Whether the image's process (or the given one) runs, or the machine idles."""
        if self.workload is not None:
            return self.workload
        return self.command is not None or self.entrypoint is not None or self.handoff


def mebibytes(memory: str) -> int:
    """The size in MiB of "512M", "2G" or a number of bytes. MachineError where it is none."""
    return byte_count(memory, "memory") >> 20


def restart_of(text: str) -> Restart:
    """docker's policies: no, on-failure[:N], always. MachineError."""
    policy, colon, limit = text.partition(":")
    if text == "no":
        return Restart()
    if policy == "on-failure" and (not colon or COUNT.fullmatch(limit)):
        return Restart(policy="on-failure", limit=int(limit or 0))
    if text in ("always", "unless-stopped"):  # a machine that was stopped is gone
        return Restart(policy="always")
    raise MachineError(
        f"restart {text!r:.40} is none of: no, on-failure, on-failure:N, always, unless-stopped"
    )
