"""The commands and their options; the words and flags are docker's where docker has them."""

import argparse
import importlib
from collections.abc import Callable
from typing import Any, Final

from microguest.guest import __version__, bounds
from microguest.host_client.cli.parser import Parser, add_list, add_switch, seconds, whole
from microguest.host_client.cli.runoptions import add_options
from microguest.host_client.cli.tell import say

__all__ = ["make_parser", "parse"]

DETACH_KEYS: Final = "ctrl-p,ctrl-q"  # docker's
IMAGE_FORMS: Final = (
    "oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:NAME] or dir:ROOTFS; "
    "@sha256:DIGEST behind all but the last"
)


def parse(argv: list[str]) -> argparse.Namespace:
    """The options of one command line; `run(options)` executes it."""
    return make_parser().parse_args(argv)


def make_parser() -> Parser:
    """Of the whole command line."""
    parser = Parser(
        prog="microguest", description="Run programs in virtual machines made of OCI images."
    )
    add_switch(parser, "-v", "--version", help="print the version")
    parser.set_defaults(run=_nothing(parser))
    commands = parser.add_subparsers(metavar="COMMAND", dest="subcommand", parser_class=Parser)
    for name, text, add, *how in COMMANDS:
        # docker's `run` has another -h.
        command = commands.add_parser(name, help=text, description=text, add_help=name != "run")
        add(command, *how)
    return parser


def _nothing(parser: Parser) -> Callable[[argparse.Namespace], int]:
    """Without a command: the version, or what commands there are."""

    def run(options: argparse.Namespace) -> int:
        if options.version:
            say(f"microguest {__version__}")
        else:
            parser.print_help()
        return 0

    return run


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_switch(parser, "--rm", help="keep neither state nor console after the end")
    add("--name", help="the machine's name (default: one is made up)")
    add(
        *("--machine",),
        default="qemu",
        choices=("qemu", "namespaces"),
        help="qemu (default), or namespaces: no VM, no isolation",
    )
    add("--help", action="help", help="show this and exit")
    add("-m", "--memory", default="512M", help="of the machine, with M or G (default 512M)")
    add("--cpus", type=whole("processors"), default=1, help="of the machine (default 1)")
    add("--kernel", help="boot this kernel instead of the bundle's")
    add("-h", "--hostname", help="of the machine (default: its name)")
    add_list(parser, "-l", "--label", metavar="KEY[=VALUE]", help="shown by ls, to filter by")
    add("--cidfile", metavar="FILE", help="write the machine's name there")
    add_switch(parser, "--init", help="nothing: PID 1 of every machine is an init")
    add("--entrypoint", help="program instead of the image's entrypoint; an empty one for none")
    add("--timeout", type=seconds, default=60.0, help="seconds from launch to ready (default 60)")
    add_switch(parser, "-d", "--detach", help="print the name and return")
    add_switch(parser, "-q", "--quiet", help="do not show how far a new image is")
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
    add_switch(parser, "-d", "--detach", help="print its id and return")
    parser.add_argument(
        "--drain",
        type=seconds,
        metavar="SECONDS",
        help="after its end, for output that others hold open "
        f"(default {bounds.STREAM_CAP_AFTER_EXIT:g}, or {bounds.STREAM_IDLE_AFTER_EXIT:g} idle)",
    )
    parser.add_argument("target", metavar="NAME", help="the machine's name")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="CMD")
    parser.set_defaults(run=_command("exec"))


def _add_shell(parser: argparse.ArgumentParser) -> None:
    _add_identity_options(parser)
    _add_kept_options(parser)
    parser.add_argument("target", metavar="NAME", help="the machine's name")
    parser.set_defaults(run=_command("exec", "shell"), drain=None)


