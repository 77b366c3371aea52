"""The commands and their options; the words and flags are docker's where docker has them."""

import argparse
import importlib
from collections.abc import Callable
from typing import Final, NoReturn

from guest import __version__, limits
from host_client.cli.runoptions import add_options
from host_client.cli.tell import complain, say

__all__ = ["Parser", "parse"]

DETACH_KEYS: Final = "ctrl-p,ctrl-q"  # docker's
IMAGE_FORMS: Final = (
    "oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:NAME] or dir:ROOTFS; "
    "@sha256:DIGEST behind all but the last"
)


class Parser(argparse.ArgumentParser):
    """Wrong usage is an error of ours: exit code 125 and one line, as docker does."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where the help is."""
        complain(f"{message}: see {self.prog} --help", self.prog)
        raise SystemExit(125)

    def _print_message(self, message: str, file: object = None) -> None:
        """argparse's own writes to a stream that may be closed, and hides that it is full."""
        for line in message.splitlines():
            say(line)


def parse(argv: list[str]) -> argparse.Namespace:
    """The options of one command line; `run(options)` executes it."""
    parser = Parser(
        prog="microguest", description="Run programs in virtual machines made of OCI images."
    )
    parser.add_argument("--version", action="version", version=f"microguest {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    _add_run(commands.add_parser("run", help="start a machine from an image"))
    _add_exec(commands.add_parser("exec", help="run a command in a machine"))
    _add_shell(commands.add_parser("shell", help="a shell in a machine, in this terminal"))
    _add_attach(commands.add_parser("attach", help="join a kept process of a machine"))
    _add_ps(commands.add_parser("ps", help="list the processes of a machine"))
    _add_kill(commands.add_parser("kill", help="send processes of a machine a signal"))
    _add_wait(commands.add_parser("wait", help="print the exit codes of processes"))
    _add_ls(commands.add_parser("ls", help="list machines"))
    _add_stop(commands.add_parser("stop", help="end machines"))
    _add_pause(commands.add_parser("pause", help="let machines stand still"), "pause")
    _add_pause(
        commands.add_parser("unpause", help="let machines go on, and set their clocks"), "unpause"
    )
    _add_logs(commands.add_parser("logs", help="show a machine's console"))
    _add_boot_chart(commands.add_parser("boot-chart", help="where a boot's time went, as SVG"))
    _add_doctor(commands.add_parser("doctor", help="what this host has and what will be used"))
    return parser.parse_args(argv)


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--rm", action="store_true", help="keep neither state nor console after the end")
    add("--name", help="the machine's name (default: one is made up)")
    add("--machine", default="qemu", help="qemu (default), or namespaces: no VM, no isolation")
    add("--memory", default="512M", help="of the machine, with M or G (default 512M)")
    add("--cpus", type=int, default=1, help="of the machine (default 1)")
    add("--kernel", help="boot this kernel instead of the bundle's")
    add("--hostname", help="of the machine (default: its name)")
    add("--entrypoint", help="program instead of the image's entrypoint; an empty one for none")
    add("--timeout", type=float, default=60.0, help="seconds from launch to ready (default 60)")
    add("-d", "--detach", action="store_true", help="print the name and return")
    add("-q", "--quiet", action="store_true", help="do not show how far a new image is")
    _add_process_options(parser)
    _add_detach_keys(parser)
    add_options(parser)
    add("image", metavar="IMAGE", help=IMAGE_FORMS)
    command = add("command", nargs=argparse.REMAINDER, metavar="CMD", help="instead of the image's")
    command.required = False  # not a word that is missing where IMAGE is
    parser.set_defaults(run=_command("run"))


def _add_exec(parser: argparse.ArgumentParser) -> None:
    _add_process_options(parser)
    _add_kept_options(parser)
    parser.add_argument("-d", "--detach", action="store_true", help="print its id and return")
    parser.add_argument(
        "--drain",
        type=float,
        metavar="SECONDS",
        help="after its end, for output that others hold open "
        f"(default {limits.STREAM_CAP_AFTER_EXIT:g}, or {limits.STREAM_IDLE_AFTER_EXIT:g} idle)",
    )
    parser.add_argument("target", metavar="TARGET", help="the machine's name")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="CMD")
    parser.set_defaults(run=_command("exec"))


