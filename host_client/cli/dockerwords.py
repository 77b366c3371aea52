"""docker's words that this program does not have, and what does the same here, if anything does.

A sentence stands behind an error that names the word, so it is short, and true of this version.
"""

import re
from collections.abc import Mapping
from typing import Final

__all__ = [
    "COMMANDS",
    "about_command",
    "about_missing",
    "about_option",
    "about_signal",
    "about_value",
]

COPY: Final = (
    "skopeo copy docker://NAME oci:DIR:TAG brings an image here, and run takes oci:DIR:TAG"
)
FILES: Final = "images are files and directories of this host: run names one as oci:DIR:TAG"
MADE: Final = "images are made elsewhere, as by podman build, and run takes docker-archive:FILE"
NO_PORTS: Final = (
    "no connections come in from outside; microguest exec -i NAME nc 127.0.0.1 PORT reaches a "
    "server in a machine whose image has nc"
)
SHARES: Final = "there are no volumes with names: run -v takes a directory of this host"
NO_RESTART: Final = "a machine that has ended is not started again: run another one"
ONE_NETWORK: Final = "a machine has no network, or with run --network user one of its own"
CPUS: Final = "run --cpus gives a virtual machine that many processors"
PRIVATE: Final = "a machine has its own kernel, and shares no namespace with this host or another"
NO_DEVICES: Final = "no device of this host is in a machine"
NO_SWAP: Final = "a virtual machine has no swap: --memory is all that it has"
OWN_MEMORY: Final = "a machine has a kernel and memory of its own, which --memory says"
LATEST: Final = "ps -a lists all, and --filter chooses by name, label or image"
HEALTH: Final = "nothing looks after a command's health: exec runs a check"

COMMANDS: Final = {
    **dict.fromkeys(("pull", "login", "logout", "search"), COPY),
    **dict.fromkeys(("images", "image", "rmi", "history"), FILES),
    **dict.fromkeys(("build", "buildx", "commit", "tag", "push", "save", "load", "import"), MADE),
    **dict.fromkeys(("start", "restart"), NO_RESTART),
    "create": "run -d makes a machine and starts it",
    "cp": "run -v shares a directory; exec -i NAME sh -c 'cat >FILE' <FILE copies a file",
    # Without what the kernel has there, of which some files have no end. busybox's tar has no
    # --one-file-system.
    "export": "microguest exec NAME sh -c 'cd / && tar -c $(ls -A | grep -vxE \"proc|sys|dev\")' "
    "writes out all files, where the image has tar",
    "inspect": "microguest ls -a --format json tells what there is to tell of machines",
    "top": "microguest exec NAME ps lists all that runs in a machine whose image has ps",
    "stats": "microguest exec NAME top shows what a machine whose image has top is busy with",
    "port": NO_PORTS,
    "network": ONE_NETWORK,
    "volume": SHARES,
    "container": "leave that word out, as in microguest ls",
    "system": "see microguest info and microguest doctor",
    "prune": "microguest rm removes what is left of machines that have ended",
    "events": "microguest logs -f and microguest wait follow one machine",
    "rename": "run --name gives a machine its name",
    "update": "what a machine has is said at its run",
    "list": "that is microguest ls",
    "compose": "each machine is run by itself",
}
OF_RUN: Final = {
    **dict.fromkeys(("-p", "--publish", "-P", "--publish-all", "--expose"), NO_PORTS),
    **dict.fromkeys(("--gpus", "--device", "--device-cgroup-rule"), NO_DEVICES),
    **dict.fromkeys(("--cpu-shares", "-c", "--cpu-quota", "--cpu-period", "--cpuset-cpus"), CPUS),
    **dict.fromkeys(("--pid", "--ipc", "--uts", "--userns", "--cgroupns"), PRIVATE),
    **dict.fromkeys(("--memory-swap", "--memory-reservation", "--memory-swappiness"), NO_SWAP),
    **dict.fromkeys(("--net", "--network-alias", "--ip", "--ip6", "--link"), ONE_NETWORK),
    "--mac-address": ONE_NETWORK,
    **dict.fromkeys(("--volumes-from", "--volume-driver"), SHARES),
    **dict.fromkeys(("--health-cmd", "--health-interval", "--health-timeout"), HEALTH),
    **dict.fromkeys(("--health-retries", "--health-start-period"), HEALTH),
    "--no-healthcheck": HEALTH,
    "--dns-opt": "that is --dns-option here",
    "--attach": "without -d stdout and stderr are attached, and with -i stdin is as well",
    "-a": "without -d stdout and stderr are attached, and with -i stdin is as well",
    "--pull": COPY,
    "--platform": "an image has to be for this host's architecture",
    "--runtime": "--machine says what runs an image: qemu, or namespaces",
    "--isolation": "--machine says what runs an image: qemu, or namespaces",
    "--log-driver": "microguest logs shows what a command of run -d has written",
    "--log-opt": "microguest logs shows what a command of run -d has written",
    "--sig-proxy": "signals are always passed on to the command",
    "--stop-timeout": "stop --time says how long a command has",
    "--storage-opt": "--upper-size says how much can be written to the root",
    "--domainname": "--hostname takes the whole name, as box.example.org",
    **dict.fromkeys(("--oom-score-adj", "--oom-kill-disable"), OWN_MEMORY),
    "--annotation": "--label is what a machine can be given to be found by",
    "--label-file": "--label takes one label, and may be given more than once",
}
OPTIONS: Final = {
    "run": OF_RUN,
    "attach": {"--sig-proxy": "--no-stdin passes on neither stdin nor signals"},
    "ps": {
        "-s": "no sizes are known",
        "--size": "no sizes are known",
        **dict.fromkeys(("-l", "--latest", "-n", "--last"), LATEST),
    },
    "stop": {
        "--timeout": "that is --time here",
        "-s": "run --stop-signal says which signal it is",
        "--signal": "run --stop-signal says which signal it is",
    },
    "exec": {"--privileged": "run --privileged says it of the machine"},
    "logs": {"--details": "microguest ls --format '{{.Labels}}' shows labels, ps what was run"},
    "rm": {
        "-l": "no machine is linked to another: " + ONE_NETWORK,
        "--link": "no machine is linked to another: " + ONE_NETWORK,
    },
}
SIGNAL: Final = re.compile(r"-([0-9]{1,2}|(SIG)?[A-Z][A-Z0-9]+([+-][0-9]+)?)")
MISSING: Final = {("kill", "ID"): "microguest stop -t 0 NAME ends a machine at once"}
NETWORKS: Final = "user is a network of the machine's own, with connections to the outside"


def about_command(word: str) -> str:
    """The sentence about a command of docker's; "" for any other word."""
    return COMMANDS.get(word, "")


def about_option(command: str, option: str) -> str:
    """The same about an option of one of our commands, as it was typed: -p80:80, --net=host."""
    words: Mapping[str, str] = OPTIONS.get(command, {})
    return words.get(option.partition("=")[0] if option.startswith("--") else option[:2], "")


def about_signal(command: str, word: str) -> str:
    """The same about a signal that is written as kill(1) has it: -9, -TERM."""
    match = SIGNAL.fullmatch(word) if command == "kill" else None
    return f"that is -s {match[1]} here, as in docker" if match else ""


def about_value(option: str) -> str:
    """The same about a value that an option of ours does not have."""
    return NETWORKS if option == "--network" else ""


def about_missing(command: str, argument: str) -> str:
    """The same about an argument that docker's command of that name does not want."""
    return MISSING.get((command, argument), "")
