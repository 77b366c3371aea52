"""Filters of system calls for processes in the guest, compiled from names to what seccomp(2) takes.

    agent.exec(["make"], seccomp=seccomp.deny(seccomp.PRIVILEGED, arch=agent.info().machine))

Pure; imports nothing of this package. It knows the calls that are worth refusing, not all that
there are, so it makes lists of what is refused and not of what is allowed: whoever wants more
compiles with libseccomp and passes the bytes.
"""

import errno as errnos
import struct
from collections.abc import Iterable
from typing import Final

__all__ = ["PRIVILEGED", "deny", "names"]


def deny(refused: Iterable[str], errno: int = errnos.EPERM, *, arch: str) -> bytes:
    """A program that lets the calls named fail with `errno` and allows all others.

    `arch` is the guest's, as `uname -m` says it: "x86_64" or "aarch64". A call that this
    architecture does not have (mkdir on aarch64) is passed over. Calls of another one, 32-bit and
    x32 included, fail with EPERM: their numbers mean something else. ValueError for a name or an
    architecture that is not known here, or an errno that is none.
    """
    if isinstance(refused, str):
        raise TypeError(f"expected a list of names, not one string: pass [{refused!r}]")
    if not 1 <= errno <= ERRNO_MAX:
        raise ValueError(f"errno: {errno} is not 1 to {ERRNO_MAX}")
    column = _column(arch)
    found = set()
    for name in refused:
        if name not in NUMBERS:
            raise ValueError(
                f"{name!r:.100} is not among the system calls known here (seccomp.names() lists "
                "them): compile the filter with libseccomp (seccomp_export_bpf) and pass its bytes"
            )
        number = NUMBERS[name][column]
        if number is not None:
            found.add(number)
    return _assemble(sorted(found), errno, arch)


def names() -> list[str]:
    """Every name that `deny` takes, sorted."""
    return sorted(NUMBERS)


def _column(arch: str) -> int:
    if arch not in ARCHITECTURES:
        known = " or ".join(ARCHITECTURES)
        raise ValueError(
            f"architecture {arch!r:.100}: expected {known}; for others pass a compiled program"
        )
    return list(ARCHITECTURES).index(arch)


def _assemble(calls: list[int], errno: int, arch: str) -> bytes:
    """Compare the number with each of `calls`; the three answers are at the end."""
    foreign = [(JUMP_AT_LEAST, X32)] if arch == "x86_64" else []
    tests = [*foreign, *((JUMP_EQUAL, number) for number in calls)]
    end = 3 + len(tests)  # of the comparisons, where the answers begin
    program = [
        (LOAD, 0, 0, OFFSET_ARCH),
        (JUMP_EQUAL, 0, end, ARCHITECTURES[arch]),  # jumps count from the next instruction
        (LOAD, 0, 0, OFFSET_NUMBER),
    ]
    for here, (kind, value) in enumerate(tests, start=len(program) + 1):
        answer = end + 1 if kind == JUMP_EQUAL else end + 2
        program.append((kind, answer - here, 0, value))
    program += [
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, FAIL | errno),
        (RETURN, 0, 0, FAIL | errnos.EPERM),
    ]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)


# ── of the kernel's ABI: linux/bpf_common.h, linux/seccomp.h, linux/audit.h ──────────────────────

LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS: a word of struct seccomp_data
JUMP_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
JUMP_AT_LEAST: Final = 0x35  # BPF_JMP | BPF_JGE | BPF_K
RETURN: Final = 0x06  # BPF_RET | BPF_K
OFFSET_NUMBER: Final = 0
OFFSET_ARCH: Final = 4
ALLOW: Final = 0x7FFF0000  # SECCOMP_RET_ALLOW
FAIL: Final = 0x00050000  # SECCOMP_RET_ERRNO
ERRNO_MAX: Final = 4095  # what the kernel cuts it to
X32: Final = 0x40000000  # __X32_SYSCALL_BIT: x32's calls have the same architecture

# AUDIT_ARCH_*, both little-endian; in the order of the numbers in the tables below.
ARCHITECTURES: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# Calls that act on the guest as a whole: what docker's default profile refuses without further
# capabilities. clone(2) stays, which can make namespaces too. From asm/unistd_64.h and
# asm-generic/unistd.h; None: not there.
_PRIVILEGED: Final[dict[str, tuple[int | None, int | None]]] = {
    "_sysctl": (156, None), "acct": (163, 89), "add_key": (248, 217), "adjtimex": (159, 171),
    "bpf": (321, 280), "clock_adjtime": (305, 266), "clock_settime": (227, 112),
    "create_module": (174, None), "delete_module": (176, 106), "fanotify_init": (300, 262),
    "finit_module": (313, 273), "fsconfig": (431, 431), "fsmount": (432, 432), "fsopen": (430, 430),
    "fspick": (433, 433), "get_kernel_syms": (177, None), "get_mempolicy": (239, 236),
    "init_module": (175, 105), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425), "ioperm": (173, None), "iopl": (172, None),
    "kexec_file_load": (320, 294), "kexec_load": (246, 104), "keyctl": (250, 219),
    "lookup_dcookie": (212, 18), "mbind": (237, 235), "mount": (165, 40),
    "mount_setattr": (442, 442), "move_mount": (429, 429), "move_pages": (279, 239),
    "nfsservctl": (180, 42), "open_by_handle_at": (304, 265), "open_tree": (428, 428),
    "perf_event_open": (298, 241), "pivot_root": (155, 41), "query_module": (178, None),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "reboot": (169, 142),
    "request_key": (249, 218), "set_mempolicy": (238, 237), "setdomainname": (171, 162),
    "sethostname": (170, 161), "setns": (308, 268), "settimeofday": (164, 170),
    "swapoff": (168, 225), "swapon": (167, 224), "sysfs": (139, None), "syslog": (103, 116),
    "umount2": (166, 39), "unshare": (272, 97), "uselib": (134, None), "userfaultfd": (323, 282),
    "ustat": (136, None), "vhangup": (153, 58),
}  # fmt: skip

_ORDINARY: Final[dict[str, tuple[int | None, int | None]]] = {
    "accept": (43, 202), "accept4": (288, 242), "bind": (49, 200), "chmod": (90, None),
    "chown": (92, None), "chroot": (161, 51), "clone": (56, 220), "clone3": (435, 435),
    "connect": (42, 203), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "fchown": (93, 55), "fchownat": (260, 54), "fork": (57, None), "kcmp": (312, 272),
    "kill": (62, 129), "lchown": (94, None), "link": (86, None), "linkat": (265, 37),
    "listen": (50, 201), "memfd_create": (319, 279), "migrate_pages": (256, 238),
    "mkdir": (83, None), "mkdirat": (258, 34), "mknod": (133, None), "mknodat": (259, 33),
    "name_to_handle_at": (303, 264), "personality": (135, 92), "pidfd_getfd": (438, 438),
    "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "process_madvise": (440, 440),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "ptrace": (101, 117),
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "rmdir": (84, None),
    "seccomp": (317, 277), "socket": (41, 198), "socketpair": (53, 199), "symlink": (88, None),
    "symlinkat": (266, 36), "tgkill": (234, 131), "tkill": (200, 130), "unlink": (87, None),
    "unlinkat": (263, 35), "vfork": (58, None),
}  # fmt: skip

NUMBERS: Final = {**_PRIVILEGED, **_ORDINARY}
PRIVILEGED: Final = tuple(_PRIVILEGED)
