"""The image's process as the boot config has it: docker's words, the image's defaults."""

import base64
import os
from collections.abc import Sequence
from typing import Final

from microguest.guest.boot.workload import (
    Capabilities,
    ImageDefaults,
    Workload,
    check_init,
    signal_number,
)
from microguest.guest.errors import OperationError
from microguest.guest.privileges import (
    CAPABILITIES,
    capability_mask,
    resource_limits,
    seccomp_program,
)
from microguest.guest.record import RecordError
from microguest.host_client.errors import MachineError
from microguest.host_client.images import ImageConfig, process_for
from microguest.host_client.machines.settings import Settings, restart_of
from microguest.host_client.seccomp import profile

__all__ = ["capabilities_of", "check_process", "check_workload", "defaults_of", "workload_of"]

ALL: Final = "all"
OF_THE_WORKLOAD: Final = (
    *("groups", "umask", "rlimits", "processes", "cap_add", "cap_drop", "no_new_privileges"),
    *("seccomp", "masked", "read_only_paths", "stop_signal", "restart"),
)


def check_workload(settings: Settings) -> None:
    """MachineError for what a process cannot have, or could have if there were one."""
    if settings.has_workload:
        capabilities_of(settings)
        rlimits_of(settings)
        return
    idle = Settings(image=settings.image)
    for name in OF_THE_WORKLOAD:
        value, default = getattr(settings, name), getattr(idle, name)
        if value != default and (value or default):  # an empty list is an empty tuple
            raise MachineError(
                f"{name}: this machine runs no command that it could be of: give one, or "
                "command=[] for the image's own"
            )


def check_process(settings: Settings, config: ImageConfig) -> None:
    """The same for what depends on the image, before the machine has a folder. ImageError, too."""
    try:
        workload = workload_of(settings, config, defaults_of(settings, config, ""))
        if workload is not None and settings.handoff:
            check_init(workload)
    except RecordError as error:
        raise MachineError(str(error)) from None


def workload_of(
    settings: Settings, config: ImageConfig, defaults: ImageDefaults
) -> Workload | None:
    """None where the machine idles. ImageError, MachineError, RecordError for what makes no sense.

    Its environment, user and directory are the machine's: `defaults_of`.
    """
    if not settings.has_workload:
        return None
    rows, columns = settings.terminal
    privileged = settings.privileged
    return Workload(
        argv=process_for(config, settings.command, settings.entrypoint),
        cwd=defaults.cwd,
        user=defaults.user,
        groups=tuple(settings.groups),
        stdio=settings.stdio,
        output_wait=settings.output_wait,
        rows=rows,
        columns=columns,
        umask=settings.umask,
        rlimits=rlimits_of(settings),
        processes=settings.processes,
        capabilities=capabilities_of(settings),
        no_new_privs=settings.no_new_privileges,
        seccomp="" if privileged else filter_of(settings),
        masked=() if privileged else tuple(settings.masked),
        read_only_paths=() if privileged else tuple(settings.read_only_paths),
        stop_signal=settings.stop_signal or _stop_signal_of(config),
        restart=restart_of(settings.restart),
    )


def defaults_of(settings: Settings, config: ImageConfig, hostname: str) -> ImageDefaults:
    """What was asked of `run` holds for every process of the machine, as in docker.

    MachineError where the image's environment makes no sense.
    """
    for item in config.env:
        if not item.partition("=")[0]:
            raise MachineError(f"the image's config has {item!r:.200} in Env, which has no name")
    env = dict(item.partition("=")[::2] for item in config.env)
    return ImageDefaults(
        env={"HOSTNAME": hostname, **env, **(settings.env or {})},
        cwd=settings.cwd if settings.cwd is not None else config.working_dir or "/",
        user=settings.user if settings.user is not None else config.user,
    )


def _stop_signal_of(config: ImageConfig) -> str:
    name = config.stop_signal or "TERM"
    try:
        signal_number(name)
    except RecordError:
        raise MachineError(
            f"the image's config has the StopSignal {name!r:.40}, which is no signal: give another "
            "(--stop-signal)"
        ) from None
    return name


def capabilities_of(settings: Settings) -> Capabilities | None:
    """As docker works them out, but that all capabilities are there to begin with.

    None leaves the sets alone: root has all of them, others none. MachineError for a name that
    is none.
    """
    added, dropped = _names("cap_add", settings.cap_add), _names("cap_drop", settings.cap_drop)
    if settings.privileged or not dropped:
        return None
    if ALL in added:
        kept = tuple(name for name in there_are(settings) if name not in dropped)
    elif ALL in dropped:
        kept = tuple(name for name in CAPABILITIES if name in added)
    else:
        kept = tuple(name for name in there_are(settings) if name not in dropped or name in added)
    # Those of a user but root are gone at execve(2), which looks at the bounding set only.
    return Capabilities(bounding=kept, permitted=kept, effective=kept)


def there_are(settings: Settings) -> tuple[str, ...]:
    """All of them, but where the machine is a part of this host and this host's user is root."""
    if settings.machine != "namespaces" or os.geteuid() != 0:
        return CAPABILITIES
    with open("/proc/self/status", encoding="ascii") as file:
        fields = dict(line.rstrip().partition(":\t")[::2] for line in file)
    ours = int(fields["CapPrm"], 16) & int(fields["CapBnd"], 16)
    return tuple(name for number, name in enumerate(CAPABILITIES) if ours >> number & 1)


def _names(option: str, given: Sequence[str]) -> tuple[str, ...]:
    """Small letters, without CAP_."""
    names = tuple(name.lower().removeprefix("cap_") for name in given)
    try:
        capability_mask(tuple(name for name in names if name != ALL))
    except OperationError as error:
        raise MachineError(f"{option}: {error.message}, or ALL") from None
    return names


def filter_of(settings: Settings) -> str:
    """The compiled program as base64, "" for none. MachineError for what cannot be kept."""
    program = settings.seccomp
    try:
        if isinstance(program, str):
            sets = capabilities_of(settings)
            kept = CAPABILITIES if sets is None else sets.bounding
            program = profile.profile(program, arch=os.uname().machine, capabilities=kept)
        text = base64.b64encode(program).decode("ascii")
        if text:
            seccomp_program(text)
    except OperationError as error:
        raise MachineError(error.message) from None
    except ValueError as error:
        raise MachineError(f"seccomp: {error}") from error
    return text


def rlimits_of(settings: Settings) -> dict[str, tuple[int, ...]]:
    """The resource limits by name. MachineError for what is none."""
    wanted: dict[str, tuple[int, ...]] = {
        name: (soft, hard) for name, (soft, hard) in settings.rlimits.items()
    }
    try:
        resource_limits(wanted)
    except OperationError as error:
        raise MachineError(error.message) from None
    return wanted
