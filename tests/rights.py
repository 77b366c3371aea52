"""Who may get at a test's files."""

import os
from pathlib import Path

__all__ = ["open_to_all"]


def open_to_all(folder: Path) -> None:
    """Let every user into it: pytest closes the folders that it makes, however deep this one is."""
    for each in (folder, *folder.parents):
        mode = each.stat().st_mode
        if each.stat().st_uid == os.geteuid() and mode & 0o055 != 0o055:
            each.chmod(mode | 0o055)