def _add_shell(parser: argparse.ArgumentParser) -> None:
    _add_identity_options(parser)
    _add_kept_options(parser)
    parser.add_argument("target", metavar="TARGET", help="the machine's name")
    parser.set_defaults(run=_command("exec", "shell"), drain=None)


def _add_attach(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--no-stdin", action="store_true", help="only watch: pass on neither stdin nor signals")
    add("-a", "--all", action="store_true", help="of a terminal too, show what is retained first")
    _add_detach_keys(parser)
    add("target", metavar="TARGET", help="the machine's name")
    add("process", metavar="ID", nargs="?", default="main", help="of a process (default: main)")
    parser.set_defaults(run=_command("processes", "attach"))


def _add_ps(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-a", "--all", action="store_true", help="also those that have ended")
    add("-q", "--quiet", action="store_true", help="ids only")
    add("--no-trunc", action="store_true", help="lines longer than the terminal is wide")
    add("target", metavar="TARGET", help="the machine's name")
    parser.set_defaults(run=_command("processes", "list_processes"))


def _add_kill(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-s", "--signal", default="KILL", help="name or number (default KILL)")
    add("target", metavar="TARGET", help="the machine's name")
    add("processes", nargs="+", metavar="ID", help="of a process, as ps shows it")
    parser.set_defaults(run=_command("processes", "kill"))


def _add_wait(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", help="the machine's name")
    parser.add_argument("processes", nargs="*", default=["main"], metavar="ID")
    parser.set_defaults(run=_command("processes", "wait"))


def _add_ls(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-a", "--all", action="store_true", help="also those that have ended")
    add("-q", "--quiet", action="store_true", help="names only")
    add("--no-trunc", action="store_true", help="lines longer than the terminal is wide")
    parser.set_defaults(run=_command("machines", "list_machines"))


def _add_stop(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        *("-t", "--time"),
        type=float,
        default=limits.STOP_GRACE,
        help=f"seconds between TERM and KILL (default {limits.STOP_GRACE:g})",
    )
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.set_defaults(run=_command("machines", "stop"))


def _add_pause(parser: argparse.ArgumentParser, function: str) -> None:
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.set_defaults(run=_command("machines", function))


def _add_logs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--follow", action="store_true", help="until the machine ends")
    parser.add_argument("name", metavar="NAME")
    parser.set_defaults(run=_command("machines", "logs"))


def _add_boot_chart(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--json", action="store_true", help="the steps with their times instead of a picture")
    add("-o", "--output", metavar="FILE", help="write there (default: stdout)")
    add("name", metavar="NAME", help="of a machine that runs, or whose state is kept")
    parser.set_defaults(run=_command("boot_chart"))


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_command("doctor"))


def _add_process_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-i", "--interactive", action="store_true", help="pass stdin on")
    add("-t", "--tty", action="store_true", help="give the command a terminal")
    _add_identity_options(parser)


def _add_identity_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-e", "--env", action="append", default=[], metavar="NAME[=VALUE]", help="set it")
    add("--env-file", action="append", default=[], metavar="FILE", help="of lines NAME[=VALUE]")
    add("-u", "--user", help="name, uid, name:group or uid:gid")
    add("-w", "--workdir", metavar="DIR", help="working directory")


def _add_kept_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--label", default="", help="shown by ps")
    _add_detach_keys(parser)


def _add_detach_keys(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--detach-keys",
        metavar="KEYS",
        default=DETACH_KEYS,
        help=f"leave a terminal with these (default {DETACH_KEYS}); empty for none",
    )


def _command(module: str, function: str = "main") -> Callable[[argparse.Namespace], int]:
    """The function of a command's module, imported when it is called."""

    def run(options: argparse.Namespace) -> int:
        command = getattr(importlib.import_module(f"host_client.cli.{module}"), function)
        code: int = command(options)
        return code

    return run
