"""The program that serves a virtual machine directories of the host: where it is, what it is told.

There are two programs of that name: QEMU's own, in C, which came with QEMU until version 7.2 and
needs root, and its successor in Rust.
"""

import os
import shutil
import subprocess
from typing import Final

from microguest.host_client.errors import MachineError
from microguest.host_client.machines.deputy import ATTRIBUTE_RULES, capability_changes
from microguest.host_client.machines.plan import blank
from microguest.host_client.probe import probe

__all__ = ["is_successor", "share_command", "virtiofsd"]

PLACES: Final = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd")  # Debian's, of both
# A guest can mount anew what it has mounted read-only. QEMU's own virtiofsd cannot refuse writes,
# so it gets a read-only view of the directory, in a mount namespace that ends with it.
READ_ONLY: Final = (
    *("unshare", "--mount", "--propagation", "private", "sh", "-c"),
    'mount --bind -o ro "$1" "$1" && shift && exec "$@"',
    "sh",
)


def virtiofsd() -> str:
    """Its path. MachineError where it is not installed."""
    found = shutil.which("virtiofsd") or next(filter(os.path.exists, PLACES), None)
    if found is None:
        raise MachineError(
            "virtiofsd, which shows a virtual machine directories of the host, is not installed: "
            "install it (Debian: virtiofsd; on Debian 12 it is in qemu-system-common), or use a "
            "mount of type disk"
        )
    return found


def share_command(
    program: str, source: str, *, read_only: bool, suid: bool = False, dev: bool = False
) -> tuple[str, ...]:
    """virtiofsd's words; with a blank for the descriptor of its socket. MachineError.

    suid, dev: as root it may make files with set-user-id bits or capabilities, and device nodes;
    suid: it serves all extended attributes, not `user.*` only. The one in Rust serves none.
    As root it confines itself by chroot(2): its other way needs a PID namespace, whose processes do
    not all end with it.
    """
    root = os.geteuid() == 0
    changes = capability_changes(suid=suid, dev=dev) if root else ""
    if is_successor(program):
        return (
            *(program, f"--fd={blank('listener')}", f"--shared-dir={source}", "--cache=auto"),
            f"--sandbox={'chroot' if root else 'namespace'}",
            *(("--readonly",) if read_only else ()),
            *((f"--modcaps={changes}",) if changes else ()),
        )
    if not root:
        raise MachineError(
            f"{program} needs root: run as root, or install the virtiofsd that is written in Rust"
        )
    escaped = source.replace("\\", "\\\\").replace(",", "\\,")  # fuse_opt_parse
    return (
        *((*READ_ONLY, source) if read_only else ()),
        *(program, f"--fd={blank('listener')}", "-o", f"source={escaped}", "-o", "sandbox=chroot"),
        *("-o", "cache=auto", "-o", "xattr", "--rlimit-nofile=0"),
        *(() if suid else ("-o", f"xattrmap={ATTRIBUTE_RULES}")),
        *(("-o", f"modcaps={changes}") if changes else ()),
    )


def is_successor(program: str) -> bool:
    """Whether it is the one in Rust, by its options. MachineError where it does not even start."""
    try:
        done = probe([program, "--help"])
    except (OSError, subprocess.SubprocessError) as error:
        raise MachineError(f"{program} --help fails: {error}") from error
    return b"--shared-dir" in done.stdout + done.stderr
