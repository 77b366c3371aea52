"""The options of `microguest run` that say what the machine is like, and what `boot` calls them.

The words are docker's where docker has them. Texts are taken apart when the command runs, so that
other commands need not import what knows them.
"""

import argparse
import json
from typing import Any, Final

from microguest.host_client.cli.environment import environment
from microguest.host_client.cli.files import read_named
from microguest.host_client.cli.parser import add_list, add_switch, whole
from microguest.host_client.errors import MachineError
from microguest.host_client.machines.settings import MachineOptions

__all__ = ["add_options", "machine_options"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """In groups, as `--help` shows them."""
    _add_files(parser.add_argument_group("files"))
    _add_privileges(parser.add_argument_group("what the command may do"))
    _add_life(parser.add_argument_group("its life"))
    _add_network(parser.add_argument_group("network and kernel"))


def machine_options(options: argparse.Namespace) -> MachineOptions:
    """MachineError for what cannot be understood; `Settings` checks what makes no sense."""
    from microguest.host_client.machines.mounts import parse_mount, parse_tmpfs, parse_volume

    mounts = [
        *map(parse_volume, options.volume),
        *map(parse_mount, options.mount),
        *map(parse_tmpfs, options.tmpfs),
    ]
    return {
        "machine": options.machine,
        "memory": options.memory,
        "cpus": options.cpus,
        "name": options.name,
        "labels": dict(map(_label, options.label)),
        "kernel": options.kernel,
        "hostname": options.hostname,
        "timeout": options.timeout,
        "command": options.command or None,
        "entrypoint": None if options.entrypoint is None else [options.entrypoint],
        "env": environment(options),
        "user": options.user,
        "cwd": options.workdir,
        "mounts": mounts,
        "read_only": options.read_only,
        "writable": options.writable,
        "upper": options.upper,
        "upper_size": options.upper_size,
        "shm_size": options.shm_size,
        "groups": options.group_add,
        "umask": options.umask,
        "rlimits": dict(map(_rlimit, options.ulimit)),
        "processes": options.pids_limit if options.pids_limit > 0 else None,
        "cap_add": options.cap_add,
        "cap_drop": options.cap_drop,
        "privileged": options.privileged,
        **_security(options.security_opt),
        "stop_signal": options.stop_signal,
        "restart": options.restart,
        "handoff": options.handoff,
        "network": options.network,
        "dns": options.dns,
        "dns_search": options.dns_search,
        "dns_options": options.dns_option,
        "hosts": dict(_pair(text, "add-host", "NAME:ADDRESS") for text in options.add_host),
        "sysctls": dict(_pair(text, "sysctl", "NAME=VALUE") for text in options.sysctl),
        "hardening": options.hardening,
        "modules": options.modules,
    }


def _add_files(group: Any) -> None:
    add_list(group, "-v", "--volume", metavar="SRC:DST[:ro]", help="show a directory of the host")
    add_list(group, "--mount", metavar="KEY=VALUE,...", help="type=bind|tmpfs|disk,src=,dst=,...")
    add_list(group, "--tmpfs", metavar="DST[:OPTIONS]", help="memory, as /run:size=16m,mode=755")
    add = group.add_argument
    add_switch(group, "--read-only", help="the root cannot be written to")
    add_list(group, "--writable", metavar="PATH", help="but this path in it can")
    add("--upper", metavar="FILE", help="keep what is written to the root in this file (qemu)")
    add("--upper-size", metavar="SIZE", help="of a new one (8G), or of the memory used instead")
    add("--shm-size", default="64M", metavar="SIZE", help="of /dev/shm; default 64M")


def _add_privileges(group: Any) -> None:
    add_list(group, "--cap-add", metavar="CAP", help="a capability that it keeps, or ALL")
    add_list(group, "--cap-drop", metavar="CAP", help="a capability that it loses, or ALL")
    add = group.add_argument
    add_switch(group, "--privileged", help="nothing is taken from it")
    add_list(
        group,
        *("--security-opt",),
        metavar="OPT",
        help="no-new-privileges, seccomp=FILE, mask=PATH[:PATH]",
    )
    add_list(group, "--group-add", metavar="GROUP", help="name or id")
    add_list(group, "--ulimit", metavar="NAME=SOFT[:HARD]", help="as nofile=1024:4096")
    add("--umask", type=_octal, default=0o022, metavar="MODE", help="default 022")
    add(
        "--pids-limit",
        type=whole("processes"),
        default=0,
        metavar="N",
        help="processes and threads (-1: any)",
    )


def _add_life(group: Any) -> None:
    add = group.add_argument
    add("--stop-signal", metavar="SIGNAL", help="instead of the image's")
    add(
        "--restart",
        default="no",
        metavar="POLICY",
        help="no, on-failure[:N], always or unless-stopped, which are one here",
    )
    add_switch(group, "--handoff", help="it is an init of its own, and becomes PID 1")


def _add_network(group: Any) -> None:
    add = group.add_argument
    add("--network", default="none", choices=("none", "user"), help="default none")
    add_list(group, "--dns", metavar="ADDRESS", help="a name server")
    add_list(group, "--dns-search", metavar="DOMAIN", help="for names without a dot")
    add_list(group, "--dns-option", metavar="OPTION", help="of resolv.conf(5)")
    add_list(group, "--add-host", metavar="NAME:ADDRESS", help="a line of /etc/hosts")
    add_list(group, "--sysctl", metavar="NAME=VALUE", help="a kernel parameter")
    add_switch(group, "--modules", help="kernel modules can be loaded after the boot")
    add("--hardening", default="default", choices=("default", "strict", "off"))


def _label(text: str) -> tuple[str, str]:
    """KEY[=VALUE]."""
    key, _, value = text.partition("=")
    if not key:
        raise MachineError(f"label {text!r:.100}: expected KEY[=VALUE]")
    return key, value


def _octal(text: str) -> int:
    try:
        return int(text, 8)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r:.20} is not an octal number, as 022") from None


