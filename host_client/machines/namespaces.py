"""`machine="namespaces"`: the very same PID 1 in Linux namespaces, without a VM. No isolation.

The launcher is the bundle's own program; agent and reports go over Unix sockets in the run folder.
"""

import os
from typing import Final

from guest.bootconfig import Endpoint
from guest.rootplan import Lower
from host_client import images
from host_client.address import SUN_PATH_MAX, UnixAddress
from host_client.errors import MachineError
from host_client.machines.folder import write_file
from host_client.machines.plan import Plan
from host_client.machines.prepare import Preparation, lease_of
from host_client.machines.settings import Settings

__all__ = ["NamespacesBackend"]

# Paths of the initial root, where the launcher shows the run folder's `host` and the image's tree.
HOST_FOLDER: Final = "/microguest/host"
LOWER: Final = "/microguest/lower"
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

    def plan(self, preparation: Preparation) -> Plan:
        """Write the boot files and say what to start."""
        settings, folder = preparation.settings, preparation.folder
        host = os.path.join(folder.run, "host")
        assert len(HOST_FOLDER) + len(REPORT_SOCKET) < SUN_PATH_MAX
        os.mkdir(host, 0o700)
        root = images.as_directory(preparation.image, folder.run)
        config = preparation.boot_config(
            "namespaces",
            Lower(kind="directory", path=LOWER),
            Endpoint(transport="unix", path=f"{HOST_FOLDER}/{AGENT_SOCKET}"),
            Endpoint(transport="unix", path=f"{HOST_FOLDER}/{REPORT_SOCKET}"),
        )
        write_file(os.path.join(folder.run, BOOT_FILE), config)
        argv = (preparation.bundle.program, "namespaces", "--root", str(root))
        return Plan(
            name=folder.name,
            machine=self.name,
            image=settings.image,
            command=preparation.command,
            url=str(UnixAddress(os.path.join(host, AGENT_SOCKET))),
            argv=(*argv, "--run", folder.run, "--parent", "{monitor}"),
            console="stdout",
            report_socket=f"host/{REPORT_SOCKET}",
            lease=lease_of(preparation.image, root),
            token_proof=preparation.token_proof,
            boot_timeout=settings.timeout,
            boot_files=(BOOT_FILE,),
            keep=settings.keep,
        )
