"""What the guest does without once it is up; docs/security.md lists each and what it prevents."""

from guest.bootconfig import BootConfig

__all__ = ["harden"]


def harden(config: BootConfig) -> None:
    """Apply the profile and the config's own sysctls. Raises Failure for the latter only."""
