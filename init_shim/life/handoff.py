"""Mode handoff: PID 1 becomes the image's own init, and finds nothing of its life before.

Imported in that mode only. The child that stays behind for the host is `init_shim.life.keeper`.
"""

import os

import _guestsys

from microguest.guest import launch
from microguest.guest.boot.config import BootConfig
from microguest.guest.boot.workload import Workload
from microguest.init_shim.life import keeper, workload
from microguest.init_shim.life.agent_child import AgentProcess
from microguest.init_shim.life.workload import WorkloadNotStarted
from microguest.init_shim.reporter import Reporter, announcement
from microguest.init_shim.signals import Signals
from microguest.init_shim.timeline import Timeline

TYPE_CHECKING = False  # typing itself is too heavy for PID 1
if TYPE_CHECKING:
    from typing import NoReturn

__all__ = ["hand_off"]

ROOT_CGROUP = "/sys/fs/cgroup/cgroup.procs"
GO_ON = (FileNotFoundError, NotADirectoryError, PermissionError)  # to the next path, as execvp(3)


def hand_off(
    config: BootConfig,
    agent: AgentProcess,
    reporter: Reporter,
    signals: Signals,
    timeline: Timeline,
) -> None:
    """Fork the keeper, wait until the agent serves, announce it, and become the image's init.

    Returns only where PID 1 was told meanwhile to end. Raises Failure, or WorkloadNotStarted; the
    keeper then leaves everything to PID 1.
    """
    assert config.workload is not None  # the contract's
    with timeline.step("keeper"):
        kept = keeper.start(config, agent, reporter, timeline)
    with timeline.step("agent-ready"):
        if not kept.await_agent(signals):
            return
    reporter.send(announcement(config, timeline))
    signals.end_deadline()
    try:
        become_init(config.workload, config)
    except BaseException:
        kept.call_off()
        raise


def become_init(wanted: Workload, config: BootConfig) -> "NoReturn":
    """execve(2) in PID 1. Raises WorkloadNotStarted; what was undone by then nobody misses."""
    plan = workload.make_plan(wanted.replace(cwd="/"), config.image)
    if plan.identity.uid != 0:
        raise WorkloadNotStarted(
            "bad_user", f"user {wanted.user!r:.100}: an init has to be root; leave the user out"
        )
    leave_nothing(wanted.umask)
    env = dict(entry.partition(b"=")[::2] for entry in plan.env)
    refused: OSError | None = None
    for path in plan.candidates:
        try:
            os.execve(path, plan.argv, env)  # noqa: S606
        except GO_ON as error:
            if not isinstance(refused, PermissionError):
                refused = error
        except OSError as error:
            refused = error
            break
    raise not_executed(plan, refused)


def leave_nothing(umask: int) -> None:
    """Undo what PID 1 has set for itself and execve(2) would hand on.

    All descriptors but the console are close-on-exec; an alarm is not among what is left to undo.
    """
    os.chdir("/")
    os.umask(umask)
    # The kernel never kills PID 1, but what the init starts inherits this; and an init below a
    # cgroup of somebody else takes that for the whole hierarchy.
    for path, value in (("/proc/self/oom_score_adj", "0"), (ROOT_CGROUP, "0")):
        try:
            with open(path, "w", encoding="ascii") as file:
                file.write(value)
        except OSError:
            pass  # namespaces without the right to it
    keep_only_console()
    _guestsys.reset_signals()


def keep_only_console() -> None:
    """Close-on-exec for whatever is not the console, wherever it came from."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            try:
                os.set_inheritable(int(name), False)
            except OSError:
                pass  # the one that listed them


def not_executed(plan: launch.Plan, error: OSError | None) -> WorkloadNotStarted:
    """Why none of the candidates runs."""
    number = (error.errno if error is not None else None) or 2
    code, message, _ = launch.start_failure(
        "exec",
        number,
        os.fsdecode(plan.argv[0]),
        "/",
        program_exists=any(os.path.exists(path) for path in plan.program_paths()),
    )
    return WorkloadNotStarted(code, message, step="exec", errno=number)