def _add_attach(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_switch(parser, "--no-stdin", help="only watch: pass on neither stdin nor signals")
    add_switch(parser, "-a", "--all", help="of a terminal too, show what is retained first")
    _add_detach_keys(parser)
    add("target", metavar="NAME", help="the machine's name")
    add("process", metavar="ID", nargs="?", default="main", help="of a process (default: main)")
    parser.set_defaults(run=_command("processes", "attach"))


def _add_ps(parser: argparse.ArgumentParser) -> None:
    _add_listing(parser, "ids or names only")
    add = parser.add_argument
    add("target", metavar="NAME", nargs="?", help="the machine's name; without it, as ls")
    parser.set_defaults(run=_command("processes", "list_processes"))


def _add_listing(parser: argparse.ArgumentParser, quiet: str) -> None:
    add_switch(parser, "-a", "--all", help="also those that have ended")
    add_switch(parser, "-q", "--quiet", help=quiet)
    add_switch(parser, "--no-trunc", help="lines longer than the terminal is wide")
    parser.add_argument("--format", metavar="FORM", help="json, or [table] and a template")
    add_list(parser, "-f", "--filter", metavar="KEY=VALUE", help="only those, as status=running")


def _add_kill(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-s", "--signal", default="KILL", help="name or number (default KILL)")
    add("target", metavar="NAME", help="the machine's name")
    add("processes", nargs="+", metavar="ID", help="of a process, as ps shows it")
    parser.set_defaults(run=_command("processes", "kill"))


def _add_wait(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="NAME", help="the machine's name")
    parser.add_argument("processes", nargs="*", default=["main"], metavar="ID")
    parser.set_defaults(run=_command("processes", "wait"))


def _add_ls(parser: argparse.ArgumentParser) -> None:
    _add_listing(parser, "names only")
    parser.set_defaults(run=_command("machines", "list_machines"))


def _add_rm(parser: argparse.ArgumentParser) -> None:
    add_switch(parser, "-f", "--force", help="end those that run first")
    add_switch(parser, "-v", "--volumes", help="nothing: a machine has no volumes of its own")
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.set_defaults(run=_command("machines", "remove"))


def _add_about(parser: argparse.ArgumentParser, function: str) -> None:
    parser.add_argument("-f", "--format", metavar="FORM", help="json, or a template")
    parser.set_defaults(run=_command("about", function))


def _add_help(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("command", nargs="?", metavar="COMMAND")
    parser.set_defaults(run=_help)


def _help(options: argparse.Namespace) -> int:
    return parse([*([options.command] if options.command else []), "--help"]).run(options)  # type: ignore[no-any-return]


def _add_completion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh"))
    parser.set_defaults(run=_command("completion"))


def _add_stop(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        *("-t", "--time"),
        type=grace,
        default=bounds.STOP_GRACE,
        help=f"seconds between TERM and KILL (default {bounds.STOP_GRACE:g}; "
        f"-1: {bounds.STOP_GRACE_MAX:g}, the most there is)",
    )
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.set_defaults(run=_command("machines", "stop"))


def grace(text: str) -> float:
    """The type of the time that processes have to end. As docker's, a negative one has no end, but
    for ours."""
    found = seconds(text)
    if found > bounds.STOP_GRACE_MAX:
        raise argparse.ArgumentTypeError(
            f"{text!r:.40}: at most {bounds.STOP_GRACE_MAX:g} seconds, which -1 is, too"
        )
    return found if found >= 0 else bounds.STOP_GRACE_MAX


def _add_pause(parser: argparse.ArgumentParser, function: str) -> None:
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.set_defaults(run=_command("machines", function))


def _add_logs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_switch(parser, "-f", "--follow", help="until the machine ends")
    add("-n", "--tail", metavar="LINES", default="all", help="so many at the end (default all)")
    add(
        "--since",
        metavar="TIME",
        help="no lines from before: 10m for so long ago, a date, or seconds since 1970",
    )
    add("--until", metavar="TIME", help="no lines from after it")
    add_switch(parser, "-t", "--timestamps", help="before each line when it began")
    add("name", metavar="NAME")
    parser.set_defaults(run=_command("machines", "logs"))


def _add_boot_chart(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_switch(parser, "--json", help="the steps with their times instead of a picture")
    add("-o", "--output", metavar="FILE", help="write there (default: stdout)")
    add("name", metavar="NAME", help="of a machine that runs, or whose state is kept")
    parser.set_defaults(run=_command("boot_chart"))


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_command("doctor"))


def _add_process_options(parser: argparse.ArgumentParser) -> None:
    add_switch(parser, "-i", "--interactive", help="pass stdin on")
    add_switch(parser, "-t", "--tty", help="give the command a terminal")
    _add_identity_options(parser)


def _add_identity_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_list(parser, "-e", "--env", metavar="NAME[=VALUE]", help="an environment variable")
    add_list(parser, "--env-file", metavar="FILE", help="of lines NAME[=VALUE]")
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
        command = getattr(importlib.import_module(f"microguest.host_client.cli.{module}"), function)
        code: int = command(options)
        return code

    return run


# As `--help` lists them: name, what it does, what adds its options.
COMMANDS: Final[tuple[tuple[Any, ...], ...]] = (
    ("run", "start a machine from an image", _add_run),
    ("exec", "run a command in a machine", _add_exec),
    ("shell", "a shell in a machine, in this terminal", _add_shell),
    ("attach", "join a kept process of a machine", _add_attach),
    ("ps", "list the processes of a machine, or machines", _add_ps),
    ("kill", "send processes of a machine a signal", _add_kill),
    ("wait", "print the exit codes of processes", _add_wait),
    ("ls", "list machines", _add_ls),
    ("stop", "end machines", _add_stop),
    ("rm", "remove what is left of machines that have ended", _add_rm),
    ("pause", "let machines stand still", _add_pause, "pause"),
    ("unpause", "let machines go on, and set their clocks", _add_pause, "unpause"),
    ("logs", "show a machine's console", _add_logs),
    ("boot-chart", "where a boot's time went, as SVG", _add_boot_chart),
    ("doctor", "what this host has and what will be used", _add_doctor),
    ("info", "what is installed here, and how many machines there are", _add_about, "info"),
    ("version", "the versions of this program and of the guest", _add_about, "version"),
    ("help", "about a command", _add_help),
    ("completion", "what a shell reads to complete this program's words", _add_completion),
)