def _rlimit(text: str) -> tuple[str, tuple[int, int]]:
    """NAME=SOFT[:HARD], as docker has it."""
    name, _, value = text.partition("=")
    soft, _, hard = value.partition(":")
    try:
        return name, (int(soft), int(hard or soft))
    except ValueError:
        raise MachineError(f"ulimit {text!r:.100}: expected NAME=SOFT[:HARD]") from None


def _pair(text: str, option: str, form: str) -> tuple[str, str]:
    """The words before and behind the separator that the form has; "=" is always one."""
    separators = {":", "="} & {*form, "="}
    at = min((at for separator in separators if (at := text.find(separator)) > 0), default=0)
    if not at or not text[at + 1 :]:
        raise MachineError(f"{option} {text!r:.100}: expected {form}")
    return text[:at], text[at + 1 :]


def _security(texts: list[str]) -> MachineOptions:
    """docker's --security-opt, and podman's mask=."""
    found: MachineOptions = {}
    masked: list[str] = []
    for text in texts:
        at = min((at for sign in "=:" if (at := text.find(sign)) > 0), default=len(text))
        name, value = text[:at], text[at + 1 :]  # docker's older form has a colon
        if name == "no-new-privileges" and value in ("", "true", "false"):
            found["no_new_privileges"] = value != "false"
        elif name == "seccomp" and value:
            found["seccomp"] = b"" if value == UNCONFINED else _profile(value)
        elif name == "mask" and value:
            masked += value.split(":")
        elif text == f"systempaths={UNCONFINED}":
            masked.clear()
        else:
            raise MachineError(
                f"security-opt {text!r:.100} is none of: no-new-privileges, seccomp=FILE, "
                "seccomp=unconfined, mask=PATH[:PATH], systempaths=unconfined"
            )
    found["masked"] = masked
    return found


def _profile(path: str) -> str:
    """A file of docker's format, of which only is known here that it is JSON."""
    try:
        text = read_named(path, "seccomp profile", PROFILE_MAX).decode("utf-8")
        json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MachineError(f"the seccomp profile {path} is no JSON: {error}") from error
    return text


PROFILE_MAX: Final = 1024 * 1024  # bytes; docker's own has 15 thousand
UNCONFINED: Final = "unconfined"
