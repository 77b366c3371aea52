"""What every kind of machine needs before its launch: boot config, token, the common plan."""

import hashlib
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from microguest.guest.boot.config import AgentSettings, BootConfig, Endpoint, Hardening, parse
from microguest.guest.boot.root import Lower, Root, Upper, Volume
from microguest.guest.boot.workload import ImageDefaults, Workload
from microguest.guest.bounds import VOLUMES
from microguest.guest.errors import BootConfigError
from microguest.guest.record import RecordError
from microguest.host_client.errors import MachineError
from microguest.host_client.images import Image, OnProgress
from microguest.host_client.machines.bundle import Bundle
from microguest.host_client.machines.folder import Folder
from microguest.host_client.machines.mounts import Mount, byte_size
from microguest.host_client.machines.networking import network_of
from microguest.host_client.machines.settings import TMPFS_SIZE, Settings
from microguest.host_client.machines.workload import defaults_of, workload_of
from microguest.host_client.values import absolute_path

__all__ = ["Preparation", "directory", "lease_of"]

COMMAND_SHOWN = 200  # characters of the workload in `ls`


@dataclass(frozen=True)
class Preparation:
    """One machine about to be planned."""

    settings: Settings
    folder: Folder
    bundle: Bundle
    image: Image
    token: str
    progress: OnProgress | None = None

    def boot_config(
        self,
        machine: str,
        lower: Lower,
        listen: Endpoint,
        report: Endpoint,
        *,
        upper: Upper | None = None,
        volumes: Sequence[Volume] = (),
    ) -> bytes:
        """The document for PID 1; `upper` None is a tmpfs. MachineError names what does not fit."""
        settings = self.settings
        hardening = "off" if settings.privileged else settings.hardening
        try:
            root = Root(
                lower=(lower,),
                upper=upper or Upper(size=settings.upper_size or TMPFS_SIZE),
                read_only=settings.read_only,
                writable=self._writable(),
                directories=self._cwd() if settings.read_only else self._volumes(),
            )
            config = BootConfig(
                machine=machine,
                mode="handoff" if settings.handoff else "supervise",
                root=root,
                volumes=tuple(volumes),
                shm_size=str(byte_size(settings.shm_size)),
                agent=AgentSettings(listen=listen, token=self.token),
                report=report,
                workload=self._workload(),
                image=self._defaults(),
                hostname=self._hostname,
                machine_id=settings.machine_id,
                network=network_of(settings),
                hardening=Hardening(
                    profile=hardening,
                    sysctls=dict(settings.sysctls),
                    modules=settings.modules or settings.privileged,
                ),
                modules=True,
            )
            document = config.to_json().encode("ascii")
            parse(document)  # as PID 1 will: what it would refuse, as a number that is too large
        except (RecordError, BootConfigError) as error:
            raise MachineError(f"machine {self.folder.name}: {error}") from None
        return document

    def volume(self, mount: Mount, *, source: dict[str, str]) -> Volume:
        """The record of a mount. `source`: its kind in the guest, and what it is found by there."""
        try:
            return Volume(
                target=mount.target,
                mode=mount.mode,
                read_only=mount.read_only,
                suid=mount.suid,
                dev=mount.dev,
                exec=mount.executable,
                create=mount.create,
                **source,
            )
        except RecordError as error:
            raise MachineError(f"mount {mount.target}: {error}") from None

    def tmpfs(self, mount: Mount) -> Volume:
        """The same for one that needs nothing of the host."""
        return self.volume(mount, source={"kind": "tmpfs", "size": mount.size or TMPFS_SIZE})

    @property
    def command(self) -> str:
        """The workload for people, as a shell would take it, shortened."""
        workload = self._workload()
        return shlex.join(workload.argv)[:COMMAND_SHOWN] if workload else ""

    @property
    def token_proof(self) -> str:
        """What the guest's `ready` must carry."""
        return hashlib.sha256(self.token.encode()).hexdigest()

    def _workload(self) -> Workload | None:
        return workload_of(self.settings, self.image.config, self._defaults())

    def _defaults(self) -> ImageDefaults:
        return defaults_of(self.settings, self.image.config, self._hostname)

    @property
    def _hostname(self) -> str:
        return self.settings.hostname or self.folder.name

    def _writable(self) -> tuple[str, ...]:
        if not self.settings.read_only:
            return ()
        return tuple(dict.fromkeys((*self.settings.writable, *self._volumes())))

    def _cwd(self) -> tuple[str, ...]:
        """The working directory, to be made while the root can still be written to, as docker does.

        Of one with `..` only the guest knows where it leads: there it has to exist.
        """
        path = os.path.normpath(f"/{self._defaults().cwd.lstrip('/')}")
        return () if path == "/" or ".." in self._defaults().cwd.split("/") else (path,)

    def _volumes(self) -> tuple[str, ...]:
        """The image's volumes where nothing else is mounted: they are there and can be written to,
        as with docker.
        """
        mounted = {mount.target.rstrip("/") for mount in self.settings.mounts}
        paths = (os.path.normpath(f"/{path}") for path in self.image.config.volumes)
        own = (f"/{path.lstrip('/')}" for path in paths)  # normpath keeps a second slash
        kept = tuple(dict.fromkeys(path for path in own if path != "/" and path not in mounted))
        if len(kept) > VOLUMES:
            raise MachineError(
                f"machine {self.folder.name}: the image's config has {len(kept)} Volumes, at most "
                f"{VOLUMES} can be made"
            )
        return kept


def directory(path: str, target: str) -> str:
    """The absolute path of a mount's source. MachineError where it is no directory."""
    absolute = absolute_path(path)
    if not os.path.isdir(absolute):
        found = "is no directory" if os.path.lexists(absolute) else "does not exist"
        raise MachineError(f"mount {target}: {absolute} {found}")
    return absolute


def lease_of(image: Image, path: os.PathLike[str]) -> str:
    """The entry of the image cache that holds `path`, for the monitor to keep; "" for a `dir`."""
    return "" if image.digest is None else os.path.dirname(path)
