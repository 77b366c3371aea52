"""What every kind of machine needs before its launch: boot config, token, the common plan."""

import hashlib
import os
from dataclasses import dataclass

from guest.bootconfig import AgentSettings, BootConfig, Endpoint
from guest.record import RecordError
from guest.rootplan import Lower, Root, Upper
from guest.workload import ImageDefaults, Workload
from host_client.errors import MachineError
from host_client.images import Image, process_for
from host_client.machines.bundle import Bundle
from host_client.machines.folder import Folder
from host_client.machines.settings import Settings

__all__ = ["Preparation", "lease_of"]

COMMAND_SHOWN = 200  # characters of the workload in `ls`


@dataclass(frozen=True)
class Preparation:
    """One machine about to be planned."""

    settings: Settings
    folder: Folder
    bundle: Bundle
    image: Image
    token: str

    def boot_config(self, machine: str, lower: Lower, listen: Endpoint, report: Endpoint) -> bytes:
        """The document for PID 1. MachineError names what does not fit."""
        settings = self.settings
        try:
            return (
                BootConfig(
                    machine=machine,
                    root=Root(lower=(lower,), upper=Upper(size=settings.upper_size)),
                    agent=AgentSettings(listen=listen, token=self.token),
                    report=report,
                    workload=self._workload(),
                    image=self._defaults(),
                    hostname=settings.hostname or self.folder.name,
                    modules=True,
                )
                .to_json()
                .encode("ascii")
            )
        except RecordError as error:
            raise MachineError(f"machine {self.folder.name}: {error}") from None

    @property
    def command(self) -> str:
        """The workload for people, shortened."""
        workload = self._workload()
        text = " ".join(workload.argv) if workload else ""
        printable = "".join(c if c.isprintable() else "?" for c in text)
        return printable[:COMMAND_SHOWN]

    @property
    def token_proof(self) -> str:
        """What the guest's `ready` must carry."""
        return hashlib.sha256(self.token.encode()).hexdigest()

    def _workload(self) -> Workload | None:
        settings = self.settings
        if not settings.has_workload:
            return None
        argv = process_for(self.image.config, settings.command, settings.entrypoint)
        defaults = self._defaults()
        return Workload(argv=argv, cwd=defaults.cwd, user=defaults.user, stdio=settings.stdio)

    def _defaults(self) -> ImageDefaults:
        """As `docker exec` has it: what was asked of `run` holds for every process."""
        settings, config = self.settings, self.image.config
        env = dict(item.partition("=")[::2] for item in config.env)
        return ImageDefaults(
            env={**env, **settings.env},
            cwd=settings.cwd if settings.cwd is not None else config.working_dir or "/",
            user=settings.user if settings.user is not None else config.user,
        )


def lease_of(image: Image, path: os.PathLike[str]) -> str:
    """The entry of the image cache that holds `path`, for the monitor to keep; "" for a `dir`."""
    return "" if image.digest is None else os.path.dirname(path)
