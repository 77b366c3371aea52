"""PID 1: `bootstrap` reads like the boot, `supervise` is the machine's life, `run` never returns.

Standard library only, and little of it: what is imported here is paid for before the listener is
open, and it stays in memory for as long as the machine lives. A test pins the list.
"""

import os

from microguest.guest.boot import config as bootconfig
from microguest.guest.boot.config import BootConfig
from microguest.guest.errors import BootConfigError, raised_at
from microguest.init_shim import mounts
from microguest.init_shim.failure import Failure, call
from microguest.init_shim.hardening import modules, profile
from microguest.init_shim.life import power, protection, server_limits
from microguest.init_shim.life.agent_child import AgentProcess
from microguest.init_shim.life.supervisor import Supervisor, await_agent
from microguest.init_shim.life.workload import WorkloadNotStarted, start_workload
from microguest.init_shim.life.workload_cgroup import Most
from microguest.init_shim.life.workload_lives import MainProcess, failed_start
from microguest.init_shim.listener import open_listener
from microguest.init_shim.network import configuring
from microguest.init_shim.reporter import Reporter, announcement, failed_boot, mark_lines, say
from microguest.init_shim.root import assembling, volumes
from microguest.init_shim.signals import Signals
from microguest.init_shim.timeline import Timeline

TYPE_CHECKING = False  # typing itself is too heavy for PID 1
if TYPE_CHECKING:
    from typing import NoReturn

    from microguest.init_shim.life.leftovers import Leftovers

__all__ = ["run"]


def run() -> "NoReturn":
    """Boot, supervise, power off. Whatever goes wrong on the way ends in the power-off too."""
    try:
        supervisor = Supervisor(Signals(), Reporter())
        live(supervisor, Timeline())
        power.end_machine(supervisor)
    except BaseException as error:  # noqa: BLE001  PID 1 may not die: the kernel would panic
        say(f"PID 1 failed: {raised_at(error)}")
    finally:
        power.switch_off()


def live(supervisor: Supervisor, timeline: Timeline) -> None:
    """The machine's life; `supervisor` knows afterwards what it ended with."""
    try:
        bootstrap(supervisor, timeline)
        supervisor.run(lambda: False)
    except WorkloadNotStarted as error:
        supervisor.reporter.send(failed_start(error))
        supervisor.fail("workload-failed")
    except BaseException as error:  # noqa: BLE001  see run()
        supervisor.reporter.send(failed_boot(error, timeline))
        supervisor.fail("boot-failed")
    finally:
        supervisor.signals.end_deadline()


def bootstrap(supervisor: Supervisor, timeline: Timeline) -> None:
    """From the kernel's hands to a running workload. The steps' names are in docs/design/boot.md.

    Raises Failure, or WorkloadNotStarted. The agent is started before the root is assembled: it
    imports while PID 1 goes on, and the workload does not wait for it.
    """
    step, signals, reporter = timeline.step, supervisor.signals, supervisor.reporter
    signals.start_deadline()
    with step("api-mounts"):
        settle()
    with step("config"):
        config = take_config()
        mark_lines(config.agent.token)
        reporter.endpoint = config.report
        profile.forbid_core_dumps(config)
    with step("modules"):
        if config.machine == "vm" and config.modules:
            modules.load_modules()
    with step("listener"):
        listener = open_listener(config.agent.listen)
    with step("report"):
        reporter.connect()
    with step("agent-start"):
        agent = supervisor.agent = AgentProcess(config, listener)
        if config.mode == "supervise":  # otherwise its parent is not to be this process
            agent.start()
            protection.watch_oom(config, supervisor, reporter)
    with step("root-lower"):
        assembling.mount_lowers(config.root)
    with step("root-upper"):
        leftovers = prepare_writes(config)
    with step("root-overlay"):
        assembling.mount_root(config.root, keep_run=config.mode == "supervise")
    with step("volumes"):
        volumes.mount_volumes(config.root, config.volumes)
    with step("switch-root"):
        new_root = assembling.switch_root(config.root, config.volumes)
    with step("network"):
        configuring.configure(config, signals)
    with step("hardening"):
        profile.harden(config)
        assembling.make_read_only(config.root)
        hide_paths(config)  # which may write-protect what hardening writes to
        agent.root_ready(new_root)  # nothing of the image runs before this
    if config.mode == "handoff":
        hand_off(config, supervisor, agent, timeline)
        return
    with step("workload"):
        refusal = start_main(config, supervisor, leftovers)
    with step("agent-ready"):
        await_agent(supervisor, agent)
    if agent.ready:
        reporter.send(announcement(config, timeline))
    if refusal is not None:
        raise refusal
    signals.end_deadline()


