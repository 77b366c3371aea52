"""Filters of system calls for processes in the guest, compiled from names to what seccomp(2) takes.

    agent.exec(["make"], seccomp=seccomp.deny(seccomp.PRIVILEGED, arch=agent.info().machine))

Pure: needs no libseccomp. `deny` makes a list of what is refused, `profile` compiles what docker
and the OCI runtime spec call a profile. docs/design/workload.md has the rules.
"""

import errno as errnos
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

from microguest.host_client.seccomp.numbers import ELSEWHERE, NUMBERS
from microguest.host_client.seccomp.program import AUDIT, Condition, Rules, assemble

__all__ = ["PRIVILEGED", "deny", "names", "profile"]


def deny(refused: Iterable[str], errno: int = errnos.EPERM, *, arch: str) -> bytes:
    """A program that lets the calls named fail with `errno` and allows all others.

    `arch` is the guest's, as `uname -m` says it: "x86_64" or "aarch64". A call that this
    architecture does not have (mkdir on aarch64) is passed over. Calls of another one, 32-bit and
    x32 included, fail with EPERM: their numbers mean something else. ValueError for a name or an
    architecture that is not known here, or an errno that is none.
    """
    if isinstance(refused, str):
        raise TypeError(f"expected a list of names, not one string: pass [{refused!r}]")
    answer = FAIL | checked_errno(errno)
    column = checked_column(arch)
    calls = {}
    for name in refused:
        if name not in NUMBERS:
            raise ValueError(
                f"{name!r:.100} is not among the system calls known here (seccomp.names() lists "
                "them): compile the filter with libseccomp (seccomp_export_bpf) and pass its bytes"
            )
        number = NUMBERS[name][column]
        if number is not None:
            calls[number] = Rules(answer)
    return assemble(calls, ALLOW, FOREIGN, arch)


def names() -> list[str]:
    """Every name that `deny` takes, sorted."""
    return sorted(NUMBERS)


def profile(
    document: Mapping[str, Any] | str | bytes,
    *,
    arch: str,
    capabilities: Collection[str] = (),
    kernel: str = "6.1",
) -> bytes:
    """The program of a profile: `linux.seccomp` of an OCI config, or a file of docker's format.

    `capabilities` are those of the process's bounding set, as net_admin or CAP_NET_ADMIN, and
    `kernel` the guest's version: what docker's `includes` and `excludes` are about. `arch` is as in
    `deny`. Of several rules for one call the first whose conditions hold counts, those with
    conditions before one without. Calls of other architectures fail with EPERM, also where the
    profile lists them. ValueError for what cannot be kept, with the place in the profile.
    """
    try:
        given = json.loads(document) if isinstance(document, str | bytes) else document
    except ValueError as error:
        raise ValueError(f"the profile is no JSON: {error}") from None
    check_keys(given, PROFILE_KEYS, "profile")
    column = checked_column(arch)
    default = checked_action(given, "defaultAction", "defaultErrnoRet", "profile")
    situation = Situation(arch, capabilities, kernel)
    gathered: dict[int, list[tuple[tuple[Condition, ...], int]]] = {}
    for place, rule in enumerate(sequence(given, "syscalls", "profile")):
        where = f"syscalls[{place}]"
        check_keys(rule, RULE_KEYS, where)
        action = checked_action(rule, "action", "errnoRet", where)
        alternatives = checked_conditions(rule, where)
        if not situation.applies(rule, where) or action == default:
            continue
        for name in checked_names(rule, where, strict=default in PERMISSIVE):
            number = NUMBERS[name][column]
            if number is not None:
                choices = gathered.setdefault(number, [])
                choices += [(conditions, action) for conditions in alternatives]
    calls = {number: in_order(choices, default) for number, choices in gathered.items()}
    return assemble(calls, default, FOREIGN, arch)


def in_order(choices: list[tuple[tuple[Condition, ...], int]], default: int) -> Rules:
    """What has conditions first, and then the first that has none."""
    plain = [action for conditions, action in choices if not conditions]
    conditional = tuple(choice for choice in choices if choice[0])
    return Rules(plain[0] if plain else default, conditional)


