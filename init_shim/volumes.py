"""What is mounted into the new root before it becomes the root: shares, disks, tmpfs, binds."""

from guest.rootplan import Volume
from init_shim.failure import Failure

__all__ = ["mount_volumes"]


def mount_volumes(volumes: tuple[Volume, ...]) -> None:
    """Parents first. Raises Failure."""
    if volumes:
        raise Failure("volumes are not supported")