def settle() -> None:
    """What PID 1 is to have and to be before it knows anything about its machine."""
    own_session()
    mounts.mount_api()
    power.prepare()
    server_limits.raise_limits()
    protection.unkillable()


def own_session() -> None:
    """PID 1 of the namespaces launcher must not get what a person types at its terminal."""
    try:
        os.setsid()
    except PermissionError:
        pass  # it leads a session already


def take_config() -> BootConfig:
    """Read the boot config and remove it: it has the token. Raises Failure."""
    with call("open", bootconfig.PATH, hint="the host appends it to the initramfs"):
        with open(bootconfig.PATH, "rb", buffering=0) as file:
            text = file.read(bootconfig.CONFIG_SIZE + 1) or b""
        os.unlink(bootconfig.PATH)
    try:
        return bootconfig.parse(text)
    except BootConfigError as error:
        raise Failure(str(error), path=bootconfig.PATH) from None


def hand_off(
    config: BootConfig, supervisor: Supervisor, agent: AgentProcess, timeline: Timeline
) -> None:
    """Become the image's own init. Returns only where PID 1 was told to end before it had."""
    from microguest.init_shim.life.handoff import hand_off

    hand_off(config, agent, supervisor.reporter, supervisor.signals, timeline)
    supervisor.status = "shutdown"


def hide_paths(config: BootConfig) -> None:
    """What nobody shall see or change, processes of hosts included. Raises Failure."""
    workload = config.workload
    if workload is not None and (workload.masked or workload.read_only_paths):
        from microguest.init_shim.hardening import masks  # few images ask for it

        masks.hide(workload.masked, workload.read_only_paths)


def prepare_writes(config: BootConfig) -> "Leftovers | None":
    """What takes all writes, and what clears IPC away between the workload's lives. Raises Failure.

    None where it has only one life.
    """
    sizes = assembling.mount_upper(config)
    if config.machine == "vm":
        from microguest.init_shim.hardening import ipc_bounds  # nobody waits for it before

        ipc_bounds.bound(sizes.segments)
    if config.workload is None or config.workload.restart.policy == "never":
        return None
    from microguest.init_shim.life import leftovers  # not before the listener is open

    return leftovers.Leftovers()


def start_main(
    config: BootConfig, supervisor: Supervisor, leftovers: "Leftovers | None"
) -> WorkloadNotStarted | None:
    """Start the workload, if there is one and nobody has asked for the end already.

    Returns why it could not be started; the host is told when it knows that the machine is up.
    """
    if supervisor.signals.stop_requested:
        supervisor.status = "shutdown"
    workload = config.workload
    if workload is None or supervisor.status:
        return None
    try:
        memory = protection.memory_for_workload(agent_pid(supervisor))
        most = Most(memory, protection.processes_for_workload())

        def clear() -> None:
            if leftovers is not None:
                leftovers.clear(agent_pid(supervisor))

        supervisor.begin(
            MainProcess(workload, lambda: start_workload(workload, config.image, most, clear))
        )
    except WorkloadNotStarted as error:
        return error
    return None


def agent_pid(supervisor: Supervisor) -> int:
    """0 where there is none now."""
    return supervisor.agent.pid if supervisor.agent else 0