class Situation:
    """What `includes` and `excludes` of docker's format are compared with."""

    def __init__(self, arch: str, capabilities: Collection[str], kernel: str) -> None:
        self.arches = (arch, GO_NAMES[arch])
        self.capabilities = {name.upper().removeprefix("CAP_") for name in capabilities}
        self.kernel = version(kernel, "kernel")

    def applies(self, rule: Mapping[str, Any], where: str) -> bool:
        """Whether the rule is for this process, on this kernel and architecture."""
        includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
        for key, found in (("includes", includes), ("excludes", excludes)):
            check_keys(found, FILTER_KEYS, f"{where}.{key}")
        held = [self._has(name) for name in includes.get("caps") or ()]
        if not all(held) or any(self._has(name) for name in excludes.get("caps") or ()):
            return False
        arches = includes.get("arches") or self.arches
        if not set(arches) & set(self.arches) or set(excludes.get("arches") or ()) & set(
            self.arches
        ):
            return False
        least, most = includes.get("minKernel"), excludes.get("minKernel")
        if least and self.kernel < version(least, f"{where}.includes.minKernel"):
            return False
        return not (most and self.kernel >= version(most, f"{where}.excludes.minKernel"))

    def _has(self, name: str) -> bool:
        return name.upper().removeprefix("CAP_") in self.capabilities


# ── what a profile may say ───────────────────────────────────────────────────────────────────────


