"""`machine="namespaces"`: the very same PID 1 in Linux namespaces, without a VM. No isolation.

The launcher is the bundle's own program; agent and reports go over Unix sockets in the run folder.
"""

import os
from typing import Final

from microguest.guest.boot.config import Endpoint
from microguest.guest.boot.root import Lower, Volume
from microguest.host_client import images
from microguest.host_client.client.address import SUN_PATH_MAX, UnixAddress
from microguest.host_client.errors import MachineError
from microguest.host_client.machines.mounts import Mount
from microguest.host_client.machines.plan import Plan, blank
from microguest.host_client.machines.prepare import Preparation, directory, lease_of
from microguest.host_client.machines.settings import MEMORY, Settings

__all__ = ["NamespacesBackend"]

# Paths of the initial root, where the launcher shows the run folder's `host` and the image's tree.
HOST_FOLDER: Final = "/microguest/host"
LOWER: Final = "/microguest/lower"
VOLUMES: Final = "/microguest/volumes"  # what --volume names, by its number
AGENT_SOCKET: Final = "agent.sock"
REPORT_SOCKET: Final = "report.sock"
BOOT_FILE: Final = "boot.json"


class NamespacesBackend:
    """Needs the kernel's namespaces: as root, or where users may make user namespaces."""

    name = "namespaces"

    def check(self, settings: Settings) -> None:
        """MachineError for what this machine cannot do."""
        if settings.kernel is not None:
            raise MachineError("machine namespaces runs on the host's kernel: leave kernel out")
        if settings.memory != MEMORY or settings.cpus != 1:
            raise MachineError(
                "machine namespaces has this host's memory and processors, and limits neither: "
                "leave memory (-m) and cpus out, or use qemu"
            )
        if settings.processes is not None:
            raise MachineError(
                "machine namespaces has no cgroup to limit processes in: leave processes "
                "(--pids-limit) out, or use qemu"
            )
        if settings.network != "none":
            raise MachineError("machine namespaces has no network: leave network out, or use qemu")
        if settings.upper is not None or any(mount.kind == "disk" for mount in settings.mounts):
            raise MachineError("machine namespaces has no disks: use qemu, or bind a directory")

    def plan(self, preparation: Preparation) -> Plan:
        """Write the boot files and say what to start."""
        settings, folder = preparation.settings, preparation.folder
        host = os.path.join(folder.run, "host")
        assert len(HOST_FOLDER) + len(REPORT_SOCKET) < SUN_PATH_MAX
        os.mkdir(host, 0o700)
        root = images.as_directory(preparation.image, folder.run, progress=preparation.progress)
        sources: list[str] = []
        volumes = [volume_of(preparation, mount, sources) for mount in settings.mounts]
        config = preparation.boot_config(
            "namespaces",
            Lower(kind="directory", path=LOWER),
            Endpoint(transport="unix", path=f"{HOST_FOLDER}/{AGENT_SOCKET}"),
            Endpoint(transport="unix", path=f"{HOST_FOLDER}/{REPORT_SOCKET}"),
            volumes=volumes,
        )
        folder.write_run(BOOT_FILE, config)
        bound = (word for source in sources for word in ("--volume", source))
        argv = (preparation.bundle.program, "namespaces", "--root", str(root))
        return Plan(
            name=folder.name,
            machine=self.name,
            image=settings.image,
            command=preparation.command,
            labels=dict(settings.labels),
            stdio=settings.stdio,
            url=str(UnixAddress(os.path.join(host, AGENT_SOCKET))),
            argv=(*argv, *bound, "--run", folder.run, "--parent", blank("monitor")),
            console="stdout",
            report_socket=f"host/{REPORT_SOCKET}",
            lease=lease_of(preparation.image, root),
            token_proof=preparation.token_proof,
            boot_timeout=settings.timeout,
            boot_files=(BOOT_FILE,),
            keep=settings.keep,
        )


def volume_of(preparation: Preparation, mount: Mount, sources: list[str]) -> Volume:
    """What the guest mounts; a directory that the launcher has to bind is added to `sources`."""
    if mount.kind == "tmpfs":
        return preparation.tmpfs(mount)
    sources.append(directory(mount.source, mount.target))
    path = f"{VOLUMES}/{len(sources) - 1}"
    return preparation.volume(mount, source={"kind": "directory", "path": path})
