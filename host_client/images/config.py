"""What an image says about the process that runs in it, and which process that is."""

from collections.abc import Sequence
from dataclasses import dataclass

from microguest.host_client.errors import ImageError


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """The `config` object of an OCI image (image spec, config.md). Empty where it says nothing.

    env: NAME=VALUE strings in order.  working_dir: "" means "/".  user: "", "name", "uid",
    "user:group".  exposed_ports: as "8080/tcp".  volumes: paths.  stop_signal: "" means SIGTERM.
    labels: (key, value) pairs, sorted by key.
    """

    env: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    working_dir: str = ""
    user: str = ""
    exposed_ports: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()
    stop_signal: str = ""
    labels: tuple[tuple[str, str], ...] = ()


def process_for(
    config: ImageConfig,
    command: Sequence[str] | None = None,
    entrypoint: Sequence[str] | None = None,
) -> tuple[str, ...]:
    """The argv to run, by docker's rules; ImageError when nothing is left to run.

    `command` replaces the image's Cmd (None or empty: it stays) and is appended to the entrypoint.
    `entrypoint` replaces the image's and drops its Cmd, as `docker run --entrypoint` does; an empty
    one or [""] means none at all.
    """
    if isinstance(command, str) or isinstance(entrypoint, str):
        raise ImageError("command and entrypoint are lists of words, not one string")
    if entrypoint is None:
        argv = (*config.entrypoint, *(command or config.cmd))
    else:
        given = () if tuple(entrypoint) == ("",) else tuple(entrypoint)
        argv = (*given, *(command or ()))
    if not argv:
        raise ImageError("image has no Entrypoint or Cmd and no command was given: name a command")
    if not argv[0]:
        raise ImageError("the command's first word is empty: name a program")
    for word in argv:
        if "\0" in word:
            raise ImageError(f"command has a NUL byte in the word {word!r}")
    return argv
