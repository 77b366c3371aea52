"""What a caller can choose about a machine, checked before anything is made."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from guest.record import RecordError
from guest.rootplan import Upper
from host_client.errors import MachineError

__all__ = ["Settings", "mebibytes"]

MEMORY: Final = re.compile(r"([0-9]{1,9})([kKmMgG]?)")
MEMORY_MIN: Final = 64  # MiB; the kernel and the initramfs need most of that
CPUS_MAX: Final = 256


@dataclass(frozen=True, kw_only=True)
class Settings:
    """As the parameters of `host_client.boot`, which documents them."""

    image: str
    machine: str = "qemu"
    memory: str = "512M"
    cpus: int = 1
    name: str | None = None
    kernel: str | None = None
    command: Sequence[str] | None = None
    entrypoint: Sequence[str] | None = None
    workload: bool | None = None  # None: where a command or an entrypoint is given
    stdio: str = "console"
    env: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None
    cwd: str | None = None
    hostname: str | None = None
    upper_size: str = "50%"
    timeout: float = 60.0
    keep: bool = False

    def __post_init__(self) -> None:
        mebibytes(self.memory)
        try:
            Upper(size=self.upper_size)
        except RecordError as error:
            raise MachineError(f"upper_size: {error}") from None
        if not 1 <= self.cpus <= CPUS_MAX:
            raise MachineError(f"cpus must be 1 to {CPUS_MAX}, not {self.cpus}")
        for name, value in self.env.items():
            if not name or "=" in name or "\0" in name + value:
                raise MachineError(f"{name!r:.80} cannot be the name of an environment variable")

    @property
    def has_workload(self) -> bool:
        """Whether the image's process (or the given one) runs, or the machine idles."""
        if self.workload is not None:
            return self.workload
        return self.command is not None or self.entrypoint is not None


def mebibytes(memory: str) -> int:
    """The size in MiB of "512M", "2G" or a number of bytes. MachineError where it is none."""
    match = MEMORY.fullmatch(memory)
    if match is None:
        raise MachineError(f"memory {memory!r:.40} is not a size: write 512M or 2G")
    shift = {"": 0, "k": 10, "m": 20, "g": 30}[match[2].lower()]
    size = (int(match[1]) << shift) >> 20
    if size < MEMORY_MIN:
        raise MachineError(f"memory {memory} is too little: a machine needs {MEMORY_MIN}M")
    return size