def check_keys(given: object, known: frozenset[str], where: str) -> None:
    """It is an object, and says nothing that would be overlooked. Raises ValueError."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: expected an object, got {given!r:.100}")  # noqa: TRY004  a file
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(f"{where}: {', '.join(unknown)[:100]} cannot be kept here; remove it")


def sequence(given: Mapping[str, Any], key: str, where: str) -> Sequence[Any]:
    """A list, [] where there is none. Raises ValueError."""
    found = given.get(key)
    if found is None:
        return []
    if not isinstance(found, list | tuple):
        raise ValueError(f"{where}.{key}: expected a list, not {found!r:.99}")  # noqa: TRY004  same
    return found


def checked_action(given: Mapping[str, Any], key: str, errno_key: str, where: str) -> int:
    """The return value for an action and its errno. Raises ValueError."""
    name = given.get(key)
    if name not in ACTIONS:
        known = ", ".join(ACTIONS)
        raise ValueError(f"{where}.{key}: {name!r:.100} is not one of {known}")
    answer = ACTIONS[name]
    if answer not in (FAIL, TRACE):
        return answer
    errno = given.get(errno_key)
    if errno is None:
        errno = errnos.EPERM
    try:
        return answer | checked_errno(errno)
    except ValueError as error:
        raise ValueError(f"{where}.{errno_key}: {error}") from None


def checked_names(rule: Mapping[str, Any], where: str, *, strict: bool) -> list[str]:
    """The calls that it is about, those of other architectures left out. Raises ValueError.

    `strict`: the rule refuses, so one that is not known must not be passed over.
    """
    found = [*sequence(rule, "names", where), *([rule["name"]] if rule.get("name") else [])]
    for name in found:
        if not isinstance(name, str) or (strict and name not in NUMBERS and name not in ELSEWHERE):
            raise ValueError(
                f"{where}: {name!r:.100} is not a system call that is known here, "
                "and refusing it would be forgotten"
            )
    return [name for name in found if name in NUMBERS]


def checked_conditions(rule: Mapping[str, Any], where: str) -> list[tuple[Condition, ...]]:
    """Alternatives, each of conditions that all have to hold. Raises ValueError.

    One after the other and not together where an argument comes twice: as libseccomp's users do.
    """
    found = []
    for place, given in enumerate(sequence(rule, "args", where)):
        here = f"{where}.args[{place}]"
        check_keys(given, ARGUMENT_KEYS, here)
        index, value, second = (given.get(key, 0) for key in ("index", "value", "valueTwo"))
        operation = OPERATIONS.get(given.get("op", ""))
        if operation is None:
            raise ValueError(f"{here}.op: {given.get('op')!r:.100} is none of {[*OPERATIONS]}")
        if not all(type(number) is int for number in (index, value, second)):
            raise ValueError(f"{here}: index, value and valueTwo must be whole numbers")
        if not (0 <= index <= 5 and 0 <= value < 2**64 and 0 <= second < 2**64):
            raise ValueError(f"{here}: index is 0 to 5, value and valueTwo have 64 bits")
        masked = operation == MASKED
        found.append(
            Condition(index, "==", second & value, mask=value)
            if masked
            else Condition(index, operation, value)
        )
    if len({condition.index for condition in found}) < len(found):
        return [(condition,) for condition in found]
    return [tuple(found)]


def checked_errno(errno: object) -> int:
    """1 to ERRNO_MAX. Raises ValueError."""
    if type(errno) is not int or not 1 <= errno <= ERRNO_MAX:
        raise ValueError(f"errno: {errno!r:.100} is not 1 to {ERRNO_MAX}")
    return errno


def checked_column(arch: str) -> int:
    """Of NUMBERS. Raises ValueError."""
    if arch not in AUDIT:
        known = " or ".join(AUDIT)
        raise ValueError(
            f"architecture {arch!r:.100}: expected {known}; for others pass a compiled program"
        )
    return list(AUDIT).index(arch)


def version(text: str, where: str) -> tuple[int, int]:
    """Major and minor. Raises ValueError."""
    words = str(text).split("-")[0].split(".")
    if len(words) < 2 or not (words[0].isdecimal() and words[1].isdecimal()):
        raise ValueError(f"{where}: {text!r:.100} is not a version as 6.1")
    return int(words[0]), int(words[1])


# ── of the kernel's ABI (linux/seccomp.h), and names of the runtime spec ─────────────────────────

ALLOW: Final = 0x7FFF0000
LOG: Final = 0x7FFC0000
TRACE: Final = 0x7FF00000
FAIL: Final = 0x00050000  # SECCOMP_RET_ERRNO
TRAP: Final = 0x00030000
KILL_THREAD: Final = 0x00000000
KILL_PROCESS: Final = 0x80000000
ERRNO_MAX: Final = 4095  # what the kernel cuts it to
FOREIGN: Final = FAIL | errnos.EPERM
PERMISSIVE: Final = (ALLOW, LOG)

ACTIONS: Final = {
    "SCMP_ACT_ALLOW": ALLOW,
    "SCMP_ACT_ERRNO": FAIL,
    "SCMP_ACT_KILL": KILL_THREAD,
    "SCMP_ACT_KILL_PROCESS": KILL_PROCESS,
    "SCMP_ACT_KILL_THREAD": KILL_THREAD,
    "SCMP_ACT_LOG": LOG,
    "SCMP_ACT_TRACE": TRACE,
    "SCMP_ACT_TRAP": TRAP,
}
MASKED: Final = "masked"
OPERATIONS: Final = {
    "SCMP_CMP_EQ": "==",
    "SCMP_CMP_GE": ">=",
    "SCMP_CMP_GT": ">",
    "SCMP_CMP_LE": "<=",
    "SCMP_CMP_LT": "<",
    "SCMP_CMP_MASKED_EQ": MASKED,
    "SCMP_CMP_NE": "!=",
}
GO_NAMES: Final = {"x86_64": "amd64", "aarch64": "arm64"}

# Other architectures are refused in any case, and no flag changes what is allowed.
PROFILE_KEYS: Final = frozenset(
    ("defaultAction", "defaultErrnoRet", "architectures", "archMap", "flags", "syscalls", "comment")
)
RULE_KEYS: Final = frozenset(
    ("name", "names", "action", "errnoRet", "args", "comment", "includes", "excludes")
)
ARGUMENT_KEYS: Final = frozenset(("index", "value", "valueTwo", "op"))
FILTER_KEYS: Final = frozenset(("arches", "caps", "minKernel"))

# Calls that act on the guest as a whole: what docker's default profile refuses without further
# capabilities. clone(2) stays, which can make namespaces too.
PRIVILEGED: Final = (
    "_sysctl", "acct", "add_key", "adjtimex", "bpf", "clock_adjtime", "clock_settime",
    "create_module", "delete_module", "fanotify_init", "finit_module", "fsconfig", "fsmount",
    "fsopen", "fspick", "get_kernel_syms", "get_mempolicy", "init_module", "io_uring_enter",
    "io_uring_register", "io_uring_setup", "ioperm", "iopl", "kexec_file_load", "kexec_load",
    "keyctl", "lookup_dcookie", "mbind", "mount", "mount_setattr", "move_mount", "move_pages",
    "nfsservctl", "open_by_handle_at", "open_tree", "perf_event_open", "pivot_root", "query_module",
    "quotactl", "quotactl_fd", "reboot", "request_key", "set_mempolicy", "setdomainname",
    "sethostname", "setns", "settimeofday", "swapoff", "swapon", "sysfs", "syslog", "umount2",
    "unshare", "uselib", "userfaultfd", "ustat", "vhangup",
)  # fmt: skip
